"""The training loop: what it skips, keeps, writes and resumes."""

import dataclasses
import json
import math
import threading
import time

import pytest
import torch
from meta_toys import configured
from rule_toys import flat_weights

from odeopt.meta import (
    Backpropagation,
    Estimator,
    EvolutionStrategies,
    Hybrid,
    MetaConfig,
    MetaObjective,
    PersistentEvolutionStrategies,
    meta_train,
    unroll,
)
from odeopt.meta import trainer as trainer_module
from odeopt.meta.files import make_config
from odeopt.rules import HamiltonianUpdate, PortHamiltonianUpdate, SGDUpdate
from odeopt.tasks import Mixture, MonkeySaddle, RandomQuadratic, TaskFamily

TASK = RandomQuadratic(3)
CONFIG = {"n_tasks": 3, "horizon": 5, "validate_every": 4, "n_validation_tasks": 4, "lr": 1e-2}


def tiny_rule(seed=0, **options):
    torch.manual_seed(seed)
    return PortHamiltonianUpdate(hidden=(3,), modes=1, **options)


def train(rule, folder=None, **options):
    stop_after = options.pop("stop_after", None)
    config = configured(**(CONFIG | options))
    return meta_train(rule, TASK, config, folder=folder, stop_after=stop_after, progress_bar=False)


class Scripted(Estimator):
    """Hands out gradients of given norms."""

    def __init__(self, norms):
        self.norms = iter(norms)

    def gradients(self, rule, task, objective, **options):
        norm = next(self.norms)
        for p in rule.parameters():
            p.grad = torch.zeros_like(p)
        next(iter(rule.parameters())).grad.view(-1)[0] = norm
        yield torch.tensor(1.0)


def scripted(monkeypatch, norms, **options):
    """Train on gradients of given norms; return the result and the weights after each meta-step."""
    weights = []
    rule, update = tiny_rule(), trainer_module._Run._update

    def recorded(self, *args):
        before = flat_weights(rule)
        loss = update(self, *args)
        weights.append((flat_weights(rule) - before).norm().item())
        return loss

    monkeypatch.setattr(trainer_module._Run, "_update", recorded)
    settings = {"n_meta_steps": len(norms), "schedule": "constant", "estimator": Scripted(norms)}
    config = MetaConfig(**(CONFIG | settings | options))
    return meta_train(rule, TASK, config, progress_bar=False), weights


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_meta_gradients_are_skipped_and_counted(monkeypatch, bad):
    norms = [1.0, bad, 1.0, bad, bad]
    result, moves = scripted(monkeypatch, norms)
    assert result.n_skipped_nonfinite == 3
    assert result.n_skipped_outliers == 0
    assert [move == 0 for move in moves] == [norm == bad or math.isnan(norm) for norm in norms]


def test_outlying_meta_gradients_are_skipped_and_counted(monkeypatch):
    # ten are wanted before any is judged; skipped ones do not move the median
    norms = [1.0] * 9 + [500.0, 101.0, 99.0] + [1e6] * 20 + [101.0, 1.0]
    result, moves = scripted(monkeypatch, norms)
    assert result.n_skipped_outliers == 22
    assert result.n_skipped_nonfinite == 0
    assert [move == 0 for move in moves] == [False] * 10 + [True, False] + [True] * 21 + [False]


def test_outliers_are_judged_by_what_came_before_an_interruption(monkeypatch, tmp_path):
    def interrupted():
        yield from [1.0] * 12
        raise KeyboardInterrupt

    def go_on(norms):
        config = MetaConfig(**(CONFIG | {"validate_every": 12}), n_meta_steps=14, estimator=Scripted(norms))
        return meta_train(tiny_rule(), TASK, config, folder=tmp_path, progress_bar=False)

    with pytest.raises(KeyboardInterrupt):
        go_on(interrupted())
    assert go_on([101.0, 1.0]).n_skipped_outliers == 1


def test_long_meta_gradients_are_scaled_down_to_the_clip(monkeypatch):
    # plain gradient descent in place of Adam, which would hide the scale
    monkeypatch.setattr(torch.optim, "Adam", lambda p, lr, betas: torch.optim.SGD(p, lr))
    _, moves = scripted(monkeypatch, [0.1, 0.2, 0.5, 7.0], clip=0.2, lr=1.0)
    assert moves == pytest.approx([0.1, 0.2, 0.2, 0.2], rel=1e-4)


