"""search(): hyperparameters of meta-training, tried one set after the other, and the rule that they make."""

from __future__ import annotations

import contextlib
import math
import os
import random
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from odeopt.checks import check_class
from odeopt.files import held, unfit, write_json
from odeopt.meta.config import MetaResult
from odeopt.meta.files import Config, finite
from odeopt.meta.search_files import SearchConfig, import_optuna
from odeopt.meta.trainer import check_call, meta_train
from odeopt.progress import tqdm
from odeopt.rules.base import UpdateRule
from odeopt.tasks import Mixture, Task
from odeopt.tasks.fingerprint import are_alike

if TYPE_CHECKING:
    from odeopt.meta.search_files import optuna

_STUDY = "study.db"
# those of trials, best first, and what Optuna is told: samplers keep away from what diverged as from what was pruned
_STATES = {"complete": "COMPLETE", "pruned": "PRUNED", "diverged": "PRUNED", "failed": "FAIL"}


class Trial(NamedTuple):
    """Outcome of training with one set of values.

    Attributes:
        number: Which trial this is, from 1 on.
        values: What was tried, by dotted names.
        state: ``"complete"``; ``"pruned"``, worse than the others on the way; ``"diverged"``, ended by a validation
            that was not finite; or ``"failed"``, could not be trained.
        score: Best validation score until then; infinite where there is none.
        best_step: The meta-step it comes from.
        n_meta_steps: Meta-steps taken.
        seconds: Time spent on training, over all resumed pieces.
        reason: Why the trial ended, where it is not complete.
    """

    number: int
    values: dict[str, Any]
    state: str
    score: float = math.inf
    best_step: int = 0
    n_meta_steps: int = 0
    seconds: float = 0.0
    reason: str = ""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """Result of a search.

    Attributes:
        config: The search.
        trials: The trials that have ended, in the order in which they were made.
        rule: The rule of the best complete trial; None where there is none.
        trained_for: What an artefact should say of that rule.
    """

    config: SearchConfig
    trials: tuple[Trial, ...]
    rule: UpdateRule | None = None
    trained_for: dict[str, Any] | None = None

    @property
    def is_finished(self) -> bool:
        """True once all trials have ended."""
        return len(self.trials) >= self.config.n_trials

    @property
    def ranked(self) -> list[Trial]:
        """The trials, best first: complete ones by their score, then those that were pruned, diverged and failed."""
        return sorted(self.trials, key=lambda trial: (list(_STATES).index(trial.state), trial.score, trial.number))

    @property
    def best(self) -> Trial | None:
        """The complete trial with the least score; None where no trial is complete."""
        return next((trial for trial in self.ranked if trial.state == "complete"), None)

    def rows(self) -> tuple[list[tuple[str, str]], list[list[str]]]:
        """Headers and cells of a table, best trial first, for :func:`odeopt.report.draw_table`."""
        names = list(self.config.space)
        headers = [("trial", ""), *((name, "") for name in names), ("score", ""), ("at", "[meta-step]"), ("state", "")]
        headers += [("meta-steps", ""), ("time", "[s]")]
        rows = []
        for trial in self.ranked:
            tried = (trial.values[name] for name in names)
            row = [str(trial.number), *(f"{x:.4g}" if isinstance(x, float) else str(x) for x in tried)]
            row += [f"{trial.score:.4f}" if math.isfinite(trial.score) else "none", str(trial.best_step), trial.state]
            rows.append([*row, str(trial.n_meta_steps), f"{trial.seconds:.1f}"])
        return headers, rows

    def caption(self) -> list[str]:
        """Lines that say what the table shows, and why trials broke off."""
        counts = {state: sum(trial.state == state for trial in self.trials) for state in _STATES}
        counted = ", ".join(f"{count} {state}" for state, count in counts.items() if count)
        n_steps = sum(trial.n_meta_steps for trial in self.trials)
        score = "mean loss over the last tenth of the horizon"
        if self.config.sections["task"].get("class") == "Mixture":
            score = "mean logarithm of the loss in the last tenth of the horizon over the first one"
        return [
            f"{len(self.trials)} of {self.config.n_trials} trials ({counted or 'none'}), {n_steps} meta-steps in all.",
            f"Score: {score}, on validation tasks, at the meta-step where it is best.",
            *(f"Trial {t.number} {t.state}: {t.reason}." for t in self.trials if t.state in ("diverged", "failed")),
        ]


