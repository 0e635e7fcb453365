"""What a meta-training run is told, and what it leaves behind."""

from __future__ import annotations

import dataclasses

from odeopt.checks import is_integer, is_number, require
from odeopt.meta.estimators import (
    Backpropagation,
    DampedBackpropagation,
    Estimator,
    EvolutionStrategies,
    Hybrid,
    require_dampings,
)
from odeopt.meta.objective import MetaObjective
from odeopt.meta.persistent import PersistentEvolutionStrategies
from odeopt.rules.base import UpdateRule

_SCHEDULES = ("one-cycle", "constant")
# What each estimator of the meta-gradient can be told; None, or False, leaves it unsaid.
_ESTIMATORS = {
    "backpropagation": ("truncation", "checkpoint", "detach"),
    "damped": ("dampings", "threshold", "longest", "checkpoint"),
    "es": ("n_pairs", "sigma", "chunk", "difference_clip", "subspace"),
    "hybrid": ("n_pairs", "sigma", "chunk", "difference_clip", "subspace", "threshold", "longest", "dampings"),
    "pes": ("n_pairs", "sigma", "truncation", "n_groups", "difference_clip"),
}


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """Settings of a meta-training run.

    Attributes:
        n_meta_steps: Number of meta-updates tried, skipped ones included.
        n_tasks: Tasks per batch, on each rank; of a mixture, draws per meta-step on each rank.
        horizon: Optimizee steps per task; a mixture draws its own.
        meta_gradient: How the meta-gradient is estimated: ``"backpropagation"``, which reads ``truncation``,
            ``checkpoint`` and ``detach``; or ``"damped"``, :class:`~odeopt.meta.estimators.DampedBackpropagation`,
            which reads ``dampings``, ``threshold``, ``longest`` and ``checkpoint``; or ``"es"``,
            :class:`~odeopt.meta.estimators.EvolutionStrategies` over the full horizon, which reads ``n_pairs``,
            ``sigma``, ``chunk``, ``difference_clip`` and ``subspace``; or ``"hybrid"``,
            :class:`~odeopt.meta.estimators.Hybrid`, which reads these, ``threshold``, ``longest`` and ``dampings``; or
            ``"pes"``, :class:`~odeopt.meta.persistent.PersistentEvolutionStrategies`, which reads
            ``n_pairs``, ``sigma``, ``truncation``, ``n_groups`` and ``difference_clip`` and takes a single task, no
            mixture. An option that the chosen one does not read is an error.
        truncation: Steps per segment: of truncated backpropagation, None for the full horizon; of persistent
            evolution strategies, 20 where None.
        checkpoint: Steps per checkpointed segment, for horizons that do not fit in memory; None keeps every step.
            ``horizon / checkpoint`` boundaries and ``checkpoint`` steps are in memory at once. With the
            port-Hamiltonian rule a boundary has 16 bytes per parameter and task, a step about 200, so
            ``sqrt(horizon / 12)`` needs the least. Every step is evaluated twice, whatever the length.
            The gradient is the same to rounding, and a run may be resumed with another length.
        detach: Whether the gradients that the rule sees count as constants.
        n_pairs: Antithetic pairs of perturbations of the rule's weights per meta-step; 16 where None.
        sigma: Standard deviation of the perturbations, in the units of the weights; 0.01 where None.
        chunk: Perturbations that are run at a time, ``2 * n_pairs`` of them where None: the memory is that of
            ``chunk * n_tasks`` tasks. The gradient is the same to rounding, and a run may be resumed with another
            chunk.
        n_groups: Groups of tasks whose runs are in different parts of the horizon; 4 where None.
        difference_clip: What the meta-losses of a pair count as differing by at most; no limit where None.
        subspace: Beginning of the names of the weights that are perturbed; all where None.
        dampings: Factors per step on a meta-gradient on its way back, tried in turn; where None, 1, 0.95 and 0.85 for
            damped ones, and 1 alone for hybrid ones.
        threshold: Norm of an exact meta-gradient, or of a damped one, up to which it counts; 5 where None.
        longest: Steps up to which the first of the dampings is tried, by default the exact gradient; 150 where None.
        weights: Weights of the losses in the meta-loss: ``"uniform"``, ``"linear"``, ``"late"`` or ``"last"``.
        log_loss: Whether the meta-loss takes logarithms of the losses.
        log_eps: Added to a loss inside the logarithm.
        relative_loss: Whether losses are divided by the first one of their run.
        held_out: Share of the loss on batches that no step trains on in each loss, in [0, 1].
        gain_margin: Training multiplies the updates by this factor, use and validation do not: the rule then
            stands that far away from the step sizes it was fitted at, which are at the edge of stability.
        lr: Peak learning rate of meta-Adam.
        beta2: Decay of meta-Adam's second moment.
        averaging: Decay, per meta-step, of the running mean of the weights, which is what is validated and kept; 0
            keeps the weights themselves.
        schedule: ``"one-cycle"`` or ``"constant"``.
        clip: Largest norm of a meta-gradient; longer ones are scaled down to it. With a mixture that of each draw,
            before they are averaged.
        outlier_factor: A meta-gradient this many times longer than the running median is skipped (not with a mixture),
            until such ones are the rule.
        validate_every: Meta-steps between validations.
        n_validation_tasks: Tasks per validation, on the full horizon; draws of a mixture.
        seed: Seed of everything but the validation tasks, which are the same for all seeds: their scores compare.
    """

    n_meta_steps: int = 150
    n_tasks: int = 4
    horizon: int = 100
    meta_gradient: str = "backpropagation"
    truncation: int | None = None
    checkpoint: int | None = None
    detach: bool = False
    n_pairs: int | None = None
    sigma: float | None = None
    chunk: int | None = None
    n_groups: int | None = None
    difference_clip: float | None = None
    subspace: str | None = None
    dampings: list[float] | None = None
    threshold: float | None = None
    longest: int | None = None
    weights: str = "linear"
    log_loss: bool = True
    log_eps: float = 1e-8
    relative_loss: bool = False
    held_out: float = 0.0
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
        for name in ("n_meta_steps", "n_tasks", "horizon", "validate_every", "n_validation_tasks"):
            value = getattr(self, name)
            require(is_integer(value) and value >= 1, name, value, "a positive integer")
        for name in ("truncation", "checkpoint", "n_pairs", "chunk", "n_groups", "longest"):
            value = getattr(self, name)
            require(value is None or (is_integer(value) and value >= 1), name, value, "a positive integer or None")
        for name in ("sigma", "difference_clip", "threshold"):
            value = getattr(self, name)
            require(value is None or (is_number(value) and value > 0), name, value, "a positive number or None")
        if self.dampings is not None:
            require_dampings(self.dampings)
            object.__setattr__(self, "dampings", list(self.dampings))  # as a file gives it back
        is_prefix = self.subspace is None or isinstance(self.subspace, str)
        require(is_prefix, "subspace", self.subspace, "the beginning of a name or None")
        for name in ("averaging", "beta2"):
            value = getattr(self, name)
            require(is_number(value) and 0 <= value < 1, name, value, "a number in [0, 1)")
        is_seed = is_integer(self.seed) and -(2**63) <= self.seed < 2**64  # what torch's generators take
        require(is_seed, "seed", self.seed, "an integer of 64 bits")
        for name in ("detach", "log_loss", "relative_loss"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("lr", "clip", "outlier_factor", "log_eps"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, name, value, "a positive number")
        is_margin = is_number(self.gain_margin) and self.gain_margin >= 1
        require(is_margin, "gain_margin", self.gain_margin, "a number of at least 1")
        require(self.schedule in _SCHEDULES, "schedule", self.schedule, f"one of {', '.join(_SCHEDULES)}")
        is_known = self.meta_gradient in tuple(_ESTIMATORS)
        require(is_known, "meta_gradient", self.meta_gradient, f"one of {', '.join(_ESTIMATORS)}")
        read = _ESTIMATORS[self.meta_gradient]
        for name in sorted({name for names in _ESTIMATORS.values() for name in names} - set(read)):
            value = getattr(self, name)
            wanted = f"left out where `meta_gradient = {self.meta_gradient!r}`, which has no such option"
            require(value is None or value is False, name, value, wanted)
        self.objective()

    def objective(self) -> MetaObjective:
        """Build the meta-loss."""
        return MetaObjective(self.weights, self.log_loss, self.log_eps, self.relative_loss, self.held_out)

    def estimator(self) -> Estimator:
        """Build the estimator of the meta-gradient."""
        given = {name: getattr(self, name) for name in _ESTIMATORS[self.meta_gradient]}
        given = {name: value for name, value in given.items() if value is not None}
        if self.meta_gradient == "backpropagation":
            return Backpropagation(**given)
        if self.meta_gradient == "damped":
            return DampedBackpropagation(**given)
        own = {name: given.pop(name) for name in ("threshold", "longest", "dampings") if name in given}
        if "difference_clip" in given:
            given["clip"] = given.pop("difference_clip")
        if self.meta_gradient == "pes":
            return PersistentEvolutionStrategies(**given)
        evolution = EvolutionStrategies(**given)
        return evolution if self.meta_gradient == "es" else Hybrid(evolution, **own)


@dataclasses.dataclass
class MetaResult:
    """What meta-training leaves behind.

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