def test_training_on_quadratics_improves_validation():
    rule = tiny_rule()
    result = train(rule, n_meta_steps=40, horizon=10, lr=3e-2, n_validation_tasks=32)
    (first_step, before), *_ = result.validation
    assert first_step == 0
    assert result.best_score < 0.85 * before
    assert len(result.meta_losses) == 40
    assert result.seconds > 0


def test_best_weights_in_validation_are_kept(monkeypatch):
    scores, seen = iter([5.0, 3.0, math.inf, 4.0]), []

    def score(rule, *args, **kwargs):
        seen.append(flat_weights(rule))
        return next(scores)

    monkeypatch.setattr(trainer_module, "validation_score", score)
    rule = tiny_rule()
    result = train(rule, n_meta_steps=12)
    assert result.validation == [(0, 5.0), (4, 3.0), (8, math.inf), (12, 4.0)]
    assert (result.best_step, result.best_score) == (4, 3.0)
    assert result.rule is rule
    assert torch.equal(flat_weights(rule), seen[1])
    assert not torch.equal(seen[1], seen[3])


class Diverging(RandomQuadratic):
    """Quadratics whose losses leave the numbers."""

    def __init__(self, end):
        super().__init__(3)
        self.end = end

    def loss(self, params, batch):
        return super().loss(params, batch) + self.end


@pytest.mark.parametrize("end", [math.inf, math.nan])
def test_diverged_validation_scores_infinity_and_never_counts_as_best(end):
    rule = tiny_rule()
    before = flat_weights(rule)
    config = MetaConfig(**CONFIG, n_meta_steps=4)
    with pytest.warns(RuntimeWarning, match="No validation came out finite"):
        result = meta_train(rule, TASK, config, validation_task=Diverging(end), progress_bar=False)
    assert result.validation == [(0, math.inf), (4, math.inf)]
    assert (result.best_step, result.best_score) == (0, math.inf)
    assert torch.equal(flat_weights(rule), before)


def test_validation_is_the_mean_loss_over_the_last_tenth_of_the_full_horizon():
    rule, indices = tiny_rule(), torch.arange(4)
    score = trainer_module.validation_score(rule, TASK, indices=indices, horizon=20, seed=3)
    with torch.no_grad():
        losses = unroll(rule, TASK, indices=indices, n_steps=20, seed=3, total_steps=20).losses
    assert score == pytest.approx(losses[-2:].mean().item())


class Watched(RandomQuadratic):
    """Quadratics that remember which of them were asked for."""

    def __init__(self):
        super().__init__(3)
        self.names = []

    def init_params(self, indices, seed):
        self.names.append({(index, seed) for index in indices.tolist()})
        return super().init_params(indices, seed)


@pytest.mark.parametrize("seed", [0, 7])
def test_validation_tasks_are_never_training_tasks(seed):
    task = Watched()
    config = MetaConfig(**CONFIG, n_meta_steps=8, seed=seed)
    meta_train(tiny_rule(), task, config, progress_bar=False)
    validation = task.names[0]
    training = [names for names in task.names if names != validation]
    assert len(training) == 8
    assert len(task.names) == 8 + 3
    assert not any(validation & names for names in training)
    assert len(set().union(*training)) == 8 * CONFIG["n_tasks"]  # no task is seen twice


def test_validation_is_on_the_same_tasks_whatever_the_seed():
    unmoved = MetaConfig(**{**CONFIG, "lr": 1e-30}, n_meta_steps=2)
    results = [
        meta_train(tiny_rule(), TASK, dataclasses.replace(unmoved, seed=seed), progress_bar=False) for seed in (0, 7)
    ]
    assert results[0].validation == results[1].validation
    assert results[0].meta_losses != results[1].meta_losses


def test_validation_task_may_be_another():
    other = Watched()
    meta_train(tiny_rule(), TASK, MetaConfig(**CONFIG, n_meta_steps=4), validation_task=other, progress_bar=False)
    assert len(other.names) == 2


@pytest.mark.parametrize("options", [{}, {"truncation": 2, "schedule": "constant"}], ids=["full", "truncated"])
def test_resumed_run_gives_the_result_of_the_uninterrupted_one(tmp_path, options):
    uninterrupted = tiny_rule()
    expected = train(uninterrupted, n_meta_steps=12, **options)
    lengths = []
    while not lengths or lengths[-1] < 12:
        rule = tiny_rule()
        result = train(rule, tmp_path, n_meta_steps=12, stop_after=0, **options)
        lengths.append(len(result.meta_losses))
        assert len(lengths) <= 4, f"no progress: {lengths}"
    assert len(lengths) > 1
    assert result.meta_losses == expected.meta_losses
    assert result.validation == expected.validation
    assert (result.best_step, result.best_score) == (expected.best_step, expected.best_score)
    assert torch.equal(flat_weights(rule), flat_weights(uninterrupted))


