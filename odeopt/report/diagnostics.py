"""The steps of an optimizer, tensor by tensor, as scalars of TensorBoard and as a figure."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from odeopt.checks import n_of, require
from odeopt.report.figure import new_figure, panel_grid, save_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Diagnostics = Mapping[str, Mapping[str, Tensor]]  # quantities by tensor, as LearnedOptimizer.diagnostics returns them

# of each quantity: title of its panel, and scale of its axis
_PANELS = {
    "energy": ("energy stored", "log"),
    "dissipated": ("power dissipated", "log"),
    "supplied": ("power supplied by the gradient", "symlog"),
    "step_size": ("step size", "log"),
    "friction": ("friction, mean of the modes", "linear"),
    "update_to_weight": ("update over weight", "log"),
}
_MOST_LINES = 8  # tensors of which a panel shows each
_LONGEST = 46  # characters of a name in a line of a panel's legend


class ScalarWriter(Protocol):
    """The part of ``torch.utils.tensorboard.SummaryWriter`` that is used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Write one number."""


def write_diagnostics(writer: ScalarWriter, diagnostics: Diagnostics, step: int) -> None:
    """Write what :meth:`odeopt.LearnedOptimizer.diagnostics` returned to TensorBoard, one chart per quantity.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``, or what has its ``add_scalar``.
        diagnostics: Quantities by tensor: one number, or one for each mode.
        step: Number of the step.

    Example:
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> write_diagnostics(SummaryWriter("runs/mine"), optimizer.diagnostics(), step)  # doctest: +SKIP
    """
    for tensor, quantities in diagnostics.items():
        for quantity, x in quantities.items():
            numbers = x.flatten().tolist()
            tags = [""] if len(numbers) == 1 else [f"/mode {k + 1}" for k in range(len(numbers))]
            for tag, number in zip(tags, numbers, strict=True):
                writer.add_scalar(f"{quantity}/{tensor}{tag}", number, step)


def plot_diagnostics(
    history: Sequence[Diagnostics],
    path: str | os.PathLike[str],
    *,
    steps: Sequence[int] | None = None,
    title: str = "",
) -> Path:
    """Draw energy, power, step size and the size of the updates of each tensor over a run, and save the figure.

    Up to eight tensors have a line each. Of more, each panel shows the range from the least to the greatest of all
    tensors in grey, their median in black, and names those that stand out in it, from the highest to the lowest: the
    two of the highest and the two of the lowest medians over the run, and those that hold its greatest and its least
    number. What is not finite leaves a gap, and so does what is not positive on a logarithmic axis; a title says
    of how many tensors the panel shows anything where that is not all of them.

    Args:
        history: What :meth:`odeopt.LearnedOptimizer.diagnostics` returned, in the order of the steps.
        path: The image file.
        steps: Numbers of the steps; counted from zero if None.
        title: Stands above.

    Returns:
        The path.

    Raises:
        ValueError: If ``history`` is empty, or ``steps`` has another length.
    """
    require(len(history) > 0, "history", list(history), "of one step at least")
    steps = range(len(history)) if steps is None else steps
    require(len(steps) == len(history), "steps", list(steps), f"as many as `history`, {len(history)}")
    tensors = list(dict.fromkeys(tensor for found in history for tensor in found))
    known = {quantity for found in history for quantities in found.values() for quantity in quantities}
    panels = [quantity for quantity in _PANELS if quantity in known]
    with style():
        n_columns = min(3, max(1, len(panels)))
        has_lines = len(tensors) <= _MOST_LINES
        # nine lines of names below each panel
        width, height = 3.6 * n_columns, (2.6 if has_lines else 3.7) * -(-len(panels) // n_columns) + 0.6
        figure, _ = new_figure(width, height, n_columns=0, title=title)
        cells = panel_grid(figure, len(panels), n_columns)
        for axes, quantity in zip(cells, panels, strict=False):
            name, scale = _PANELS[quantity]
            rows = [[_number(found, tensor, quantity) for found in history] for tensor in tensors]
            values = torch.tensor(rows, dtype=torch.float64)
            visible = values.where(values > 0, torch.nan) if scale == "log" else values
            is_shown = visible.isfinite().any(1)
            of = "" if is_shown.all() else f", {int(is_shown.sum())} of {n_of(len(tensors), 'tensor')}"
            axes.set(title=name + of, xlabel="step")
            if has_lines:
                _draw_lines(axes, steps, dict(zip(tensors, values, strict=True)))
            elif is_shown.any():
                _draw_range(axes, steps, visible)
                stand_out = {tensors[k]: values[k] for k in outstanding(visible)}
                _draw_lines(axes, steps, stand_out)
                _name_below(axes, stand_out)
            _set_scale(axes, scale, values)
        first = next((axes for axes in cells if axes.get_lines()), cells[0])
        handles = first.get_lines() if has_lines else [*first.collections, *first.get_lines()[:1]]
        n_characters = max((len(handle.get_label()) for handle in handles), default=0)
        n_entries = max(1, min(4, int(12 * width / (n_characters + 6))))  # twelve characters take about an inch
        figure.legend(handles=handles, loc="outside lower center", ncols=n_entries, frameon=False)
        return save_figure(figure, path)


def outstanding(values: Tensor) -> list[int]:
    """Rows that stand out among many, from that of the highest to that of the lowest median.

    Args:
        values: A row for each tensor, shape ``(n_tensors, n_steps)``; NaN where nothing is known.

    Returns:
        Numbers of the two rows of the highest medians, of the two of the lowest, and of those that hold the greatest
        and the least number of all; without what has no number.
    """
    medians = values.nanmedian(1).values
    order = [k for k in medians.argsort(descending=True).tolist() if not medians[k].isnan()]
    greatest, least = values.nan_to_num(-torch.inf).amax(1).argmax(), values.nan_to_num(torch.inf).amin(1).argmin()
    chosen = {*order[:2], *order[-2:], int(greatest), int(least)}
    return [k for k in order if k in chosen]


def _draw_lines(axes: Axes, steps: Sequence[int], lines: Mapping[str, Tensor]) -> None:
    from matplotlib import colormaps

    colours = colormaps["viridis"](torch.linspace(0, 0.9, len(lines)).numpy())
    for (tensor, row), colour in zip(lines.items(), colours, strict=True):
        axes.plot(steps, row.tolist(), color=colour, linewidth=1.0, label=tensor)


def _draw_range(axes: Axes, steps: Sequence[int], values: Tensor) -> None:
    """Draw the range and the median of all tensors, behind the lines of a few."""
    known = values.isfinite().any(0)
    least, greatest = (f(values.nan_to_num(x), 0) for f, x in ((torch.amin, torch.inf), (torch.amax, -torch.inf)))
    edges = [edge.where(known, torch.nan).tolist() for edge in (least, greatest)]
    axes.fill_between(steps, *edges, color="#D9D9D9", linewidth=0, label=f"least to greatest of {len(values)} tensors")
    median = values.nanmedian(0).values
    axes.plot(steps, median.tolist(), color="black", linestyle=(0, (4, 2)), linewidth=1.4, label="their median")


def _number(found: Diagnostics, tensor: str, quantity: str) -> float:
    """One number of one step; NaN, where a line has a gap, if there is none."""
    x = found.get(tensor, {}).get(quantity)
    return torch.nan if x is None or not bool(x.isfinite().all()) else float(x.mean())


def _name_below(axes: Axes, tensors: Collection[str]) -> None:
    """Name the last lines of a panel below it, where no data are covered."""
    from matplotlib.transforms import ScaledTranslation

    names = [_in_lines(tensor) for tensor in tensors]
    n_columns = 2 if max(map(len, names)) <= _LONGEST // 2 else 1
    below = axes.transAxes + ScaledTranslation(0, -0.42, axes.figure.dpi_scale_trans)  # inches: the axis' own labels
    place = {"loc": "upper center", "bbox_to_anchor": (0.5, 0), "bbox_transform": below, "borderaxespad": 0.0}
    axes.legend(axes.get_lines()[-len(names) :], names, ncols=n_columns, fontsize=7, frameon=False, **place)


def _in_lines(name: str) -> str:
    """Break a long name behind one of its dots."""
    return re.sub(rf"(?=.{{{_LONGEST + 1}}})(.{{1,{_LONGEST}}}\.)", r"\1\n", name)


def _set_scale(axes: Axes, scale: str, values: Tensor) -> None:
    """Scale the vertical axis; tensors differ by orders of magnitude, also in what may have either sign."""
    largest = values.nan_to_num(0.0).abs().amax().item()
    if scale == "linear":
        axes.set_ylim(bottom=0.0)
    elif largest > 0:
        # a power of ten, below which no ticks crowd
        linear = {"linthresh": 10.0 ** math.ceil(math.log10(largest / 100))}
        axes.set_yscale(scale, **(linear if scale == "symlog" else {"nonpositive": "mask"}))
