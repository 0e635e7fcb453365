"""The one door to Optuna: a study in an SQLite file, whose trials are made one after the other and can be resumed."""

from __future__ import annotations

import json
import os
import random
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from odeopt.meta.search_files import Choices, Range, SearchConfig
from odeopt.tasks.fingerprint import are_alike

if TYPE_CHECKING:
    import optuna

_NAME = "search"  # one study per file, whatever the configuration is called


class MissingOptunaError(ImportError):
    """Optuna, which searches need and nothing else does, is not installed."""


@contextmanager
def open_study(config: SearchConfig, folder: str | os.PathLike) -> Iterator[Study]:
    """Open the study of a search in ``folder/study.db``, new or begun before, for this process alone.

    Args:
        config: The search.
        folder: A folder that exists.

    Yields:
        The study.

    Raises:
        MissingOptunaError: If Optuna is not installed.
        ValueError: If the file is damaged, or a study of another search, or another process has it open.
    """
    module, path = _optuna(), Path(folder) / "study.db"
    verbosity = module.logging.get_verbosity()
    module.logging.set_verbosity(module.logging.ERROR)
    try:
        with _locked(path.parent), _stored(module, path) as storage:
            yield Study(module, _checked(module, storage, config, path), config)
    finally:
        module.logging.set_verbosity(verbosity)


class Study:
    """The trials of a search.

    A trial that has ended has a row: what the caller wants to keep, with a ``state`` and a ``score``. One that has
    none was interrupted, and is made again.
    """

    def __init__(self, module: ModuleType, study: optuna.Study, config: SearchConfig) -> None:
        self._module, self._study, self._config = module, study, config
        self._distributions = {name: _distribution(module, tried) for name, tried in config.space.items()}
        for trial in self._kept():
            if trial.state == module.trial.TrialState.RUNNING:
                self.close(trial.number, trial.user_attrs.get("row"))

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the trials that have ended, in their order."""
        return [trial.user_attrs["row"] for trial in self._kept() if "row" in trial.user_attrs]

    def check_tasks(self, fingerprints: list[dict[str, Any]]) -> None:
        """Keep what tells the tasks of the search from others, or refuse those that are not the kept ones.

        Args:
            fingerprints: Results of :meth:`odeopt.tasks.Task.fingerprint`, in the order of the search's values.

        Raises:
            ValueError: If the trials so far were made on other tasks, or in a version that does not say on which.
        """
        kept = self._study.user_attrs.get("tasks")
        if kept is None and not self.rows():
            self._study.set_user_attr("tasks", fingerprints)
        elif kept is None or len(kept) != len(fingerprints) or not all(map(are_alike, fingerprints, kept)):
            raise ValueError(
                "Parameter `folder` should be empty or hold a study of the same search. Found one whose trials were "
                "made on other tasks, or on other data; choose another folder or delete it."
            )

    def ask(self) -> OpenTrial:
        """Make the next trial: the interrupted one again, or what the sampler proposes.

        The proposal depends on the seed, on the number of trials that have ended, and on what came of them: not on
        how often the search was interrupted.
        """
        kept, number = self._kept(), len(self.rows())
        is_waiting = any(trial.state == self._module.trial.TrialState.WAITING for trial in kept)
        last = next((trial for trial in reversed(kept) if trial.params), None)
        if is_waiting:  # killed before it was asked for
            pass
        elif last is not None and "row" not in last.user_attrs and last.params.keys() == self._distributions.keys():
            self._study.enqueue_trial(last.params, user_attrs={"is_continued": True})
        elif self._config.sampler == "grid":
            self._study.enqueue_trial({name: _choice(value) for name, value in self._config.grid()[number].items()})
        self._study.sampler = self._sampler(number)
        trial = self._study.ask(self._distributions)
        values = {name: _meaning(self._config.space[name], param) for name, param in trial.params.items()}
        return OpenTrial(self, trial, values, trial.user_attrs.get("is_continued", False))

    def close(self, number: int, row: dict[str, Any] | None) -> None:
        """Tell Optuna how a trial ended; one that diverged counts as pruned, so that samplers keep away from it."""
        states = self._module.trial.TrialState
        if row is None or row["state"] == "failed":
            self._study.tell(number, state=states.FAIL)
        elif row["state"] == "complete":
            self._study.tell(number, row["score"])
        else:
            self._study.tell(number, state=states.PRUNED)

    def _kept(self) -> list[optuna.trial.FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        samplers = self._module.samplers
        # one generator for all trials would depend on how many of them this process has made
        seed = random.Random(f"{self._config.seed}/{number}").getrandbits(32)
        if self._config.sampler == "tpe":
            return samplers.TPESampler(seed=seed, n_startup_trials=self._config.startup_trials)
        return samplers.RandomSampler(seed=seed)


class OpenTrial:
    """A trial that has not ended.

    Attributes:
        values: What is tried, by dotted names.
        is_continued: Whether an interrupted trial had the same values.
    """

    def __init__(self, study: Study, trial: optuna.Trial, values: dict[str, Any], is_continued: bool) -> None:
        self.values, self.is_continued = values, is_continued
        self._study, self._trial = study, trial

    def report(self, step: int, score: float) -> bool:
        """Keep a validation; return whether the pruner would end the trial there."""
        self._trial.report(score, step)
        return self._trial.should_prune()

    def end(self, row: dict[str, Any]) -> None:
        """Keep the row of the trial, and close it."""
        # in this order: what is interrupted in between is closed by its row
        self._trial.set_user_attr("row", row)
        self._study.close(self._trial.number, row)


def _optuna() -> ModuleType:
    try:
        import optuna
    except ImportError as error:
        raise MissingOptunaError(f'Searching needs Optuna: pip install "odeopt[search]" ({error}).') from error
    return optuna


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of the folder; the lock goes with the process, however it ends."""
    connection = sqlite3.connect(folder / "lock", timeout=0, isolation_level=None)
    try:
        try:
            connection.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            wanted = "one that can be written to and that no other process works on"
            raise ValueError(f"Parameter `folder` should be {wanted}. Found `{folder}`: {error}.") from error
        yield
    finally:
        connection.close()


