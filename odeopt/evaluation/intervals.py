"""Intervals of means and of ratios, and means of losses along a run."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.checks import is_number, require

RESOLUTION = torch.finfo(torch.float32).eps  # of a cross-entropy in single precision; below it losses count as equal


class Interval(NamedTuple):
    """A mean and the bounds of its confidence interval."""

    mean: float
    low: float
    high: float


def student_interval(samples: Tensor, confidence: float = 0.95) -> Interval:
    r"""Student's interval of the mean of independent samples.

    .. math:: \bar x \pm t_{n-1,\,(1 + c)/2}\; s / \sqrt{n}

    Args:
        samples: Shape ``(n,)``.
        confidence: Probability ``c`` that the interval covers the expectation, in (0, 1).

    Returns:
        Mean and bounds in the unit of the samples; infinite bounds for one sample, NaN where a sample is
        not finite.

    Raises:
        ValueError: If there is no sample or ``confidence`` is out of range.

    References:
        Student (1908), The probable error of a mean, Biometrika 6.
    """
    is_right = samples.ndim == 1 and len(samples) > 0
    require(is_right, "samples", tuple(samples.shape), "a tensor of one, non-empty axis")
    require(0 < confidence < 1, "confidence", confidence, "in (0, 1)")
    samples = samples.double()
    n, mean = len(samples), samples.mean().item()
    if not samples.isfinite().all():
        return Interval(float("nan"), float("nan"), float("nan"))
    if n == 1:
        return Interval(mean, float("-inf"), float("inf"))
    from scipy.special import stdtrit  # takes longer to import than this library

    half = float(stdtrit(n - 1, (1 + confidence) / 2)) * samples.std().item() / n**0.5
    return Interval(mean, mean - half, mean + half)


def ratio_interval(scores: Tensor, reference: Tensor, *, floor: float = 0.0) -> Interval:
    """Ratio of scores to those of paired runs: the geometric mean, with its 95 % interval.

    Args:
        scores: Losses, at least zero, shape ``(n_runs,)``.
        reference: Those of the reference in the same runs.
        floor: Losses below it count as it, such as :data:`RESOLUTION` for cross-entropies.

    Returns:
        Student's interval of the log ratio, taken back; NaN where a loss is negative; infinite where a score is not
        finite, else zero where one of the reference is not.
    """
    if (torch.cat((scores, reference)) < 0).any():
        return Interval(math.nan, math.nan, math.nan)
    floor = max(floor, torch.finfo(torch.float32).tiny)  # a loss of zero has a ratio, too
    mine, theirs = (x.clamp_min(floor) for x in (scores, reference))
    if not (mine.isfinite().all() and theirs.isfinite().all()):
        return Interval(*3 * [0.0 if mine.isfinite().all() else math.inf])
    return Interval(*torch.tensor(student_interval((mine / theirs).log()), dtype=torch.float64).exp().tolist())


def ratio_text(ratio: Interval) -> str:
    """Write a ratio and its bounds, e.g. ``"0.912 [0.874, 0.952]"``."""
    if math.isnan(ratio.mean):
        return "no ratio: a loss is negative"
    if ratio.mean in (0, math.inf):
        return "diverged" if ratio.mean else "the reference diverged"
    mean, low, high = (f"{x:.2e}" if x >= 1e4 else f"{x:.3f}" if x >= 0.01 else f"{x:.2g}" for x in ratio)
    return f"{mean} [{low}, {high}]" if ratio.high < math.inf else f"{mean} [one run]"


def trailing_mean(losses: Tensor, part: float = 0.05) -> Tensor:
    """Average losses over the last steps, a part of those so far: the longer a run, the finer the differences shown.

    Args:
        losses: Shape ``(n_steps, n_runs)``.
        part: Part of the steps so far; less than a step is one.

    Returns:
        The means, of the shape of ``losses``, double precision.

    Raises:
        ValueError: If there is no step, or ``part`` is not in (0, 1].
    """
    is_table = isinstance(losses, Tensor) and losses.ndim == 2 and len(losses) > 0
    found = tuple(losses.shape) if isinstance(losses, Tensor) else losses
    require(is_table, "losses", found, "a tensor of shape (n_steps, n_runs), of at least one step")
    require(is_number(part) and 0 < part <= 1, "part", part, "a number in (0, 1]")
    # no differences of running sums: a loss that once was huge would be missing from all that follow
    ends = range(1, len(losses) + 1)
    return torch.stack([losses[end - max(1, int(part * end)) : end].double().mean(0) for end in ends])
