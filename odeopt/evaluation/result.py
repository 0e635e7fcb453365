"""Results of a comparison: losses of every rule, their differences, table and figure."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from odeopt.checks import n_of, require, require_one_of
from odeopt.evaluation.intervals import Interval, student_interval, trailing_mean
from odeopt.report import draw_table, number_text, plot_losses

SCORES = {
    "last ten": "the mean of the last ten losses before the last update",
    "final": "the loss after the last update",
}
DIVERGED = (
    "Diverged: last loss not finite, or above the first. Each is of one batch, so noise alone can put a run here."
)
Score = Callable[[Tensor], Tensor]


def scores_of(losses: Tensor, score: str | Score) -> Tensor:
    """One number per run, the smaller the better.

    Args:
        losses: ``f_t(theta_t)`` for t = 0 ... n_steps, shape ``(n_steps + 1, n_runs)``.
        score: A name in :data:`SCORES`, or a function of the losses. The last ten losses are those at
            t = n_steps - 10 ... n_steps - 1.

    Returns:
        Shape ``(n_runs,)``; not finite where a loss that enters is not.

    Raises:
        ValueError: If there is no score of this name.
    """
    if callable(score):
        return score(losses)
    require_one_of(SCORES, score=score)
    return losses[-1] if score == "final" else losses[:-1][-10:].mean(0)


@dataclass(frozen=True, eq=False)
class RuleResult:
    """Runs of one rule.

    Attributes:
        losses: ``f_t(theta_t)`` for t = 0 ... n_steps, float64 on the CPU, shape ``(n_steps + 1, n_runs)``.
        accuracies: Fraction of held-out examples classified right after the last update, shape ``(n_runs,)``;
            NaN where the final loss is not finite; None where the task has no accuracy.
        is_learned: Whether the rule has learned parameters.
        crosses_coordinates: Whether the update of a coordinate depends on other coordinates.
        ms_per_step: Median time of one optimizer step on one task, gradient excluded, in milliseconds.
        state_bytes: Bytes of state per parameter.
    """

    losses: Tensor
    accuracies: Tensor | None
    is_learned: bool
    crosses_coordinates: bool
    ms_per_step: float
    state_bytes: float

    @property
    def is_diverged(self) -> Tensor:
        """True where a run's final loss is not finite, or above its first; shape ``(n_runs,)``."""
        return ~(self.losses[-1] <= self.losses[0])


