"""Training on a mixture: what reaches the runs, what is skipped and kept, and checkpoints of any families."""

import copy
import math
from functools import partial
from itertools import pairwise

import pytest
import torch
from rank_toys import on_threads
from rule_toys import flat_weights
from test_meta_hybrid import mixture, rule_of, train
from torch import nn

from odeopt.meta import Hybrid, MetaConfig, unroll
from odeopt.meta import trainer as trainer_module
from odeopt.meta.validation import validation_score
from odeopt.tasks import Mixture, ModuleTask, RandomQuadratic, ScaledTask, TaskFamily

f64 = torch.float64
INPUTS = torch.linspace(-1, 1, 12, dtype=f64).unsqueeze(1)


# -------------------- a meta-step


def test_draws_are_run_as_they_are_drawn_and_by_the_margin(monkeypatch):
    seen = []

    def recorded(rule, task, *, indices, n_steps, total_steps, update_scale, seed, **options):
        kind = "exact" if torch.is_grad_enabled() else "perturbed"
        seen.append((kind, repr(task), int(indices[0]), n_steps, total_steps, update_scale, seed))
        run = {"indices": indices, "n_steps": n_steps, "seed": seed}
        return unroll(rule, task, **run, total_steps=total_steps, update_scale=update_scale, **options)

    for module in ("backpropagation", "es"):
        monkeypatch.setattr(f"odeopt.meta.estimators.{module}.unroll", recorded)
    train(gain_margin=1.5, threshold=1e-9, n_meta_steps=2, n_tasks=4, n_validation_tasks=1, seed=3)
    draws = [mixture().draw(number, seed=3) for number in range(8)]
    assert {draw.tells_horizon for draw in draws} == {True, False}
    assert seen == [
        (kind, repr(task), int(indices[0]), horizon, horizon if tells_horizon else None, 1.5, 3)
        for task, indices, horizon, tells_horizon in draws
        for kind in ("exact", "perturbed")
    ]


def test_gradients_that_are_not_finite_are_left_out_and_counted(monkeypatch):
    module = __import__("odeopt.meta.trainer", fromlist=["validation_score"])
    bad, weights = {1, 4, 5}, []

    def broken(self, rule, task, objective, *, indices, **options):
        value = math.nan if int(indices[0]) // 2 in bad else 1.0  # two problems per draw
        for p in rule.parameters():
            p.grad = torch.full_like(p, value)
        yield torch.tensor(1.0, dtype=f64)

    monkeypatch.setattr(Hybrid, "gradients", broken)
    monkeypatch.setattr(module, "validation_score", lambda rule, *a, **k: weights.append(flat_weights(rule)) or 0.0)
    result = train(n_meta_steps=3, n_tasks=3, validate_every=1)
    assert result.n_skipped_nonfinite == len(bad)
    assert len(result.meta_losses) == 3
    # the others of the step moved the weights
    assert all(after.isfinite().all() for after in weights)
    assert all((before > after).all() for before, after in pairwise(weights))


