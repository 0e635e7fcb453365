"""Backpropagation in bounded memory: the same gradient, from the boundaries of segments."""

import weakref
from typing import NamedTuple

import pytest
import torch
from rule_toys import RULES, draws, port_hamiltonian
from torch import Tensor, nn

from odeopt.meta import Backpropagation, DampedBackpropagation, Hybrid, MetaObjective, unroll
from odeopt.rules import SGDUpdate, UpdateRule
from odeopt.tasks import ModuleTask, RandomQuadratic

f64 = torch.float64
INDICES = torch.tensor([3, 0, 11])
HORIZON = 7
# rounding only: sums of the same products in another order
SAME = {"rtol": 1e-9, "atol": 1e-12}


class Counted(RandomQuadratic):
    """Quadratics that count how often they are evaluated."""

    def __init__(self):
        super().__init__(4, dtype=f64)
        self.n_evaluations = 0

    def loss(self, params, batch):
        self.n_evaluations += 1
        return super().loss(params, batch)


def network_task():
    def network():
        return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(f64)

    data = (draws(12, 3), draws(12, 2, seed=1))
    return ModuleTask(network, data, loss_fn=nn.functional.mse_loss, batch_size=5)


def gradients(rule, task, *, horizon=HORIZON, **options):
    """Every meta-loss and meta-gradient that the estimator hands out, in one vector."""
    estimator, got = Backpropagation(**options), []
    for loss in estimator.gradients(rule, task, MetaObjective(), indices=INDICES, horizon=horizon, seed=1):
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in rule.parameters()]
        got += [loss.view(1), *(g.flatten() for g in grads)]
        rule.zero_grad()
    return torch.cat(got)


LEARNED = [name for name in RULES if name.startswith(("port-hamiltonian", "lstm", "hamiltonian"))]


@pytest.mark.parametrize("detach", [False, True], ids=["exact", "detach"])
@pytest.mark.parametrize("name", LEARNED)
def test_checkpointed_gradient_is_the_gradient(name, detach):
    rule, task = RULES[name](), network_task()
    expected = gradients(rule, task, detach=detach)
    assert expected[1:].abs().max() > 1e-6
    torch.testing.assert_close(gradients(rule, task, detach=detach, checkpoint_every=3), expected, **SAME)


@pytest.mark.parametrize("options", [{}, {"detach": True}, {"truncation": 4}], ids=str)
@pytest.mark.parametrize("checkpoint", [1, 2, 3, HORIZON, HORIZON + 5])
def test_any_length_of_segment_gives_the_same_gradient(checkpoint, options):
    # lengths that divide neither the horizon nor the truncation, and longer ones, among them
    rule = port_hamiltonian(uses_progress=True)
    expected = gradients(rule, network_task(), **options)
    torch.testing.assert_close(
        gradients(rule, network_task(), checkpoint_every=checkpoint, **options), expected, **SAME
    )


class OddState(NamedTuple):
    """A momentum, a count in integers, a switch, and a field that nothing learned has touched."""

    momentum: Tensor
    step: Tensor
    is_even: Tensor
    first: Tensor


class OddUpdate(UpdateRule):
    """Momentum that remembers its first gradient, and every second step takes half a step."""

    def __init__(self):
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([-0.02, 0.9], dtype=f64))

    def init_state(self, param):
        step = torch.zeros(*param.shape[:-1], 1, dtype=torch.int64)
        return OddState(torch.zeros_like(param), step, step == 0, torch.zeros_like(param))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        momentum = self.weights[1] * state.momentum + grad
        first = torch.where(state.step == 0, grad, state.first)
        update = self.weights[0] * (momentum + 0.1 * first) * torch.where(state.is_even, 1.0, 0.5)
        return update, OddState(momentum, state.step + 1, ~state.is_even, first)


@pytest.mark.parametrize("detach", [False, True], ids=["exact", "detach"])
def test_integers_and_truth_values_pass_through_a_boundary(detach):
    rule, task = OddUpdate(), RandomQuadratic(4, dtype=f64)
    expected = gradients(rule, task, detach=detach)
    torch.testing.assert_close(gradients(rule, task, detach=detach, checkpoint_every=2), expected, **SAME)
    run = unroll(rule, task, indices=INDICES, n_steps=5, checkpoint_every=2)
    state = run.states["theta"]
    assert type(state) is OddState
    assert torch.equal(state.step, torch.full((3, 1), 5))
    assert torch.equal(state.is_even, torch.full((3, 1), False))


