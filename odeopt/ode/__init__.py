"""Solving ordinary differential equations: torchdiffeq's methods and single steps of our own."""

from odeopt.ode.adapter import ORDER, available_methods, is_fixed_step
from odeopt.ode.implicit import Newton
from odeopt.ode.inputs import FirstOrderHold, ZeroOrderHold
from odeopt.ode.integrate import BACKENDS, integrate, integrate_unit
from odeopt.ode.solution import Solution, Status
from odeopt.ode.steps import EXPLICIT_METHODS, LINEAR_METHODS, explicit_step, linear_step
from odeopt.ode.structured import STRUCTURE_METHODS, STRUCTURE_ORDER, StructureStep, discrete_gradient, structure_step

__all__ = [
    "BACKENDS",
    "EXPLICIT_METHODS",
    "LINEAR_METHODS",
    "ORDER",
    "STRUCTURE_METHODS",
    "STRUCTURE_ORDER",
    "FirstOrderHold",
    "Newton",
    "Solution",
    "Status",
    "StructureStep",
    "ZeroOrderHold",
    "available_methods",
    "discrete_gradient",
    "explicit_step",
    "integrate",
    "integrate_unit",
    "is_fixed_step",
    "linear_step",
    "structure_step",
]
