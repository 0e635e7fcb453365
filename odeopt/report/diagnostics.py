"""What an optimizer does to each tensor, as scalars of TensorBoard and as a figure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from odeopt.checks import require
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
_MOST_NAMED = 12  # tensors that a legend can hold; more are told apart by a colour bar


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
        from matplotlib import colormaps

        colours = colormaps["viridis"](torch.linspace(0, 0.9, len(tensors)).numpy())
        n_columns = min(3, max(1, len(panels)))
        figure, _ = new_figure(3.6 * n_columns, 2.6 * -(-len(panels) // n_columns) + 0.6, n_columns=0)
        cells = panel_grid(figure, len(panels), n_columns)
        for axes, quantity in zip(cells, panels, strict=False):
            name, scale = _PANELS[quantity]
            axes.set(title=name, xlabel="step")
            for tensor, colour in zip(tensors, colours, strict=True):
                values = [_number(found, tensor, quantity) for found in history]
                axes.plot(steps, values, color=colour, linewidth=1.0, label=tensor)
            _set_scale(axes, scale)
        handles = cells[0].get_lines()[: len(tensors)]
        if len(tensors) > _MOST_NAMED:  # the first and the last, between which colours run
            handles = [handles[0], handles[-1]]
        figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False)
        if title:
            figure.suptitle(title)
        return save_figure(figure, path)


def _number(found: Diagnostics, tensor: str, quantity: str) -> float:
    """One number of one step; NaN, where a line has a gap, if there is none."""
    x = found.get(tensor, {}).get(quantity)
    return torch.nan if x is None or not bool(x.isfinite().all()) else float(x.mean())


def _set_scale(axes: Axes, scale: str) -> None:
    """Scale the vertical axis; tensors differ by orders of magnitude, also in what may have either sign."""
    values = torch.tensor([y for line in axes.get_lines() for y in line.get_ydata()])
    largest = values.nan_to_num(0.0).abs().amax().item()
    if scale == "linear":
        axes.set_ylim(bottom=0.0)
    elif largest > 0:
        # a power of ten, below which no ticks crowd
        linear = {"linthresh": 10.0 ** math.ceil(math.log10(largest / 100))}
        axes.set_yscale(scale, **(linear if scale == "symlog" else {"nonpositive": "mask"}))
