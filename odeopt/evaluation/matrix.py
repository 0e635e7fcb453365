"""The matrix: a rule beside tuned Adam over networks, data, horizons and scales, one cell after the other."""

from __future__ import annotations

import copy
import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeopt._version import __version__
from odeopt.artifacts import fingerprint
from odeopt.checks import n_of, require, require_counts
from odeopt.evaluation.baselines import Family, tune
from odeopt.evaluation.compare import run
from odeopt.evaluation.intervals import RESOLUTION, Interval, ratio_interval, ratio_text
from odeopt.evaluation.result import DIVERGED, scores_of
from odeopt.files import held_to_add, read_json, write_json
from odeopt.progress import tqdm
from odeopt.report import draw_table, plot_ratios
from odeopt.rules.base import UpdateRule
from odeopt.rules.classical import AdamUpdate
from odeopt.tasks import DATASETS, MLPClassification, ScaledTask, Task, load_dataset
from odeopt.tasks.classification import SPLITS
from odeopt.tasks.random import EVALUATION_SEED, TUNING_SEED

REFERENCES = (Family("Adam", AdamUpdate), Family("Adam, cosine", partial(AdamUpdate, cosine=True)))
TARGET_SHARE, TARGET_WORST = 0.9, 1.1  # of cells no worse than tuned Adam; of the ratio to it in any cell
_RULE = "rule"
_SCORE = "last ten"


@dataclass(frozen=True)
class Cell:
    """One setting of everything: a network, its data, and a run.

    Attributes:
        dataset: Name for :func:`odeopt.tasks.load_dataset`.
        widths: Widths of the hidden layers.
        activation: Name of the activation.
        batch_size: Images per step.
        horizon: Updates per run.
        loss_scale: Factor on the loss.
        init_scale: Factor on the initial parameters.
    """

    dataset: str = "mnist"
    widths: tuple[int, ...] = (20,)
    activation: str = "sigmoid"
    batch_size: int = 128
    horizon: int = 100
    loss_scale: float = 1.0
    init_scale: float = 1.0

    @property
    def name(self) -> str:
        """Names the cell in tables and files, e.g. ``"mnist relu 100-100, 300 steps, loss x1000"``."""
        network = f"{self.activation} {'-'.join(map(str, self.widths))}" if self.widths else "linear"
        words = [f"{self.dataset} {network}", f"{self.horizon} steps"]
        words += [f"batch {self.batch_size}"] * (self.batch_size != Cell.batch_size)
        words += [f"loss x{self.loss_scale:g}"] * (self.loss_scale != 1)
        words += [f"init x{self.init_scale:g}"] * (self.init_scale != 1)
        return ", ".join(words)

    def task(
        self, split: str, *, data_dir: str | os.PathLike | None = None, device: torch.device | str = "cpu"
    ) -> Task:
        """Build the task of the cell, of a split of :class:`odeopt.tasks.MLPClassification`."""
        data, options = load_dataset(self.dataset, data_dir), {"activation": self.activation, "split": split}
        task = MLPClassification(data, self.widths, batch_size=self.batch_size, device=device, **options)
        return ScaledTask(task, loss_scale=self.loss_scale, init_scale=self.init_scale)


_CORNERS = (
    Cell(widths=(100, 100), activation="relu", horizon=300),
    Cell(widths=(100, 100), activation="relu", horizon=1000),
    Cell(widths=(50, 50, 50), activation="tanh", horizon=300),
    Cell(widths=(50, 50), horizon=300),
    Cell(widths=(50,), activation="gelu", horizon=300, loss_scale=1e3, init_scale=3.0),
    Cell("digits", (100,), "gelu", horizon=1000),
    Cell("digits", (50, 50), "relu", horizon=3000, loss_scale=1e-3),
    Cell("digits", (10, 10, 10), horizon=50, init_scale=0.3),
    Cell("fashion-mnist", (100,), "relu", horizon=300),
    Cell("kmnist", (50, 50), "tanh", horizon=1000),
)


