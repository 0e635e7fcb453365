"""Persistent evolution strategies: what they estimate, how runs are staggered, resumed and shared by ranks."""

import math
import threading
from pathlib import Path

import pytest
import torch
from meta_toys import configured
from rank_toys import on_two_processes
from rule_toys import flat_weights, port_hamiltonian
from test_meta_es import Cliff, Thread, ThreeWeights, TwoTensors, tiny_rule

from odeopt.meta import (
    Backpropagation,
    EvolutionStrategies,
    MetaObjective,
    PersistentEvolutionStrategies,
    World,
    meta_train,
    unroll,
)
from odeopt.meta.estimators import pes as pes_module
from odeopt.meta.files import load_config
from odeopt.tasks import Mixture, RandomQuadratic, TaskFamily

INDICES = torch.arange(6, 9)
HORIZON = 6


class ThreeTasks(RandomQuadratic):
    """The same three problems whatever the seed: what differs between two seeds are the perturbations."""

    def __init__(self):
        super().__init__(3, dtype=torch.float64)

    def draw(self, indices, seed):
        return super().draw(indices % 3, 0)


def pes(**options):
    return PersistentEvolutionStrategies(**({"n_pairs": 4, "sigma": 1e-3, "truncation": 2, "n_groups": 1} | options))


def estimates(estimator, rule, task, n_calls=1, *, indices=INDICES, step=0, seed=1, world=World(), **options):  # noqa: B008
    """Meta-losses and meta-gradients of some calls; the weights are left as they are."""
    losses, grads, options = [], [], {"horizon": HORIZON, "objective": MetaObjective()} | options
    for call in range(n_calls):
        at = indices + call * step
        for loss in estimator.gradients(rule, task, indices=at, seed=seed, world=world, **options):
            losses.append(loss)
            grads.append(torch.cat([p.grad.flatten() for p in rule.parameters() if p.requires_grad]))
            rule.zero_grad()
    return torch.stack(losses), torch.stack(grads)


@pytest.fixture
def seen(monkeypatch):
    """Calls of unroll(): first step, number of steps, tasks."""
    calls = []

    def recorded(*args, **kwargs):
        calls.append((kwargs.get("start", 0), kwargs["n_steps"], sorted(set(kwargs["indices"].tolist()))))
        return unroll(*args, **kwargs)

    monkeypatch.setattr(pes_module, "unroll", recorded)
    return calls


# -------------------- what is estimated


@pytest.mark.parametrize(("n_groups", "truncation"), [(1, 2), (3, 2), (2, 5)])
def test_runs_estimate_the_exact_gradient_of_the_whole_horizon_without_bias(n_groups, truncation):
    rule, task, n_segments = ThreeWeights(), ThreeTasks(), -(-HORIZON // truncation)
    _, (exact,) = estimates(Backpropagation(), rule, task)
    _, biased = estimates(Backpropagation(truncation=truncation), rule, task)
    means = []
    for seed in range(60):
        estimator = pes(n_groups=n_groups, truncation=truncation, n_pairs=24)
        if n_groups > 1:  # the short first runs see the beginning of the horizon only
            estimates(estimator, rule, task, n_segments, seed=seed)
        _, grads = estimates(estimator, rule, task, n_segments, seed=seed)
        means.append(grads.mean(0))
    means = torch.stack(means)
    error = means.std(0) / len(means) ** 0.5
    # sigma adds third derivatives times 1e-6
    assert ((means.mean(0) - exact).abs() < 5 * error).all()
    # so the comparison says something: the plain truncated gradient is told apart
    assert ((biased.mean(0) - exact).abs() > 8 * error).any()


def test_meta_losses_of_the_segments_add_up_to_that_of_the_horizon():
    rule, task = ThreeWeights(), TwoTensors()
    got, _ = estimates(pes(sigma=1e-7), rule, task, 3)
    expected, _ = estimates(Backpropagation(), rule, task)
    # the two perturbations of a pair differ by 1e-7 times the gradient, and cancel
    torch.testing.assert_close(got.mean(), expected[0], rtol=1e-9, atol=0.0)


@pytest.mark.parametrize("make", [ThreeWeights, port_hamiltonian, lambda: port_hamiltonian(solver="dopri5")])
@pytest.mark.parametrize("clip", [None, 1e-3])
def test_one_segment_of_the_whole_horizon_is_plain_evolution_strategies(make, clip):
    rule, task, options = make(), TwoTensors(), {"n_pairs": 3, "sigma": 0.02, "clip": clip}
    # plain ones name perturbations by the first task, these by the call: with a task per call both count from 0
    run = {"n_calls": 2, "indices": torch.arange(1), "step": 1, "horizon": 3}
    expected = estimates(EvolutionStrategies(**options), rule, task, **run)
    got = estimates(pes(**options, truncation=3), rule, task, **run)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)  # sums in another order