def search(
    config: SearchConfig,
    folder: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    stop_after: float | None = None,
    progress_bar: bool = True,
) -> SearchResult:
    """Train a rule with one set of values after the other, and keep the one that validates best.

    Every trial trains with the seed of the configuration: trials differ by their values alone. An interrupted search
    that is continued makes the trials that it would have made, and goes on inside the one that was interrupted.

    Args:
        config: The search, from :func:`odeopt.meta.search_files.load_search`.
        folder: Where the study goes (``study.db``, SQLite), the table (``trials.json``), and for each trial TensorBoard
            scalars and a checkpoint, of which the best trial's is kept. A study found there is continued.
        data_dir: Where image datasets lie; see :func:`odeopt.tasks.load_dataset`.
        device: Where to train.
        stop_after: Seconds after which this call stops at the next validation, to be resumed later.
        progress_bar: Whether to show one.

    Returns:
        The result, also when stopped early.

    Raises:
        MissingExtraError: If Optuna is not installed.
        ValueError: If a value does not fit the tasks; if ``folder`` holds the study of another search, or one that
            cannot be read; if ``stop_after`` is no number, or gradients are disabled.
        OSError: If another process works on ``folder``, or it cannot be written to.
        TypeError: If ``config`` is no :class:`~odeopt.meta.search_files.SearchConfig`.
    """
    check_class("config", config, SearchConfig)
    check_call(stop_after)  # before trials would fail by it
    folder = Path(folder)
    with _opened(config, folder) as study:
        run = _Search(config, study, folder, data_dir, torch.device(device))
        run.check_tasks()
        run.go_on(stop_after, progress_bar)
        run.write_table()
        return run.result()


@dataclass
class _Search:
    """The trials of a study, run in order."""

    config: SearchConfig
    study: optuna.Study
    folder: Path
    data_dir: str | os.PathLike | None
    device: torch.device
    task: tuple[dict[str, Any], Task | Mixture] | None = None

    @property
    def so_far(self) -> SearchResult:
        """The trials that have ended, which the study keeps."""
        return SearchResult(self.config, tuple(Trial(**trial.user_attrs["row"]) for trial in self.ended()))

    def ended(self) -> list[optuna.trial.FrozenTrial]:
        # a study of an earlier version has others, too
        return [trial for trial in self.study.get_trials(deepcopy=False) if trial.state.is_finished()]

    def check_tasks(self) -> None:
        """Build every task that the values to be tried ask for, before any work, and compare them with the study's."""
        seen, fingerprints = [], []
        for values in self.config.probes():
            config = self.config.at(values)
            if config.task not in seen:
                seen.append(config.task)
                fingerprints.append(self.task_of(config).fingerprint())
        kept = self.study.user_attrs.get("tasks")
        if kept is None:
            self.study.set_user_attr("tasks", fingerprints)
        elif not all(map(are_alike, fingerprints, kept)):
            found = ", whose trials were made on other tasks, or on other data; choose another folder or delete it"
            raise unfit(self.folder / _STUDY, "a study of the same search", found)

    def task_of(self, config: Config) -> Task | Mixture:
        """The tasks of a trial, kept until others are wanted."""
        if self.task is None or self.task[0] != config.task:
            self.task = config.task, config.build_task(data_dir=self.data_dir, device=self.device)
        return self.task[1]

    def go_on(self, stop_after: float | None, progress_bar: bool) -> None:
        """Make the trials that are left, or as many as there is time for."""
        began, n_done, n_wanted = time.perf_counter(), len(self.so_far.trials), self.config.n_trials
        with tqdm(total=n_wanted, initial=n_done, disable=not progress_bar, desc="search", unit=" trials") as bar:
            for number in range(n_done, n_wanted):
                seconds_left = None if stop_after is None else stop_after - (time.perf_counter() - began)
                is_late = seconds_left is not None and seconds_left < 0 and number > n_done
                if is_late or not self.run(seconds_left, bar):
                    return
                self.write_table()
                bar.update()

    def ask(self) -> tuple[optuna.Study, optuna.Trial, dict[str, Any]]:
        """Ask for the next trial in a copy of the study, of which nothing is kept until the trial has ended.

        Returns:
            The copy, the trial and the values that are tried in it. They depend on the seed, on the number of the trial
            and on what came of those before it, not on how often the search was interrupted.
        """
        module, config = import_optuna(), self.config
        pruner = module.pruners.NopPruner()
        if config.pruner == "median":
            pruner = module.pruners.MedianPruner(config.startup_trials, config.warmup_steps)
        study = module.create_study(pruner=pruner)
        study.add_trials(self.ended())
        if config.sampler == "grid":
            tried = config.probes()[len(study.trials)]
            study.enqueue_trial({name: repr(value) for name, value in tried.items()})
        asked, values = study.ask(), {}
        study.sampler = self.sampler(asked.number, "")
        _ = asked.relative_params  # drawn here, with a seed of their own: those that the sampler draws together
        for name in config.space:
            study.sampler = self.sampler(asked.number, name)
            values[name] = config.suggest(asked, name)
        return study, asked, values

    def sampler(self, number: int, name: str) -> optuna.samplers.BaseSampler:
        """Make the sampler of a name in a trial, with a seed of its own: a search proposes what it always did."""
        samplers = import_optuna().samplers
        seed = random.Random(f"{self.config.seed}/{number}/{name}").getrandbits(32)
        if self.config.sampler == "tpe":
            return samplers.TPESampler(n_startup_trials=self.config.startup_trials, seed=seed)
        return samplers.RandomSampler(seed)

    def run(self, seconds_left: float | None, bar: tqdm) -> bool:
        """Make the next trial, and keep what comes of it; False where there was no time to end it."""
        study, asked, values = self.ask()
        number, state, reason = asked.number + 1, "complete", ""
        best = "" if self.so_far.best is None else f", best {self.so_far.best.score:.4f}"

        def on_validation(step: int, score: float) -> bool:
            nonlocal state, reason
            bar.set_postfix_str(f"meta-step {step} of {n_wanted}{best}")
            asked.report(score, step)
            if step > 0 and not math.isfinite(score):  # an untrained rule may diverge and learn not to
                state, reason = "diverged", f"validation not finite at meta-step {step}"
            elif asked.should_prune() and step < n_wanted:
                state, reason = "pruned", f"worse than the median at meta-step {step}"
            return state != "complete"

        try:
            config = self.config.at(values)
            n_wanted = config.training.n_meta_steps
            result = self.train(config, number, stop_after=seconds_left, on_validation=on_validation)
        except ValueError as error:
            if self.checkpoint(number).exists() and study.trials[-1].last_step is None:
                raise  # it cannot be continued, says the error
            # values that are good one by one and not together
            trial = Trial(number, values, "failed", reason=str(error).rstrip("."))
        else:
            n_taken, seconds = len(result.meta_losses), round(result.seconds, 3)
            if state == "complete" and n_taken < n_wanted:
                return False
            trial = Trial(number, values, state, result.best_score, result.best_step, n_taken, seconds, reason)
        asked.set_user_attr("row", trial._asdict())
        told = import_optuna().trial.TrialState[_STATES[trial.state]]
        self.study.add_trial(study.tell(asked, trial.score if trial.state == "complete" else None, told))
        return True

    def train(self, config: Config, number: int, **options: Any) -> MetaResult:
        """Train, or go on from the checkpoint of the trial."""
        rule = config.build_rule().to(self.device)
        options |= {"folder": self.checkpoint(number).parent, "progress_bar": False}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No validation came out finite", RuntimeWarning)
            return meta_train(rule, self.task_of(config), config.training, **options)

    def checkpoint(self, number: int) -> Path:
        return self.folder / f"trial-{number:03d}" / "checkpoint.pt"

    def write_table(self) -> None:
        """Write the table, and delete the checkpoints of all trials but the best."""
        result = self.so_far
        rows = [{**trial._asdict(), "score": finite(trial.score)} for trial in result.ranked]
        content = {"config": self.config.name, "n_trials": self.config.n_trials, "settings": self.config.identity()}
        write_json(self.folder / "trials.json", {**content, "trials": rows})
        for trial in result.trials:
            if trial != result.best:
                self.checkpoint(trial.number).unlink(missing_ok=True)

    def result(self) -> SearchResult:
        """Return the trials and the rule of the best one, which its checkpoint holds."""
        found, best = self.so_far, self.so_far.best
        if best is None:
            return found
        config = self.config.at(best.values)
        trained = self.train(config, best.number)
        account = {**config.trained_for(trained), "search": {"trial": best.number, "values": best.values}}
        return replace(found, rule=config.in_use(trained.rule.cpu()), trained_for=account)


