"""Generalisation: what networks do on held-out images when their training losses are equal."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from odeopt.checks import require
from odeopt.evaluation import RESOLUTION, Interval, fast_batch, student_interval
from odeopt.files import read_json, write_json
from odeopt.meta.unroll import unroll
from odeopt.report import draw_table
from odeopt.rules.base import UpdateRule
from odeopt.tasks import MLPClassification

_NONE = Interval(*3 * [float("nan")])


class Curves(NamedTuple):
    """Losses and accuracies along the runs of one optimizer; float64 on the CPU.

    Attributes:
        training_loss: Over all images that a run trains on, in nats, shape ``(n_records, n_runs)``, from step 0 on.
        held_out_loss: Over images that no run trains on, in nats, of the same shape.
        accuracy: Fraction of the held-out images that are classified right, of the same shape.
    """

    training_loss: Tensor
    held_out_loss: Tensor
    accuracy: Tensor

    @property
    def lowest(self) -> Tensor:
        """Smallest training loss of each run, shape ``(n_runs,)``."""
        return self.training_loss.nan_to_num(nan=float("inf")).amin(0)

    def at(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Held-out loss and accuracy where each run's training loss first comes down to a level.

        Between two records both are taken as linear in the logarithm of the training loss.

        Args:
            level: Training loss in nats, shape ``(n_runs,)``.

        Returns:
            Two tensors of shape ``(n_runs,)``; NaN where a run starts below its level, or never comes down to it.
        """
        losses, level = self.training_loss.clamp_min(RESOLUTION), level.clamp_min(RESOLUTION)
        is_below = losses <= level
        first = is_below.int().argmax(0)  # of equal ones the first; 0 also where there is none
        around = torch.stack((first - 1, first)).clamp_min(0)
        before, after = losses.gather(0, around)
        # logarithms of ratios: those of neighbouring floats are told apart, where logarithms would be the same number
        weight = ((before / level).log() / (before / after).log()).where(first > 0, float("nan"))
        held_out_loss, accuracy = (x.gather(0, around) for x in (self.held_out_loss, self.accuracy))
        return torch.lerp(*held_out_loss, weight), torch.lerp(*accuracy, weight)


class Difference(NamedTuple):
    """Two optimizers, one minus the other, over paired runs.

    Attributes:
        held_out_loss: In nats.
        accuracy: Of the fractions classified right.
        n_compared: Number of runs that could be compared, of which the intervals are.
        n_runs: Number of runs.
        level: The training loss in nats at which they are compared, geometric mean over the runs; NaN where there is
            none.
    """

    held_out_loss: Interval
    accuracy: Interval
    n_compared: int
    n_runs: int
    level: float = float("nan")


@torch.no_grad()
def record(
    rule: UpdateRule,
    task: MLPClassification,
    *,
    n_steps: int,
    n_runs: int,
    seed: int,
    every: int = 25,
    runs_per_batch: int | None = None,
) -> Curves:
    """Train the networks 0 ... n_runs - 1 and measure them on the way.

    Args:
        rule: The update rule; told the length of the run.
        task: Networks and images.
        n_steps: Updates per run.
        n_runs: Number of runs.
        seed: Seed of initialisations and batches.
        every: Steps between records; there is one at the start and one at the end too.
        runs_per_batch: Runs computed at once; as many as are fast by default.

    Returns:
        The records.

    Raises:
        ValueError: If a number is not positive.
    """
    for name, value in (("n_steps", n_steps), ("n_runs", n_runs), ("every", every)):
        require(value >= 1, name, value, "positive")
    require(runs_per_batch is None or runs_per_batch >= 1, "runs_per_batch", runs_per_batch, "positive")
    rule = copy.deepcopy(rule).to(task.device)  # the caller's stays where it is
    pieces = []
    for indices in torch.arange(n_runs).split(runs_per_batch or fast_batch(rule, task)):
        params, states = task.init_params(indices, seed), None
        records = [_measured(task, params)]
        for start in range(0, n_steps, every):
            length = min(every, n_steps - start)
            run = {"n_steps": length, "start": start, "total_steps": n_steps, "params": params, "states": states}
            _, params, states = unroll(rule, task, indices=indices, seed=seed, **run)
            records.append(_measured(task, params))
        pieces.append(torch.stack(records, dim=1))
    return Curves(*torch.cat(pieces, dim=2).double().cpu())


