"""Solving ordinary differential equations: torchdiffeq's methods and single steps of our own."""

from odeopt.ode.integrate import ORDER, available_methods, integrate, integrate_unit, is_fixed_step
from odeopt.ode.solution import Solution, Status
from odeopt.ode.steps import EXPLICIT_METHODS, LINEAR_METHODS, explicit_step, linear_step

__all__ = [
    "EXPLICIT_METHODS",
    "LINEAR_METHODS",
    "ORDER",
    "Solution",
    "Status",
    "available_methods",
    "explicit_step",
    "integrate",
    "integrate_unit",
    "is_fixed_step",
    "linear_step",
]