@contextlib.contextmanager
def _opened(config: SearchConfig, folder: Path) -> Iterator[optuna.Study]:
    """Open the study in ``study.db``, new or begun before, for this process alone."""
    module, path = import_optuna(), folder / _STUDY
    with contextlib.ExitStack() as stack:
        stack.enter_context(held(folder))
        stack.callback(module.logging.set_verbosity, module.logging.get_verbosity())
        module.logging.set_verbosity(module.logging.ERROR)
        try:
            storage = module.storages.RDBStorage(f"sqlite:///{path}")
            stack.callback(storage.engine.dispose)  # else the file stays open
            stack.callback(storage.remove_session)
            study = module.create_study(storage=storage, study_name="search", load_if_exists=True)
            kept = study.user_attrs.get("settings")
        except Exception as error:  # SQLite's, SQLAlchemy's, Alembic's or Optuna's
            found = f", which cannot be read ({str(error).splitlines()[0]}); delete it to start anew"
            raise unfit(path, "a study", found) from error
        wanted = config.identity()
        if kept is None:
            for checkpoint in folder.glob("trial-*/checkpoint.pt"):  # of a study that was deleted
                checkpoint.unlink()
            study.set_user_attr("settings", wanted)
        elif kept != wanted:
            names = [name for name in {**wanted, **kept} if kept.get(name) != wanted.get(name)]
            changed = ", ".join(f"`{name} = {kept.get(name)!r}` in place of {wanted.get(name)!r}" for name in names)
            raise unfit(path, "a study of the same search", f" with {changed}; choose another folder or delete it")
        yield study
