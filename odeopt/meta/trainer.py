"""meta_train(): the loop that fits a rule, with validation, checkpoints and resume."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from odeopt.meta.estimators import Backpropagation, Estimator
from odeopt.meta.objective import MetaObjective
from odeopt.meta.unroll import unroll
from odeopt.rules.base import UpdateRule, is_integer, is_number, require
from odeopt.tasks.base import Task

_SCHEDULES = ("one-cycle", "constant")
_VALIDATION_SEED_OFFSET = 1_000_003  # validation draws from streams that training never touches
_N_NORMS = 50  # accepted gradient norms that an outlier is judged against


@dataclasses.dataclass(frozen=True)
class MetaConfig:
    """Settings of a meta-training run.

    Attributes:
        n_meta_steps: Number of meta-updates tried, skipped ones included.
        n_tasks: Tasks per batch.
        horizon: Optimizee steps per task.
        truncation: Steps per segment of truncated backpropagation; None for the full horizon.
        detach: Whether the gradients that the rule sees count as constants.
        weights: Weights of the losses in the meta-loss: ``"uniform"``, ``"linear"`` or ``"last"``.
        log_loss: Whether the meta-loss takes logarithms of the losses.
        gain_margin: Training multiplies the updates by this factor, use and validation do not: the rule then
            stands that far away from the step sizes it was fitted at, which are at the edge of stability.
        lr: Peak learning rate of meta-Adam.
        schedule: ``"one-cycle"`` or ``"constant"``.
        clip: Largest norm of a meta-gradient; longer ones are scaled down to it.
        outlier_factor: A meta-gradient this many times longer than the running median is skipped.
        validate_every: Meta-steps between validations.
        n_validation_tasks: Tasks per validation, on the full horizon.
        seed: Seed of everything.
    """

    n_meta_steps: int = 150
    n_tasks: int = 4
    horizon: int = 100
    truncation: int | None = None
    detach: bool = False
    weights: str = "linear"
    log_loss: bool = True
    gain_margin: float = 1.0
    lr: float = 3e-3
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
        is_length = self.truncation is None or (is_integer(self.truncation) and self.truncation >= 1)
        require(is_length, "truncation", self.truncation, "a positive integer or None")
        require(is_integer(self.seed), "seed", self.seed, "an integer")
        for name in ("detach", "log_loss"):
            require(isinstance(getattr(self, name), bool), name, getattr(self, name), "true or false")
        for name in ("lr", "clip", "outlier_factor"):
            value = getattr(self, name)
            require(is_number(value) and value > 0, name, value, "a positive number")
        is_margin = is_number(self.gain_margin) and self.gain_margin >= 1
        require(is_margin, "gain_margin", self.gain_margin, "a number of at least 1")
        require(self.schedule in _SCHEDULES, "schedule", self.schedule, f"one of {', '.join(_SCHEDULES)}")
        self.objective()

    def objective(self) -> MetaObjective:
        """Build the meta-loss."""
        return MetaObjective(self.weights, self.log_loss)

    def estimator(self) -> Estimator:
        """Build the estimator of the meta-gradient."""
        return Backpropagation(truncation=self.truncation, detach=self.detach)


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
    """

    rule: UpdateRule
    best_score: float = float("inf")
    best_step: int = 0
    meta_losses: list[float] = dataclasses.field(default_factory=list)
    validation: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    n_skipped_nonfinite: int = 0
    n_skipped_outliers: int = 0
    seconds: float = 0.0


