"""Parameters side by side: the same run as one by one, eagerly and compiled."""

import pytest
import torch
from rule_toys import port_hamiltonian
from torch import nn

from odeopt.meta import (
    Backpropagation,
    DampedBackpropagation,
    EvolutionStrategies,
    Hybrid,
    MetaConfig,
    meta_train,
    unroll,
)
from odeopt.meta.layouts import CompiledSteps, Packed, Separate, layout_for
from odeopt.rules import AdamUpdate, HamiltonianUpdate, LSTMUpdate
from odeopt.tasks import MLPClassification, RandomQuadratic, load_dataset

f64 = torch.float64
# torch's compiler imports what torch deprecates, and looks for the .grad of tensors that have none
compiles = pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning", "ignore:The .grad attribute")


def networks(**options):
    # 65-300-10: rows of which some are full, and biases of less than one
    return MLPClassification(load_dataset("digits"), (30,), batch_size=16, dtype=f64, **options)


def one_by_one(monkeypatch):
    module = __import__("odeopt.meta.unroll", fromlist=["layout_for"])
    monkeypatch.setattr(module, "layout_for", lambda rule, shapes, like, tables: Separate(shapes))


def gradient(rule, task, **options):
    rule.zero_grad()
    run = unroll(rule, task, indices=torch.arange(3), n_steps=6, total_steps=6, **options)
    run.losses.log().mean().backward()
    return run, nn.utils.parameters_to_vector([weight.grad for weight in rule.parameters()])


@pytest.mark.parametrize("variant", ["default", "coordinatewise", "progress", "mass", "friction"])
@pytest.mark.parametrize("options", [{}, {"detach": True}, {"checkpoint_every": 4}], ids=str)
def test_side_by_side_is_the_run_of_each_parameter_by_itself(variant, options, monkeypatch):
    rule, task = port_hamiltonian(variant), networks()
    found, found_gradient = gradient(rule, task, **options)
    one_by_one(monkeypatch)
    wanted, wanted_gradient = gradient(rule, task, **options)
    # float64: sums in another order, grown over six steps
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found_gradient, wanted_gradient, rtol=1e-7, atol=1e-9)
    for name, param in wanted.params.items():
        torch.testing.assert_close(found.params[name], param, rtol=1e-9, atol=1e-10)
        for ours, theirs in zip(found.states[name], wanted.states[name], strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


def test_run_continued_from_its_states_is_the_whole_run():
    rule, task, indices = port_hamiltonian(), networks(), torch.arange(2)
    with torch.no_grad():
        whole = unroll(rule, task, indices=indices, n_steps=7)
        first = unroll(rule, task, indices=indices, n_steps=3)
        rest = unroll(
            rule, task, indices=indices, n_steps=4, start=3, params=first.params, states=first.states
        )  # fmt: skip
    assert torch.equal(whole.losses[3:], rest.losses)


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (port_hamiltonian(), Packed),
        (port_hamiltonian("potential"), Separate),  # it would move what pads the rows
        (port_hamiltonian(solver="dopri5"), Separate),  # it chooses one step size for all coordinates
        (LSTMUpdate(), Separate),
        (AdamUpdate(), Separate),
        (HamiltonianUpdate(normalize=True), Separate),
    ],
    ids=lambda x: type(x).__name__ if not isinstance(x, type) else x.__name__,
)
def test_only_staged_rules_lie_side_by_side(rule, expected):
    like = torch.zeros(2, 3, dtype=f64)
    assert type(layout_for(rule, {"a": torch.Size((2, 3)), "b": torch.Size((2, 1))}, like)) is expected
    assert type(layout_for(rule, {"a": torch.Size((2, 3))}, like)) is Separate
    assert type(layout_for(rule, {"a": torch.Size((2, 3)), "b": torch.Size((2, 0))}, like)) is Separate


def test_number_of_rule_calls_does_not_grow_with_the_number_of_parameters():
    rule, calls = port_hamiltonian(), []
    rule.coefficient_network.register_forward_hook(lambda _, inputs, output: calls.append(tuple(output.shape)))
    with torch.no_grad():
        unroll(rule, networks(), indices=torch.arange(3), n_steps=2)
    assert calls == [(3, 4, 13)] * 2


@compiles
def test_compiled_steps_give_the_gradient_and_train():
    rule, task = port_hamiltonian(), networks()
    wanted, wanted_gradient = gradient(rule, task)
    compiled = CompiledSteps(rule)
    rule.zero_grad()
    run = unroll(compiled, task, indices=torch.arange(3), n_steps=6, total_steps=6)
    run.losses.log().mean().backward()
    found = nn.utils.parameters_to_vector([weight.grad for weight in rule.parameters()])
    torch.testing.assert_close(run.losses, wanted.losses, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found, wanted_gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("estimator", [Backpropagation(), DampedBackpropagation(threshold=1e9)], ids=str)
def test_meta_training_takes_the_compiled_steps(estimator, monkeypatch):
    seen = []
    # what compiling does is tested above and takes half a minute
    monkeypatch.setattr(
        torch, "compile", lambda function, **_: lambda *args, **options: seen.append(1) or function(*args, **options)
    )
    config = MetaConfig(n_meta_steps=3, n_tasks=4, horizon=4, n_validation_tasks=2, estimator=estimator)
    losses = []
    for compile in (False, True):
        result = meta_train(
            port_hamiltonian(), RandomQuadratic(3, dtype=f64), config, progress_bar=False, compile=compile
        )
        losses.append(torch.tensor(result.meta_losses))
        assert len(seen) == compile * config.n_meta_steps * config.horizon
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-7, atol=1e-9)
    assert list(CompiledSteps(rule := port_hamiltonian()).parameters()) == list(rule.parameters())


@pytest.mark.parametrize("estimator", [EvolutionStrategies(), Hybrid()], ids=str)
def test_steps_are_not_compiled_where_weights_are_perturbed(estimator):
    config = MetaConfig(n_meta_steps=1, estimator=estimator)
    with pytest.raises(ValueError, match=r"`compile` should be False where `estimator = .*Found `compile = True`"):
        meta_train(port_hamiltonian(), RandomQuadratic(), config, compile=True, progress_bar=False)


def test_steps_of_a_rule_without_stages_are_not_compiled():
    with pytest.raises(ValueError, match=r"`rule` should be a staged rule.* Found `rule = 'LSTMUpdate'`"):
        meta_train(LSTMUpdate(), RandomQuadratic(), MetaConfig(n_meta_steps=1), compile=True, progress_bar=False)


def test_rule_with_networks_of_positions_is_not_compiled():
    with pytest.raises(ValueError, match="`rule` should be one without networks of positions"):
        CompiledSteps(port_hamiltonian(mass="network"))


def test_steps_are_taken_as_they_are_where_nothing_compiles(monkeypatch):
    def compile_fails(function, **options):
        def fails(*args, **options):
            raise torch._dynamo.exc.Unsupported("no compiler here")

        return fails

    monkeypatch.setattr(torch, "compile", compile_fails)
    rule, task = port_hamiltonian().double(), RandomQuadratic(3, dtype=torch.float64)
    compiled = CompiledSteps(rule)
    options = {"task": task, "indices": torch.arange(2), "n_steps": 3}
    with pytest.warns(RuntimeWarning, match="PortHamiltonianUpdate could not be compiled.*no compiler here"):
        losses = unroll(compiled, **options).losses
    # side by side with one tensor is not what the plain run does, so rounding may differ
    torch.testing.assert_close(losses, unroll(rule, **options).losses, rtol=1e-12, atol=0)
