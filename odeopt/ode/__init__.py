"""Solving ordinary differential equations: torchdiffeq's methods, single steps of our own, and all of them compared."""

from odeopt.ode.compare import compare_solvers, observed_order
from odeopt.ode.comparison import OrderRun, SolverComparison, SolverRun
from odeopt.ode.integrate import ORDER, available_methods, integrate, integrate_unit, is_fixed_step
from odeopt.ode.methods import Method, comparable_methods
from odeopt.ode.problem import Problem
from odeopt.ode.problems import available_problems, select_problems
from odeopt.ode.solution import Solution, Status
from odeopt.ode.steps import EXPLICIT_METHODS, LINEAR_METHODS, explicit_step, linear_step

__all__ = [
    "EXPLICIT_METHODS",
    "LINEAR_METHODS",
    "ORDER",
    "Method",
    "OrderRun",
    "Problem",
    "Solution",
    "SolverComparison",
    "SolverRun",
    "Status",
    "available_methods",
    "available_problems",
    "comparable_methods",
    "compare_solvers",
    "explicit_step",
    "integrate",
    "integrate_unit",
    "is_fixed_step",
    "linear_step",
    "observed_order",
    "select_problems",
]
