"""The suite: today's architectures, trained by learned rules and by tuned opponents."""

from odeopt.suite.problems import Problem, available_problems, make_problem
from odeopt.suite.run import Run, run

__all__ = ["Problem", "Run", "available_problems", "make_problem", "run"]