def test_estimate_is_the_differences_of_losses_times_the_summed_perturbations():
    rule, task, sigma = ThreeWeights(), TwoTensors(), 0.05
    _, got = estimates(pes(n_pairs=2, sigma=sigma), rule, task, 3)
    noises = [pes_module.Noise({"w": rule.w}, 1, call).draw("w", range(2)) for call in range(3)]
    weights, expected = rule.w.detach().clone(), torch.zeros(3, 3, dtype=torch.float64)
    for pair in range(2):
        particles = {1: (None, None, None), -1: (None, None, None)}
        for call in range(3):
            losses = {}
            for sign, (params, states, first) in particles.items():
                rule.w.data = weights + sign * sigma * noises[call][pair]
                options = {"start": 2 * call, "params": params, "states": states, "total_steps": 6, "seed": 1}
                with torch.no_grad():
                    run = unroll(rule, task, indices=INDICES, n_steps=2, **options)
                first = run.losses[0] if first is None else first
                objective = MetaObjective(relative=True)
                losses[sign] = 3 * objective(run.losses[1:], start=2 * call, horizon=6, first=first).mean()
                particles[sign] = (run.params, run.states, first)
            xi = sigma * sum(noise[pair] for noise in noises[: call + 1])
            expected[call] += (losses[1] - losses[-1]) * xi / (2 * sigma**2) / 2
    rule.w.data = weights
    _, got = estimates(pes(n_pairs=2, sigma=sigma), rule, task, 3, objective=MetaObjective(relative=True))
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_perturbations_never_repeat(monkeypatch):
    rule, task, steps, make = ThreeWeights(), ThreeTasks(), [], pes_module.Noise
    monkeypatch.setattr(pes_module, "Noise", lambda *args: steps.append(args[2]) or make(*args))
    estimates(pes(n_groups=3), rule, task, 7)
    assert len(set(steps)) == len(steps) == 21
    _, grads = estimates(pes(truncation=HORIZON), rule, task, 4)
    assert len(grads[:, 0].unique()) == 4
    _, again = estimates(pes(truncation=HORIZON), rule, task, 4)
    assert torch.equal(grads, again)
    # two groups with the same tasks are two draws
    _, one = estimates(pes(truncation=HORIZON), rule, task, indices=INDICES[:1])
    _, two = estimates(pes(truncation=HORIZON, n_groups=2), rule, task, indices=INDICES[:1].repeat(2))
    assert not torch.allclose(one, two, rtol=1e-3)


def test_weights_are_left_alone_and_frozen_ones_get_no_gradient():
    rule = ThreeWeights()
    before = flat_weights(rule)
    losses, _ = estimates(pes(), rule, TwoTensors(), 2)
    assert torch.equal(flat_weights(rule), before)
    assert rule.frozen.grad is None
    assert not losses.requires_grad


@pytest.mark.parametrize("height", [math.nan, math.inf, 1e200])
def test_diverged_particles_have_a_bounded_voice_until_their_run_is_over(height):
    rule, task = ThreeWeights(log_lr=-4.2), Cliff(height)
    options = {"n_pairs": 32, "sigma": 0.3, "truncation": 3}
    _, grads = estimates(pes(**options), rule, task, 4)
    assert grads.isfinite().all()
    _, clipped = estimates(pes(**options, clip=1e-3), rule, task, 4)
    # two perturbations of norm 3 sigma sqrt(2) at most here, over 2 sigma^2, times 1e-3
    assert clipped.norm(dim=1).max() < 0.01 < grads.norm(dim=1).max()


# -------------------- whose turn it is


def test_groups_are_in_different_parts_of_the_horizon(seen):
    task = TwoTensors()
    estimates(pes(truncation=2, n_groups=3), ThreeWeights(), task, 5, step=3)
    starts = [[start for start, _, _ in seen[3 * call : 3 * call + 3]] for call in range(5)]
    assert starts == [[0, 0, 0], [0, 2, 2], [2, 0, 4], [4, 2, 0], [0, 4, 2]]
    # a run keeps its tasks to the end; the next one is given those of its call
    tasks = [[tasks for *_, (tasks,) in seen[3 * call : 3 * call + 3]] for call in range(5)]
    assert tasks == [[6, 7, 8], [9, 7, 8], [9, 13, 8], [9, 13, 17], [18, 13, 17]]