def grid(
    *, datasets: Collection[str] = DATASETS, max_horizon: float = math.inf, pattern: str = "", quick: bool = False
) -> dict[str, dict[str, Cell]]:
    """Cells that differ from one, 784-20-10 on MNIST for 100 steps, by one factor at a time; and some corners.

    Args:
        datasets: Those that are available; cells of others are left out.
        max_horizon: Leave out cells of more steps.
        pattern: Leave out cells in whose name this regular expression is not found.
        quick: Everything on the digits, for at most 50 steps.

    Returns:
        Cells by factor and by the value of the factor; the cell in the middle stands under every factor.

    Raises:
        ValueError: If the expression is not one, or no cell is left.
    """
    try:
        wanted = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"Parameter `pattern` should be a regular expression. Found {pattern!r}: {error}.") from error
    middle = Cell(dataset="digits", horizon=50) if quick else Cell()
    corners = [replace(c, dataset="digits", horizon=min(c.horizon, 50)) if quick else c for c in _CORNERS]
    horizons = (50,) if quick else (50, 100, 300, 1000, 3000)
    factors = {
        "activation": {name: replace(middle, activation=name) for name in ("sigmoid", "tanh", "relu", "gelu")},
        "width": {str(width): replace(middle, widths=(width,)) for width in (10, 20, 50, 100, 200)},
        "depth": {str(depth): replace(middle, widths=(20,) * depth) for depth in range(4)},
        "data": {name: replace(middle, dataset=name) for name in (("digits",) if quick else DATASETS)},
        "horizon": {f"{horizon:,}": replace(middle, horizon=horizon) for horizon in horizons},
        "loss scale": {f"{scale:g}": replace(middle, loss_scale=scale) for scale in (1e-3, 1.0, 1e3)},
        "initial scale": {f"{scale:g}": replace(middle, init_scale=scale) for scale in (0.3, 1.0, 3.0)},
        "corners": {cell.name: cell for cell in corners},
    }

    def is_wanted(cell: Cell) -> bool:
        return cell.dataset in datasets and cell.horizon <= max_horizon and wanted.search(cell.name) is not None

    factors = {name: {k: cell for k, cell in cells.items() if is_wanted(cell)} for name, cells in factors.items()}
    factors = {name: cells for name, cells in factors.items() if cells}
    require(len(factors) > 0, "pattern", pattern, "found in the name of a cell, of the data and horizons asked for")
    return factors


class Outcome(NamedTuple):
    """Runs of one optimizer in a cell.

    Attributes:
        scores: Mean of the last ten losses before the last update, the loss scale divided out, infinite where one is
            not finite; shape ``(n_runs,)``.
        n_diverged: Number of runs whose final loss is not finite, or above the first.
        lr: The tuned learning rate; None for a rule that has none.
    """

    scores: Tensor
    n_diverged: int
    lr: float | None = None


