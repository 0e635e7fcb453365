"""Check of the constructor arguments of the rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from odeopt.checks import is_integer, is_list, is_number, require
from odeopt.ode import EXPLICIT_METHODS, LINEAR_METHODS, available_methods

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
    "matrix_polynomial": ("muon", "short", "learned"),
    "matrix_products": ("auto", "full", "bfloat16"),
    "schedule": ("none", "power"),
}
_ENERGIES = ("quadratic", "relativistic", "spectral")
_OF_MATRICES = (
    "matrix_normalization",
    "matrix_scale",
    "matrix_polynomial",
    "initial_matrix_kappa",
    "initial_lookahead",
    "initial_coherence",
    "initial_decay",
    "decay_growth",
    "decay_onset",
    "decay_horizon",
    "depth_power",
    "trust_ratio",
    "narrow",
    "row_power",
    "matrix_products",
    "matrix_interval",
)
_LARGEST_INTERVAL = 2**24  # steps, up to which float32 counts them


def depends_on_q(given: Mapping[str, Any]) -> bool:
    """True if a part of the system is a network of positions."""
    return "network" in (given["mass"], given["potential"], given["friction"], given["port"])


def is_linear(given: Mapping[str, Any]) -> bool:
    """True if held friction and port make the system linear, and a step of it a polynomial or an exponential."""
    return given["solver"] in LINEAR_METHODS and not depends_on_q(given) and given["backend"] != "torchdiffeq"


def is_spectral(given: Mapping[str, Any]) -> bool:
    """True if matrices are stepped by their singular values."""
    kinetic = given["kinetic"]
    return given["output"] == "spectral" or "spectral" in ((kinetic,) if isinstance(kinetic, str) else kinetic)


def check_arguments(given: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check the constructor arguments of the rule, by name; the solver by what it has to solve.

    Raises:
        ValueError: If one is out of range, has no effect beside the others, or there is no such solver under the
            backend.
    """

    def check(name: str, is_right: bool, wanted: str) -> None:
        require(is_right, name, given[name], wanted)

    modes, decay = given["modes"], given["decay"]
    check("modes", is_integer(modes) and modes >= 1, "an integer of at least 1")
    for name in ("memory", "narrow"):
        check(name, is_integer(given[name]) and given[name] >= 0, "a non-negative integer")
    interval = given["matrix_interval"]
    is_count = is_integer(interval) and 1 <= interval <= _LARGEST_INTERVAL
    check("matrix_interval", is_count, f"an integer between 1 and {_LARGEST_INTERVAL}")
    check("decay", is_number(decay) and 0 <= decay < 1, "in [0, 1)")
    widths, scales = given["hidden"], given["time_scales"]
    are_positive = is_list(widths) and all(is_integer(w) and w > 0 for w in widths)
    check("hidden", are_positive, "a list of positive widths")
    are_positive = is_list(scales) and len(scales) > 0 and all(is_number(s) and s > 0 for s in scales)
    check("time_scales", are_positive, "a list of positive numbers")
    check("solver", isinstance(given["solver"], str), "the name of a method")
    for name in ("ratio_floor", "row_power"):
        check(name, is_number(given[name]) and 0 <= given[name] <= 1, "a number in [0, 1]")
    for name in ("coordinatewise", "uses_progress"):
        check(name, isinstance(given[name], bool), "True or False")
    for name, values in _CHOICES.items():
        *first, last = map(repr, values)
        check(name, given[name] in values, f"{', '.join(first)} or {last}")
    kinetic = given["kinetic"]
    names = (kinetic,) * modes if isinstance(kinetic, str) else kinetic
    is_known = is_list(names, str) and len(names) == modes and set(names) <= set(_ENERGIES)
    check("kinetic", is_known, f"one of {', '.join(_ENERGIES)}, or one of them for each of {modes} modes")
    for name in ("initial_kappa", "speed_limit", "initial_matrix_kappa", "initial_lookahead"):
        check(name, is_number(given[name]) and given[name] > 0, "a positive number")
    for name in (
        *("initial_coherence", "initial_decay", "decay_horizon", "horizon_power", "depth_power"),
        *("alignment_rate", "alignment_horizon", "trust_ratio"),
    ):
        check(name, is_number(given[name]) and given[name] >= 0, "a non-negative number")
    for name in ("decay_growth", "decay_onset"):
        check(name, is_number(given[name]) and given[name] >= 1, "a number of at least 1")
    if not is_linear(given):
        wanted = "'quadratic' where the momenta are not stepped in closed form"
        check("kinetic", set(names) == {"quadratic"}, f"{wanted} (networks of q, `backend`, `solver`)")
    if given["normalization"] == "tensor":
        is_right = given["matrix_normalization"] == "tensor"
        check("matrix_normalization", is_right, "'tensor' where `normalization = 'tensor'`, which keeps no squares")
    has_spectral_output = given["output"] == "spectral"
    if has_spectral_output:
        is_right = set(names) == {"quadratic"} and is_linear(given)
        check("kinetic", is_right, "'quadratic' where `output = 'spectral'`")
    for is_idle, idle, reason in (
        ("relativistic" not in names, ("speed_limit",), "no mode is relativistic"),
        (not is_spectral(given), _OF_MATRICES, "no energy is spectral"),
        (has_spectral_output, ("initial_lookahead", "initial_coherence", "row_power"), "`output = 'spectral'`"),
        (given["initial_decay"] == 0, ("decay_growth", "decay_horizon"), "`initial_decay = 0`"),
        (given["decay_growth"] == 1, ("decay_onset",), "`decay_growth = 1`"),
        (given["alignment_rate"] == 0, ("alignment_horizon",), "`alignment_rate = 0`"),
        (given["horizon_power"] == 0, ("decay_horizon",), "`horizon_power = 0`"),
        (given["schedule"] == "none", ("horizon_power",), "`schedule = 'none'`"),
    ):
        for name in idle if is_idle else ():
            check(name, given[name] == defaults[name], f"{defaults[name]!r} where {reason}")
    if given["coordinatewise"]:
        wanted = "'coordinate' where `coordinatewise = True`, which knows nothing of the tensor"
        check("normalization", given["normalization"] == "coordinate", wanted)
        check("kinetic", not is_spectral(given), "without spectral energies where `coordinatewise = True`")
        for name in ("ratio_floor", "alignment_rate"):
            check(name, given[name] == 0, "0 where `coordinatewise = True`, which knows nothing of the tensor")
    ours = EXPLICIT_METHODS if depends_on_q(given) else LINEAR_METHODS
    if given["backend"] != "torchdiffeq" and given["solver"] in ours:  # torchdiffeq need not be imported for it
        return
    theirs = () if given["backend"] == "odeopt" else available_methods()
    solvers = dict.fromkeys(theirs if given["backend"] == "torchdiffeq" else (*theirs, *ours))
    check("solver", given["solver"] in solvers, f"one of {', '.join(solvers)}")