def test_stopped_run_has_reached_a_validation_and_its_checkpoint(tmp_path):
    result = train(tiny_rule(), tmp_path, n_meta_steps=12, stop_after=0)
    assert len(result.meta_losses) == 4
    assert [step for step, _ in result.validation] == [0, 4]
    assert (tmp_path / "checkpoint.pt").exists()


def test_finished_run_is_not_repeated(tmp_path):
    first = train(tiny_rule(), tmp_path, n_meta_steps=4)
    rule = tiny_rule()
    again = train(rule, tmp_path, n_meta_steps=4)
    assert again.meta_losses == first.meta_losses
    assert torch.equal(flat_weights(rule), flat_weights(first.rule))


def test_interrupted_writing_leaves_the_last_checkpoint_whole(tmp_path, monkeypatch):
    expected = train(tiny_rule(), n_meta_steps=8)
    save, n_saved = torch.save, []

    def interrupted(checkpoint, path):
        n_saved.append(path)
        save(checkpoint, path)
        if len(n_saved) == 2:
            path.write_bytes(path.read_bytes()[:100])
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(tiny_rule(), tmp_path, n_meta_steps=8)
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert len(checkpoint["result"]["meta_losses"]) == 4
    result = train(tiny_rule(), tmp_path, n_meta_steps=8)
    assert result.meta_losses == expected.meta_losses
    assert [path.name for path in tmp_path.glob("*checkpoint*")] == ["checkpoint.pt"]


@pytest.mark.parametrize("n_bytes", [0, 10, 2000])
def test_damaged_checkpoint_is_refused_by_its_name(tmp_path, n_bytes):
    train(tiny_rule(), tmp_path, n_meta_steps=4)
    path = tmp_path / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:n_bytes])
    with pytest.raises(
        ValueError, match=r"`folder` should be empty or hold a whole checkpoint. Found `.*checkpoint.pt`"
    ):
        train(tiny_rule(), tmp_path, n_meta_steps=4)


def test_each_resumed_piece_has_its_own_time(tmp_path, monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(trainer_module.time, "perf_counter", lambda: float(next(clock)))
    run = {"n_meta_steps": 200, "validate_every": 4, "stop_after": 6}
    first, second, third = (len(train(tiny_rule(), tmp_path, **run).meta_losses) for _ in range(3))
    assert third < 200
    # the first piece validates once before it begins
    assert third - second == second - first == first + 4


def test_run_that_learned_nothing_says_so():
    rule = tiny_rule()
    with torch.no_grad():
        next(rule.parameters()).fill_(math.nan)
    with pytest.warns(RuntimeWarning, match="No validation came out finite"):
        result = train(rule, n_meta_steps=2)
    assert result.n_skipped_nonfinite == 2


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("x", TASK, None), "`rule` should be of class UpdateRule. Found `'x'`"),
        ((PortHamiltonianUpdate, TASK, None), "`rule` should be of class UpdateRule"),
        ((SGDUpdate(), None, None), "`task` should be of class Task or Mixture. Found `None`"),
        ((SGDUpdate(), TASK, {"lr": 1.0}), "`config` should be of class MetaConfig. Found `{'lr': 1.0}`"),
    ],
)
def test_arguments_of_another_kind_are_refused(arguments, match):
    with pytest.raises(TypeError, match=match):
        meta_train(*arguments)


