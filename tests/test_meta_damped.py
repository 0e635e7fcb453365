"""Damped backpropagation: a soft truncation, where runs are chaotic."""

import math
import re
from typing import NamedTuple

import pytest
import torch
from rank_toys import on_threads
from rule_toys import RULES, flat_weights, port_hamiltonian
from torch import Tensor, nn

from odeopt.meta import Backpropagation, DampedBackpropagation, Hybrid, MetaConfig, MetaObjective, meta_train, unroll
from odeopt.rules import UpdateRule
from odeopt.tasks import RandomQuadratic

f64 = torch.float64
TASK, HORIZON = RandomQuadratic(3, dtype=f64), 6
DAMPINGS = (1.0, 0.5, 0.25)


def gradients(estimator, rule, *, n=2, horizon=HORIZON, **options):
    rule.zero_grad()
    run = {"indices": torch.arange(n), "horizon": horizon, "seed": 0} | options
    (loss,) = estimator.gradients(rule, TASK, MetaObjective(), **run)
    return loss, torch.cat([p.grad.flatten() for p in rule.parameters() if p.grad is not None])


def loss_gradients(rule, damping, **options):
    """Gradient of the loss of each step, a row each."""
    run = unroll(rule, TASK, indices=torch.arange(2), n_steps=HORIZON, damping=damping, **options)
    weights = list(rule.parameters())
    rows = []
    for loss in run.losses[1:].sum(1):
        grads = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
        rows.append(torch.cat([g.flatten() for g in grads if g is not None]))
    return torch.stack(rows)


class Count(NamedTuple):
    step: Tensor


class OwnSteps(UpdateRule):
    """Gradient descent whose step sizes are weights, one for each step of the run."""

    crosses_coordinates = False

    def __init__(self):
        super().__init__()
        self.rates = nn.Parameter(torch.full((HORIZON,), 0.01, dtype=f64))

    def init_state(self, param):
        return Count(param.new_zeros((*param.shape[:-1], 1)))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        return -self.rates[state.step.long()] * grad, Count(state.step + 1)


@pytest.mark.parametrize("damping", [0.3, 0.9])
def test_a_loss_counts_less_for_updates_that_are_longer_ago(damping):
    exact, damped = (loss_gradients(OwnSteps(), factor) for factor in (1.0, damping))
    for t in range(1, HORIZON + 1):  # the loss after t updates
        boundaries = t if t < HORIZON else t - 1  # no step begins with the last loss
        powers = torch.tensor([float(boundaries - k) if k < t else 0.0 for k in range(HORIZON)], dtype=f64)
        torch.testing.assert_close(damped[t - 1], exact[t - 1] * damping**powers)


@pytest.mark.parametrize("name", sorted(RULES))
def test_damping_changes_the_gradient_and_not_the_run(name):
    rule = RULES[name]().double()
    runs = [unroll(rule, TASK, indices=torch.arange(2), n_steps=HORIZON, damping=d) for d in (1.0, 0.5)]
    assert torch.equal(runs[0].losses, runs[1].losses)
    weights = list(rule.parameters())
    if weights:
        exact, damped = (torch.autograd.grad(r.losses.sum(), weights, allow_unused=True) for r in runs)
        assert any(a is not None and not torch.allclose(a, b, rtol=1e-3) for a, b in zip(exact, damped, strict=True))
    with torch.no_grad():
        assert torch.equal(unroll(rule, TASK, indices=torch.arange(2), n_steps=HORIZON, damping=0.5).losses,
                           runs[0].losses.detach())  # fmt: skip


def test_states_are_damped_as_parameters_are():
    # momenta carry what a rule did: were they left alone, old updates would speak through them undamped
    rule = port_hamiltonian()
    norms = [loss_gradients(rule, damping)[-1].norm() for damping in (1.0, 0.5, 1e-6)]
    nearly, one_step = norms[2], loss_gradients_of_the_last_step(rule)
    torch.testing.assert_close(nearly, one_step, rtol=1e-4, atol=0)
    assert norms[0] != norms[1] != norms[2]


def loss_gradients_of_the_last_step(rule):
    """Length of the last loss' gradient where only the last update depends on the weights."""
    with torch.no_grad():
        run = unroll(rule, TASK, indices=torch.arange(2), n_steps=HORIZON - 1)
    last = unroll(rule, TASK, indices=torch.arange(2), n_steps=1, start=HORIZON - 1, params=run.params,
                  states=run.states)  # fmt: skip
    grads = torch.autograd.grad(last.losses[-1].sum(), list(rule.parameters()), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None]).norm()


@pytest.mark.parametrize("checkpoint", [1, 2, 4])
def test_checkpointed_gradient_is_damped_alike(checkpoint):
    rule = port_hamiltonian()
    plain, checkpointed = (
        gradients(Backpropagation(damping=0.7, checkpoint_every=length), rule) for length in (None, checkpoint)
    )
    torch.testing.assert_close(checkpointed, plain)


# -------------------- as little damping as a run asks for