@pytest.mark.parametrize(
    ("horizon", "truncation", "n_groups", "lengths"),
    [
        (6, 4, 1, [4, 2, 4, 2]),  # the last segment of a run is what is left
        (6, 9, 1, [6, 6]),
        (8, 2, 2, [2, 2, 2, 2, 2, 2]),
    ],
)
def test_segments_fill_the_horizon(seen, horizon, truncation, n_groups, lengths):
    estimator, n_calls = pes(truncation=truncation, n_groups=n_groups), len(lengths)
    estimates(estimator, ThreeWeights(), TwoTensors(), n_calls, horizon=horizon)
    assert [n_steps for _, n_steps, _ in seen[n_groups - 1 :: n_groups]] == lengths
    assert max(start + n_steps for start, n_steps, _ in seen) == horizon


def test_first_runs_are_rounded_up_to_segments(seen):
    # a fifth of three segments is one, two fifths are two
    estimates(pes(truncation=2, n_groups=5), ThreeWeights(), TwoTensors(), 4, indices=torch.arange(5))
    starts = torch.tensor([start for start, _, _ in seen]).view(4, 5).T
    assert starts.tolist() == [[0, 0, 2, 4], [0, 2, 0, 2], [0, 2, 0, 2], [0, 2, 4, 0], [0, 2, 4, 0]]


def test_update_scale_and_progress_reach_the_run(monkeypatch):
    calls = []

    def recorded(*args, **kwargs):
        calls.append((kwargs["update_scale"], kwargs["total_steps"], torch.is_grad_enabled()))
        return unroll(*args, **kwargs)

    monkeypatch.setattr(pes_module, "unroll", recorded)
    estimates(pes(), ThreeWeights(), TwoTensors(), update_scale=1.5)
    estimates(pes(), ThreeWeights(), TwoTensors(), tells_horizon=False)
    assert calls == [(1.5, HORIZON, False), (1.0, None, False)]


# -------------------- in the training loop

CONFIG = {"n_meta_steps": 13, "n_tasks": 3, "horizon": 6, "validate_every": 4, "n_validation_tasks": 32, "lr": 3e-2}
CONFIG |= {"estimator": PersistentEvolutionStrategies, "n_pairs": 3, "sigma": 0.05, "truncation": 2, "n_groups": 3}


def train(rule, folder=None, task=None, stop_after=None, **options):
    config = configured(**(CONFIG | options))
    task = RandomQuadratic(3) if task is None else task
    return meta_train(rule, task, config, folder=folder, stop_after=stop_after, progress_bar=False)


def test_training_improves_validation():
    result = train(tiny_rule(), n_meta_steps=60, horizon=10, n_tasks=12, n_pairs=8)
    assert result.best_score < 0.85 * result.validation[0][1]
    assert result.n_skipped_nonfinite == result.n_skipped_outliers == 0


@pytest.mark.parametrize("n_groups", [1, 3])
def test_resumed_run_gives_the_result_of_the_uninterrupted_one(tmp_path, n_groups):
    uninterrupted = tiny_rule()
    expected = train(uninterrupted, n_groups=n_groups)
    for n_done in (4, 8):  # four meta-steps are one run and a third
        part = train(tiny_rule(), tmp_path, stop_after=0, n_groups=n_groups)
        assert len(part.meta_losses) == n_done
    rule = tiny_rule()
    result = train(rule, tmp_path, n_groups=n_groups)
    assert result.meta_losses == expected.meta_losses
    assert result.validation == expected.validation
    assert torch.equal(flat_weights(rule), flat_weights(uninterrupted))


def test_state_before_the_first_call_and_state_not_yet_taken_up():
    estimator, rule, task = pes(), ThreeWeights(), TwoTensors()
    assert estimator.state_dict() == {}
    estimates(estimator, rule, task, 2)
    state, again = estimator.state_dict(), pes()
    again.load_state_dict(state)
    assert again.state_dict() is state
    assert torch.equal(estimates(again, rule, task, 5)[1], estimates(estimator, rule, task, 5)[1])


def test_estimators_without_state_keep_nothing():
    estimator = EvolutionStrategies()
    assert estimator.state_dict() == {}
    estimator.load_state_dict({})
    assert not estimator.is_stateful


def test_mixtures_are_refused():
    mixture = Mixture([TaskFamily(RandomQuadratic, {"dim": 3})])
    with pytest.raises(ValueError, match=r"`task` should be no mixture where `estimator = Persis.*`, whose runs go on"):
        train(tiny_rule(), task=mixture)


# -------------------- what is refused


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_groups": 0}, "`n_groups` should be a positive integer. Found `n_groups = 0`"),
        ({"n_pairs": 0}, "`n_pairs` should be a positive integer. Found `n_pairs = 0`"),
        ({"truncation": 2.0}, "`truncation` should be a positive integer. Found `truncation = 2.0`"),
        ({"n_groups": True}, "`n_groups` should be a positive integer. Found `n_groups = True`"),
        ({"sigma": -1.0}, "`sigma` should be a positive number. Found `sigma = -1.0`"),
        ({"ceiling": math.inf}, "`ceiling` should be a positive number. Found `ceiling = inf`"),
        ({"clip": 0}, "`clip` should be a positive number or None. Found `clip = 0`"),
    ],
)
def test_arguments_out_of_range_are_refused(options, match):
    with pytest.raises(ValueError, match=match):
        PersistentEvolutionStrategies(**options)


