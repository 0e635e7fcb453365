"""Comparing ODE solvers on common problems: error, evaluations, seconds, energy, gradients and orders."""

from odeopt.solvers.compare import compare_solvers, observed_order
from odeopt.solvers.initial_value import Problem
from odeopt.solvers.methods import Method, comparable_methods
from odeopt.solvers.problems import available_problems, select_problems
from odeopt.solvers.result import SolverComparison
from odeopt.solvers.runs import OrderRun, SolverRun

__all__ = [
    "Method",
    "OrderRun",
    "Problem",
    "SolverComparison",
    "SolverRun",
    "available_problems",
    "comparable_methods",
    "compare_solvers",
    "observed_order",
    "select_problems",
]
