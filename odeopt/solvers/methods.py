"""The methods that can be compared: whatever the installed libraries offer, and ours."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from odeopt.ode.structured import STRUCTURE_ORDER
from odeopt.ode.torchdiffeq import accepted_options, available_methods, is_external, is_fixed_step, nominal_order
from odeopt.solvers.selection import select


@dataclass(frozen=True, eq=False)
class Method:
    """A method under the name that it has in tables.

    Attributes:
        name: That name.
        method: Name for :func:`integrate`.
        kind: ``"fixed"`` if it takes steps of a given size, ``"adaptive"`` if it chooses them by tolerances,
            ``"structure"`` if it takes steps of a given size and needs a port-Hamiltonian system.
        order: Nominal order; None where none is judged.
        options: Options for :func:`integrate`, without the size of the steps.
        is_external: Whether gradients need the adjoint equation.
    """

    name: str
    method: str
    kind: str
    order: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    is_external: bool = False


def comparable_methods() -> dict[str, Method]:
    """Return every method that can be compared, by name.

    These are all methods of the installed torchdiffeq, with ``scipy_solver`` standing for each method of the installed
    SciPy (``"scipy-LSODA"``), and the structure-preserving methods written here. ``explicit_adams`` has its order
    limited to five, above which it is unstable; no order of a multistep method is judged.
    """
    methods = {}
    for name in available_methods():
        if "solver" in accepted_options(name):
            for solver in _scipy_solvers():
                key = f"scipy-{solver}"
                methods[key] = Method(key, name, "adaptive", None, {"solver": solver}, is_external=True)
        elif is_fixed_step(name):
            options = {"max_order": 5} if name == "explicit_adams" else {}
            key = f"torchdiffeq-{name}" if name in STRUCTURE_ORDER else name  # theirs takes bare fields, ours systems
            methods[key] = Method(key, name, "fixed", nominal_order(name), options)
        else:
            methods[name] = Method(name, name, "adaptive", nominal_order(name), {}, is_external(name))
    for name, order in STRUCTURE_ORDER.items():
        methods[name] = Method(name, name, "structure", order)
    return methods


def _scipy_solvers() -> list[str]:
    import scipy.integrate

    base = scipy.integrate.OdeSolver
    return [
        name
        for name, value in vars(scipy.integrate).items()
        if inspect.isclass(value) and issubclass(value, base) and value is not base
    ]


def select_methods(methods: Iterable[str | Method] | str | Method | None = None) -> list[Method]:
    """Look methods up.

    Args:
        methods: Methods, names out of :func:`comparable_methods`, or kinds (``"fixed"``, ``"adaptive"``,
            ``"structure"``), one or several; None for all.

    Returns:
        The methods, one of each name.

    Raises:
        ValueError: If there is no such method, or none is wanted.
    """
    return select("methods", methods, comparable_methods(), "kind")
