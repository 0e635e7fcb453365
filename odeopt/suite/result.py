"""The suite's numbers: ratios of paired runs, steps and seconds to a loss, tables and the figure."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from odeopt.evaluation.intervals import Interval, ratio_interval, ratio_text
from odeopt.report import draw_table, plot_suite
from odeopt.suite.opponents import OPPONENTS, REFERENCE, Contender
from odeopt.suite.problems import Problem, resolution_of

TARGETS = {"train": 1.0, "held_out": 1.02}  # ratios to tuned AdamW that a learned rule may not exceed
_TITLES = {"train": "train loss", "held_out": "held-out loss"}
_DEFAULT = "port-hamiltonian-spectral"
_KNOWN = (*(x.title for x in OPPONENTS.values()), _DEFAULT, f"{_DEFAULT}, not told", f"{_DEFAULT}, untrained")


class Outcome(NamedTuple):
    """Runs of a contender on a problem.

    Attributes:
        lr: The learning rate that was chosen.
        is_edge: Whether it is the least or the greatest of several that were tried.
        train: Mean of the last twentieth of the training losses, infinite where a run diverged; shape ``(n_runs,)``.
        held_out: Held-out loss at the end, infinite where a run diverged; shape ``(n_runs,)``.
        seconds: Time of the training loop; shape ``(n_runs,)``.
        curves: Training losses, each averaged over the twentieth of the run before it; shape ``(n_points, n_runs)``.
        steps: Number of steps done at each point; shape ``(n_points,)``.
    """

    lr: float
    is_edge: bool
    train: Tensor
    held_out: Tensor
    seconds: Tensor
    curves: Tensor
    steps: Tensor

    @property
    def is_diverged(self) -> Tensor:
        """True for runs that ended in a loss that is not finite; shape ``(n_runs,)``."""
        return ~(self.train.isfinite() & self.held_out.isfinite())

    @property
    def n_diverged(self) -> int:
        """Number of those runs."""
        return int(self.is_diverged.sum())

    @property
    def run_seconds(self) -> float:
        """Median time of the runs that did not diverge; NaN where all did, as those end early."""
        return self.seconds[~self.is_diverged].median().item() if self.n_diverged < len(self.seconds) else math.nan

    def steps_to(self, levels: Tensor) -> Tensor:
        """Find after how many steps each run's loss is at a level, or below it.

        Args:
            levels: Shape ``(n_runs,)``.

        Returns:
            Numbers of steps, of the same shape; infinite where a run does not come down to its level, or the level is
            not finite.
        """
        is_there = (self.curves <= levels) & levels.isfinite()
        steps = self.steps[is_there.int().argmax(0)].double()
        return steps.where(is_there.any(0), math.inf)


@dataclass(frozen=True, eq=False)
class Suite:
    """Contenders on problems.

    Attributes:
        problems: The problems, by name.
        contenders: The contenders, by name; tuned AdamW is the reference.
        outcomes: What each contender did, by the name of the problem and its own.
        n_runs: Number of paired runs.
    """

    problems: Mapping[str, Problem]
    contenders: Mapping[str, Contender]
    outcomes: Mapping[str, Mapping[str, Outcome]]
    n_runs: int

    def ratio(self, problem: str, contender: str, of: str = "train", *, reference: str = REFERENCE) -> Interval:
        """Ratio of a contender's loss to that of tuned AdamW: the geometric mean over paired runs, with its interval.

        Args:
            problem: Name of the problem.
            contender: Name of the contender.
            of: ``"train"`` or ``"held_out"``.
            reference: Another contender, in the place of tuned AdamW.

        Returns:
            See :func:`odeopt.evaluation.intervals.ratio_interval`; cross-entropies below the rounding of single
            precision count as that.
        """
        at_problem, floor = self.outcomes[problem], resolution_of(self.problems[problem].settings["criterion"])
        return ratio_interval(getattr(at_problem[contender], of), getattr(at_problem[reference], of), floor=floor)

    def summary(self, contender: str) -> str:
        """Say in one line on how many problems a contender is no worse than tuned AdamW, and on which it is worst."""
        words = []
        for of, bound in TARGETS.items():
            ratios = {problem: self.ratio(problem, contender, of) for problem in self.problems}
            n_good = sum(0 < ratio.mean <= bound for ratio in ratios.values())
            worst = max(ratios, key=lambda problem: (math.isnan(ratios[problem].mean), ratios[problem].mean))
            words.append(
                f"{_TITLES[of]} at most {bound:g} times AdamW's on {n_good} of {len(ratios)} problems, worst "
                f"{ratio_text(ratios[worst])} ({worst})"
            )
        n_diverged = sum(by_name[contender].n_diverged for by_name in self.outcomes.values())
        n_all = self.n_runs * len(self.problems)
        return f"{self.contenders[contender].title}: {'; '.join(words)}; {n_diverged} of {n_all} runs diverged."

    def table(self, *, markdown: bool = False) -> str:
        """One table per problem, followed by a caption and a line on each learned rule.

        Args:
            markdown: Whether to write markdown tables rather than aligned plain ones.

        Returns:
            Lines of text.
        """
        tables = [draw_table(*self._rows(name), markdown=markdown) for name in self.problems]
        caption = [
            f"Train: mean of the last 5 % of the training losses; held out: loss at the end. Means of {self.n_runs} "
            "runs, on common initialisations and batches.",
            "Ratio: to tuned AdamW, geometric mean of paired runs [95 % Student interval]; cross-entropies below "
            "1.2e-7 count as 1.2e-7.",
            "To AdamW's loss: steps and seconds after which the mean of 5 % of the losses is what AdamW ends with, in "
            "the median run; runs that diverged, which end early, have no time.",
            "Learning rates are chosen by one run on another seed; * is the edge of what was tried.",
            *(self.summary(name) for name, contender in self.contenders.items() if contender.is_learned),
        ]
        return "\n\n".join([*tables, ("  \n" if markdown else "\n").join(caption)])

    def _rows(self, problem: str) -> tuple[list[tuple[str, str]], list[list[str]]]:
        headers = [(self.problems[problem].title, ""), ("lr", ""), ("train", ""), ("ratio", ""), ("held out", "")]
        headers += [("ratio", ""), ("to AdamW's loss", "[steps]"), ("", "[s]"), ("run", "[s]"), ("diverged", "[runs]")]
        rows, levels = [], self.outcomes[problem][REFERENCE].train
        for name, contender in self.contenders.items():
            outcome = self.outcomes[problem][name]
            steps = outcome.steps_to(levels).quantile(0.5, interpolation="higher")
            seconds = steps / outcome.steps[-1] * outcome.run_seconds
            row = [contender.title, f"{outcome.lr:g}{'*' * outcome.is_edge}"]
            for of in TARGETS:
                ratio = "" if name == REFERENCE else ratio_text(self.ratio(problem, name, of))
                row += [f"{getattr(outcome, of).mean():.4g}", ratio]
            at_level, whole = ("" if math.isnan(time) else f"{time:.1f}" for time in (seconds, outcome.run_seconds))
            row += [f"{steps:.0f}", at_level] if steps.isfinite() else ["never", ""]
            rows.append([*row, whole, str(outcome.n_diverged)])
        return headers, rows

    def plot(self, path: str | os.PathLike, *, title: str = "The suite") -> Path:
        """Draw losses and ratios, under a title that the number of runs is added to.

        See :func:`odeopt.report.plot_suite`.
        """
        titles = {name: contender.title for name, contender in self.contenders.items()}
        curves = {
            "\n".join(dict.fromkeys((name, problem.title))): {
                titles[c]: (o.steps, o.curves) for c, o in self.outcomes[name].items()
            }
            for name, problem in self.problems.items()
        }
        ratios = {
            f"{words} over tuned AdamW's": {
                name: {titles[c]: self.ratio(name, c, of) for c in titles if c != REFERENCE} for name in self.problems
            }
            for of, words in _TITLES.items()
        }
        is_learned = {contender.title: contender.is_learned for contender in self.contenders.values()}
        return plot_suite(curves, ratios, is_learned, path, title=f"{title}, {self.n_runs} paired runs", known=_KNOWN)
