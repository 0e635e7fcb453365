"""Solving ordinary differential equations: torchdiffeq's methods, single steps of our own, and all of them compared."""

from odeopt.ode.adapter import ORDER, available_methods, is_fixed_step
from odeopt.ode.compare import compare_solvers, observed_order
from odeopt.ode.comparison import OrderRun, SolverComparison, SolverRun
from odeopt.ode.implicit import Newton
from odeopt.ode.inputs import FirstOrderHold, ZeroOrderHold
from odeopt.ode.integrate import BACKENDS, integrate, integrate_unit
from odeopt.ode.ledger import DampingReport, EnergyLedger, diagnose_damping, energy_ledger
from odeopt.ode.methods import Method, comparable_methods
from odeopt.ode.problem import Problem
from odeopt.ode.problems import available_problems, select_problems
from odeopt.ode.solution import IntegrationError, Solution, Status
from odeopt.ode.steps import EXPLICIT_METHODS, LINEAR_METHODS, explicit_step, linear_step
from odeopt.ode.structured import STRUCTURE_METHODS, STRUCTURE_ORDER, StructureStep, discrete_gradient, structure_step

__all__ = [
    "BACKENDS",
    "EXPLICIT_METHODS",
    "LINEAR_METHODS",
    "ORDER",
    "STRUCTURE_METHODS",
    "STRUCTURE_ORDER",
    "DampingReport",
    "EnergyLedger",
    "FirstOrderHold",
    "IntegrationError",
    "Method",
    "Newton",
    "OrderRun",
    "Problem",
    "Solution",
    "SolverComparison",
    "SolverRun",
    "Status",
    "StructureStep",
    "ZeroOrderHold",
    "available_methods",
    "available_problems",
    "comparable_methods",
    "compare_solvers",
    "diagnose_damping",
    "discrete_gradient",
    "energy_ledger",
    "explicit_step",
    "integrate",
    "integrate_unit",
    "is_fixed_step",
    "linear_step",
    "observed_order",
    "select_problems",
    "structure_step",
]
