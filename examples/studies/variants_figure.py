"""The figure of variants: by how much each differs from a reference."""

from __future__ import annotations

import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from odeopt.checks import require
from odeopt.report import PALETTE, new_figure, save_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from variants import Row

# colour is not all that tells worse from better, and both from neither
_KINDS = {
    "reference": {"marker": "D", "color": "#000000"},
    "better": {"marker": "^", "color": PALETTE[2]},
    "neither": {"marker": "o", "color": PALETTE[0]},
    "worse": {"marker": "s", "color": PALETTE[1]},
}
_RING = {"marker": "o", "markersize": 5, "markerfacecolor": "none", "markeredgewidth": 0.9, "linestyle": "none"}


def plot_ablation(
    columns: Mapping[str, Mapping[str, Row]],
    path: str | os.PathLike,
    *,
    reference: str | Mapping[str, str],
    label: str,
    title: str,
) -> Path:
    """Draw by how much variants differ from one of them, one panel per column of the table, and save it.

    A filled mark is a mean and its line the interval over runs; a ring is one meta-training, and the band spans those
    of the reference. Axes span what most rows need, and what lies beyond is written at the edge.

    Args:
        columns: Rows of ``variants.compare_variants`` by the title of the column; the same in all.
        path: The image file.
        reference: The row that the others are compared with; by column where they differ.
        label: What the difference is of, for the axes.
        title: Title of the figure.

    Returns:
        The path.

    Raises:
        ValueError: If there is no row or column, columns have other rows than the first, or the reference is none of
            them or did not stay finite.
    """
    references = _checked(columns, reference)
    with style():
        names = list(next(iter(columns.values())))
        figure, panels = new_figure(9.6, 0.235 * len(names) + 1.7, len(columns))
        for axes, (column, rows) in zip(panels, columns.items(), strict=True):
            own = references[column]
            axes.set_xlim(*_limits([row for name, row in rows.items() if name != own], rows[own]))
            spread = rows[own].by_seed
            axes.axvspan(min(spread), max(spread), color="#000000", alpha=0.1, linewidth=0)
            axes.axvline(0, color="#666666", linewidth=1)
            for height, (name, row) in enumerate(rows.items()):
                _draw_row(axes, row, -height, is_reference=name == own)
            axes.set_ylim(-len(names) + 0.4, 0.6)
            axes.set_yticks(
                [-height for height in range(len(names))], names if axes is panels[0] else [""] * len(names)
            )
            axes.tick_params(axis="y", length=0)
            axes.set(xlabel=label, title=textwrap.fill(column, 80 // len(columns)))  # titles of neighbours may not meet
            axes.locator_params(axis="x", nbins=4)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        words = {"better": "better", "neither": "interval holds zero", "worse": "worse"}
        handles = [panels[0].plot([], [], linewidth=1.6, markersize=5, **_KINDS[kind])[0] for kind in words]
        labels = list(words.values())
        if any(len(row.by_seed) > 1 for rows in columns.values() for row in rows.values()):
            handles += panels[0].plot([], [], color="#000000", **_RING)
            has_band = any(len(rows[references[column]].by_seed) > 1 for column, rows in columns.items())
            labels.append("one meta-training (band: those of the reference)" if has_band else "one meta-training")
        figure.legend(handles, labels, loc="outside lower center", ncols=len(handles), frameon=False)
        return save_figure(figure, path)


def _checked(columns: Mapping[str, Mapping[str, Row]], reference: str | Mapping[str, str]) -> Mapping[str, str]:
    """Check what is to be drawn, and return the reference of each column."""
    are_columns = isinstance(columns, Mapping) and all(isinstance(rows, Mapping) for rows in columns.values())
    require(are_columns and len(columns) > 0, "columns", columns, "a mapping of titles to rows by name")
    names = list(next(iter(columns.values())))
    references = reference if isinstance(reference, Mapping) else dict.fromkeys(columns, reference)
    for column, rows in columns.items():
        is_alike = list(rows) == names and len(names) > 0
        require(is_alike, f"columns[{column!r}]", list(rows), f"the rows of the first column, {names}, at least one")
        for name, row in rows.items():
            is_row = len(getattr(row, "by_seed", ())) > 0
            require(is_row, f"columns[{column!r}][{name!r}]", row, "a row of at least one meta-seed")
        own = references.get(column)
        require(own in names, "reference", reference, f"one of {', '.join(names)}, for {column}")
        spread = rows[own].by_seed
        is_finite = all(map(math.isfinite, spread))
        require(is_finite, "reference", reference, f"a row that stayed finite; for {column} it is at {spread}")
    return references


def _draw_row(axes: Axes, row: Row, height: float, *, is_reference: bool) -> None:
    """Meta-trainings, mean and interval of one row; words for what is outside."""
    mean, low, high = row.difference
    left, right = axes.get_xlim()
    is_worse = low > 0 or not math.isfinite(mean)
    kind = _KINDS["reference" if is_reference else "worse" if is_worse else "better" if high < 0 else "neither"]
    if not left <= mean <= right:
        at = {"va": "center", "fontsize": 8, "color": kind["color"]}
        if mean < left:
            axes.annotate(f"\N{LEFTWARDS ARROW} {mean:+.2g}", (left, height), ha="left", **at)
        else:
            words = f"{mean:+.2g} \N{RIGHTWARDS ARROW}" if math.isfinite(mean) else "diverged"
            axes.annotate(words, (right, height), ha="right", **at)
        return
    if not is_reference and math.isfinite(low):
        axes.hlines(height, max(low, left), min(high, right), color=kind["color"], linewidth=1.6)
    axes.plot([mean], [height], markersize=5, **kind)
    if len(row.by_seed) > 1:
        inside = [x for x in row.by_seed if left <= x <= right]
        axes.plot(inside, [height] * len(inside), color=kind["color"], **_RING)


def _limits(rows: Sequence[Row], reference: Row) -> tuple[float, float]:
    """Bounds that hold zero, the reference, and the three quarters of the rows that are nearest to it."""
    finite = [row for row in rows if math.isfinite(row.difference.mean)]
    shown = sorted(finite, key=lambda row: abs(row.difference.mean))[: math.ceil(0.75 * len(finite))]
    bounds = [0.0, *reference.by_seed, *(x for row in shown for x in (*row.difference, *row.by_seed))]
    bounds = [x for x in bounds if math.isfinite(x)]
    margin = 0.08 * (max(bounds) - min(bounds)) or 0.01
    return min(bounds) - margin, max(bounds) + margin
