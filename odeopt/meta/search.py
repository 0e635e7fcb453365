"""search(): hyperparameters of meta-training, tried one set after the other, and the rule that they make."""

from __future__ import annotations

import math
import os
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm.auto import tqdm

from odeopt.files import write_json
from odeopt.meta.config import MetaResult
from odeopt.meta.files import Config
from odeopt.meta.search_files import SearchConfig
from odeopt.meta.study import OpenTrial, Study, open_study
from odeopt.meta.trainer import meta_train
from odeopt.rules.base import UpdateRule
from odeopt.tasks import Mixture, Task

_STATES = ("complete", "pruned", "diverged", "failed")


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

    def as_json(self) -> dict[str, Any]:
        """Fields that JSON can hold, which has no infinity."""
        return {**self._asdict(), "score": self.score if math.isfinite(self.score) else None}

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> Trial:
        """Read what :meth:`as_json` gives."""
        return cls(**{**fields, "score": math.inf if fields["score"] is None else fields["score"]})


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
        """Whether all trials have ended."""
        return len(self.trials) >= self.config.n_trials

    @property
    def ranked(self) -> list[Trial]:
        """The trials, best first: complete ones by their score, then those that were pruned, diverged and failed."""
        return sorted(self.trials, key=lambda trial: (_STATES.index(trial.state), trial.score, trial.number))

    @property
    def best(self) -> Trial | None:
        """The complete trial with the least score; None where no trial is complete."""
        first = next(iter(self.ranked), None)
        return first if first is not None and first.state == "complete" else None

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
        folder: Where the study goes (``study.db``, SQLite), the table (``trials.json``), the best weights
            (``best.pt``), and for each trial TensorBoard scalars and, until it ends, a checkpoint. A study found there
            is continued.
        data_dir: Where image datasets lie; see :func:`odeopt.tasks.load_dataset`.
        device: Where to train.
        stop_after: Seconds after which this call stops at the next validation, to be resumed later.
        progress_bar: Whether to show one.

    Returns:
        The result, also when stopped early.

    Raises:
        MissingOptunaError: If Optuna is not installed.
        ValueError: If a value does not fit the tasks; if ``folder`` holds the study of another search, one that cannot
            be read, or one that another process is working on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open_study(config, folder) as study:
        run = _Search(config, study, folder, data_dir, torch.device(device))
        run.check_tasks()
        if len(run.trials) < config.n_trials:
            run.go_on(stop_after, progress_bar)
        run.write_table()
        return run.result()