def test_the_first_gradient_that_is_short_enough_counts():
    rule = port_hamiltonian()
    expected = [gradients(Backpropagation(damping=damping), rule) for damping in DAMPINGS]
    lengths = [grad.norm().item() for _, grad in expected]
    assert lengths[0] > lengths[1] > lengths[2]
    # a hair above a length lets it through; below the shortest one the last damping counts all the same
    for threshold, k in [(1.001 * length, k) for k, length in enumerate(lengths)] + [(0.5 * lengths[2], 2)]:
        loss, grad = gradients(DampedBackpropagation(dampings=DAMPINGS, threshold=threshold), rule)
        assert torch.equal(loss, expected[k][0])
        assert torch.equal(grad, expected[k][1])


@pytest.mark.parametrize(("dampings", "tried"), [(DAMPINGS, 0.5), ([0.25], 0.25)])
def test_long_runs_begin_with_the_second_damping_if_there_is_one(dampings, tried):
    rule = port_hamiltonian()
    estimator = DampedBackpropagation(dampings=dampings, threshold=1e9, longest=HORIZON - 1)
    assert torch.equal(gradients(estimator, rule)[1], gradients(Backpropagation(damping=tried), rule)[1])


def test_gradients_that_are_not_finite_are_damped(monkeypatch):
    rule, real = port_hamiltonian(), Backpropagation.gradients

    def broken(self, rule, *args, **kwargs):
        (loss,) = real(self, rule, *args, **kwargs)
        if self.damping == 1:
            for p in rule.parameters():
                p.grad = torch.full_like(p, math.nan)
        yield loss

    expected = gradients(Backpropagation(damping=0.5), rule)
    monkeypatch.setattr(Backpropagation, "gradients", broken)
    assert torch.equal(gradients(DampedBackpropagation(dampings=DAMPINGS, threshold=1e9), rule)[1], expected[1])


@pytest.mark.parametrize("k", range(4))
def test_ranks_agree_with_one_process(k):
    indices, rules = torch.arange(6, 10), [port_hamiltonian() for _ in range(2)]
    lengths = [gradients(Backpropagation(damping=d), rules[0], indices=indices)[1].norm().item() for d in DAMPINGS]
    threshold = [*(1.001 * length for length in lengths), 0.5 * lengths[2]][k]
    expected = gradients(DampedBackpropagation(dampings=DAMPINGS, threshold=threshold), rules[0], indices=indices)

    def work(world):
        estimator = DampedBackpropagation(dampings=DAMPINGS, threshold=threshold)
        return gradients(estimator, rules[world.rank], indices=indices[world.share(4)], world=world)

    _, got = on_threads(2, work)
    assert torch.equal(got[0][1], got[1][1])  # to the bit, or ranks would drift apart
    torch.testing.assert_close(got[0], expected)


def test_interrupted_run_continues(tmp_path):
    options = {"n_meta_steps": 4, "n_tasks": 2, "horizon": 4, "validate_every": 2, "n_validation_tasks": 2}
    damped = MetaConfig(**options, estimator=DampedBackpropagation(dampings=(0.9, 0.8), threshold=1e-3))
    rules = [port_hamiltonian() for _ in range(2)]
    meta_train(rules[0], TASK, damped, progress_bar=False)
    for stop_after in (0.0, None):
        meta_train(rules[1], TASK, damped, folder=tmp_path / "damped", stop_after=stop_after, progress_bar=False)
    assert torch.equal(flat_weights(rules[0]), flat_weights(rules[1]))


def test_each_attempt_is_checkpointed_alike():
    estimator = DampedBackpropagation(dampings=[0.9, 0.8], longest=7, checkpoint_every=3)
    assert estimator.attempts(7) == [Backpropagation(damping=d, checkpoint_every=3) for d in (0.9, 0.8)]
    assert estimator.attempts(8) == estimator.attempts(7)[1:]
    assert estimator == DampedBackpropagation(dampings=(0.9, 0.8), longest=7, checkpoint_every=3)


@pytest.mark.parametrize("damping", [0, 1.1, -0.5, "0.9", None, math.nan])
def test_damping_out_of_range_is_refused(damping):
    match = re.escape(f"`damping` should be a number in (0, 1]. Found `damping = {damping!r}`")
    with pytest.raises(ValueError, match=match):
        Backpropagation(damping=damping)
    with pytest.raises(ValueError, match=match):
        unroll(port_hamiltonian(), TASK, indices=torch.arange(1), n_steps=1, damping=damping)


@pytest.mark.parametrize("dampings", [[], [0.5, 0.5], [0.5, 0.9], [1.0, 0.0], [2.0], ["0.5"], 0.5, "0.5"])
def test_dampings_that_do_not_fall_are_refused(dampings):
    match = r"`dampings` should be one falling number in \(0, 1\] or more. Found `dampings = "
    for estimator in (DampedBackpropagation, Hybrid):
        with pytest.raises(ValueError, match=match):
            estimator(dampings=dampings)
