"""The share of held-out batches in the losses of a run, and in what is made of them."""

import pytest
import torch
from meta_toys import configured
from rule_toys import port_hamiltonian
from torch import nn

from odeopt.meta import meta_train, unroll
from odeopt.meta.estimators import (
    Backpropagation,
    DampedBackpropagation,
    EvolutionStrategies,
    Hybrid,
    PersistentEvolutionStrategies,
)
from odeopt.meta.objective import MetaObjective
from odeopt.meta.validation import validation_score
from odeopt.tasks import Mixture, NoisyQuadratic, Task, TaskFamily

f64 = torch.float64
INDICES = torch.tensor([3, 0])
TASK = NoisyQuadratic(3, dtype=f64)
RUN = {"task": TASK, "indices": INDICES, "n_steps": 5, "seed": 2, "total_steps": 6}
over_shares = pytest.mark.parametrize("held_out", [0.25, 1.0])


def held_out_losses():
    """Of the parameters before each step of RUN, and of the last ones."""
    losses = []
    with torch.no_grad():
        for n_steps in range(6):
            params = TASK.init_params(INDICES, 2)
            if n_steps > 0:
                params = unroll(port_hamiltonian(), **RUN | {"n_steps": n_steps}).params
            losses.append(TASK.loss(params, TASK.sample_held_out(INDICES, n_steps, 2)))
    return torch.stack(losses)


def test_without_a_share_the_run_is_what_it_was():
    with torch.no_grad():
        plain, given = unroll(port_hamiltonian(), **RUN), unroll(port_hamiltonian(), **RUN, held_out=0.0)
    assert torch.equal(plain.losses, given.losses)


@over_shares
def test_losses_are_the_share_of_those_on_batches_of_no_step(held_out):
    with torch.no_grad():
        plain, run = unroll(port_hamiltonian(), **RUN), unroll(port_hamiltonian(), **RUN, held_out=held_out)
    wanted = (1 - held_out) * plain.losses + held_out * held_out_losses()
    torch.testing.assert_close(run.losses, wanted, rtol=1e-12, atol=1e-12)
    assert (run.losses - plain.losses).abs().min() > 1e-6
    for name, param in plain.params.items():  # the run itself is the same
        assert torch.equal(run.params[name], param)


def meta_gradient(**options):
    rule = port_hamiltonian()
    unroll(rule, **RUN, **options).losses.log().mean().backward()
    return nn.utils.parameters_to_vector([weight.grad for weight in rule.parameters()])


@over_shares
def test_meta_gradient_is_that_of_the_losses(held_out):
    found, rule = meta_gradient(held_out=held_out), port_hamiltonian()
    weight = rule.coefficient_network[-1].bias
    losses = []
    for step in (1e-5, -1e-5):
        with torch.no_grad():
            weight[0] += step
            losses.append(unroll(rule, **RUN, held_out=held_out).losses.log().mean())
            weight[0] -= step
    start = found.numel() - weight.numel()
    # central difference: 1e-10 times a third derivative, and rounding over 1e-5
    torch.testing.assert_close(found[start], (losses[0] - losses[1]) / 2e-5, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(meta_gradient(held_out=held_out, checkpoint_every=2), found, rtol=1e-9, atol=1e-12)


class Constant(Task):
    """Held-out batches have the loss seven, whatever the parameters; others a quadratic one."""

    def __init__(self, **options):
        super().__init__(dtype=f64, **options)

    def init_params(self, indices, seed):
        return {"x": torch.ones(len(indices), 2, dtype=f64), "y": torch.ones(len(indices), 1, dtype=f64)}

    def sample_batch(self, indices, step, seed):
        return (torch.zeros(len(indices), dtype=f64),)

    def sample_held_out(self, indices, step, seed):
        return (torch.ones(len(indices), dtype=f64),)

    def loss(self, params, batch):
        square = sum(x.square().sum(-1) for x in params.values())
        return torch.where(batch[0] > 0, 7 + 0 * square, square)


EVOLUTION = {"n_pairs": 2, "sigma": 0.01}
ESTIMATORS = {
    "backpropagation": Backpropagation(),
    "truncated": Backpropagation(truncation=2),
    "damped": DampedBackpropagation(),
    "evolution": EvolutionStrategies(**EVOLUTION),
    "persistent": PersistentEvolutionStrategies(truncation=4, n_groups=1, **EVOLUTION),
    "hybrid, calm": Hybrid(evolution=EvolutionStrategies(**EVOLUTION)),
    "hybrid": Hybrid(evolution=EvolutionStrategies(**EVOLUTION), longest=1),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_follow_the_objective(name):
    objective = MetaObjective(weights="uniform", log=False, held_out=1.0)
    options = {"indices": INDICES, "horizon": 4, "seed": 0}
    losses = list(ESTIMATORS[name].gradients(port_hamiltonian(), Constant(), objective, **options))
    torch.testing.assert_close(torch.stack(losses), torch.full((len(losses),), 7.0, dtype=f64))


def test_validation_follows_the_share():
    options = {"indices": INDICES, "horizon": 4, "seed": 0}
    assert validation_score(port_hamiltonian(), Constant(), **options, held_out=1.0) == 7.0
    assert validation_score(port_hamiltonian(), Constant(), **options) < 5.0
    mixture = Mixture([TaskFamily(lambda device: Constant(device=device))], horizons=(4, 4), n_problems=2)
    # of the loss over the first one, which is seven as well
    assert validation_score(port_hamiltonian(), mixture, **options, held_out=1.0) == pytest.approx(0.0, abs=2e-3)
    assert validation_score(port_hamiltonian(), mixture, **options) < -0.05


def test_meta_training_follows_the_share():
    config = configured(n_meta_steps=2, n_tasks=2, horizon=3, n_validation_tasks=2, log=False, held_out=1.0)
    result = meta_train(port_hamiltonian(), Constant(), config, progress_bar=False)
    assert result.meta_losses == pytest.approx([7.0, 7.0])
    assert result.best_score == pytest.approx(7.0)


@pytest.mark.parametrize("held_out", [-0.1, 1.5, None, "half", float("nan"), True])
@pytest.mark.parametrize(
    "take",
    [lambda x: unroll(port_hamiltonian(), **RUN, held_out=x), lambda x: MetaObjective(held_out=x)],
    ids=["unroll", "objective"],
)
def test_what_is_no_share_is_refused(take, held_out):
    with pytest.raises(ValueError, match=r"`held_out` should be a number in \[0, 1\]. Found `held_out = "):
        take(held_out)