def test_batches_that_do_not_fit_are_refused():
    rule, task, estimator = ThreeWeights(), TwoTensors(), pes(n_groups=3)
    with pytest.raises(ValueError, match=r"`n_groups` should be at most .*, which is 2. Found `n_groups = 3`"):
        estimates(estimator, rule, task, indices=INDICES[:2])
    estimates(estimator, rule, task)
    with pytest.raises(ValueError, match=r"`horizon` should be 6, as in the first call.* Found `horizon = 7`"):
        estimates(estimator, rule, task, horizon=7)
    with pytest.raises(ValueError, match=r"`indices` should be of 3 tasks .* first call.* Found `indices = 4`"):
        estimates(estimator, rule, task, indices=torch.arange(4))


def test_configuration_file_may_ask_for_it(tmp_path):
    path = Path(tmp_path, "pes.toml")
    training = '[training.estimator]\nclass = "pes"\ntruncation = 7\nn_groups = 2\n'
    path.write_text(f'[rule]\nclass = "hamiltonian"\n[task]\nclass = "RandomQuadratic"\n{training}[training]\n')
    assert load_config(path).training.estimator == PersistentEvolutionStrategies(truncation=7, n_groups=2)


def test_training_leaves_the_estimator_of_its_settings_without_runs():
    config = configured(**CONFIG)
    for _ in range(2):
        rule = tiny_rule()
        meta_train(rule, RandomQuadratic(3), config, progress_bar=False)
        assert config.estimator.state_dict() == {}
        found = flat_weights(rule)
    fresh = tiny_rule()
    train(fresh)
    assert torch.equal(flat_weights(fresh), found)  # the second training as the first


# -------------------- over ranks


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("n_groups", [1, 2, 4])
def test_ranks_exchange_losses_alone_and_agree_with_one_process(size, n_groups, monkeypatch):
    indices, options = torch.arange(6, 10), {"n_groups": n_groups, "sigma": 0.01}
    run = {"n_calls": 5, "step": 4}
    loss, grad = estimates(pes(**options), port_hamiltonian(), TwoTensors(), indices=indices, **run)
    monkeypatch.setattr(Thread, "average", None)
    barrier, box, got = threading.Barrier(size), [None] * size, [None] * size
    worlds = [Thread(rank, size, barrier, box) for rank in range(size)]

    def work(world):
        own, estimator, rule, task = indices[world.share(4)], pes(**options), port_hamiltonian(), TwoTensors()
        parts = [estimates(estimator, rule, task, **(run | {"n_calls": 2}), indices=own, world=world)]
        sent = list(world.sent)
        # what ranks put together is taken apart again, with the tasks of every group in their places
        again = pes(**options)
        again.load_state_dict(estimator.state_dict(world))
        parts.append(estimates(again, rule, task, **(run | {"n_calls": 3}), indices=own + 8, world=world))
        got[world.rank] = (sent, *map(torch.cat, zip(*parts, strict=True)))

    threads = [threading.Thread(target=work, args=(world,)) for world in worlds]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    for world, (sent, rank_loss, rank_grad) in zip(worlds, got, strict=True):
        assert sent == [(1,), (len(indices[world.share(4)]), 8)] * 2  # how many tasks, and their losses
        assert torch.equal(rank_grad, got[0][2])  # to the bit, or ranks would drift apart
        assert torch.equal(rank_loss, got[0][1])
        # batches of other sizes round differently, over 2 sigma
        torch.testing.assert_close(rank_grad, grad, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(rank_loss, loss, rtol=1e-12, atol=0.0)


def trained(n_tasks, folder=None, stop_after=None):
    rule = tiny_rule().double()
    task = RandomQuadratic(3, dtype=torch.float64)
    result = train(rule, folder, task, stop_after, n_tasks=n_tasks, n_validation_tasks=5)
    return flat_weights(rule), torch.tensor(result.meta_losses), torch.tensor(result.validation)


def train_on_two(rank, folder):
    trained(3, folder / "run", stop_after=0)
    return trained(3, folder / "run", stop_after=0)


def test_run_begun_by_two_processes_and_ended_by_one_is_that_of_one(tmp_path):
    expected = trained(6)
    ranks = on_two_processes(train_on_two, tmp_path)
    assert None not in ranks
    assert len(ranks[0][1]) == 8
    got = trained(3, tmp_path / "run")
    for a, b in zip(got, expected, strict=True):
        # float64 losses in other batches, over 2 sigma, grown over the meta-steps
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)