@dataclass(frozen=True, eq=False)
class Matrix:
    """A rule beside its references in every cell.

    Attributes:
        rule: Name of the rule.
        cells: The cells by factor and value, as from :func:`grid`.
        outcomes: Runs of each optimizer, by the name of the cell and its own: ``"rule"``, or a reference's.
        settings: What the numbers depend on beside the cell.
    """

    rule: str
    cells: Mapping[str, Mapping[str, Cell]]
    outcomes: Mapping[str, Mapping[str, Outcome]]
    settings: Mapping[str, Any]

    def ratio(self, cell: str, reference: str = "Adam") -> Interval:
        """Ratio of the rule's score to a reference's: the geometric mean over paired runs, with its 95 % interval.

        Args:
            cell: Name of the cell.
            reference: Name of the reference.

        Returns:
            See :func:`odeopt.evaluation.intervals.ratio_interval`.
        """
        at_cell = self.outcomes[cell]
        return ratio_interval(at_cell[_RULE].scores, at_cell[reference].scores, floor=RESOLUTION)

    def summary(self, reference: str = "Adam") -> str:
        """Say in one line how many cells are no worse than a reference, which is the worst, and what diverged."""
        ratios = {cell: self.ratio(cell, reference) for cell in self.outcomes}
        n_good = sum(ratio.mean <= 1 for ratio in ratios.values())
        n_surely_worse = sum(ratio.low > 1 for ratio in ratios.values())
        worst = max(ratios, key=lambda cell: ratios[cell].mean)
        mine, theirs = (sum(o[name].n_diverged for o in self.outcomes.values()) for name in (_RULE, reference))
        return (
            f"To {reference}: {n_good} of {len(ratios)} cells ({n_good / len(ratios):.0%}) no worse, {n_surely_worse} "
            f"worse beyond their interval; worst {ratio_text(ratios[worst])} ({worst}). Diverged: {mine} of "
            f"{n_of(len(ratios) * self.settings['runs'], 'run')} of {self.rule}, {theirs} of {reference}."
        )

    def table(self, *, markdown: bool = False) -> str:
        """One line per cell, followed by a caption and the counts that the targets are about.

        Args:
            markdown: Whether to write a markdown table rather than an aligned plain one.

        Returns:
            Lines of text.
        """
        headers = [("cell", ""), (self.rule, "[nats]"), ("diverged", "[runs]")]
        for family in REFERENCES:
            headers += [(family.name, "[nats]"), ("tuned lr", ""), ("ratio to it", "")]
        rows = []
        for cell, outcomes in self.outcomes.items():
            row = [cell, f"{outcomes[_RULE].scores.mean():.4g}", str(outcomes[_RULE].n_diverged)]
            for family in REFERENCES:
                outcome, ratio = outcomes[family.name], self.ratio(cell, family.name)
                row += [f"{outcome.scores.mean():.4g}", f"{outcome.lr:g}", ratio_text(ratio)]
            rows.append(row)
        caption = [
            f"Means of the last ten losses of {n_of(self.settings['runs'], 'run')}, on common initialisations and "
            "batches, the loss scale divided out.",
            "Ratio: geometric mean of paired runs [95 % Student interval]. Learning rates are tuned for each cell, on "
            f"{n_of(self.settings['tuning_runs'], 'run')} on other data.",
            DIVERGED,
            *(self.summary(family.name) for family in REFERENCES),
            f"Targets, to Adam: {TARGET_SHARE:.0%} of the cells no worse, none beyond {TARGET_WORST:g}, none diverged.",
        ]
        return draw_table(headers, rows, markdown=markdown) + "\n\n" + ("  \n" if markdown else "\n").join(caption)

    def plot(self, path: str | os.PathLike) -> Path:
        """Draw the ratios as a heat map; see :func:`odeopt.report.plot_ratios`."""
        ratios = {
            f"{self.rule} over {family.name}": {
                factor: {value: self.ratio(cell.name, family.name).mean for value, cell in by_value.items()}
                for factor, by_value in self.cells.items()
            }
            for family in REFERENCES
        }
        return plot_ratios(ratios, path, label="ratio of the mean of the last ten losses")


