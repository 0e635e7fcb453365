"""The figure of an energy ledger."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from odeopt.report.figure import PALETTE, new_figure, save_figure, style

_DASHES = ("solid", (0, (4, 1.6)), (0, (1, 1)))


def plot_ledger(
    t: Tensor, parts: Mapping[str, Tensor], residual: Tensor, path: str | os.PathLike, *, title: str = ""
) -> Path:
    """Draw where the energy went, the mean over a batch: cumulated, and the residual that the solver made.

    Args:
        t: Output times, shape ``(n_times,)``.
        parts: Energies between neighbouring times by name, three at most, each of shape ``(n_times - 1, *batch)``.
        residual: Energy out of nothing, likewise.
        path: The image file.
        title: Stands above.

    Returns:
        The path.
    """

    def cumulated(part: Tensor) -> list[float]:
        return [0.0, *part.reshape(len(part), -1).mean(1).cumsum(0).tolist()]

    with style():
        figure, (left, right) = new_figure(8.4, 3.2, n_columns=2, title=title)
        for (name, part), colour, dashes in zip(parts.items(), PALETTE, _DASHES, strict=False):
            left.plot(t, cumulated(part), color=colour, label=name, linestyle=dashes)
        left.legend()
        left.set(xlabel="t", ylabel="energy since the start")
        right.plot(t, cumulated(residual), color="#000000")
        right.set(xlabel="t", ylabel="residual since the start")
        return save_figure(figure, path)
