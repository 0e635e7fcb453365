"""Hand-designed optimizers, tuned by grid for a task and horizon; and the committed table of settings."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from odeopt._version import __version__
from odeopt.checks import check_class, require, require_counts
from odeopt.evaluation.compare import run
from odeopt.evaluation.result import SCORES, Score, scores_of
from odeopt.files import write_json
from odeopt.progress import tqdm
from odeopt.rules.base import UpdateRule
from odeopt.rules.classical import AdamUpdate, RMSpropUpdate, SGDUpdate
from odeopt.tasks.base import Task
from odeopt.tasks.random import TUNING_SEED

# twenty preferred numbers per decade, rounded, times powers of ten: the lattice of learning rates
_MANTISSAS = (1, 1.1, 1.25, 1.4, 1.6, 1.8, 2, 2.2, 2.5, 2.8, 3.2, 3.6, 4, 4.5, 5, 5.6, 6.3, 7, 8, 9)
# of the searches, in turn: 1, 3.2, 10, ..., then ten values a decade, then all
_STRIDES = (10, 2, 1)
_N_EXTENSIONS = 100  # lattice points that a search may walk beyond its first grid: five decades


@dataclass(frozen=True)
class Family:
    """A hand-designed optimizer and what is tuned about it.

    Attributes:
        name: Its name in tables.
        make: Builds the rule from the settings, given by keyword.
        lr: Least and greatest learning rate of the first grid, extended where the best lies on its edge.
        other: Name of the second setting, if any.
        values: Its values, in order.
        first: Those tried first; further ones follow where the best lies on the edge.
    """

    name: str
    make: Callable[..., UpdateRule]
    lr: tuple[float, float] = (1e-3, 1.0)
    other: str | None = None
    values: tuple[float, ...] = ()
    first: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        require(0 < self.lr[0] <= self.lr[1], "lr", self.lr, "two rising, positive numbers")
        is_right = (self.other is None) == (not self.first) and set(self.first) <= set(self.values)
        require(is_right, "first", self.first, f"values of `{self.other}` among {self.values}")


_MOMENTA = (0.5, 0.7, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99)
_BY_MOMENTUM = {"other": "momentum", "values": _MOMENTA, "first": (0.8, 0.9, 0.95)}
FAMILIES = (
    Family("Adam", AdamUpdate),
    Family("RMSprop", RMSpropUpdate, other="alpha", values=(0.9, 0.99), first=(0.9, 0.99)),
    Family("Momentum", SGDUpdate, **_BY_MOMENTUM),
    Family("Nesterov", partial(SGDUpdate, nesterov=True), **_BY_MOMENTUM),
)
PLAIN_SGD = Family("SGD", SGDUpdate)


@dataclass(frozen=True)
class Tuned:
    """The outcome of a search.

    Attributes:
        family: Name of the family.
        settings: The best settings.
        score: Their mean score.
        tried: Every pair of settings and mean score; infinity where a run did not stay finite, or the score is NaN.
    """

    family: str
    settings: Mapping[str, float]
    score: float
    tried: Sequence[tuple[Mapping[str, float], float]] = field(repr=False)

    @property
    def label(self) -> str:
        """Name and settings, for tables and figures."""
        return f"{self.family} ({', '.join(f'{name} {value:g}' for name, value in self.settings.items())})"


def tune(
    family: Family,
    task: Task,
    *,
    n_steps: int,
    n_tasks: int = 16,
    seed: int = TUNING_SEED,
    score: str | Score = "last ten",
    on_trial: Callable[[], Any] | None = None,
) -> Tuned:
    """Find the settings with the least mean score on common tasks.

    For each value of the second setting the learning rates 1, 3.2, 10, ... times a power of ten are tried,
    the grid is extended while the best lies on its edge, then refined, in the end to twenty a decade, around
    the best until that lies inside; the grid of the second setting is extended likewise. Settings with a run
    that does not stay finite, or without a score, are out.

    Args:
        family: What to tune.
        task: Where losses come from; not the tasks of an evaluation.
        n_steps: Updates per run.
        n_tasks: Number of tasks.
        seed: Seed of initialisations and batches, common to all settings; not that of an evaluation.
        score: What to minimise; see :func:`odeopt.evaluation.scores_of`.
        on_trial: Called after every trial.

    Returns:
        The best settings and all that were tried.

    Raises:
        TypeError: If ``family`` or ``task`` is of another class.
        ValueError: If an argument is out of range.
        RuntimeError: If no setting kept every run finite.
    """
    check_class("family", family, Family)
    check_class("task", task, Task)
    require_counts(n_tasks=n_tasks)
    tried: list[tuple[dict[str, float], float]] = []

    def trial(**settings: float) -> float:
        rule = family.make(**settings).to(task.device)
        losses, _ = run(rule, task, n_steps=n_steps, n_runs=n_tasks, seed=seed, with_accuracy=False)
        value = scores_of(losses, score).mean().item() if losses.isfinite().all() else math.inf
        value = math.inf if math.isnan(value) else value
        tried.append((settings, value))
        if on_trial is not None:
            on_trial()
        return value

    low, high = (_nearest_index(lr) for lr in family.lr)
    lattice = range(low - _N_EXTENSIONS, high + _N_EXTENSIONS + 1)

    def best_lr(**other: float) -> float:
        first = range(low, high + 1, _STRIDES[0])
        return _search(lambda i: trial(lr=_lr(i), **other), first, lattice, strides=_STRIDES)

    if family.other is None:
        best_lr()
    else:
        first = [family.values.index(value) for value in family.first]
        _search(lambda j: best_lr(**{family.other: family.values[j]}), first, range(len(family.values)))
    settings, value = min(tried, key=lambda item: item[1])
    if not value < float("inf"):
        raise RuntimeError(
            f"{family.name}: no setting kept all {n_tasks} runs finite over {n_steps} steps; "
            f"learning rates from {min(s['lr'] for s, _ in tried):g} were tried."
        )
    return Tuned(family.name, settings, value, tuple(tried))


def _search(
    score: Callable[[int], float], first: Sequence[int], lattice: range, *, strides: Sequence[int] = (1,)
) -> float:
    """Least score over a lattice of integers: a coarse grid, extended at its edges, then refined."""
    scores = {i: score(i) for i in first}
    for stride in strides:
        while True:
            # of equal ones the least: where all diverge, the walk goes down
            best = min(scores, key=lambda i: (scores[i], i))
            missing = [i for i in (best - stride, best + stride) if i in lattice and i not in scores]
            if not missing:
                break
            scores |= {i: score(i) for i in missing}
    return min(scores.values())


def _lr(index: int) -> float:
    decade, mantissa = divmod(index, len(_MANTISSAS))
    return float(f"{_MANTISSAS[mantissa]}e{decade}")


def _nearest_index(lr: float) -> int:
    """Lattice point closest to a learning rate, among the coarse ones."""
    lattice = range(-20 * len(_MANTISSAS), 10 * len(_MANTISSAS), _STRIDES[0])
    return min(lattice, key=lambda i: abs(math.log(_lr(i) / lr)))


def tune_all(
    task: Task, *, families: Sequence[Family] = FAMILIES, progress_bar: bool = True, **options: Any
) -> tuple[Tuned, ...]:
    """Tune every family on the same tasks.

    Args:
        task: Where losses come from.
        families: What to tune.
        progress_bar: Whether to show one; it counts trials, whose number is not known beforehand.
        options: ``n_steps`` and further arguments of :func:`tune`.

    Returns:
        One outcome per family, in their order.
    """
    outcomes = []
    with tqdm(disable=not progress_bar, desc="tuning hand-designed rules", unit=" trials") as bar:
        for family in families:
            bar.set_postfix_str(family.name)
            outcomes.append(tune(family, task, on_trial=bar.update, **options))
    return tuple(outcomes)


def build(outcomes: Sequence[Tuned], families: Sequence[Family] = FAMILIES) -> dict[str, UpdateRule]:
    """Build tuned rules, by label.

    Args:
        outcomes: Settings, as from :func:`tune_all` or :func:`read_baselines`.
        families: Those to build.

    Returns:
        Rules by the name to show them under.
    """
    makers = {family.name: family.make for family in families}
    return {tuned.label: makers[tuned.family](**tuned.settings) for tuned in outcomes if tuned.family in makers}


def read_baselines(
    task: Task, n_steps: int, path: str | os.PathLike | None = None, *, score: str | None = None
) -> tuple[Tuned, ...] | None:
    """Look up the committed settings for a task and horizon.

    Args:
        task: The task, of any split.
        n_steps: Updates per run.
        score: What they should have been tuned for; None for whatever it was.
        path: A table written by :func:`make_baselines_table`; the committed one by default.

    Returns:
        One outcome per family, or None where the table has none for this task and horizon.
    """
    committed = importlib.resources.files("odeopt") / "pretrained" / "baselines.json"
    file = committed if path is None else Path(path)
    if not file.is_file():
        return None
    key = _key(task)
    for entry in json.loads(file.read_text(encoding="utf-8"))["entries"]:
        if entry["task"] == key and entry["n_steps"] == n_steps and score in (None, entry["score"]):
            return tuple(
                Tuned(b["family"], b["settings"], b["score"], _tried(b["settings"], b["tried"]))
                for b in entry["baselines"]
            )
    return None


def baselines_for(
    task: Task,
    tuning_task: Task,
    *,
    n_steps: int,
    n_tasks: int = 8,
    score: str = "last ten",
    families: Sequence[Family] = FAMILIES,
    progress_bar: bool = True,
) -> tuple[dict[str, UpdateRule], str]:
    """Tuned hand-designed rules for a task: from the committed table, else tuned on the fly.

    Args:
        task: What they will be evaluated on; looked up in the table.
        tuning_task: What they are tuned on where the table does not have it.
        n_steps: Updates per run.
        n_tasks: Number of tasks when tuning.
        score: What to minimise.
        families: What to tune.
        progress_bar: Whether to show one when tuning.

    Returns:
        Rules by the name to show them under, and where their settings come from, for captions.
    """
    require(callable(score) or score in SCORES, "score", score, f"one of {', '.join(SCORES)}, or a function")
    outcomes = read_baselines(task, n_steps, score=score)
    if outcomes is not None and {family.name for family in families} <= {tuned.family for tuned in outcomes}:
        return build(outcomes, families), "tuned for this task and horizon (committed table)"
    options = {"n_steps": n_steps, "n_tasks": n_tasks, "score": score}
    outcomes = tune_all(tuning_task, families=families, progress_bar=progress_bar, **options)
    return build(outcomes, families), f"tuned on the fly on {n_tasks} separate tasks of {n_steps} steps"


def make_baselines_table(
    path: str | os.PathLike, data_dir: str | os.PathLike | None = None, progress_bar: bool = True
) -> None:
    """Tune the hand-designed rules for the seed's settings and write the table that ships with the library.

    The settings: random quadratics, and MNIST with a 784-20-10 network, sigmoid and ReLU, batches of 128; 100
    steps each.

    Args:
        path: The JSON file to write.
        data_dir: Folder of MNIST; see :func:`odeopt.tasks.load_dataset`.
        progress_bar: Whether to show one.

    Raises:
        DatasetUnavailable: If MNIST is unavailable.
    """
    from odeopt.tasks import MLPClassification, RandomQuadratic, load_dataset

    mnist = load_dataset("mnist", data_dir)
    jobs = [(RandomQuadratic(), "final", 2000)]
    jobs += [(MLPClassification(mnist, activation=name), "last ten", 32) for name in ("sigmoid", "relu")]
    entries = []
    for task, score, n_tasks in jobs:
        options = {"n_steps": 100, "score": score, "n_tasks": n_tasks, "seed": TUNING_SEED}
        outcomes = tune_all(task, progress_bar=progress_bar, **options)
        entries.append({"task": _key(task), **options, "baselines": [_as_json(tuned) for tuned in outcomes]})
    table = {
        "command": "python -m odeopt tune --out odeopt/pretrained/baselines.json",
        "library_version": __version__,
        "note": "`tried` lists the settings, in the order of `settings`, and the mean score over the tasks; "
        "null: a run did not stay finite",
        "entries": entries,
    }
    write_json(path, table, is_by_row=True)


def _key(task: Task) -> dict[str, Any]:
    """The description of a task without its split, in which tuning and evaluation differ."""
    return {name: value for name, value in task.describe().items() if name != "split"}


def _tried(names: Iterable[str], trials: Iterable[Sequence[float | None]]) -> tuple:
    """Pairs of settings and score from the table's rows."""
    return tuple(
        (dict(zip(names, settings, strict=True)), float("inf") if score is None else score)
        for *settings, score in trials
    )


def _as_json(tuned: Tuned) -> dict[str, Any]:
    return {
        "family": tuned.family,
        "settings": tuned.settings,
        "score": round(tuned.score, 5),
        "tried": [[*s.values(), round(v, 5) if v < float("inf") else None] for s, v in tuned.tried],
    }
