"""Settings of a meta-training run, and its result."""

from __future__ import annotations

import dataclasses
from typing import Any

from odeopt.checks import is_integer, is_number, require, require_counts, require_one_of, require_positive
from odeopt.meta.estimators import Backpropagation, Estimator
from odeopt.meta.objective import MetaObjective
from odeopt.rules.base import UpdateRule
from odeopt.tasks.random import EVALUATION_SEED, TUNING_SEED, VALIDATION_SEED

_RESERVED_SEEDS = {VALIDATION_SEED: "validation", TUNING_SEED: "tuning", EVALUATION_SEED: "evaluation"}
_SCHEDULES = ("one-cycle", "constant")


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """Settings of a meta-training run.

    Attributes:
        n_meta_steps: Number of meta-updates tried, skipped ones included.
        n_tasks: Tasks per batch, on each rank; of a mixture, draws per meta-step on each rank.
        horizon: Optimizee steps per task; a mixture draws its own.
        estimator: Estimator of the meta-gradient, one of :mod:`odeopt.meta.estimators`; by default the exact one, over
            the full horizon.
        objective: The meta-loss.
        gain_margin: Multiplier of the updates in training only, at least 1: a margin to the edge of stability, at which
            the step sizes of training lie.
        lr: Peak learning rate of meta-Adam.
        beta2: Decay of meta-Adam's second moment.
        averaging: Decay, per meta-step, of the running mean of the weights, which is what is validated and kept; 0
            keeps the weights themselves.
        schedule: ``"one-cycle"`` or ``"constant"``.
        clip: Largest norm of a meta-gradient; longer ones are scaled down to it. With a mixture that of each draw,
            before they are averaged.
        outlier_factor: A meta-gradient this many times longer than the running median is skipped, until such ones are
            the rule; with a mixture that of a draw.
        validate_every: Meta-steps between validations.
        n_validation_tasks: Tasks per validation, on the full horizon; draws of a mixture.
        seed: Seed of everything but the validation tasks, which are the same for all seeds: their scores compare. The
            seeds that validation, tuning and evaluation draw their tasks from are refused.

    Raises:
        ValueError: If a setting is out of range.

    Example:
        >>> from odeopt.meta import Hybrid, MetaObjective
        >>> config = MetaConfig(horizon=50, estimator=Hybrid(threshold=3.0), objective=MetaObjective("late"))
    """

    n_meta_steps: int = 150
    n_tasks: int = 4
    horizon: int = 100
    estimator: Estimator = dataclasses.field(default_factory=Backpropagation)
    objective: MetaObjective = dataclasses.field(default_factory=MetaObjective)
    gain_margin: float = 1.0
    lr: float = 3e-3
    beta2: float = 0.999
    averaging: float = 0.0
    schedule: str = "one-cycle"
    clip: float = 0.3
    outlier_factor: float = 100.0
    validate_every: int = 10
    n_validation_tasks: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require_counts(n_meta_steps=self.n_meta_steps, n_tasks=self.n_tasks, horizon=self.horizon)
        require_counts(validate_every=self.validate_every, n_validation_tasks=self.n_validation_tasks)
        require_positive(lr=self.lr, clip=self.clip, outlier_factor=self.outlier_factor)
        wanted = "an estimator of the meta-gradient, such as Backpropagation()"
        require(isinstance(self.estimator, Estimator), "estimator", self.estimator, wanted)
        is_objective = isinstance(self.objective, MetaObjective)
        require(is_objective, "objective", self.objective, "a meta-loss, such as MetaObjective()")
        for name in ("averaging", "beta2"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value < 1, name, value, "a number in [0, 1)")
        require(is_integer(self.seed), "seed", self.seed, "an integer of 64 bits")  # what torch's generators take
        reserved = _RESERVED_SEEDS.get(self.seed)
        require(reserved is None, "seed", self.seed, f"another one than that of the tasks of {reserved}")
        is_margin = is_number(self.gain_margin) and self.gain_margin >= 1
        require(is_margin, "gain_margin", self.gain_margin, "a number of at least 1")
        require_one_of(_SCHEDULES, schedule=self.schedule)

    def describe(self) -> dict[str, Any]:
        """Return the settings as a configuration file has them, in values that JSON can hold."""
        return dataclasses.asdict(self) | {"estimator": self.estimator.describe()}


@dataclasses.dataclass
class MetaResult:
    """Result of a meta-training run.

    Attributes:
        rule: The rule, holding the weights that did best in validation.
        best_score: Their validation score: mean loss over the last tenth of the horizon.
        best_step: The meta-step they come from.
        meta_losses: Meta-loss of every meta-step.
        validation: Pairs of meta-step and validation score.
        n_skipped_nonfinite: Meta-gradients skipped because they were not finite.
        n_skipped_outliers: Meta-gradients skipped because of their length.
        seconds: Time spent, over all resumed pieces.
        n_tasks_per_step: Tasks per meta-step, of all ranks together.
    """

    rule: UpdateRule
    best_score: float = float("inf")
    best_step: int = 0
    meta_losses: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    n_skipped_nonfinite: int = 0
    n_skipped_outliers: int = 0
    seconds: float = 0.0
    n_tasks_per_step: int = 0