def test_checkpoint_of_another_run_is_refused_by_what_changed(tmp_path):
    train(tiny_rule(), tmp_path, n_meta_steps=4)
    kept = (tmp_path / "checkpoint.pt").read_bytes()
    message = r"`folder` should be empty or hold a checkpoint of the same run. Found `.*\.pt` with another "
    with pytest.raises(ValueError, match=message + "`config`; choose another folder or delete it"):
        train(tiny_rule(), tmp_path, n_meta_steps=4, clip=0.1)
    with pytest.raises(ValueError, match=message + "`rule config`;"):
        train(tiny_rule(decay=0.5), tmp_path, n_meta_steps=4)
    with pytest.raises(ValueError, match=message + "`rule class`, `rule config`, .*`initial weights`;"):
        train(HamiltonianUpdate(), tmp_path, n_meta_steps=4)
    config = MetaConfig(**CONFIG, n_meta_steps=4)
    with pytest.raises(ValueError, match=message + "`task`, `validation task`;"):
        meta_train(tiny_rule(), RandomQuadratic(5), config, folder=tmp_path, progress_bar=False)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def test_scalars_are_written_for_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    result = train(tiny_rule(), tmp_path, n_meta_steps=8)
    events = EventAccumulator(str(tmp_path)).Reload()
    wanted = {"meta/loss", "meta/gradient_norm", "meta/lr", "validation/score"}
    assert wanted <= set(events.Tags()["scalars"])
    # a meta-step is counted from one under every name; the score before the first has number zero
    assert [e.step for e in events.Scalars("meta/loss")] == list(range(1, 9))
    for name in ("meta/gradient_norm", "meta/lr"):
        assert [e.step for e in events.Scalars(name)] == list(range(1, 9))
    scores = events.Scalars("validation/score")
    assert [e.step for e in scores] == [step for step, _ in result.validation]
    assert [e.value for e in scores] == pytest.approx([score for _, score in result.validation])


def test_interrupt_does_not_wait_for_scalars_for_ever(tmp_path, monkeypatch):
    from torch.utils.tensorboard import SummaryWriter

    def interrupted(*args):
        raise KeyboardInterrupt

    over = threading.Event()
    monkeypatch.setattr(trainer_module, "_PATIENCE", 0.1)
    monkeypatch.setattr(SummaryWriter, "add_scalar", interrupted)
    monkeypatch.setattr(SummaryWriter, "close", lambda writer: over.wait(30))
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        train(tiny_rule(), tmp_path, n_meta_steps=4)
    assert time.monotonic() - began < 20
    over.set()


def test_nothing_is_written_without_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(tiny_rule(), n_meta_steps=4)
    assert list(tmp_path.iterdir()) == []


def test_progress_bar_is_shown(capsys):
    meta_train(tiny_rule(), TASK, MetaConfig(**CONFIG, n_meta_steps=4))
    assert "meta-training: 100%" in capsys.readouterr().err
    train(tiny_rule(), n_meta_steps=4)
    assert capsys.readouterr().err == ""


def test_rule_knows_the_progress_of_a_truncated_run(monkeypatch):
    seen, forward = [], PortHamiltonianUpdate.forward

    def watched(self, grad, state, **signals):
        seen.append(signals["progress"].item())
        return forward(self, grad, state, **signals)

    monkeypatch.setattr(PortHamiltonianUpdate, "forward", watched)
    train(tiny_rule(), n_meta_steps=3, truncation=2)
    # float32 fractions of five steps, over validation, the three segments, and validation again
    assert seen == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8] * 3)


def test_rule_without_weights_is_refused():
    with pytest.raises(ValueError, match=r"`rule` should be one with parameters to learn\. Found `rule = .SGDUpdate"):
        train(SGDUpdate(), n_meta_steps=4)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_meta_steps": 0}, "`n_meta_steps` should be a positive integer. Found `n_meta_steps = 0`"),
        ({"n_tasks": 2.0}, "`n_tasks` should be a positive integer. Found `n_tasks = 2.0`"),
        ({"horizon": -1}, "`horizon` should be a positive integer. Found `horizon = -1`"),
        ({"validate_every": 0}, "`validate_every` should be a positive integer"),
        ({"n_validation_tasks": 0}, "`n_validation_tasks` should be a positive integer"),
        ({"lr": 0.0}, "`lr` should be a positive number. Found `lr = 0.0`"),
        ({"clip": -1.0}, "`clip` should be a positive number. Found `clip = -1.0`"),
        ({"outlier_factor": math.nan}, "`outlier_factor` should be a positive number. Found `outlier_factor = nan`"),
        (
            {"schedule": "cosine"},
            "`schedule` should be one of one-cycle, constant. Found `schedule = 'cosine'`",
        ),
        ({"objective": "late"}, "`objective` should be a meta-loss, such as MetaObjective.*Found `objective = 'late'`"),
        ({"gain_margin": 0.5}, "`gain_margin` should be a number of at least 1. Found `gain_margin = 0.5`"),
    ],
)
def test_settings_out_of_range_are_refused_by_name_and_value(options, match):
    with pytest.raises(ValueError, match=match):
        MetaConfig(**options)


