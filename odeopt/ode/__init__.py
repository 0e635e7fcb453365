"""Solving ordinary differential equations: torchdiffeq's methods and single steps of our own."""

from odeopt.ode.implicit import Newton
from odeopt.ode.inputs import FirstOrderHold, ZeroOrderHold
from odeopt.ode.integrate import BACKENDS, integrate, integrate_unit
from odeopt.ode.ledger import DampingReport, EnergyLedger, diagnose_damping, energy_ledger
from odeopt.ode.solution import IntegrationError, Solution, Status
from odeopt.ode.steps import EXPLICIT_METHODS, LINEAR_METHODS, explicit_step, linear_step
from odeopt.ode.structured import STRUCTURE_METHODS, STRUCTURE_ORDER, StructureStep, discrete_gradient, structure_step
from odeopt.ode.torchdiffeq import available_methods, is_fixed_step, nominal_order

__all__ = [
    "BACKENDS",
    "EXPLICIT_METHODS",
    "LINEAR_METHODS",
    "STRUCTURE_METHODS",
    "STRUCTURE_ORDER",
    "DampingReport",
    "EnergyLedger",
    "FirstOrderHold",
    "IntegrationError",
    "Newton",
    "Solution",
    "Status",
    "StructureStep",
    "ZeroOrderHold",
    "available_methods",
    "diagnose_damping",
    "discrete_gradient",
    "energy_ledger",
    "explicit_step",
    "integrate",
    "integrate_unit",
    "is_fixed_step",
    "linear_step",
    "nominal_order",
    "structure_step",
]