@contextmanager
def _stored(module: ModuleType, path: Path) -> Iterator[optuna.storages.RDBStorage]:
    try:
        storage = module.storages.RDBStorage(f"sqlite:///{path}")
    except Exception as error:  # SQLite's, SQLAlchemy's, Alembic's or Optuna's
        raise _unreadable(path, error) from error
    try:
        yield storage
    finally:  # else the file stays open
        storage.remove_session()
        storage.engine.dispose()


def _checked(module: ModuleType, storage: optuna.storages.RDBStorage, config: SearchConfig, path: Path) -> optuna.Study:
    """The study in a file, if it is of this search or new."""
    pruner = module.pruners.NopPruner()
    if config.pruner == "median":
        pruner = module.pruners.MedianPruner(config.startup_trials, config.warmup_steps)
    try:
        study = module.create_study(storage=storage, pruner=pruner, study_name=_NAME, load_if_exists=True)
        kept = study.user_attrs.get("settings")
    except Exception as error:  # as above
        raise _unreadable(path, error) from error
    wanted = config.identity()
    if kept is None:
        study.set_user_attr("settings", wanted)
    elif kept != wanted:
        names = [name for name in {**wanted, **kept} if kept.get(name) != wanted.get(name)]
        changed = ", ".join(f"`{name} = {kept.get(name)!r}` in place of {wanted.get(name)!r}" for name in names)
        raise ValueError(
            f"Parameter `folder` should be empty or hold a study of the same search. Found `{path}` with {changed}; "
            "choose another folder or delete it."
        )
    return study


def _unreadable(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"Parameter `folder` should be empty or hold a study. Found `{path}`, which cannot be read "
        f"({str(error).splitlines()[0]}); delete it to start anew."
    )


def _distribution(module: ModuleType, tried: Choices | Range) -> optuna.distributions.BaseDistribution:
    kinds = module.distributions
    if isinstance(tried, Choices):
        return kinds.CategoricalDistribution([_choice(value) for value in tried.values])
    if tried.is_integer:
        return kinds.IntDistribution(tried.low, tried.high, log=tried.log, step=tried.step or 1)
    return kinds.FloatDistribution(tried.low, tried.high, log=tried.log, step=tried.step)


def _choice(value: Any) -> Any:
    """A value as Optuna can keep it: lists and tables as text."""
    return value if isinstance(value, bool | int | float | str) else json.dumps(value, sort_keys=True, default=str)


def _meaning(tried: Choices | Range, param: Any) -> Any:
    """The inverse of :func:`_choice`."""
    return next(x for x in tried.values if _choice(x) == param) if isinstance(tried, Choices) else param
