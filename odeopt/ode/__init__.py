"""Solving ordinary differential equations: torchdiffeq's methods under one call."""

from odeopt.ode.integrate import ORDER, available_methods, integrate, integrate_unit, is_fixed_step
from odeopt.ode.solution import Solution, Status

__all__ = [
    "ORDER",
    "Solution",
    "Status",
    "available_methods",
    "integrate",
    "integrate_unit",
    "is_fixed_step",
]
