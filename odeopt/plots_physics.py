"""The figure of systems that were learned from their motions."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor

from odeopt.plots import PALETTE, line_styles, new_figure, save_figure, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from odeopt.systems import Portrait

_TRUTH = {"color": "#BBBBBB", "linewidth": 4.5, "zorder": 1, "solid_capstyle": "butt"}
_PARTS = {"V": "V, without its mean", "inverse_mass": "inverse mass", "D": "D", "g": "g"}


def plot_physics(
    portraits: Mapping[str, Portrait], path: str | os.PathLike, *, shown: str, n_learned_from: int, title: str
) -> Path:
    """Draw motions, their energy and learned parts against the truth, a row for each system, and save it.

    Args:
        portraits: By the name of the system; of the same models.
        path: The image file.
        shown: The model whose parts are drawn.
        n_learned_from: Observations of a motion in the training; a line tells where they end.
        title: Title of the figure.

    Returns:
        The path.
    """
    names = list(dict.fromkeys(name for portrait in portraits.values() for name in portrait.paths))
    styles = line_styles({name: name == shown for name in names if name != "truth"})
    with style():
        figure, _ = new_figure(15.5, 2.45 * len(portraits) + 0.9)
        figure.clear()
        rows = figure.subplots(len(portraits), 2 + len(_PARTS), squeeze=False)
        for row, (system, portrait) in zip(rows, portraits.items(), strict=True):
            _draw_motion(row[0], row[1], portrait, styles)
            row[1].axvline(portrait.t[n_learned_from - 1].item(), color="#666666", linewidth=0.8, linestyle=":")
            row[0].set_title(f"{system}: a motion")
            for axes, (name, words) in zip(row[2:], _PARTS.items(), strict=True):
                _draw_part(axes, portrait, name, shown)
                axes.set_title(words)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        lines = {line.get_label(): line for row in rows for line in row[0].get_legend_handles_labels()[0]}
        figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=max(1, len(lines)), frameon=False)
        return save_figure(figure, path)


def _draw_motion(phase: Axes, energy: Axes, portrait: Portrait, styles: Mapping[str, dict]) -> None:
    """Phase portrait and energy; what diverges leaves the axes, which are the truth's."""
    for name, motion in portrait.paths.items():
        kind = _TRUTH if name == "truth" else styles[name]
        phase.plot(motion[:, 0], motion[:, 1], label=name, **kind)
        energy.plot(portrait.t, portrait.energies[name], **kind)
    q, rate = portrait.paths["truth"].T
    phase.set(xlim=_limits(q), ylim=_limits(rate), xlabel="q", ylabel=portrait.rate)
    energy.set(ylim=_limits(portrait.energies["truth"]), xlabel="time [s]", title="its energy")


def _draw_part(axes: Axes, portrait: Portrait, name: str, shown: str) -> None:
    """Entries of one part along a position; the upper triangle of what is symmetric."""
    for i, (entry, values) in enumerate(_entries(getattr(portrait.parts["truth"], name), name).items()):
        axes.plot(portrait.q, values, **(_TRUTH | {"label": None}))
        found = _entries(getattr(portrait.parts[shown], name), name)[entry]
        axes.plot(portrait.q, found, color=PALETTE[i], linewidth=1.4, label=entry)
    axes.set_xlabel("q" if not axes.get_legend_handles_labels()[1][1:] else "last of q")
    low, high = axes.get_ylim()
    if high - low < 0.2 * max(abs(low), abs(high)):  # a constant is not to look like noise
        axes.set_ylim(min(0.0, 1.5 * low), max(0.0, 1.5 * high))
    if len(axes.get_legend_handles_labels()[1]) > 1:
        axes.legend(frameon=False, fontsize=7, loc="best")


def _entries(value: Tensor, name: str) -> dict[str, Tensor]:
    if value.dim() == 1:
        return {name: value}
    n_rows, n_columns = value.shape[1:]
    is_symmetric = name != "g"
    return {
        f"{i + 1}{j + 1}" if is_symmetric else f"{i + 1}": value[:, i, j]
        for i in range(n_rows)
        for j in range(n_columns)
        if not is_symmetric or j >= i
    }


def _limits(values: Tensor) -> tuple[float, float]:
    low, high = values.min().item(), values.max().item()
    margin = 0.25 * max(high - low, 1e-3)
    return low - margin, high + margin