def test_gain_margin_scales_the_updates_of_training_and_not_those_of_validation(monkeypatch):
    scales = []

    def recorded(*args, update_scale=1.0, **kwargs):
        scales.append(update_scale)
        return unroll(*args, update_scale=update_scale, **kwargs)

    monkeypatch.setattr("odeopt.meta.estimators.backpropagation.unroll", recorded)
    monkeypatch.setattr("odeopt.meta.validation.unroll", recorded)
    train(tiny_rule(), n_meta_steps=1, gain_margin=1.5)
    assert scales == [1.0, 1.5, 1.0]


@pytest.mark.parametrize(
    ("make", "options", "match"),
    [
        (
            Backpropagation,
            {"truncation": 0},
            "`truncation` should be a positive integer or None. Found `truncation = 0`",
        ),
        (Backpropagation, {"truncation": 2.5}, "`truncation` should be a positive integer or None"),
        (Backpropagation, {"detach": 1}, "`detach` should be true or false. Found `detach = 1`"),
        (MetaObjective, {"weights": "first"}, "`weights` should be one of uniform, linear, late, last"),
        (MetaObjective, {"log": "yes"}, "`log` should be true or false. Found `log = 'yes'`"),
        (MetaObjective, {"relative": 0}, "`relative` should be true or false. Found `relative = 0`"),
        (MetaObjective, {"eps": 0.0}, "`eps` should be a positive number. Found `eps = 0.0`"),
    ],
)
def test_options_of_estimator_and_objective_are_refused_by_name_and_value(make, options, match):
    with pytest.raises(ValueError, match=match):
        make(**options)


@pytest.mark.parametrize(
    "estimator",
    [
        Backpropagation(truncation=7, detach=True),
        Hybrid(dampings=(1.0, 0.9), evolution=EvolutionStrategies(n_pairs=3, clip=0.5)),
        PersistentEvolutionStrategies(n_groups=2),
    ],
    ids=lambda estimator: estimator.key,
)
def test_settings_are_described_as_files_have_them(estimator, tmp_path):
    config = MetaConfig(horizon=7, estimator=estimator, objective=MetaObjective("last", log=False))
    table = json.loads(json.dumps(config.describe()))
    training = {name: {k: v for k, v in value.items() if v is not None} if isinstance(value, dict) else value
                for name, value in table.items()}  # fmt: skip
    content = {"rule": {"class": "hamiltonian"}, "task": {"class": "RandomQuadratic"}, "training": training}
    assert make_config(tmp_path / "again.toml", content).training == config


def test_training_does_not_depend_on_torchs_random_state_and_leaves_it_alone():
    weights = []
    for seed in (1, 2):
        rule = tiny_rule()
        before = torch.manual_seed(seed).get_state()
        train(rule, n_meta_steps=4)
        assert torch.equal(torch.get_rng_state(), before)
        weights.append(flat_weights(rule))
    assert torch.equal(*weights)


@pytest.mark.parametrize(
    ("objective", "match"),
    [
        (
            MetaObjective(),
            r"Parameter `log` should be False where losses are negative, here -[\d.]+. Found `log = True`",
        ),
        (MetaObjective(log=False, relative=True), r"Parameter `relative` should be False where losses are negative"),
    ],
)
def test_negative_losses_are_refused_where_their_sign_would_turn(objective, match):
    config = MetaConfig(n_meta_steps=2, n_tasks=4, horizon=4, n_validation_tasks=2, objective=objective)
    with pytest.raises(ValueError, match=match):
        meta_train(tiny_rule(), MonkeySaddle(offset=1.0), config, progress_bar=False)


def test_a_mixture_with_negative_losses_is_refused():
    config = MetaConfig(n_meta_steps=2, n_tasks=2, objective=MetaObjective(log=False))
    mixture = Mixture([TaskFamily(MonkeySaddle, {"offset": 1.0})], horizons=(4, 4))
    with pytest.raises(ValueError, match="`task` should have losses above zero: validation of a mixture"):
        meta_train(tiny_rule(), mixture, config, progress_bar=False)


def test_a_rule_that_is_trained_further_has_no_account_of_what_it_was():
    config = MetaConfig(n_meta_steps=3, n_tasks=2, horizon=3, validate_every=1, n_validation_tasks=2, lr=1e-2)
    for lr, is_changed in ((1e-2, True), (1e3, False)):  # steps that only make it worse leave it as it was
        rule = tiny_rule()
        rule.trained_for = {"horizon": 9, "task": "before"}
        result = meta_train(rule, RandomQuadratic(3), dataclasses.replace(config, lr=lr), progress_bar=False)
        assert (result.best_step > 0) == is_changed
        assert (rule.trained_for is None) == is_changed
