"""What to look at: a motion as the truth and the models have it, its energy, and the parts along one position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.checks import require
from odeopt.systems.data import simulate
from odeopt.systems.identification import Parts, fix_gauge, parts_at
from odeopt.systems.mechanics import Mechanism
from odeopt.systems.observed import ObservedSystem, PortHamiltonianModel, weights_like

TRUTH = "truth"


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
