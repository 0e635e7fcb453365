"""All contenders on all problems: learning rates by grid, paired runs, and a file that continues."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeopt.checks import is_integer, n_of, require, require_counts
from odeopt.files import held_to_add, read_json, write_json
from odeopt.progress import tqdm
from odeopt.suite.opponents import REFERENCE, Contender
from odeopt.suite.problems import Problem
from odeopt.suite.result import Outcome, Suite
from odeopt.suite.run import Run, run, smoothed

TUNING_SEED = 1000  # learning rates are chosen by a run of it; comparisons are on the seeds 0, 1, ...
_N_POINTS = 200  # of a curve, at most


class Record(NamedTuple):
    """Numbers that are kept of a run.

    Attributes:
        train: Mean of the last twentieth of the training losses; infinite if the run diverged.
        held_out: Loss on the held-out examples at the end; infinite if the run diverged.
        seconds: Time of the training loop.
        curve: Training losses, each averaged over the twentieth of the run before it, at steps evenly spaced.
    """

    train: float
    held_out: float
    seconds: float
    curve: tuple[float, ...]


def evaluate_suite(
    problems: Mapping[str, Problem],
    contenders: Mapping[str, Contender],
    *,
    path: str | os.PathLike | None = None,
    n_runs: int = 5,
    n_extensions: int = 3,
    device: torch.device | str = "cpu",
    progress_bar: bool = True,
) -> Suite:
    """Run every contender on every problem, after a choice of its learning rate.

    Args:
        problems: By name, as from :func:`odeopt.suite.make_problem`.
        contenders: By name; tuned AdamW, with which the others are compared, is among them.
        path: JSON file to which each run is written as soon as it is done; runs that it has are not run again.
            Several processes may write to one file.
        n_runs: Runs per problem and contender.
        n_extensions: Further learning rates that are tried, one after the other, as long as the best is at an edge.
        device: Where to train.
        progress_bar: Whether to show one.

    Returns:
        The suite of these problems and contenders.

    Raises:
        ValueError: If an argument is out of range, the reference is missing, or the file is damaged.
    """
    require_counts(n_runs=n_runs)
    require(is_integer(n_extensions) and n_extensions >= 0, "n_extensions", n_extensions, "an integer of at least 0")
    require(REFERENCE in contenders, "contenders", [*contenders], f"contenders with {REFERENCE!r} among them")
    for kind, named in (("contenders", contenders), ("problems", problems)):
        others = {name: each.name for name, each in named.items() if each.name != name}
        require(not others, kind, others, "by their own names")
    store = _Store(path, device)
    outcomes: dict[str, dict[str, Outcome]] = {}
    n_each = sum(n_runs + (len(c.rates) if len(c.rates) > 1 else 0) for c in contenders.values())
    with tqdm(total=n_each * len(problems), disable=not progress_bar, desc="suite", unit=" runs") as bar:

        def done(problem: Problem, contender: Contender, lr: float, seed: int) -> Record:
            bar.set_postfix_str(f"{problem.name}, {contender.name}, lr {lr:g}, seed {seed}")
            record = store.run(problem, contender, lr, seed)
            bar.total = max(bar.total, bar.n + 1)  # rates beyond a grid were not counted
            bar.update()
            return record

        for name, problem in problems.items():
            outcomes[name] = {}
            for contender in contenders.values():
                lr, is_edge = contender.rates[0], False
                if len(contender.rates) > 1:
                    trial = partial(done, problem, contender, seed=TUNING_SEED)
                    lr, is_edge = _tuned(contender.rates, trial, problem.tuned_on, n_extensions)
                records = [done(problem, contender, lr, seed) for seed in range(n_runs)]
                *numbers, curves = (torch.tensor(x, dtype=torch.float64) for x in zip(*records, strict=True))
                steps = steps_of(problem.n_steps)
                outcomes[name][contender.name] = Outcome(lr, is_edge, *numbers, curves.T, steps)
    return Suite(problems, contenders, outcomes, n_runs)


def _tuned(
    rates: Sequence[float], trial: Callable[[float], Record], criterion: str, n_extensions: int
) -> tuple[float, bool]:
    """Choose a learning rate; and say whether it is at an edge of those that were tried."""
    losses = {lr: getattr(trial(lr), criterion) for lr in rates}
    n_most = len(losses) + n_extensions
    while True:
        lr = min(losses, key=lambda rate: (losses[rate], rate))  # the least, where all diverge
        is_edge = lr in (min(losses), max(losses))
        if not is_edge or len(losses) == n_most:
            return lr, is_edge
        beyond = neighbour(lr, 1 if lr == max(losses) else -1)
        losses[beyond] = getattr(trial(beyond), criterion)


def neighbour(lr: float, direction: int) -> float:
    """Return the next of ..., 0.01, 0.03, 0.1, 0.3, ... above a learning rate (1) or below it (-1)."""
    exponent = round(2 * math.log10(lr)) + direction
    return float(f"{(1, 3)[exponent % 2]}e{exponent // 2}")


def steps_of(n_steps: int) -> Tensor:
    """Steps that a curve shows, the last of them among them; int64, shape ``(n_points,)``."""
    n_points = min(_N_POINTS, n_steps)
    return torch.arange(1, n_points + 1) * n_steps // n_points


class _Store:
    """Records by problem, contender, learning rate, seed, and a digest of all else that they depend on."""

    def __init__(self, path: str | os.PathLike | None, device: torch.device | str) -> None:
        self._path, self._device = None if path is None else Path(path), device
        self._records: dict[str, dict[str, Any]] = {}
        if self._path is not None:  # what cannot be read or written should show before the first run
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._read()

    def run(self, problem: Problem, contender: Contender, lr: float, seed: int) -> Record:
        """Return the record of a run, which is made unless the file has it."""
        settings = {**problem.settings, **contender.settings, "contender": contender.name}
        settings |= {"torch": torch.__version__.split("+")[0], "device": torch.device(self._device).type}
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        key = f"{problem.name} | {contender.name} | lr {lr:g} | seed {seed} | {digest}"
        if key not in self._records:
            result = run(problem, lambda model, n_steps: contender.make(model, n_steps, lr), seed, device=self._device)
            self._write(key, {**_as_json(result), "settings": settings})
        return _from_json(self._records[key])

    def _write(self, key: str, record: dict[str, Any]) -> None:
        """Add a record to what the file holds by now, another process being free to do so too."""
        self._records[key] = record
        if self._path is not None:
            with held_to_add(self._path):
                self._read()
                self._records[key] = record
                write_json(self._path, {"runs": self._records}, is_by_row=True, sort_keys=True)

    def _read(self) -> None:
        if not self._path.exists():
            return

        def checked(content: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
            for record in content["runs"].values():
                _from_json(record)
            return content["runs"]

        self._records |= read_json(self._path, checked, wanted="a suite that can be continued")


def _as_json(result: Run) -> dict[str, Any]:
    def number(value: float) -> float | None:
        # JSON has no numbers that are not finite
        return float(f"{value:.6g}") if math.isfinite(value) else None

    curve = smoothed(result.losses)[steps_of(len(result.losses)) - 1].tolist()
    numbers = {"train": number(result.train), "held_out": number(result.held_out), "seconds": round(result.seconds, 3)}
    return {**numbers, "curve": [number(value) for value in curve]}


def _from_json(record: Mapping[str, Any]) -> Record:
    def number(value: float | None) -> float:
        return math.inf if value is None else float(value)

    *values, curve = (record[name] for name in Record._fields)
    n_points = len(steps_of(record["settings"]["n_steps"]))
    if len(curve) != n_points:
        raise ValueError(f"field `curve` should have {n_of(n_points, 'number')}. Found {len(curve)}")
    return Record(*map(number, values), tuple(map(number, curve)))