def _measured(task: MLPClassification, params: dict[str, Tensor]) -> Tensor:
    """Training loss, held-out loss and held-out accuracy, shape (3, n_tasks)."""
    held_out_loss, accuracy = task.held_out_scores(params)
    # a network of NaN counts as right where the label is 0
    accuracy = accuracy.where(held_out_loss.isfinite(), float("nan"))
    return torch.stack((task.training_scores(params)[0], held_out_loss, accuracy))


def at_equal_training_loss(curves: Curves, reference: Curves) -> Difference:
    """Compare two optimizers where their training losses are equal, run by run.

    The level of a pair of runs is the lowest that both come down to: the larger of their smallest training losses.

    Args:
        curves: Of one optimizer.
        reference: Of the other, from the same initialisations, on the same batches.

    Returns:
        The first minus the second, with 95 % Student intervals over the runs that can be compared.

    Raises:
        ValueError: If the numbers of runs differ.
    """
    n_runs = [x.training_loss.shape[1] for x in (curves, reference)]
    require(n_runs[0] == n_runs[1], "reference", f"curves of {n_runs[1]} runs", f"of {n_runs[0]} runs")
    level = torch.maximum(curves.lowest, reference.lowest)
    return _difference(curves.at(level), reference.at(level), level)


def at_the_end(curves: Curves, reference: Curves) -> Difference:
    """Compare two optimizers after their last steps; as :func:`at_equal_training_loss` does at equal training loss."""
    return _difference(*((x.held_out_loss[-1], x.accuracy[-1]) for x in (curves, reference)))


def _difference(values: Sequence[Tensor], reference: Sequence[Tensor], level: Tensor | None = None) -> Difference:
    """Intervals of the differences of held-out losses and accuracies, of the runs that have both."""
    differences = torch.stack([x - y for x, y in zip(values, reference, strict=True)])
    is_kept = differences.isfinite().all(0)
    if not is_kept.any():
        return Difference(_NONE, _NONE, 0, len(is_kept))
    intervals = [student_interval(difference[is_kept]) for difference in differences]
    mean_level = float("nan") if level is None else level[is_kept].clamp_min(RESOLUTION).log().mean().exp().item()
    return Difference(*intervals, int(is_kept.sum()), len(is_kept), mean_level)


def by_level(curves: Curves, n_levels: int = 80) -> Tensor:
    """Held-out loss against training loss along the runs, as far as all of them come down.

    Args:
        curves: Of one optimizer. Runs that never fall below the least of all first losses are left out.
        n_levels: Number of levels, evenly spaced in the logarithm.

    Returns:
        Levels, mean held-out loss and the bounds of its 95 % Student interval, shape ``(4, n_levels)``;
        ``(4, 0)`` where no run is left.
    """
    highest = curves.training_loss[0].min()
    is_kept = curves.lowest < highest
    if not is_kept.any():
        return torch.empty(4, 0)
    curves = Curves(*(x[:, is_kept] for x in curves))
    lowest = curves.lowest.max().clamp_min(RESOLUTION)
    levels = highest * (lowest / highest) ** torch.linspace(0, 1, n_levels + 1, dtype=torch.float64)[1:]
    levels = levels.minimum(highest.nextafter(lowest))  # a run begins at its highest: it comes down to what is less
    levels[-1] = lowest  # to the bit
    intervals = [student_interval(curves.at(level.expand(int(is_kept.sum())))[0]) for level in levels]
    return torch.cat((levels[None], torch.tensor(intervals, dtype=torch.float64).T))


def generalisation_table(curves: Mapping[str, Curves], *, markdown: bool = False) -> str:
    """One line per optimizer: the end of its runs, and the first one minus it at equal training loss.

    Args:
        curves: By the name of the optimizer; the first is the one that the others are compared with.
        markdown: Whether to write a markdown table rather than an aligned plain one.

    Returns:
        Lines of text.
    """
    first, *others = curves
    headers = [("optimizer", ""), ("training loss", "[nats]"), ("held-out loss", "[nats]"), ("accuracy", "[%]")]
    headers += [("at training loss", "[nats]"), (f"{first} - it: held-out loss", "[nats]"), ("accuracy", "[points]")]
    rows = []
    for name, ends in curves.items():
        losses, held_out, accuracy = (x[-1].mean().item() for x in ends)
        row = [name, _number(losses), _number(held_out), _number(100 * accuracy, "#.4g")]
        if name in others:
            difference = at_equal_training_loss(curves[first], ends)
            row += [_number(difference.level) if difference.n_compared else "", *_texts(difference)]
        rows.append([*row, *[""] * (len(headers) - len(row))])
    return draw_table(headers, rows, markdown=markdown)


