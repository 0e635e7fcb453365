"""The suite: today's architectures, trained by learned rules and by tuned opponents."""

from odeopt.suite.evaluate import evaluate_suite
from odeopt.suite.opponents import Contender, learned, opponents, untrained
from odeopt.suite.problems import Problem, available_problems, make_problem
from odeopt.suite.result import Suite
from odeopt.suite.run import Run, run

__all__ = [
    "Contender",
    "Problem",
    "Run",
    "Suite",
    "available_problems",
    "evaluate_suite",
    "learned",
    "make_problem",
    "opponents",
    "run",
    "untrained",
]
