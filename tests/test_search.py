"""Searches: what is tried and in which order, what ends a trial, what survives an interruption, and the command."""

import contextlib
import functools
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rule_toys import fields_of, flat_weights
from search_toys import RANGES, write, written

import odeopt
from odeopt.__main__ import main
from odeopt.checks import MissingExtraError
from odeopt.meta import meta_train
from odeopt.meta import trainer as trainer_module
from odeopt.meta.search import search
from odeopt.meta.search_files import load_search
from odeopt.tasks import RandomQuadratic

# the extra that searches need; where it is not installed, the other tests can still be collected
optuna, sqlalchemy = pytest.importorskip("optuna"), pytest.importorskip("sqlalchemy")
script = pytest.importorskip("alembic.script")


def go(config, folder, **options):
    return search(config, folder, progress_bar=False, **options)


def told(result):
    """All that a search says, but for the time that it took."""
    return [trial._replace(seconds=0.0) for trial in result.trials]


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Let SQLite not wait for the disk, Alembic read its scripts once, and TensorBoard write nothing."""

    def hasten(connection, record):
        connection.execute("PRAGMA synchronous = OFF")

    class Writer:
        def __init__(self, folder): ...
        def add_scalar(self, name, value, step): ...
        def close(self): ...

    sqlalchemy.event.listen(sqlalchemy.engine.Engine, "connect", hasten)
    scripts = functools.cache(lambda: script.ScriptDirectory(Path(optuna.__file__).parent / "storages/_rdb/alembic"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script.ScriptDirectory, "from_config", lambda config: scripts())
        patch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
        yield
    sqlalchemy.event.remove(sqlalchemy.engine.Engine, "connect", hasten)


@pytest.fixture
def scores(monkeypatch):
    """Train nothing, and validate by a script: a function of the settings of the trial and the meta-step."""

    def install(script):
        def episode(self):
            self.result.meta_losses.append(0.0)
            yield 0.0

        def validate(self, step):
            score = script(self.config, step)
            self.result.validation.append((step, score))
            if score < self.result.best_score:
                self.result.best_score, self.result.best_step = score, step

        monkeypatch.setattr(trainer_module._Run, "episode", episode)
        monkeypatch.setattr(trainer_module._Run, "validate", validate)

    return install


@pytest.fixture
def steps(monkeypatch):
    """A list that grows by one with each meta-step."""
    taken, update = [], trainer_module._Run._update

    def counted(self, *args):
        taken.append(1)
        return update(self, *args)

    monkeypatch.setattr(trainer_module._Run, "_update", counted)
    return taken


# -------------------- what is tried


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The tiny search, never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return go(load_search(write(folder)), folder / "study")


def test_grid_is_the_product_each_once_and_trains_as_its_configuration_says(whole):
    product = list(itertools.product([0.1, 0.01], [0.03, 0.3]))
    assert [tuple(trial.values.values()) for trial in whole.trials] == product
    assert {trial.state for trial in whole.trials} == {"complete"}
    for trial in whole.trials:
        alone = whole.config.at(trial.values)
        assert (alone.training.lr, alone.rule["initial_kappa"]) == tuple(trial.values.values())
        rule = alone.build_rule()
        trained = meta_train(rule, alone.build_task(), alone.training, progress_bar=False)
        if trial == whole.best:
            assert torch.equal(flat_weights(whole.rule), flat_weights(rule))
        assert (trial.score, trial.best_step) == (trained.best_score, trained.best_step)
        assert trial.n_meta_steps == 2
    best = whole.best
    assert best.score == min(trial.score for trial in whole.trials)
    assert whole.trained_for["search"] == {"trial": best.number, "values": best.values}
    assert whole.trained_for["training"]["lr"] == best.values["training.lr"]


@pytest.mark.parametrize("stop_after", [math.inf, math.nan, "1", True])
def test_time_that_is_no_number_is_refused_before_any_trial(tmp_path, whole, stop_after):
    with pytest.raises(ValueError, match=f"`stop_after` should be a number .*Found `stop_after = {stop_after!r}`"):
        go(whole.config, tmp_path / "study", stop_after=stop_after)
    assert not (tmp_path / "study").exists()


def test_calls_that_could_train_nothing_are_refused_before_any_trial(tmp_path, whole):
    with torch.no_grad(), pytest.raises(ValueError, match=r"Found `torch.is_grad_enabled\(\) = False`"):
        go(whole.config, tmp_path / "study")
    with pytest.raises(TypeError, match=r"`config` should be of class SearchConfig. Found one of class str"):
        go("tiny.toml", tmp_path / "study")
    assert not (tmp_path / "study").exists()


def test_the_rule_of_the_best_trial_has_the_options_of_its_use(tmp_path, whole):
    text = write(tmp_path).read_text().replace("[search]", "[use]\nalignment_rate = 1.5\n\n[search]")
    result = go(load_search(write(tmp_path, text)), tmp_path / "used")
    assert torch.equal(flat_weights(result.rule), flat_weights(whole.rule))
    assert (result.rule.alignment_rate, whole.rule.alignment_rate) == (1.5, 0.0)
    assert result.trained_for["use"] == {"alignment_rate": 1.5}
    assert "use" not in whole.trained_for


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_ranges_are_kept_and_seeds_decide(tmp_path, scores, sampler):
    scores(lambda config, step: config.lr)

    def values(seed, folder):
        options = {"startup_trials": 2} if sampler == "tpe" else {}
        config = written(tmp_path, sampler, 4, RANGES, seed=seed, **options)
        return [trial.values for trial in go(config, tmp_path / folder).trials]

    first = values(1, "first")
    assert first == values(1, "again")
    assert first != values(2, "other")
    for tried in first:
        assert 1e-4 <= tried["training.lr"] <= 1e-1
        assert tried["training.n_tasks"] in (1, 2, 3)
    assert len({tried["training.lr"] for tried in first}) == 4


def test_tpe_goes_where_scores_are_low_after_its_start(tmp_path, scores):
    scores(lambda config, step: abs(math.log10(config.lr) + 2))
    config = written(tmp_path, "tpe", 16, RANGES, startup_trials=6)
    distances = sorted(trial.score for trial in go(config, tmp_path / "study").trials[8:])
    assert distances[4] < 0.4  # draws that look at nothing would have a median of 0.75


def test_lists_tables_and_truth_values_pass_through_the_study(tmp_path, scores):
    scores(lambda config, step: float(config.objective.log))
    estimators = [{"class": "backpropagation"}, {"class": "backpropagation", "truncation": 1}]
    tables = '[{class = "backpropagation"}, {class = "backpropagation", truncation = 1}]'
    space = f"rule.hidden = [[3], [4, 2]]\ntraining.estimator = {tables}\ntraining.objective.log = [true, false]\n"
    result = go(written(tmp_path, space=space), tmp_path / "study")
    tried = [tuple(trial.values.values()) for trial in result.trials]
    assert tried == list(itertools.product([[3], [4, 2]], estimators, [True, False]))
    assert list(result.rule.config["hidden"]) == result.best.values["rule.hidden"]
    again = go(written(tmp_path, space=space), tmp_path / "study")
    assert told(again) == told(result)


def test_optuna_is_as_talkative_afterwards_as_before_and_silent_meanwhile(tmp_path, capfd):
    before = optuna.logging.get_verbosity()
    go(load_search(write(tmp_path), n_trials=1), tmp_path / "study")
    assert optuna.logging.get_verbosity() == before
    assert capfd.readouterr() == ("", "")


# -------------------- interruptions

TPE = {"sampler": "tpe", "n_trials": 4, "space": RANGES, "startup_trials": 2, "pruner": "median"}


def check_pieces(whole, config, folder, steps, more_calls_than, **options):
    """Search in pieces until all is done; it ends as the whole one, and nothing is computed twice."""
    result, n_calls = None, 0
    steps.clear()
    while result is None or not result.is_finished:
        n_calls += 1
        assert n_calls < 20  # each gets somewhere
        with contextlib.suppress(KeyboardInterrupt):
            result = go(config, folder, **options)
    assert n_calls > more_calls_than
    assert told(result) == told(whole)
    assert torch.equal(flat_weights(result.rule), flat_weights(whole.rule))
    assert steps == sum(trial.n_meta_steps for trial in whole.trials) * [1]
    kept = json.loads((folder / "trials.json").read_text())["trials"]
    assert [(row["number"], row["score"]) for row in kept] == [(t.number, t.score) for t in whole.ranked]


def interrupt(monkeypatch, target, name, when, every=2):
    """Make every so many calls of a method end as by Ctrl-C, before or after its work."""
    original, calls = getattr(target, name), itertools.count(1)

    def interrupted(*args, **options):
        is_now = next(calls) % every == 0
        if is_now and when == "before":
            raise KeyboardInterrupt
        result = original(*args, **options)
        if is_now:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(target, name, interrupted)


def test_search_that_is_stopped_in_its_trials_ends_as_the_uninterrupted_one(tmp_path, whole, steps):
    check_pieces(whole, whole.config, tmp_path, steps, 4, stop_after=0)


def test_search_that_is_killed_in_its_trials_ends_as_the_uninterrupted_one(tmp_path, monkeypatch, whole, steps):
    interrupt(monkeypatch, trainer_module._Run, "save", "after")
    check_pieces(whole, whole.config, tmp_path, steps, 3)


def test_what_is_proposed_and_pruned_does_not_depend_on_interruptions(tmp_path, monkeypatch, steps):
    config = written(tmp_path, **TPE)
    whole = go(config, tmp_path / "whole")
    interrupt(monkeypatch, trainer_module._Run, "save", "after")
    check_pieces(whole, config, tmp_path / "pieces", steps, 2)


@pytest.mark.parametrize("name", ["set_user_attr", "tell", "report", "set_trial_param"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_search_that_is_killed_between_two_writes_ends_as_the_uninterrupted_one(
    tmp_path, monkeypatch, whole, steps, name, when
):
    owners = {"set_user_attr": optuna.Trial, "tell": optuna.Study, "report": optuna.Trial}
    # what is made anew after an interruption is not interrupted at once again
    every = 5 if name in ("report", "set_trial_param") else 2
    interrupt(monkeypatch, owners.get(name, optuna.storages.InMemoryStorage), name, when, every)
    check_pieces(whole, whole.config, tmp_path, steps, 1)
    # Optuna, whose samplers and pruners look at its own states, holds the same
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 'study.db'}")
    kept = optuna.load_study(study_name=None, storage=storage).trials
    storage.remove_session()
    storage.engine.dispose()
    assert [(trial.state.name, trial.value) for trial in kept] == [("COMPLETE", t.score) for t in whole.trials]


@pytest.mark.parametrize("sampler", ["grid", "tpe"])
@pytest.mark.parametrize("name", ["create_new_trial", "set_trial_param", "set_trial_state_values"])
def test_search_that_is_killed_while_a_trial_is_proposed_ends_as_the_uninterrupted_one(
    tmp_path, monkeypatch, scores, sampler, name
):
    scores(lambda config, step: config.lr)
    # three values per trial: every other write is then within a trial, not always at its end
    third = {"grid": "training.clip = [0.1, 0.2]\n", "tpe": "training.clip = {low = 0.1, high = 0.3}\n"}[sampler]
    space = third + ("training.lr = [0.1, 0.01]\nrule.initial_kappa = [0.3]\n" if sampler == "grid" else RANGES)
    config = written(tmp_path, space=space) if sampler == "grid" else written(tmp_path, **{**TPE, "space": space})
    whole = go(config, tmp_path / "whole")
    interrupt(monkeypatch, trainer_module._Run, "save", "after")  # so that trials are taken up again
    interrupt(monkeypatch, optuna.storages._CachedStorage, name, "after")
    interrupt(monkeypatch, optuna.storages.InMemoryStorage, name, "after", every=7)
    result, n_calls = None, 0
    while result is None or not result.is_finished:
        n_calls += 1
        assert n_calls < 60  # each gets somewhere
        with contextlib.suppress(KeyboardInterrupt):
            result = go(config, tmp_path / "pieces")
    assert told(result) == told(whole)


@pytest.mark.parametrize("n_trials", [1, 2])
def test_study_on_other_data_is_refused_whether_finished_or_not(tmp_path, monkeypatch, scores, n_trials):
    scores(lambda config, step: config.lr)
    config, folder = load_search(write(tmp_path), n_trials=n_trials), tmp_path / "study"
    go(load_search(write(tmp_path), n_trials=1), folder)
    draw = RandomQuadratic.draw
    with monkeypatch.context() as patch:
        patch.setattr(RandomQuadratic, "draw", lambda self, indices, seed: draw(self, indices, seed + 1))
        with pytest.raises(ValueError, match=r"study.db`, whose trials were made on other tasks"):
            go(config, folder)
    assert len(go(config, folder).trials) == n_trials


def test_search_goes_on_to_more_trials_as_if_they_had_been_asked_for_at_once(tmp_path, scores):
    scores(lambda config, step: config.lr)
    path, options = tmp_path / "study", {"sampler": "tpe", "space": RANGES, "startup_trials": 2}
    first = go(written(tmp_path, n_trials=3, **options), path)
    assert len(first.trials) == 3
    second = go(written(tmp_path, n_trials=5, **options), path)
    assert told(second) == told(go(written(tmp_path, n_trials=5, **options), tmp_path / "at once"))
    assert told(second)[:3] == told(first)


def test_checkpoint_of_a_deleted_study_is_not_continued(tmp_path):
    config, folder = load_search(write(tmp_path)), tmp_path / "study"
    assert go(config, folder, stop_after=0).trials == ()
    assert (folder / "trial-001" / "checkpoint.pt").exists()
    (folder / "study.db").unlink()
    other = load_search(write(tmp_path, **{"dim = 3": "dim = 2"}))
    result = go(other, folder)
    assert {trial.state for trial in result.trials} == {"complete"}
    # which holds the best weights
    assert list(folder.glob("*/checkpoint.pt")) == [folder / f"trial-{result.best.number:03d}" / "checkpoint.pt"]


CHANGES = {
    "`training.horizon = 2` in place of 3": {"horizon = 2": "horizon = 3"},
    "`training.seed = None` in place of 1": {"horizon = 2": "horizon = 2\nseed = 1"},
    "`rule.modes = 1` in place of 2": {"modes = 1": "modes = 2"},
    r"`training.lr = \[0.1, 0.01\]` in place of \[0.1, 0.02\]": {"0.1, 0.01]": "0.1, 0.02]"},
    "`search.sampler = 'grid'` in place of 'random'": {'"grid"': '"random"\nn_trials = 6'},
}


def test_study_of_another_search_is_refused_with_the_difference(tmp_path, scores):
    scores(lambda config, step: config.lr)
    folder = tmp_path / "study"
    go(load_search(write(tmp_path), n_trials=1), folder)
    for match, replaced in CHANGES.items():
        config = load_search(write(tmp_path, **replaced))
        with pytest.raises(ValueError, match=f"study of the same search. Found `.*study.db` with {match}; choose"):
            go(config, folder)
    assert len(go(load_search(write(tmp_path), n_trials=2), folder).trials) == 2  # and left as it was


def test_folder_that_cannot_be_used_is_refused(tmp_path):
    config, folder = load_search(write(tmp_path), n_trials=1), tmp_path / "study"
    go(config, folder)
    holder = f"import sqlite3, sys; c = sqlite3.connect({str(folder / 'lock')!r}, isolation_level=None); "
    holder += "c.execute('BEGIN EXCLUSIVE'); print('held', flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", holder], stdin=-1, stdout=-1) as process:
        process.stdout.readline()
        with pytest.raises(OSError, match=r"`folder` should be one .* nothing else works on. Found `.*study`"):
            go(config, folder)
        process.kill()  # which frees it
    assert go(config, folder).is_finished
    (folder / "trial-001" / "checkpoint.pt").write_text("something else")
    with pytest.raises(ValueError, match=r"should .* hold a whole checkpoint. Found `.*trial-001.checkpoint.pt`"):
        go(config, folder)
    (folder / "study.db").write_text("something else, and long enough to be read as a header of SQLite" * 9)
    with pytest.raises(ValueError, match=r"Found `.*study.db`, which cannot be read \(.*\); delete it"):
        go(config, folder)


# -------------------- what ends a trial


def test_pruner_gives_up_what_is_worse_than_the_median_and_saves_its_meta_steps(tmp_path, scores):
    # equal to begin with; then the larger the learning rate, the worse
    scores(lambda config, step: 1.0 + config.lr * (step > 0) - step / 100)
    space = "training.lr = [0.03, 0.01, 0.02, 0.04, 0.001, 0.05]\n"
    found = {}
    for pruner, options in (("none", {}), ("median", {"startup_trials": 3, "warmup_steps": 3})):
        text = written(tmp_path, space=space, pruner=pruner, **options).path.read_text()
        path = write(tmp_path, text, **{"n_meta_steps = 2": "n_meta_steps = 8", "every = 1": "every = 2"})
        found[pruner] = go(load_search(path), tmp_path / pruner)
    assert [trial.state for trial in found["none"].trials] == ["complete"] * 6
    assert [trial.state for trial in found["median"].trials] == ["complete"] * 3 + ["pruned", "complete", "pruned"]
    # the first validation that counts is the first one after three meta-steps
    assert [trial.n_meta_steps for trial in found["median"].trials] == [8, 8, 8, 4, 8, 4]
    assert {trial.reason for trial in found["median"].trials} == {"", "worse than the median at meta-step 4"}
    assert "(4 complete, 2 pruned), 40 meta-steps in all" in found["median"].caption()[0]
    assert found["median"].best.values == found["none"].best.values == {"training.lr": 0.001}
    assert [trial.number for trial in found["median"].ranked] == [5, 2, 3, 1, 4, 6]


def test_trial_that_has_all_its_meta_steps_is_complete_however_bad(tmp_path, scores):
    scores(lambda config, step: config.lr)
    space = "training.lr = [0.01, 0.02, 0.03]\n"
    result = go(written(tmp_path, space=space, pruner="median", startup_trials=1, warmup_steps=2), tmp_path / "study")
    assert [trial.state for trial in result.trials] == ["complete"] * 3


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_divergence_is_a_row_with_its_reason_and_the_search_goes_on(tmp_path, scores, bad):
    scores(lambda config, step: bad if config.lr > 0.05 and step == 1 else 1.0 - config.lr)
    space = "training.lr = [0.01, 0.1, 0.02]\n"
    result = go(written(tmp_path, space=space), tmp_path / "study")
    diverged = result.trials[1]
    assert (diverged.state, diverged.n_meta_steps) == ("diverged", 1)
    assert diverged.reason == "validation not finite at meta-step 1"
    assert [trial.number for trial in result.ranked] == [3, 1, 2]  # last, though it had the best score before
    assert "Trial 2 diverged: validation not finite at meta-step 1." in result.caption()
    assert result.best.number == 3


def test_rule_that_really_diverges_is_a_row_without_a_score(tmp_path):
    result = go(written(tmp_path, space="rule.initial_kappa = [1e30, 0.03]\n"), tmp_path / "study")
    diverged, good = result.trials
    assert (diverged.state, diverged.score, diverged.n_meta_steps) == ("diverged", math.inf, 1)
    assert good.state == "complete"
    rows = json.loads((tmp_path / "study" / "trials.json").read_text())["trials"]
    assert [row["score"] for row in rows] == [good.score, None]
    assert [row[2] for row in result.rows()[1]] == [f"{good.score:.4f}", "none"]


def test_untrained_rule_may_diverge_if_it_learns_not_to(tmp_path, scores):
    scores(lambda config, step: math.inf if step == 0 else 1.0)
    result = go(load_search(write(tmp_path), n_trials=1), tmp_path / "study")
    assert (result.trials[0].state, result.trials[0].score) == ("complete", 1.0)


def test_values_that_do_not_go_together_are_a_row_with_the_reason(tmp_path):
    estimators = ", ".join(f'{{class = "pes", n_pairs = 1, n_groups = {n}}}' for n in (1, 2))
    space = f"training.estimator = [{estimators}]\ntraining.n_tasks = [2, 1]\n"
    result = go(written(tmp_path, "random", 8, space, seed=1), tmp_path / "study")
    failed = [trial for trial in result.trials if trial.state == "failed"]
    tried = {(trial.values["training.estimator"]["n_groups"], trial.values["training.n_tasks"]) for trial in failed}
    assert tried == {(2, 1)}
    assert all("`n_groups` should be at most the number of tasks" in trial.reason for trial in failed)
    assert {trial.state for trial in result.trials if trial not in failed} == {"complete"}
    assert result.best.state == "complete"
    assert told(go(written(tmp_path, "random", 8, space, seed=1), tmp_path / "study")) == told(result)


def test_trial_that_fails_after_an_interruption_is_a_row_as_without_one(tmp_path, scores):
    def script(config, step):
        if step == 2 and config.lr > 0.05:
            raise ValueError("no more")
        return 1.0

    scores(script)
    config = written(tmp_path, space="training.lr = [0.1, 0.01]\n")
    whole = go(config, tmp_path / "whole")
    assert [(trial.state, trial.reason) for trial in whole.trials] == [("failed", "no more"), ("complete", "")]
    assert go(config, tmp_path / "pieces", stop_after=0).trials == ()
    assert told(go(config, tmp_path / "pieces")) == told(whole)


# -------------------- Optuna is not needed for anything else


def test_missing_optuna_is_said_with_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "optuna", None)
    config = write(tmp_path)
    with pytest.raises(MissingExtraError, match=r'Optuna: pip install -c constraints.txt -e "\.\[search\]"'):
        go(load_search(config), tmp_path / "study")
    assert main(["search", "--config", str(config), "--folder", str(tmp_path / "f"), "--out", str(tmp_path / "o")]) == 2
    said = 'python -m odeopt search: Searching needs Optuna: pip install -c constraints.txt -e ".[search]"'
    assert said in capsys.readouterr().err


def test_optuna_is_imported_in_one_file_and_only_when_it_is_called():
    package = Path(odeopt.__file__).parent
    lines = [(path.name, line) for path in package.rglob("*.py") for line in path.read_text().splitlines()]
    found = [(name, line) for name, line in lines if re.match(r"\s*(import|from) (optuna|sqlalchemy|alembic)", line)]
    assert {name for name, _ in found} == {"search_files.py"}
    assert all(line.startswith("    ") for _, line in found)


# -------------------- the command


def command(config, tmp_path, *options):
    out, folder = tmp_path / "out" / "rule.safetensors", tmp_path / "run"
    return main(["search", "--config", str(config), "--out", str(out), "--folder", str(folder), *options])


def test_command_prints_the_table_saves_the_best_rule_and_refuses_to_overwrite(tmp_path, capsys, monkeypatch, whole):
    config, out, best = write(tmp_path), tmp_path / "out" / "rule.safetensors", whole.best
    assert command(config, tmp_path) == 0
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert lines[0].split()[:4] == ["trial", "training.lr", "rule.initial_kappa", "score"]
    cells = [line.split() for line in lines[3:7]]
    assert [(int(row[0]), row[3]) for row in cells] == [(t.number, f"{t.score:.4f}") for t in whole.ranked]
    assert cells[0][1:3] == [f"{value:g}" for value in best.values.values()]
    assert "4 of 4 trials (4 complete), 8 meta-steps in all." in printed
    assert f"saved {out}, the rule of trial {best.number}" in printed
    table = json.loads((tmp_path / "run" / "trials.json").read_text())
    assert table["config"] == "tiny"
    assert [row["number"] for row in table["trials"]] == [trial.number for trial in whole.ranked]
    rule, fields = odeopt.load(out), fields_of(out)
    assert torch.equal(flat_weights(rule), flat_weights(whole.rule))
    assert (fields["horizon"], fields["trained_for"]["search"]["values"]) == (2, best.values)
    kept = out.read_bytes()
    monkeypatch.setattr("odeopt.cli.search.search", None)  # not even begun
    assert command(config, tmp_path) == 2
    assert f"--out` should be a new file, or --overwrite be given. Found `{out}`" in capsys.readouterr().err
    assert out.read_bytes() == kept


def test_stopped_command_saves_no_rule_and_the_same_command_continues(tmp_path, capsys):
    config, out = write(tmp_path), tmp_path / "out" / "rule.safetensors"
    assert command(config, tmp_path, "--trials", "2", "--stop-after", "0") == 0
    assert f"stopped early; the same command continues from {tmp_path / 'run'}" in capsys.readouterr().out
    assert command(config, tmp_path, "--trials", "2", "--stop-after", "0") == 0
    assert "1 of 2 trials (1 complete)" in capsys.readouterr().out
    assert not out.exists()
    assert command(config, tmp_path, "--trials", "2", "--markdown") == 0
    assert "| trial | training.lr | rule.initial_kappa | score |" in (printed := capsys.readouterr().out)
    assert "2 of 2 trials (2 complete), 4 meta-steps in all." in printed
    assert out.exists()
    assert command(config, tmp_path, "--trials", "2", "--overwrite") == 0


def test_results_go_to_runs_under_the_name_of_the_configuration(tmp_path, monkeypatch):
    config = write(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["search", "--config", str(config), "--trials", "1", "--meta-steps", "1"]) == 0
    assert (tmp_path / "runs" / "tiny.safetensors").exists()
    assert (tmp_path / "runs" / "tiny.search" / "study.db").exists()


@pytest.mark.parametrize(
    ("replaced", "match"),
    [
        ({"[0.1, 0.01]": "[0.1, -1]"}, "with `training.lr = -1`"),
        ({"[0.03, 0.3]": "[1e30]"}, "none of the 2 trials of tiny is complete"),
    ],
)
def test_command_fails_with_one_clear_line(tmp_path, capfd, replaced, match):
    assert command(write(tmp_path, **replaced), tmp_path) == 2
    (line,) = [x for x in capfd.readouterr().err.splitlines() if "python -m odeopt search: " in x]
    assert match in line
    assert not (tmp_path / "out" / "rule.safetensors").exists()