def summary_tables(columns: Mapping[str, Mapping[str, Curves]], *, markdown: bool = False) -> str:
    """Differences of held-out loss and of accuracy, at equal training loss and at the end, of all columns.

    Args:
        columns: By the name of the column, curves as for :func:`generalisation_table`; with the same optimizers,
            whatever their settings.
        markdown: Whether to write markdown tables rather than aligned plain ones.

    Returns:
        Lines of text, of four tables.
    """
    names = list(next(iter(columns.values())))
    tables = []
    for where, compare in (("equal training loss", at_equal_training_loss), ("the end", at_the_end)):
        texts = [
            [_texts(compare(next(iter(curves.values())), reference)) for reference in list(curves.values())[1:]]
            for curves in columns.values()
        ]
        for i, (what, unit) in enumerate((("held-out loss", "[nats]"), ("accuracy", "[points]"))):
            headers = [(f"{what} at {where}, {names[0]} - it", ""), *((column, unit) for column in columns)]
            rows = [[family_of(name), *(t[row][i] for t in texts)] for row, name in enumerate(names[1:])]
            tables.append(draw_table(headers, rows, markdown=markdown))
    return "\n\n".join(tables)


def family_of(label: str) -> str:
    """Name of an optimizer without its settings: ``"Adam (lr 0.01)"`` is an ``"Adam"``."""
    return label.split(" (")[0]


def _texts(difference: Difference) -> list[str]:
    """Differences in nats and in points with their bounds, e.g. ``"-0.0012 [-0.0020, -0.0004], 9 of 10 runs"``."""
    _, _, n_compared, n_runs, _ = difference
    if not n_compared:
        return [f"none of {n_runs} runs"] * 2
    remark = f", {n_compared} of {n_runs} runs" if n_compared < n_runs else ""
    texts = []
    for interval, unit, n_decimals in ((difference.held_out_loss, 1, 4), (difference.accuracy, 100, 2)):
        mean, low, high = (f"{unit * bound:+.{n_decimals}f}" for bound in interval)
        texts.append((f"{mean} [{low}, {high}]" if n_compared > 1 else f"{mean} [one run]") + remark)
    return texts


def _number(value: float, format_spec: str = "#.3g") -> str:
    return f"{value:{format_spec}}" if abs(value) < float("inf") else "diverged"


def write_columns(
    path: str | os.PathLike, header: Mapping[str, Any], columns: Mapping[str, Mapping[str, Curves]]
) -> None:
    """Write all finished columns as JSON, in five digits: an interruption leaves the old file or the new one.

    Args:
        path: The file.
        header: What the numbers depend on, in values that JSON can hold.
        columns: Curves by column and optimizer.
    """

    def rows(values: Tensor) -> list[list[float | None]]:
        # JSON has no numbers that are not finite
        return [[float(f"{x:.5g}") if abs(x) < float("inf") else None for x in run] for run in values.T.tolist()]

    content = {
        column: {name: {field: rows(x) for field, x in curves._asdict().items()} for name, curves in by_name.items()}
        for column, by_name in columns.items()
    }
    write_json(path, {**header, "columns": content}, is_by_row=True)


def read_columns(path: str | os.PathLike, header: Mapping[str, Any]) -> dict[str, dict[str, Curves]]:
    """Read a file of :func:`write_columns`, where there is one.

    Args:
        path: The file.
        header: What its header should be.

    Returns:
        Curves by column and optimizer; nothing where there is no file.

    Raises:
        ValueError: If the file is damaged, or its header is another one.
    """
    if not Path(path).exists():
        return {}

    def parse(content: Mapping[str, Any]) -> dict[str, dict[str, Curves]]:
        return {
            column: {name: Curves(**{field: _curve(rows) for field, rows in x.items()}) for name, x in by_name.items()}
            for column, by_name in content["columns"].items()
        }

    return read_json(path, parse, wanted="a file that can be continued here", header=header)


def _curve(rows: list[list[float | None]]) -> Tensor:
    """Rows of runs to a tensor of shape (n_records, n_runs)."""
    rows = [[float("nan") if value is None else value for value in run] for run in rows]
    return torch.tensor(rows, dtype=torch.float64).T
