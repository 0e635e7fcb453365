"""Comparisons as text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from odeopt.evaluation import Comparison

_DIVERGED = "diverged"


def comparison_table(comparison: Comparison, *, markdown: bool = False) -> str:
    """Draw a comparison: one line per rule, and a caption; see :meth:`odeopt.evaluation.Comparison.table`."""
    columns = _columns(comparison)
    headers = [(title, unit and f"[{unit}]") for title, unit, _ in columns]
    rows = [[cell(name) for _, _, cell in columns] for name in comparison.results]
    caption = _caption(comparison, separator="  \n" if markdown else "\n")
    return f"{draw_table(headers, rows, markdown=markdown)}\n\n{caption}"


def draw_table(headers: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], *, markdown: bool = False) -> str:
    """Draw a table; the first column is flush left, the others are flush right.

    Args:
        headers: Title and unit of each column.
        rows: Cells, one row per line.
        markdown: Whether to write a markdown table rather than an aligned plain one.

    Returns:
        Lines of text.
    """
    if markdown:
        titles = [" ".join(filter(None, header)) for header in headers]
        lines = [titles, [":--", *["--:"] * (len(titles) - 1)], *rows]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    titles, units = zip(*headers, strict=True)
    widths = [max(map(len, column)) for column in zip(titles, units, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *rest = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in rest)]).rstrip()

    ruler = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(titles), line(units), ruler, *map(line, rows)])


def _columns(comparison: Comparison) -> list[tuple[str, str, Callable[[str], str]]]:
    """Title, unit and cell writer of each column."""
    results, unit = comparison.results, comparison.loss_unit
    columns = [("rule", "", str)]
    if comparison.score == "final":
        columns.append(("final loss", unit, lambda name: _number(comparison.scores(name).mean())))
        columns.append(("median", unit, lambda name: _median(comparison.scores(name))))
    else:
        n_last = min(10, comparison.n_steps)
        columns.append((f"last {n_last} losses", unit, lambda name: _number(comparison.scores(name).mean())))
    columns.append(("all losses", unit, lambda name: _number(results[name].losses[:-1].mean())))
    if comparison._any.accuracies is not None:
        columns.append(("accuracy", "%", lambda name: _number(100 * results[name].accuracies.mean(), 1)))
    if comparison.reference is not None:
        columns.append(("difference to reference", unit, lambda name: _difference(comparison, name)))
    columns += [
        ("diverged", "runs", lambda name: f"{int(results[name].is_diverged.sum())}/{comparison.n_runs}"),
        ("time", "ms/step", lambda name: _number(results[name].ms_per_step, 2)),
        ("state", "B/param", lambda name: f"{results[name].state_bytes:.0f}"),
        ("looks across", "coordinates", lambda name: "yes" if results[name].crosses_coordinates else "no"),
    ]
    return columns


def _number(value: Tensor | float, n_decimals: int = 4, sign: str = "") -> str:
    value = float(value)
    if not abs(value) < float("inf"):
        return _DIVERGED
    return f"{value:{sign}.{n_decimals}f}" if abs(value) < 1e4 else f"{value:{sign}.3e}"


def _median(values: Tensor) -> str:
    """Median over the runs, of which one that is not a number counts as infinite."""
    return _number(values.nan_to_num(nan=float("inf"), posinf=float("inf")).quantile(0.5))


def _difference(comparison: Comparison, name: str) -> str:
    if name == comparison.reference:
        return "reference"
    mean, low, high = comparison.difference(name)
    if mean != mean:
        return _DIVERGED
    if comparison.n_runs == 1:
        return f"{_number(mean, sign='+')} [one run]"
    return "{} [{}, {}]".format(*(_number(bound, sign="+") for bound in (mean, low, high)))


def _caption(comparison: Comparison, separator: str) -> str:
    runs = f"{comparison.n_runs} runs of {comparison.n_steps} steps"
    lines = [f"{runs}, on common tasks, initialisations and batches."]
    if comparison.reference is not None:
        lines.append(
            f"Difference: of {comparison.score_meaning}, mean [95 % Student interval of paired runs], "
            f"to {comparison.reference}."
        )
    lines.append("Diverged: final loss not finite, or above the first. Time: the rule alone, without the gradient.")
    return separator.join(lines)