@torch.no_grad()
def validation_score(rule: UpdateRule, task: Task, *, indices: Tensor, horizon: int, seed: int) -> float:
    """Mean loss over the tasks and the last tenth of the full horizon; infinite where a run diverged."""
    trajectory = unroll(rule, task, indices=indices, n_steps=horizon, seed=seed, total_steps=horizon)
    score = trajectory.losses[-max(1, horizon // 10) :].mean().item()
    return score if score == score else float("inf")


def meta_train(
    rule: UpdateRule,
    task: Task,
    config: MetaConfig | None = None,
    *,
    validation_task: Task | None = None,
    folder: str | os.PathLike | None = None,
    stop_after: float | None = None,
    progress_bar: bool = True,
) -> MetaResult:
    """Fit ``rule`` so that the loss of ``task`` falls fast.

    The exact meta-gradient over the full horizon is the default. Non-finite and outlier meta-gradients are
    skipped and counted; the weights kept are those that did best in validation over the full horizon on tasks
    that training never sees.

    Args:
        rule: The rule; changed in place. On return it holds the best weights.
        task: Training tasks.
        config: Settings; the defaults when None.
        validation_task: Where validation tasks come from; ``task``, with other seeds, by default.
        folder: Where ``checkpoint.pt`` and TensorBoard scalars go. A checkpoint found there is continued, and
            gives the result the uninterrupted run would have given. None keeps nothing.
        stop_after: Seconds after which this call stops at the next validation, to be resumed later.
        progress_bar: Whether to show one.

    Returns:
        The result, also when stopped early: ``len(result.meta_losses)`` says how far it got.

    Raises:
        ValueError: If ``folder`` holds a checkpoint that cannot be read, or one of a run with other settings.
        TypeError: If ``rule``, ``task`` or ``config`` is something else.

    Warns:
        RuntimeWarning: If no validation came out finite: nothing was learned then.
    """
    config = MetaConfig() if config is None else config
    for name, value, wanted in (("rule", rule, UpdateRule), ("task", task, Task), ("config", config, MetaConfig)):
        if not isinstance(value, wanted):
            raise TypeError(f"Parameter `{name}` should be of class {wanted.__name__}. Found `{value!r}`.")
    run = _Run(rule, task, config, validation_task or task, None if folder is None else Path(folder))
    run.resume()
    began, seconds_before, n_done = time.perf_counter(), run.result.seconds, len(run.result.meta_losses)
    with tqdm(total=config.n_meta_steps, initial=n_done, disable=not progress_bar, desc="meta-training") as bar:
        if not run.result.validation:
            run.validate(0)
        while len(run.result.meta_losses) < config.n_meta_steps:
            for loss in run.episode():
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}", best=f"{run.result.best_score:.4f}")
            seconds = time.perf_counter() - began
            run.result.seconds = seconds_before + seconds
            has_saved = run.after_episode()
            if has_saved and stop_after is not None and seconds > stop_after:
                break
    run.close()
    if not math.isfinite(run.result.best_score):
        warnings.warn(
            "No validation came out finite, so no weights could be chosen: the rule is as it was. "
            f"{run.result.n_skipped_nonfinite} meta-gradients were not finite.",
            RuntimeWarning,
            stacklevel=2,
        )
    rule.load_state_dict(run.best_weights)
    return run.result


class _Run:
    """State of one meta-training run; everything in it that changes goes into the checkpoint."""

    def __init__(
        self, rule: UpdateRule, task: Task, config: MetaConfig, validation_task: Task, folder: Path | None
    ) -> None:
        self.rule, self.task, self.config, self.validation_task = rule, task, config, validation_task
        self.objective, self.estimator = config.objective(), config.estimator()
        self.parameters = [p for p in rule.parameters() if p.requires_grad]
        if not self.parameters:
            raise ValueError(f"Parameter `rule` should have parameters to learn. Found `{type(rule).__name__}`.")
        self.meta_optimizer = torch.optim.Adam(self.parameters, lr=config.lr)
        self.scheduler = None
        if config.schedule == "one-cycle":
            self.scheduler = torch.optim.lr_scheduler.OneCycleLR(
                self.meta_optimizer, config.lr, total_steps=max(config.n_meta_steps, 2), cycle_momentum=False
            )
        self.result = MetaResult(rule)
        self.best_weights = _copy(rule.state_dict())
        self.norms: list[float] = []
        self.n_episodes = 0
        self.n_validated = 0
        self.path = None if folder is None else folder / "checkpoint.pt"
        self.writer = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(str(folder))

    def episode(self) -> Iterator[float]:
        """Train on one batch of tasks; yield the meta-loss of each meta-step."""
        config = self.config
        first = self.n_episodes * config.n_tasks
        indices = torch.arange(first, first + config.n_tasks)
        self.n_episodes += 1
        steps = self.estimator.gradients(
            self.rule,
            self.task,
            self.objective,
            indices=indices,
            horizon=config.horizon,
            seed=config.seed,
            update_scale=config.gain_margin,
        )
        self.meta_optimizer.zero_grad()
        for meta_loss in steps:
            self._update()
            self.result.meta_losses.append(meta_loss.item())
            yield meta_loss.item()
            if len(self.result.meta_losses) == config.n_meta_steps:
                return
            self.meta_optimizer.zero_grad()

    def _update(self) -> None:
        step = len(self.result.meta_losses)
        grads = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
        if not norm < float("inf"):
            self.result.n_skipped_nonfinite += 1
            self._skip()
        elif len(self.norms) >= 10 and norm > self.config.outlier_factor * statistics.median(self.norms):
            # thousands of times the usual length is chaos, not a direction: clipped it would still be a step
            self.result.n_skipped_outliers += 1
            self._skip()
        else:
            self.norms = [*self.norms, norm][-_N_NORMS:]
            torch.nn.utils.clip_grads_with_norm_(self.parameters, self.config.clip, torch.tensor(norm))
            self.meta_optimizer.step()
        self._log("meta/gradient_norm", norm, step)
        self._log("meta/lr", self.meta_optimizer.param_groups[0]["lr"], step)
        if self.scheduler is not None and step + 1 < self.config.n_meta_steps:
            self.scheduler.step()

    def _skip(self) -> None:
        """Step without gradients, which moves nothing and keeps the scheduler's count of steps right."""
        self.meta_optimizer.zero_grad()
        self.meta_optimizer.step()

    def after_episode(self) -> bool:
        """Validate and write a checkpoint when their time has come; return whether it had."""
        n_done = len(self.result.meta_losses)
        self._log("meta/loss", self.result.meta_losses[-1], n_done)
        is_due = n_done // self.config.validate_every > self.n_validated
        if not is_due and n_done < self.config.n_meta_steps:
            return False
        self.n_validated = n_done // self.config.validate_every
        self.validate(n_done)
        self.save()
        return True

    def validate(self, step: int) -> None:
        config = self.config
        score = validation_score(
            self.rule,
            self.validation_task,
            indices=torch.arange(config.n_validation_tasks),
            horizon=config.horizon,
            seed=config.seed + _VALIDATION_SEED_OFFSET,
        )
        self.result.validation.append((step, score))
        self._log("validation/score", score, step)
        if score < self.result.best_score:
            self.result.best_score, self.result.best_step = score, step
            self.best_weights = _copy(self.rule.state_dict())

    def save(self) -> None:
        if self.path is None:
            return
        result = {f.name: getattr(self.result, f.name) for f in dataclasses.fields(MetaResult) if f.name != "rule"}
        checkpoint = {
            "identity": self._identity(),
            "rule": self.rule.state_dict(),
            "best_weights": self.best_weights,
            "meta_optimizer": self.meta_optimizer.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "result": result,
            "norms": self.norms,
            "n_episodes": self.n_episodes,
            "n_validated": self.n_validated,
        }
        # written beside and renamed: a run that dies while writing leaves the last checkpoint whole
        temporary = self.path.with_suffix(".tmp")
        torch.save(checkpoint, temporary)
        os.replace(temporary, self.path)

    def resume(self) -> None:
        if self.path is None or not self.path.exists():
            return
        try:
            checkpoint = torch.load(self.path, weights_only=True, map_location="cpu")
        except Exception as error:  # torch raises half a dozen kinds for a damaged file
            raise ValueError(
                f"Parameter `folder` should be empty or hold a whole checkpoint. Found `{self.path}`, which cannot "
                "be read; delete it to start anew."
            ) from error
        identity = self._identity()
        if checkpoint["identity"] != identity:
            changed = [k for k, v in identity.items() if checkpoint["identity"].get(k) != v]
            raise ValueError(
                f"Parameter `folder` should be empty or hold a checkpoint of the same run. Found `{self.path}` "
                f"with another {', '.join(f'`{name}`' for name in changed)}; choose another folder or delete it."
            )
        self.rule.load_state_dict(checkpoint["rule"])
        self.best_weights = checkpoint["best_weights"]
        self.meta_optimizer.load_state_dict(checkpoint["meta_optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(checkpoint["scheduler"])
        self.result = MetaResult(self.rule, **checkpoint["result"])
        self.norms = checkpoint["norms"]
        self.n_episodes, self.n_validated = checkpoint["n_episodes"], checkpoint["n_validated"]

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    def _identity(self) -> dict[str, Any]:
        return {
            "config": dataclasses.asdict(self.config),
            "rule class": type(self.rule).__name__,
            "rule config": self.rule.config,
            "task": self.task.describe(),
        }

    def _log(self, name: str, value: float, step: int) -> None:
        if self.writer is not None:
            self.writer.add_scalar(name, value, step)


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in weights.items()}
