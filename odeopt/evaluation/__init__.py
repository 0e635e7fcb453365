"""Evaluating update rules: comparisons on common tasks, tuned baselines, and the matrix of networks and data."""

from odeopt.evaluation.baselines import FAMILIES, Family, Tuned, baselines_for, build, tune, tune_all
from odeopt.evaluation.compare import BEST_HAND_DESIGNED, EVALUATION_SEED, compare, fast_batch, run, time_step
from odeopt.evaluation.intervals import (
    RESOLUTION,
    Interval,
    ratio_interval,
    ratio_text,
    student_interval,
    trailing_mean,
)
from odeopt.evaluation.matrix import Cell, Matrix, evaluate_matrix, grid
from odeopt.evaluation.response import Response, response
from odeopt.evaluation.result import SCORES, Comparison, RuleResult, scores_of

__all__ = [
    "BEST_HAND_DESIGNED",
    "EVALUATION_SEED",
    "FAMILIES",
    "RESOLUTION",
    "SCORES",
    "Cell",
    "Comparison",
    "Family",
    "Interval",
    "Matrix",
    "Response",
    "RuleResult",
    "Tuned",
    "baselines_for",
    "build",
    "compare",
    "evaluate_matrix",
    "fast_batch",
    "grid",
    "ratio_interval",
    "ratio_text",
    "response",
    "run",
    "scores_of",
    "student_interval",
    "time_step",
    "trailing_mean",
    "tune",
    "tune_all",
]
