"""Parts of a coordinate's system: friction and port held over a step, and networks of its position.

Beside them what a step of the rule hands on from one of its stages to the next, and the check of its arguments.

The rule takes explicit steps of unit length, so friction and mass are bounded: the fastest decay rate that they
can make together stays under 2.71, inside the stability region of rk4 (2.785). The curvature of the potential is
not bounded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from odeopt.checks import is_integer, is_list, is_number, require
from odeopt.ode import EXPLICIT_METHODS, LINEAR_METHODS, available_methods
from odeopt.physics import MatrixPart, PositiveDefinite, Potential, mlp

_WIDTHS = (8,)
_CHOICES = {
    "mass": ("unit", "network"),
    "potential": ("none", "network"),
    "friction": ("modulated", "network", "constant"),
    "port": ("modulated", "network", "constant"),
    "normalization": ("coordinate", "tensor"),
    "backend": ("auto", "odeopt", "torchdiffeq"),
    "output": ("sum", "spectral"),
    "matrix_normalization": ("coordinate", "tensor"),
    "matrix_scale": ("transfer", "muon"),
    "schedule": ("none", "power"),
}
_ENERGIES = ("quadratic", "relativistic", "spectral")
_OF_MATRICES = (
    "matrix_normalization",
    "matrix_scale",
    "initial_matrix_kappa",
    "initial_lookahead",
    "initial_coherence",
    "initial_decay",
)


class Modulation(NamedTuple):
    """Friction, shape ``(*batch, n, modes)``, and port gain ``(*batch, n, modes, 1)``, held over one step."""

    friction: Tensor
    gain: Tensor


class Observation(NamedTuple):
    """What one gradient says about each coordinate, each field of shape ``(*batch, n)``."""

    u: Tensor  # port effort
    second_moment: Tensor  # what coordinates are compared by; the present square where no running one is kept
    is_tensor_wide: bool = False  # whether the effort is normalised by the tensor alone


class Shared(NamedTuple):
    """What the coordinates of a tensor share over one step, each field of shape ``(*batch, k)``."""

    step: Tensor
    weight: Tensor  # of the newest gradient in the running moments
    scale: Tensor
    slow_scale: Tensor
    divisor: Tensor  # the scale, one where it is zero
    carried: Tensor  # weight of the running square, in the new units
    magnitudes: Tensor  # log of the tensor's mean magnitude over its two running values
    per_mode: Tensor | None = None  # log gain, its slope, four numbers for the friction; those that there are
    kappa: Tensor | None = None
    memory: Tensor | None = None  # of the network, after the step
    matrix_kappa: Tensor | None = None  # step size of a square matrix, as an operator norm
    lookahead: Tensor | None = None  # where the velocity of a matrix is evaluated, in steps from the start
    coherence: Tensor | None = None  # power of the coherence of a matrix's momenta in the size of its step
    matrix_decay: Tensor | None = None  # decoupled decay of a matrix, per unit of its kappa
    log_rms: Tensor | None = None  # log rms of the tensor, which coordinates are compared with


class _Bounded(nn.Module):
    """Elementwise ``limit * tanh(.)``."""

    def __init__(self, limit: float) -> None:
        super().__init__()
        self.limit = limit

    def forward(self, raw: Tensor) -> Tensor:
        return self.limit * torch.tanh(raw)


def _from_zero(n_inputs: int, n_outputs: int) -> nn.Sequential:
    """Build a small network that gives zeros until it is trained."""
    network = mlp(n_inputs, n_outputs, widths=_WIDTHS)
    nn.init.zeros_(network[-1].weight)
    nn.init.zeros_(network[-1].bias)
    return network


def bounded_inverse_mass(dof: int) -> PositiveDefinite:
    """Inverse mass ``L L^T + eps I`` of a network of q, its eigenvalues bounded on both sides."""
    n_numbers = dof * (dof + 1) // 2
    # |L| <= sqrt(.7) + .1, so M^-1 <= .88; with friction under 2 exp(.3) the rate stays under 2.4
    network = nn.Sequential(_from_zero(dof, n_numbers), _Bounded(0.1 / dof))
    return PositiveDefinite(dof, network=network, start=0.7)


def potential_network(dof: int) -> Potential:
    """Potential ``V(q) >= 0`` as a network, flat until it is trained."""
    return Potential(dof, network=_from_zero(dof, 1))


class HeldFriction(MatrixPart):
    """Diagonal friction that the modulation holds, optionally times a bounded network of q.

    Args:
        dof: Number of modes.
        depends_on_q: Whether the network is there.
    """

    is_diagonal = True
    is_semidefinite = True

    def __init__(self, dof: int, *, depends_on_q: bool) -> None:
        super().__init__()
        self.shape, self.depends_on_q = (dof,), depends_on_q
        self.network = nn.Sequential(_from_zero(dof, dof), _Bounded(0.3)) if depends_on_q else None

    def forward(self, q, z=None):
        return z.friction if self.network is None else z.friction * self.network(q).exp()


class HeldPort(MatrixPart):
    """Port gains that the modulation holds, optionally times a bounded network of q.

    Args:
        dof: Number of modes.
        depends_on_q: Whether the network is there.
    """

    def __init__(self, dof: int, *, depends_on_q: bool) -> None:
        super().__init__()
        self.shape, self.depends_on_q = (dof, 1), depends_on_q
        self.network = nn.Sequential(_from_zero(dof, dof), _Bounded(1.0)) if depends_on_q else None

    def forward(self, q, z=None):
        return z.gain if self.network is None else z.gain * self.network(q).exp().unsqueeze(-1)


def check_arguments(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check the constructor arguments of the rule, by name; the solver by what it has to solve.

    Raises:
        ValueError: If one is out of range, has no effect beside the others, or there is no such solver under the
            backend.
    """

    def check(name: str, is_right: bool, wanted: str) -> None:
        require(is_right, name, given[name], wanted)

    modes, memory, decay, kappa = (given[name] for name in ("modes", "memory", "decay", "initial_kappa"))
    check("modes", is_integer(modes) and modes >= 1, "an integer of at least 1")
    check("memory", is_integer(memory) and memory >= 0, "a non-negative integer")
    check("decay", is_number(decay) and 0 <= decay < 1, "in [0, 1)")
    check("hidden", all(is_integer(w) and w > 0 for w in given["hidden"]), "positive widths")
    scales = given["time_scales"]
    check("time_scales", len(scales) > 0 and all(is_number(s) and s > 0 for s in scales), "positive numbers")
    check("initial_kappa", is_number(kappa) and kappa > 0, "a positive number")
    floor = given["ratio_floor"]
    check("ratio_floor", is_number(floor) and 0 <= floor <= 1, "a number in [0, 1]")
    for name in ("coordinatewise", "uses_progress"):
        check(name, isinstance(given[name], bool), "True or False")
    for name, values in _CHOICES.items():
        *first, last = map(repr, values)
        check(name, given[name] in values, f"{', '.join(first)} or {last}")
    kinetic = given["kinetic"]
    names = (kinetic,) * modes if isinstance(kinetic, str) else kinetic
    is_known = is_list(names, str) and len(names) == modes and set(names) <= set(_ENERGIES)
    check("kinetic", is_known, f"one of {', '.join(_ENERGIES)}, or one of them for each of {modes} modes")
    for name in ("speed_limit", "initial_matrix_kappa", "initial_lookahead"):
        check(name, is_number(given[name]) and given[name] > 0, "a positive number")
    for name in ("initial_coherence", "initial_decay", "horizon_power"):
        check(name, is_number(given[name]) and given[name] >= 0, "a non-negative number")
    depends_on_q = "network" in (given["mass"], given["potential"], given["friction"], given["port"])
    is_closed = given["solver"] in LINEAR_METHODS and not depends_on_q and given["backend"] != "torchdiffeq"
    if not is_closed:
        wanted = "'quadratic' where the momenta are not stepped in closed form"
        check("kinetic", set(names) == {"quadratic"}, f"{wanted} (networks of q, `backend`, `solver`)")
    is_spectral = "spectral" in names or given["output"] == "spectral"
    if given["output"] == "spectral":
        check("kinetic", set(names) == {"quadratic"} and is_closed, "'quadratic' where `output = 'spectral'`")
    unused = {"speed_limit": "no mode is relativistic"} if "relativistic" not in names else {}
    if not is_spectral:
        unused |= dict.fromkeys(_OF_MATRICES, "no energy is spectral")
    elif given["output"] == "spectral":
        unused |= dict.fromkeys(("initial_lookahead", "initial_coherence"), "`output = 'spectral'`")
    if given["schedule"] == "none":
        unused["horizon_power"] = "`schedule = 'none'`"
    for name, reason in unused.items():
        check(name, given[name] == defaults[name], f"{defaults[name]!r} where {reason}")
    if given["coordinatewise"]:
        wanted = "'coordinate' where `coordinatewise = True`, which knows nothing of the tensor"
        check("normalization", given["normalization"] == "coordinate", wanted)
        check("kinetic", not is_spectral, "without spectral energies where `coordinatewise = True`")
        check("ratio_floor", floor == 0, "0 where `coordinatewise = True`, which knows nothing of the tensor")
    solvers = _solvers(given["backend"], depends_on_q=depends_on_q)
    check("solver", given["solver"] in solvers, f"one of {', '.join(solvers)}")


def _solvers(backend: str, *, depends_on_q: bool) -> tuple[str, ...]:
    """Methods that a backend offers for a system that does, or does not, depend on ``q``."""
    ours = EXPLICIT_METHODS if depends_on_q else LINEAR_METHODS
    theirs = () if backend == "odeopt" else available_methods()
    return theirs if backend == "torchdiffeq" else tuple(dict.fromkeys((*theirs, *ours)))
