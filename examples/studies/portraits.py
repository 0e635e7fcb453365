"""Portraits of learned systems: a motion, its energy, and the parts along one position; and their figure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from odeopt.checks import require
from odeopt.report import PALETTE, line_styles, new_figure, save_figure, style
from odeopt.systems.data import simulate
from odeopt.systems.identification import Parts, fix_gauge, parts_at
from odeopt.systems.mechanics import Mechanism
from odeopt.systems.observed import ObservedSystem, PortHamiltonianModel, weights_like

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRUTH = "truth"
_THICK = {"color": "#BBBBBB", "linewidth": 4.5, "zorder": 1, "solid_capstyle": "butt"}
_PARTS = {"V": "V, without its mean", "inverse_mass": "inverse mass", "D": "D", "g": "g"}


class Portrait(NamedTuple):
    """One motion without inputs, and the parts of the system; by name, the truth's under ``"truth"``.

    Attributes:
        t: Times, shape ``(n_times,)``.
        paths: Last position and its momentum or velocity, whichever is observed, shape ``(n_times, 2)``.
        energies: True energy of what is observed or predicted, shape ``(n_times,)``.
        q: Last position, the others at zero, shape ``(n,)``.
        parts: Parts there of the models that have them, in the truth's gauge.
        rate: ``"p"`` or ``"dq/dt"``.
    """

    t: Tensor
    paths: dict[str, Tensor]
    energies: dict[str, Tensor]
    q: Tensor
    parts: dict[str, Parts]
    rate: str


def portray(
    mechanism: Mechanism, models: Mapping[str, ObservedSystem], x0: Tensor, q: Tensor, *, n_times: int = 100
) -> Portrait:
    """Let the truth and models move from one observation on, and evaluate their parts.

    Args:
        mechanism: The true system.
        models: Models of it, by name.
        x0: First observation, double precision, shape ``(n_observed,)``.
        q: Positions by which gauges are fixed, double precision, shape ``(n, dof)``.
        n_times: Observations of the motion, the first included.

    Returns:
        The portrait.

    Raises:
        ValueError: If a shape does not fit.
    """
    require(TRUTH not in models, "models", list(models), f"named otherwise than {TRUTH!r}")
    truth = mechanism.model
    t, x, _ = simulate(mechanism, x0[None], n_times)
    motions = {TRUTH: x}
    for name, model in models.items():
        with torch.no_grad():
            motions[name] = model.rollout(x0[None].to(weights_like(model, x0)), t).states.to(x)
    angles = torch.linspace(-math.pi, math.pi, 101, dtype=x.dtype)
    along = torch.cat((angles.new_zeros(101, truth.dof - 1), angles[:, None]), dim=-1)
    parts = {TRUTH: parts_at(truth, along)}
    for name, model in models.items():
        if isinstance(model, PortHamiltonianModel):
            of_model = parts_at(model, along, fix_gauge(model, truth, q))
            # the gauge's offset is a mean over other positions; along these, too, only differences of V tell
            parts[name] = of_model._replace(V=of_model.V - of_model.V.mean() + parts[TRUTH].V.mean())
    return Portrait(
        t,
        {name: _path(truth, motion[:, 0]) for name, motion in motions.items()},
        {name: _energy(truth, motion[:, 0]) for name, motion in motions.items()},
        angles,
        parts,
        "p" if truth.observes == "momentum" else "dq/dt",
    )


def _path(truth: PortHamiltonianModel, x: Tensor) -> Tensor:
    """Last position, unwound, and its rate."""
    q = x[:, truth.dof - 1]
    if truth.observes == "velocity":
        q = truth.coordinates.positions(x[:, : truth.coordinates.n_features])
        q = torch.cat((q[:1], truth.coordinates.shortest(q.diff(dim=0)))).cumsum(0)[:, -1]
    return torch.stack((q, x[:, -1]), dim=-1)


def _energy(truth: PortHamiltonianModel, x: Tensor) -> Tensor:
    """True energy as far as the motion is finite, NaN after it."""
    H = x.new_full((len(x),), math.nan)
    is_finite = x.isfinite().all(-1)
    H[is_finite] = truth.energy(x[is_finite])
    return H


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
        figure, _ = new_figure(15.5, 2.45 * len(portraits) + 0.9, n_columns=0)
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
        kind = _THICK if name == "truth" else styles[name]
        phase.plot(motion[:, 0], motion[:, 1], label=name, **kind)
        energy.plot(portrait.t, portrait.energies[name], **kind)
    q, rate = portrait.paths["truth"].T
    phase.set(xlim=_limits(q), ylim=_limits(rate), xlabel="q", ylabel=portrait.rate)
    energy.set(ylim=_limits(portrait.energies["truth"]), xlabel="time [s]", title="its energy")


def _draw_part(axes: Axes, portrait: Portrait, name: str, shown: str) -> None:
    """Entries of one part along a position; the upper triangle of what is symmetric."""
    for i, (entry, values) in enumerate(_entries(getattr(portrait.parts["truth"], name), name).items()):
        axes.plot(portrait.q, values, **(_THICK | {"label": None}))
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