def evaluate_matrix(
    rule: UpdateRule,
    cells: Mapping[str, Mapping[str, Cell]],
    *,
    name: str = "rule",
    path: str | os.PathLike | None = None,
    references_from: str | os.PathLike | None = None,
    n_runs: int = 5,
    n_tuning_runs: int = 4,
    data_dir: str | os.PathLike | None = None,
    device: torch.device | str = "cpu",
    progress_bar: bool = True,
) -> Matrix:
    """Run a rule and its references, tuned for the cell, in every cell.

    Args:
        rule: The rule; told the horizon, as the cosine decay is.
        cells: Cells by factor and value, as from :func:`grid`.
        name: Name of the rule, for tables and figures.
        path: JSON file to which each cell is written as soon as it is done; cells that it has are not run again. Its
            folder is made if it is not there. Several processes may write to one file.
        references_from: JSON file of another rule, with the same settings, from which references are taken.
        n_runs: Runs per cell and optimizer.
        n_tuning_runs: Runs per trial of a learning rate, on data and seeds of their own.
        data_dir: Folder of the data sets; see :func:`odeopt.tasks.load_dataset`.
        device: Where to compute.
        progress_bar: Whether to show one.

    Returns:
        The matrix of these cells.

    Raises:
        ValueError: If an argument is out of range, or a file is of another rule, version or settings.
    """
    require_counts(n_runs=n_runs, n_tuning_runs=n_tuning_runs)
    settings = {"library_version": __version__, "score": _SCORE, "runs": n_runs, "tuning_runs": n_tuning_runs}
    settings |= {"evaluation_seed": EVALUATION_SEED, "tuning_seed": TUNING_SEED}
    header = {"rule": {"name": name, "sha256": fingerprint(rule)}, **settings}
    done = _read(path, header) if path is not None and Path(path).exists() else {}
    lent = _read(references_from, settings) if references_from is not None else {}
    if path is not None:  # a folder that cannot be made should show before the first cell is tuned
        Path(path).parent.mkdir(parents=True, exist_ok=True)
    rule = copy.deepcopy(rule).to(device)
    todo = {cell.name: cell for by_value in cells.values() for cell in by_value.values()}
    with tqdm(total=len(todo), disable=not progress_bar, desc="matrix", unit=" cells") as bar:
        for cell_name, cell in todo.items():
            if cell_name not in done:
                bar.set_postfix_str(cell_name)
                tuning, task = (cell.task(split, data_dir=data_dir, device=device) for split in SPLITS)
                outcomes = {**lent.get(cell_name, {}), _RULE: _outcome(rule, task, cell, n_runs)}
                for family in REFERENCES:
                    if family.name not in outcomes:
                        tuned = tune(family, tuning, n_steps=cell.horizon, n_tasks=n_tuning_runs, score=_SCORE)
                        reference = family.make(**tuned.settings).to(device)
                        outcomes[family.name] = _outcome(reference, task, cell, n_runs, lr=tuned.settings["lr"])
                done[cell_name] = outcomes
                if path is not None:
                    _write(Path(path), header, done)
            bar.update()
    return Matrix(name, cells, {cell_name: done[cell_name] for cell_name in todo}, settings)


def _outcome(rule: UpdateRule, task: Task, cell: Cell, n_runs: int, lr: float | None = None) -> Outcome:
    losses, _ = run(rule, task, n_steps=cell.horizon, n_runs=n_runs, seed=EVALUATION_SEED, with_accuracy=False)
    n_diverged = int((~(losses[-1] <= losses[0])).sum())
    scores = scores_of(losses, _SCORE) / cell.loss_scale
    return Outcome(scores.where(scores.isfinite(), math.inf), n_diverged, lr)


def _read(path: str | os.PathLike, header: Mapping[str, Any]) -> dict[str, dict[str, Outcome]]:
    """Outcomes by cell and optimizer, from a file whose header is as wanted."""
    names = (_RULE, *(family.name for family in REFERENCES))

    def parse(content: Mapping[str, Any]) -> dict[str, dict[str, Outcome]]:
        return {
            cell: {name: _from_json(header["runs"], **outcomes[name]) for name in names}
            for cell, outcomes in content["cells"].items()
        }

    return read_json(path, parse, wanted="a matrix that can be used here", header=header)


def _from_json(n_runs: int, scores: list[float | None], n_diverged: int, lr: float | None) -> Outcome:
    found = torch.tensor([math.inf if score is None else score for score in scores], dtype=torch.float64)
    if found.shape != (n_runs,):  # else ratios would pair one run with all of another optimizer
        raise ValueError(f"field `scores` should have {n_of(n_runs, 'number')}. Found {scores}")
    return Outcome(found, n_diverged, lr)


def _write(path: Path, header: Mapping[str, Any], done: dict[str, dict[str, Outcome]]) -> None:
    """Write all finished cells, with those that another process wrote meanwhile, which join ``done``."""

    def as_json(outcome: Outcome) -> dict[str, Any]:
        # JSON has no numbers that are not finite
        scores = [score if score < math.inf else None for score in outcome.scores.tolist()]
        return {**outcome._asdict(), "scores": scores}

    with held_to_add(path):
        if path.exists():
            done |= {**_read(path, header), **done}
        cells = {cell: {name: as_json(each) for name, each in outcomes.items()} for cell, outcomes in done.items()}
        write_json(path, {**header, "cells": cells}, sort_keys=True)