def long_draws(lengths):
    """Meta-gradients of given lengths by number of the draw."""

    def gradients(self, rule, task, objective, *, indices, **options):
        weights = [p for p in rule.parameters() if p.requires_grad]
        for p in weights:
            p.grad = torch.zeros_like(p)
        weights[0].grad.view(-1)[0] = lengths[int(indices[0]) // 2]  # two problems per draw
        yield torch.tensor(1.0, dtype=f64)

    return gradients


@pytest.mark.parametrize("size", [1, 2, 3])
def test_outliers_among_draws_are_left_out_alike_on_any_number_of_ranks(size, monkeypatch):
    lengths = [1.0] * 12 + [1.0, 500.0, 2.0, 150.0, 1.0, 99.0] + [math.nan, 300.0, 400.0, 500.0, math.inf, 600.0]
    monkeypatch.setattr(Hybrid, "gradients", long_draws(lengths))
    rule = rule_of()  # built here: threads that draw weights share torch's generator

    def moved(world):
        own, task = copy.deepcopy(rule), mixture()
        config = MetaConfig(n_meta_steps=4, n_tasks=6 // size, estimator=Hybrid(), clip=1.0, lr=0.1)
        run = trainer_module._Run(own, task, config, task, None, world)
        run.meta_optimizer, run.scheduler, moves = torch.optim.SGD(run.parameters, 1.0), None, []
        for _ in range(4):
            before = flat_weights(own)
            list(run.episode())
            moves.append((flat_weights(own) - before).norm().item())
        return moves, run.result.n_skipped_outliers, run.result.n_skipped_nonfinite

    _, got = on_threads(size, moved)
    # of the third step's six draws two are outliers, of the fourth's none counts
    assert got == [(pytest.approx([1.0, 1.0, 4 / 6, 0.0]), 6, 2)] * size


def test_second_moments_decay_as_the_settings_say(monkeypatch):
    betas = []

    class Recorder(torch.optim.Adam):
        def __init__(self, params, lr, **options):
            betas.append(options["betas"])
            super().__init__(params, lr, **options)

    monkeypatch.setattr(torch.optim, "Adam", Recorder)
    train(beta2=0.75, n_meta_steps=1, n_tasks=1)
    assert [beta2 for _, beta2 in betas] == [0.75]


# -------------------- what is validated, and kept


def test_weights_that_are_kept_are_those_that_were_validated(monkeypatch):
    module = __import__("odeopt.meta.trainer", fromlist=["validation_score"])
    scores, seen = iter([3.0, 2.0, 1.0, 4.0]), []
    monkeypatch.setattr(
        module, "validation_score", lambda rule, *a, **k: seen.append(flat_weights(rule)) or next(scores)
    )
    result = train(averaging=0.5)
    assert (result.best_step, result.best_score) == (4, 1.0)
    assert torch.equal(flat_weights(result.rule), seen[2])
    assert len({tuple(weights.tolist()) for weights in seen}) == 4


def scaled(loss_scale):
    def make(dim, device):
        return ScaledTask(RandomQuadratic(dim, dtype=f64, device=device), loss_scale=loss_scale)

    return Mixture([TaskFamily(make, choices={"dim": [2, 3]})], horizons=(8, 30), n_problems=2)


def test_score_is_the_mean_log_of_the_last_losses_over_the_first_in_any_unit():
    rule, indices = rule_of(), torch.arange(4)
    plain, other = (validation_score(rule, scaled(c), indices=indices, horizon=1, seed=5) for c in (1.0, 2.0**20))
    assert other == pytest.approx(plain, rel=1e-9)  # the rule does not see the unit; powers of two round alike
    logs = []
    for number in range(4):
        task, problems, horizon, _ = scaled(1.0).draw(number, 5)
        with torch.no_grad():
            losses = unroll(rule, task, indices=problems, n_steps=horizon, seed=5, total_steps=horizon).losses
        logs.append((losses[-max(1, horizon // 10) :].mean(0) / losses[0] + 1e-3).log().mean())
    assert plain == pytest.approx(torch.stack(logs).mean().item(), rel=1e-12)


# -------------------- checkpoints


def network():
    return nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).to(f64)


def fit(scale=1.0, make_module=network):
    data = (INPUTS, scale * INPUTS.sin())
    return {"make_module": make_module, "data": data, "loss_fn": nn.functional.mse_loss}


FAMILIES = {
    "function": lambda: TaskFamily(ModuleTask, fit()),
    "lambda": lambda: TaskFamily(ModuleTask, fit(make_module=lambda: network())),
    "partial": lambda: TaskFamily(partial(ModuleTask, network), {k: v for k, v in fit().items() if k != "make_module"}),
    "module": lambda: TaskFamily(ModuleTask, fit() | {"loss_fn": nn.MSELoss()}),
    "dtype": lambda: TaskFamily(RandomQuadratic, {"dtype": f64}, {"dim": (2, 3)}),
    "choices": lambda: TaskFamily(RandomQuadratic, {"dim": 2}, {"dtype": [f64]}, name="quadratic"),
}
SHORT = {"n_meta_steps": 2, "n_tasks": 1, "validate_every": 1, "n_validation_tasks": 1}


def of(family):
    return Mixture([family], horizons=(3, 4), n_problems=1)


@pytest.mark.parametrize("name", FAMILIES)
def test_interrupted_run_on_any_family_is_continued(name, tmp_path):
    assert len(train(tmp_path, stop_after=0.0, task=of(FAMILIES[name]()), **SHORT).meta_losses) == 1
    # built anew, as another process would
    assert len(train(tmp_path, task=of(FAMILIES[name]()), **SHORT).meta_losses) == 2


@pytest.mark.parametrize(
    "other",
    [
        lambda: TaskFamily(ModuleTask, fit(scale=2.0)),
        lambda: TaskFamily(ModuleTask, fit(make_module=lambda: network())),
        lambda: TaskFamily(ModuleTask, fit() | {"batch_size": 5}),
    ],
    ids=["data", "function", "number"],
)
def test_run_on_another_family_is_not_continued(other, tmp_path):
    train(tmp_path, stop_after=0.0, task=of(FAMILIES["function"]()), **SHORT)
    with pytest.raises(ValueError, match=r"a checkpoint of the same run. Found .* with another `task`"):
        train(tmp_path, task=of(other()), **SHORT)