@dataclass(frozen=True, eq=False)
class Comparison:
    """Rules on common tasks, initialisations and batches.

    Attributes:
        results: Runs of each rule, by name.
        reference: Name of the rule that the others are compared with; None if there is none.
        score: Which number judges a run, a name in :data:`SCORES`.
        task: Description of the task.
        seed: Seed of initialisations and batches.
        loss_unit: Unit of the losses, for headers and axes.
    """

    results: Mapping[str, RuleResult]
    reference: str | None
    score: str
    task: Mapping[str, Any]
    seed: int
    loss_unit: str = ""

    @property
    def n_steps(self) -> int:
        """Updates per run."""
        return len(self._any.losses) - 1

    @property
    def n_runs(self) -> int:
        """Runs per rule."""
        return self._any.losses.shape[1]

    @property
    def score_meaning(self) -> str:
        """The score in words."""
        n_last = "ten losses" if self.n_steps >= 10 else f"{self.n_steps} losses" if self.n_steps > 1 else "loss"
        meaning = SCORES[self.score].replace("last ten losses", f"last {n_last}")
        return meaning.removeprefix("the mean of ") if self.n_steps == 1 else meaning

    @property
    def _any(self) -> RuleResult:
        return next(iter(self.results.values()))

    def scores(self, name: str) -> Tensor:
        """Score of each run of a rule, shape ``(n_runs,)``; see :func:`scores_of`.

        Raises:
            ValueError: If there is no such rule.
        """
        require_one_of(self.results, name=name)
        return scores_of(self.results[name].losses, self.score)

    def difference(self, name: str, reference: str | None = None) -> Interval:
        """Mean and 95 % Student interval of the paired difference of two rules' scores.

        Args:
            name: The rule; a negative difference means that it does better.
            reference: The rule it is compared with; :attr:`reference` by default.

        Returns:
            NaN where a run of either did not stay finite.

        Raises:
            ValueError: If there is no such rule, or no reference.
        """
        reference = self.reference if reference is None else reference
        require(reference is not None, "reference", None, f"one of {', '.join(self.results)}, as none is hand-designed")
        return student_interval(self.scores(name) - self.scores(reference))

    def table(self, *, markdown: bool = False) -> str:
        """One line per rule, units in the header, followed by a caption.

        Args:
            markdown: Whether to write a markdown table rather than an aligned plain one.

        Returns:
            Lines of text. A number that is not finite is shown as ``diverged``.
        """
        columns = _columns(self)
        headers = [(title, unit and f"[{unit}]") for title, unit, _ in columns]
        rows = [[cell(name) for _, _, cell in columns] for name in self.results]
        caption = _caption(self, separator="  \n" if markdown else "\n")
        return f"{draw_table(headers, rows, markdown=markdown)}\n\n{caption}"

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Scores as plain numbers, by rule: mean, difference to the reference with its interval, and bytes of state.

        A number that is not finite is None, and so is the difference where there is no reference or the rule is it.
        """
        found = {}
        for name, result in self.results.items():
            is_compared = self.reference not in (None, name)
            numbers = [self.scores(name).mean().item(), *(self.difference(name) if is_compared else ())]
            score, *difference = (x if math.isfinite(x) else None for x in numbers)
            found[name] = {"score": score, "difference": difference or None, "state_bytes": result.state_bytes}
        return found

    def plot(self, path: str | os.PathLike, *, title: str | None = None) -> Path:
        """Draw the mean loss against the step with its 95 % interval, and save it.

        The axis of losses is logarithmic, unless some are negative.
        Where minibatches make single losses jump, each run's is averaged over the last twentieth of the steps so far.

        Args:
            path: The image file.
            title: Title; the task's name and the number of runs by default.

        Returns:
            The path.
        """
        # a loss after the last update that counts by itself is one without minibatches
        is_noisy = self.score != "final"
        losses = {name: result.losses for name, result in self.results.items()}
        losses = {name: trailing_mean(runs) if is_noisy else runs for name, runs in losses.items()}
        bands = {name: torch.tensor([student_interval(at_step) for at_step in runs]).T for name, runs in losses.items()}
        unit = f" [{self.loss_unit}]" if self.loss_unit else ""
        return plot_losses(
            bands,
            {name: result.is_learned for name, result in self.results.items()},
            path,
            title=title or f"{self.task['task']}, {n_of(self.n_runs, 'run')}",
            xlabel=f"optimizer step{'; losses over the last 5 % of steps so far' if is_noisy else ''}",
            ylabel=f"loss{unit}, mean and its 95 % interval",
        )


def _columns(comparison: Comparison) -> list[tuple[str, str, Callable[[str], str]]]:
    """Title, unit and cell writer of each column."""
    results, unit = comparison.results, comparison.loss_unit
    is_final, n_last = comparison.score == "final", min(10, comparison.n_steps)
    title = "final loss" if is_final else f"last {n_last} losses" if n_last > 1 else "last loss"
    columns = [("rule", "", str), (title, unit, lambda name: number_text(comparison.scores(name).mean()))]
    if is_final:
        columns.append(("median", unit, lambda name: _median(comparison.scores(name))))
    columns.append(("all losses", unit, lambda name: number_text(results[name].losses[:-1].mean())))
    if comparison._any.accuracies is not None:
        columns.append(("accuracy", "%", lambda name: number_text(100 * results[name].accuracies.mean(), 1)))
    if comparison.reference is not None:
        columns.append(("difference to reference", unit, lambda name: _difference(comparison, name)))
    columns += [
        ("diverged", "runs", lambda name: f"{int(results[name].is_diverged.sum())}/{comparison.n_runs}"),
        ("time", "ms/step", lambda name: number_text(results[name].ms_per_step, 2)),
        ("state", "B/param", lambda name: f"{results[name].state_bytes:.0f}"),
        ("looks across", "coordinates", lambda name: "yes" if results[name].crosses_coordinates else "no"),
    ]
    return columns


def _median(values: Tensor) -> str:
    """Median over the runs, of which one that is not a number counts as infinite."""
    return number_text(values.nan_to_num(nan=float("inf"), posinf=float("inf")).quantile(0.5))


def _difference(comparison: Comparison, name: str) -> str:
    if name == comparison.reference:
        return "reference"
    mean, low, high = comparison.difference(name)
    if mean != mean:
        return "diverged"
    if comparison.n_runs == 1:
        return f"{number_text(mean, sign='+')} [one run]"
    return "{} [{}, {}]".format(*(number_text(bound, sign="+") for bound in (mean, low, high)))


def _caption(comparison: Comparison, separator: str) -> str:
    runs = f"{n_of(comparison.n_runs, 'run')} of {n_of(comparison.n_steps, 'step')}"
    lines = [f"{runs}, on common tasks, initialisations and batches."]
    if comparison.reference is not None:
        lines.append(
            f"Difference: of {comparison.score_meaning}, mean [95 % Student interval of paired runs], "
            f"to {comparison.reference}."
        )
    lines += [
        DIVERGED,
        "Looks across: a coordinate's step depends on others.",
        "Time: the rule alone, in tensor operations; LearnedOptimizer's step in C is faster (`odeopt rules`).",
    ]
    return separator.join(lines)