class _Search:
    """The trials of a study, run in order."""

    def __init__(
        self,
        config: SearchConfig,
        study: Study,
        folder: Path,
        data_dir: str | os.PathLike | None,
        device: torch.device,
    ) -> None:
        self.config, self.study, self.folder = config, study, folder
        self.data_dir, self.device = data_dir, device
        self.trials = [Trial.from_json(row) for row in study.rows()]
        self.task: tuple[dict[str, Any], Task | Mixture] | None = None

    @property
    def best(self) -> Trial | None:
        return SearchResult(self.config, tuple(self.trials)).best

    def check_tasks(self) -> None:
        """Build every task that the values to be tried ask for, before any work, and compare them with the study's."""
        seen, fingerprints = [], []
        for values in self.config.probes():
            config = self.config.at(values)
            if config.task not in seen:
                seen.append(config.task)
                fingerprints.append(self.task_of(config).fingerprint())
        self.study.check_tasks(fingerprints)

    def task_of(self, config: Config) -> Task | Mixture:
        """The tasks of a trial, kept until others are wanted."""
        if self.task is None or self.task[0] != config.task:
            self.task = config.task, config.build_task(data_dir=self.data_dir, device=self.device)
        return self.task[1]

    def go_on(self, stop_after: float | None, progress_bar: bool) -> None:
        """Make the trials that are left, or as many as there is time for."""
        began, n_wanted = time.perf_counter(), self.config.n_trials
        with tqdm(
            total=n_wanted, initial=len(self.trials), disable=not progress_bar, desc="search", unit=" trials"
        ) as bar:
            while len(self.trials) < n_wanted:
                seconds_left = None if stop_after is None else stop_after - (time.perf_counter() - began)
                trial = self.run(self.study.ask(), seconds_left, bar)
                if trial is None:
                    return
                self.trials.append(trial)
                self.write_table()
                bar.update()
                if stop_after is not None and time.perf_counter() - began > stop_after:
                    return

    def run(self, asked: OpenTrial, seconds_left: float | None, bar: tqdm) -> Trial | None:
        """Train, and keep what comes of it; None where there was no time to end the trial."""
        number = len(self.trials) + 1
        folder = self.folder / f"trial-{number:03d}"
        checkpoint = folder / "checkpoint.pt"
        if not asked.is_continued:  # then what lies there is of a study that was deleted
            checkpoint.unlink(missing_ok=True)
        trial = Trial(number, asked.values, "complete")
        try:
            config = self.config.at(asked.values)
            rule = config.build_rule().to(self.device)
            result, state, reason = self.train(config, rule, asked, folder, seconds_left, bar)
        except ValueError as error:
            if asked.is_continued and checkpoint.exists():  # one that cannot be continued, says the error
                raise
            # values that are good one by one and not together
            trial = trial._replace(state="failed", reason=str(error).rstrip("."))
        else:
            if state is None:
                return None
            account = {"score": result.best_score, "best_step": result.best_step, "seconds": round(result.seconds, 3)}
            trial = trial._replace(state=state, reason=reason, n_meta_steps=len(result.meta_losses), **account)
            if state == "complete" and (self.best is None or trial.score < self.best.score):
                tried = {"trial": number, "values": trial.values}
                self.write_best(rule, {**config.trained_for(result), "search": tried})
        asked.end(trial.as_json())
        checkpoint.unlink(missing_ok=True)
        return trial

    def train(
        self,
        config: Config,
        rule: UpdateRule,
        asked: OpenTrial,
        folder: Path,
        seconds_left: float | None,
        bar: tqdm,
    ) -> tuple[MetaResult, str | None, str]:
        """Train until the end or until there is a reason to stop: the state, None if it is time, and the reason."""
        n_wanted, broken_off = config.training.n_meta_steps, []
        best = f", best {self.best.score:.4f}" if self.best is not None else ""

        def on_validation(step: int, score: float) -> bool:
            bar.set_postfix_str(f"meta-step {step} of {n_wanted}{best}")
            is_worse = asked.report(step, score)
            if step > 0 and not math.isfinite(score):  # an untrained rule may diverge and learn not to
                broken_off.append(("diverged", f"validation not finite at meta-step {step}"))
            elif is_worse and step < n_wanted:
                broken_off.append(("pruned", f"worse than the median at meta-step {step}"))
            return bool(broken_off)

        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "No validation came out finite", RuntimeWarning)
            result = meta_train(
                rule,
                self.task_of(config),
                config.training,
                folder=folder,
                stop_after=seconds_left,
                progress_bar=False,
                on_validation=on_validation,
            )
        if broken_off:
            return result, *broken_off[0]
        return result, "complete" if len(result.meta_losses) == n_wanted else None, ""

    def write_best(self, rule: UpdateRule, trained_for: dict[str, Any]) -> None:
        temporary = self.folder / "best.tmp"
        torch.save({"weights": rule.state_dict(), "trained_for": trained_for}, temporary)
        os.replace(temporary, self.folder / "best.pt")

    def write_table(self) -> None:
        ranked = SearchResult(self.config, tuple(self.trials)).ranked
        content = {"config": self.config.name, "n_trials": self.config.n_trials, "settings": self.config.identity()}
        content["trials"] = [trial.as_json() for trial in ranked]
        write_json(self.folder / "trials.json", content)

    def result(self) -> SearchResult:
        trials = tuple(self.trials)
        if self.best is None:
            return SearchResult(self.config, trials)
        path = self.folder / "best.pt"
        try:
            kept = torch.load(path, weights_only=True, map_location="cpu")
            number = kept["trained_for"]["search"]["trial"]
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            number, kept, reason = None, None, str(error).splitlines()[0]
        else:
            reason = f"it is of trial {number}"
        if number != self.best.number:
            raise ValueError(
                f"Parameter `folder` should hold the weights of the best trial, {self.best.number}. Found `{path}`: "
                f"{reason}; delete the folder to start anew."
            )
        rule = self.config.at(self.best.values).build_rule()
        rule.load_state_dict(kept["weights"])
        return SearchResult(self.config, trials, rule, kept["trained_for"])