@pytest.mark.parametrize("checkpoint", [1, 3, 50])
def test_checkpointed_run_is_the_run(checkpoint):
    rule, task = port_hamiltonian("everything"), network_task()
    run = {"indices": INDICES, "n_steps": HORIZON, "total_steps": HORIZON + 1}
    expected, got = unroll(rule, task, **run), unroll(rule, task, checkpoint_every=checkpoint, **run)
    assert got.losses.requires_grad
    assert torch.equal(got.losses, expected.losses)
    for name, value in expected.params.items():
        assert torch.equal(got.params[name], value)
        assert all(torch.equal(a, b) for a, b in zip(got.states[name], expected.states[name], strict=True))
    with torch.no_grad():
        assert not unroll(rule, task, checkpoint_every=checkpoint, **run).losses.requires_grad


@pytest.mark.parametrize("checkpoint", [1, 4, 30])
@pytest.mark.parametrize("detach", [False, True], ids=["exact", "detach"])
def test_every_step_is_evaluated_twice_and_no_more(checkpoint, detach):
    rule, task, horizon = port_hamiltonian(), Counted(), 20
    gradients(rule, task, horizon=horizon, detach=detach)
    assert task.n_evaluations == horizon + 1
    task.n_evaluations = 0
    gradients(rule, task, horizon=horizon, detach=detach, checkpoint_every=checkpoint)
    assert task.n_evaluations == 2 * horizon + 1  # the loss after the last step lies in no segment


class Saved:
    """A tensor that a graph keeps; gone when the graph is."""

    def __init__(self, tensor):
        self.tensor = tensor


def saved_bytes(horizon, checkpoint):
    """Memory of the tensors that the backward pass waits for, when the forward pass is over."""
    saved = weakref.WeakSet()

    def pack(tensor):
        saved.add(holder := Saved(tensor))
        return holder

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        run = unroll(port_hamiltonian(), network_task(), indices=INDICES, n_steps=horizon, checkpoint_every=checkpoint)
    assert run.losses.requires_grad
    storages = [holder.tensor.untyped_storage() for holder in saved]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_memory_grows_with_boundaries_and_not_with_steps():
    whole = [saved_bytes(horizon, None) for horizon in (20, 40)]
    assert whole[1] > 1.9 * whole[0]
    # ten boundaries each: twice the steps, the same memory but for the losses
    few = [saved_bytes(horizon, horizon // 10) for horizon in (20, 40)]
    assert few[1] < 1.02 * few[0]
    # a boundary is parameters and state: with two modes 32 bytes per parameter in float64, and three numbers a tensor;
    # side by side, each of these tensors is filled up to the size of the largest
    sizes = [shape.numel() for shape in network_task().param_shapes.values()]
    n_boundaries, n_parameters, n_tensors, n_tasks = 10, len(sizes) * max(sizes), len(sizes), len(INDICES)
    boundaries = n_boundaries * n_tasks * 8 * (4 * n_parameters + 3 * n_tensors)
    end = saved_bytes(1, None)  # the loss after the last step keeps no more than one step does
    assert few[0] < boundaries + end
    assert whole[0] > 5 * few[0]


def test_derivatives_that_would_be_wrong_are_refused():
    rule = port_hamiltonian()
    run = unroll(rule, RandomQuadratic(4, dtype=f64), indices=INDICES, n_steps=4, checkpoint_every=2)
    with pytest.raises(RuntimeError, match="appears to not have been used"):
        torch.autograd.grad(run.losses.sum(), list(rule.parameters()))


@pytest.mark.parametrize("checkpoint", [0, -1])
def test_length_of_segments_must_be_positive(checkpoint):
    found = f"Found `checkpoint_every = {checkpoint}`"
    for estimator in (Backpropagation, DampedBackpropagation, Hybrid):
        with pytest.raises(ValueError, match=f"`checkpoint_every` should be a positive integer or None. {found}"):
            estimator(checkpoint_every=checkpoint)
    with pytest.raises(ValueError, match=f"`checkpoint_every` should be a positive integer or None. {found}"):
        unroll(SGDUpdate(), RandomQuadratic(4), indices=INDICES, n_steps=4, checkpoint_every=checkpoint)
