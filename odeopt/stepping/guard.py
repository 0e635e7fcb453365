"""A guard around any rule: a hand-designed fallback takes over where the losses say that the rule fails."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import KW_ONLY, astuple, dataclass, field, fields
from numbers import Real
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from odeopt.checks import check_class, is_integer, is_number, require, require_counts, require_positive
from odeopt.rules.base import UpdateRule
from odeopt.rules.classical import AdamUpdate
from odeopt.stepping.copies import frozen_copy

SNAPSHOT = "guard_snapshot"  # name in the state of a parameter
SAVED_GUARD, PEAK_LR = "guard", "guard_lr"  # names in the groups of parameters
# Standard errors by which a mean should stand out. Each window is a test of its own, runs have thousands, and the mean
# of twenty losses has the heavy tail that they have.
_HIGH, _PERSISTENTLY_HIGH, _LEVEL = 8.0, 3.0, 2.0
_N_PERSISTENT = 3  # windows in a row
# Page's cumulative sum of rises, in standard errors: half of the shift of one that is looked for, and the usual limit.
_ALLOWANCE, _EVIDENCE = 0.5, 5.0
_N_BEST = 32  # windows that count towards the best level
_PROBATION = 2  # windows of a rule that steps again, and of a fallback on trial: the first ones begin without momentum


@dataclass(frozen=True)
class Guard:
    r"""Hands over to a fallback where a rule fails, decided from the losses of the run alone.

    The means of windows of losses are compared with the best level so far, in units of the noise of the losses within
    a window, :math:`\sigma^2 = \tfrac12 \langle (f_{t+1} - f_t)^2 \rangle`, which a trend does not raise. The rule
    fails if a loss is not finite, or two in a row are far above all earlier ones; if the mean of a window has risen, or
    the means of three windows in a row have risen by less; or if the loss falls slowly, without having levelled off,
    and the fallback, tried for two windows, makes it fall faster. The parameters then return to the last good ones, and
    the fallback,
    with a fresh state, takes over for ``patience`` windows. The rule comes back on probation: it fails as well where
    the loss falls at less than half the pace that it had in the second half of the fallback's stay, unless it had
    levelled off by then. Each further failure doubles the stay of the fallback, so that a hopeless rule is tried for a
    logarithmic number of windows only. With ``total_steps``, it does not come back if what is left of the run is
    shorter than the next stay. A fallback that fails itself returns to the last good parameters with a quarter of its
    learning rate,
    which grows again while the loss falls. From then on it is also held to rises that are small but last, by Page's
    cumulative sum.

    A loss that has levelled off is no failure: a plateau above what the fallback would reach is not noticed once the
    rule has halved the loss. No further gradients are taken, unlike in the reference, where rule and fallback run
    side by side.

    Args:
        fallback: Rule that takes over, whose updates do not cross coordinates; :class:`odeopt.AdamUpdate` at its
            usual learning rate if not given. Its step does not depend on the level of ``lr``, only on ``lr`` relative
            to the largest one so far, so that schedules lower it, too.
        window: Losses per mean.
        patience: Windows between two looks at slow progress, and of the first stay of the fallback.
        tolerance: Rise of a window's mean that fails, as a share of the progress since the start of the run, or of half
            the first loss if that is more. Half of it fails where it persists.
        min_progress: Part of the loss that a rule should take off within ``patience`` windows until it has halved the
            loss, unless the loss levels off; None does not look at slow progress.

    Raises:
        TypeError: If ``fallback`` is not an update rule.
        ValueError: If an option is out of range, or ``fallback`` crosses coordinates.

    References:
        Page (1954), Continuous inspection schemes.
        Premont-Schwarz, Vitku, Feyereisl (2022), A simple guard for learned optimizers.
        von Neumann (1941), Distribution of the ratio of the mean square successive difference to the variance.

    Example:
        >>> from odeopt import LearnedOptimizer
        >>> weight = torch.nn.Parameter(torch.ones(3))
        >>> optimizer = LearnedOptimizer([weight], guard=Guard(AdamUpdate(0.01)))
        >>> loss = weight.square().sum()
        >>> loss.backward()
        >>> optimizer.report(loss)
        >>> optimizer.step()
        >>> optimizer.guard_status.stepping
        'rule'
    """

    fallback: UpdateRule = field(default_factory=AdamUpdate)
    _: KW_ONLY
    window: int = 20
    patience: int = 4
    tolerance: float = 0.1
    min_progress: float | None = 0.25

    def __post_init__(self) -> None:
        check_class("fallback", self.fallback, UpdateRule)
        name = type(self.fallback).__name__
        require(not self.fallback.crosses_coordinates, "fallback", name, "a rule that steps each coordinate by itself")
        require(is_integer(self.window) and self.window >= 4, "window", self.window, "an integer of at least 4")
        require_counts(patience=self.patience)
        require_positive(tolerance=self.tolerance)
        is_part = self.min_progress is None or (is_number(self.min_progress) and 0 < self.min_progress < 1)
        require(is_part, "min_progress", self.min_progress, "in (0, 1) or None")


class GuardStatus(NamedTuple):
    """Account of a guard.

    Attributes:
        stepping: ``"rule"`` or ``"fallback"``: which one takes the next step.
        n_handovers: Times that the fallback took over, trials included.
        n_fallback_steps: Steps that it took.
        n_restored: Times that the parameters returned to the last good ones; the step that did so moved nothing else.
    """

    stepping: str
    n_handovers: int
    n_fallback_steps: int
    n_restored: int


class Decision(NamedTuple):
    """Consequences of a loss: first the restoring or the snapshot, then the change of the rule that steps."""

    restores: bool = False
    snapshots: bool = False
    begins_anew: bool = False  # whoever steps from now on, with a fresh state


@dataclass
class Watch:
    """Running account of the losses, in numbers that one tensor holds."""

    start: float = math.nan  # of the run: the first loss, or the mean of the first window if that is a little higher
    kept: float = math.nan  # where the parameters were kept, mean of so many losses: of a window and after each return
    n_kept: float = 0.0
    best: float = math.nan  # first loss, or mean of the lowest windows that noise does not tell apart, and their number
    n_best: float = 0.0
    noise: float = math.nan  # variance of a loss
    is_new: float = 1.0  # whether the next loss is the first at parameters that were kept
    n: float = 0.0  # losses in the window, their sum, that of squared differences, and the last one
    total: float = 0.0
    squares: float = 0.0
    last: float = 0.0
    n_spikes: float = 0.0  # losses in a row that are far above all others, one at most
    # windows in a row above the level that may not persist; under a fallback that has failed, the sum of its rises
    n_high: float = 0.0
    previous: float = math.nan  # mean of the window before
    middle: float = math.nan  # mean half way through the stay of the fallback, or of where that began
    level: float = math.nan  # mean at the last look at progress, or at the last change of the factor
    n_looks: float = 0.0
    pace: float = 0.0  # fall per window of the other one, when it last stepped
    countdown: float = math.nan  # windows to the next look, or to the end of the stay
    interval: float = math.nan  # windows between looks
    stay: float = math.nan  # windows of the next stay of the fallback
    is_fallback: float = 0.0
    is_tried: float = 0.0  # the rule is on probation, or the fallback on trial
    factor: float = 1.0  # on the fallback's step
    n_handovers: float = 0.0
    n_fallback_steps: float = 0.0
    n_restored: float = 0.0

    def observe(self, loss: float, options: Guard, steps_left: float) -> Decision:
        """Take the loss at the present parameters into account and decide."""
        decision = self._decide(loss, options, steps_left)
        self.n_fallback_steps += bool(self.is_fallback and not decision.restores)
        self.n_restored += decision.restores
        return decision

    def _decide(self, loss: float, options: Guard, steps_left: float) -> Decision:
        is_first = math.isnan(self.start)
        if is_first:
            if not math.isfinite(loss):
                return Decision()  # nothing to return to yet
            self.start = self.kept = self.best = self.level = loss
            self.countdown = self.interval = self.stay = options.patience
        is_spike = loss > self._ceiling()
        if not math.isfinite(loss) or (is_spike and self.n_spikes):
            return self._fail(options)
        self.n_spikes = float(is_spike)
        if is_spike:  # of a bad batch, unless another one follows
            return Decision(snapshots=is_first)
        if self.is_new:
            self._begin(loss, options)
        if self.n > 0:
            self.squares += (loss - self.last) ** 2 / 2
        self.n, self.total, self.last = self.n + 1, self.total + loss, loss
        return self._close(options, steps_left) if self.n >= options.window else Decision(snapshots=is_first)

    def _begin(self, loss: float, options: Guard) -> None:
        """Compare with the best mean still, unless the surface has risen since the parameters were kept."""
        self.is_new = 0.0
        self.n_kept += 1
        self.kept += (loss - self.kept) / self.n_kept
        if self.n_best and self.kept < self.best:  # which may be of a window that climbed
            self.best, self.n_best = self.kept, self.n_kept / options.window
        if self.n_best and loss > self.best + options.tolerance * self._scale + _HIGH * math.sqrt(self.noise):
            self.best, self.kept, self.n_best, self.n_kept = loss, loss, 0.0, 1.0

    @property
    def _scale(self) -> float:
        """Progress of the run, to which rises are compared."""
        scale = max(self.start - self.best, abs(self.start) / 2)
        if self._is_suspect:
            return min(scale, abs(self.best))
        return self.factor * scale if self.is_fallback else scale  # smaller steps may do less harm, too

    @property
    def _is_suspect(self) -> bool:
        """Whether the rule steps and has failed before: it may give back little of what there is."""
        return bool(self.n_handovers and not self.is_fallback)

    def _ceiling(self) -> float:
        """Loss above which the end of the window is not waited for."""
        if self.is_new:
            return math.inf
        if math.isnan(self.noise):  # one loss is known: it may have been a lucky one
            return self.start + 9 * abs(self.start)
        return self.best + (0.5 if self._is_suspect else 3) * self._scale + 10 * math.sqrt(self.noise)

    def _close(self, options: Guard, steps_left: float) -> Decision:
        """Judge the window that ends with this loss."""
        mean, variance = self.total / self.n, self.squares / (self.n - 1)
        noise = variance if math.isnan(self.noise) else self.noise
        # of the difference to the best: a mean as well, or a single loss
        error = math.sqrt(noise / self.n * (1 + (1 / self.n_best if self.n_best else self.n)))
        best, scale = self.best, options.tolerance * self._scale
        persistent = best + scale / 2 + _PERSISTENTLY_HIGH * error
        limit = best + scale + _HIGH * error
        has_failed = self._is_suspect or self.factor < 1
        if self.is_fallback and self.factor < 1:  # it climbs, the less so the smaller its steps are
            self.n_high = max(0.0, self.n_high + mean - best - scale / 2 - _ALLOWANCE * error)
            is_lasting = self.n_high > _EVIDENCE * error
        else:
            self.n_high = self.n_high + 1 if mean > persistent else 0.0
            is_lasting = self.n_high >= _N_PERSISTENT
        if mean > (persistent if has_failed else limit) or is_lasting:
            return self._fail(options)
        self.noise = noise + (variance - noise) / 4
        if self.n_best == 0 and self.n_restored == 0 and mean <= self.start + abs(self.start) / 2:
            self.start = max(self.start, mean)  # the first loss was a lucky one; above that the rule has raised it
        if self.n_best == 0 or mean < best - _LEVEL * error:
            self.best, self.n_best = mean, 1.0
        elif mean < best + _LEVEL * error:  # the mean, because the least of many means is a lucky one
            self.n_best = min(self.n_best + 1, _N_BEST)
            self.best += (mean - best) / self.n_best
        is_good = self._is_good(mean, limit, options)
        error = min(error, math.sqrt(2 * variance / self.n))  # noise falls with the loss, faster than its mean above
        self.countdown -= 1
        judge = self._judge_fallback if self.is_fallback else self._judge_rule
        self._empty_window()
        decision = judge(mean, error, options, steps_left)
        self.previous = mean
        return decision if decision.restores else decision._replace(snapshots=is_good or decision.snapshots)

    def _is_good(self, mean: float, limit: float, options: Guard) -> bool:
        """Whether to keep the parameters: not in place of others that are as good, which are less likely broken."""
        least = 0.0 if self._is_proven(mean) else options.tolerance / 2 * self._scale
        error = math.sqrt(self.noise * (1 / self.n + 1 / self.n_kept))
        is_good = mean < self.kept - max(least, _LEVEL * error)
        # not at the end of a window in which the loss has begun to rise
        is_good = is_good and self.last <= min(limit, mean) + math.sqrt(self.noise)
        if is_good:
            self.kept, self.n_kept = mean, self.n
        return is_good

    def _is_proven(self, mean: float) -> bool:
        """Whether the loss has been halved."""
        return self.start - mean >= abs(self.start) / 2

    def _judge_rule(self, mean: float, error: float, options: Guard, steps_left: float) -> Decision:
        """Look at the progress of a rule whose losses have not risen."""
        if self.countdown > 0:
            return Decision()
        fall, self.countdown = self.level - mean, self.interval
        if self.is_tried:
            self.is_tried, self.level = 0.0, mean
            return self._hand_over() if fall < _PROBATION * self.pace / 2 else Decision()
        self.n_looks += 1
        total = self.start - mean
        is_level = total > _PERSISTENTLY_HIGH * error and fall < total / self.n_looks / 4
        is_slow = options.min_progress is not None and fall < options.min_progress * abs(self.level)
        self.level = mean
        if self._is_proven(mean) or is_level or not is_slow:
            return Decision()
        self.pace = fall / self.interval
        self.is_fallback, self.is_tried, self.countdown = 1.0, 1.0, _PROBATION
        self.n_handovers += 1
        return self._restore()

    def _judge_fallback(self, mean: float, error: float, options: Guard, steps_left: float) -> Decision:
        """End a trial, or a stay unless the run ends sooner than the next stay would."""
        if self.factor < 1 and not self.is_tried and mean < self.level - _LEVEL * error:
            self.factor, self.level, self.n_high = 4 * self.factor, mean, 0.0
        if self.countdown >= self.stay / 4:  # which has been doubled for the next time
            self.middle = mean
        if self.countdown > 0:
            return Decision()
        if self.is_tried:
            if self.level - mean > _PROBATION * (1.5 * max(self.pace, 0.0)) + error:
                self.is_tried, self.countdown, self.stay, self.middle = 0.0, self.stay, 2 * self.stay, mean
                return Decision()
            self.interval *= 2
            return self._hand_back(mean, restores=mean > self.level + _LEVEL * error)
        if steps_left < self.stay * options.window:
            return Decision()
        fall = self.middle - mean
        pace = min(fall / math.ceil(self.stay / 4), self.previous - mean + _LEVEL * error)  # it may have levelled off
        is_falling = fall > _LEVEL * error and pace * options.patience > options.tolerance / 2 * abs(mean)
        self.pace = pace if is_falling else 0.0
        decision = self._hand_back(mean, restores=False)
        self.is_tried, self.countdown = 1.0, _PROBATION
        if self.factor < 1 or mean > self.kept + _LEVEL * error:  # a fallback that has failed may be climbing
            return decision
        # else a rule that fails again would lose the steps since a window that was a lucky one
        self.kept, self.n_kept = mean, options.window
        return decision._replace(snapshots=True)

    def _fail(self, options: Guard) -> Decision:
        """Return to the last good parameters, and let the fallback step from there, or more carefully."""
        if not self.is_fallback:
            self._hand_over()
        elif self.is_tried:
            self.interval *= 2
            self._hand_back(self.level, restores=True)
        else:
            self.factor, self.level, self.middle = self.factor / 4, self.kept, self.kept
        return self._restore()

    def _restore(self) -> Decision:
        self._empty_window()
        self.is_new, self.n_high, self.n_spikes = 1.0, 0.0, 0.0
        return Decision(restores=True, begins_anew=True)

    def _hand_over(self) -> Decision:
        self.is_fallback, self.is_tried = 1.0, 0.0
        self.countdown, self.stay, self.level, self.middle = self.stay, 2 * self.stay, self.kept, self.kept
        self.n_handovers += 1
        return Decision(begins_anew=True)

    def _hand_back(self, mean: float, *, restores: bool) -> Decision:
        self.is_fallback, self.is_tried, self.level, self.countdown = 0.0, 0.0, mean, self.interval
        self.n_high = 0.0
        return self._restore() if restores else Decision(begins_anew=True)

    def _empty_window(self) -> None:
        self.n = self.total = self.squares = 0.0


class Sentry:
    """Guard of one optimizer: takes the reported losses, keeps the watch, and does what it decides.

    Args:
        guard: The options; the fallback is copied.
        digest: Number that tells the fallback from others.
    """

    def __init__(self, guard: Guard, digest: int) -> None:
        self.options, self.rule, self.digest = guard, frozen_copy(guard.fallback), digest
        self.watch = Watch()
        self._reported: float | Tensor | None = None
        self._may_replace = False

    def check_without_length(self) -> None:
        """Refuse a hand-designed fallback that cannot step without the length of the run, before it has to."""
        if any(True for _ in self.rule.parameters()):
            return
        theta = torch.zeros(1, device="cpu")
        try:
            self.rule(theta, self.rule.init_state(theta), param=theta, shape=theta.shape)
        except ValueError as error:
            wanted = "given in all groups under this guard"
            message = f"Parameter `total_steps` should be {wanted}. Found `total_steps = None`: {error}"
            raise ValueError(message) from error

    @property
    def is_fallback(self) -> bool:
        """Whether the fallback steps."""
        return bool(self.watch.is_fallback)

    @property
    def status(self) -> GuardStatus:
        """Account so far."""
        watch = self.watch
        counts = int(watch.n_handovers), int(watch.n_fallback_steps), int(watch.n_restored)
        return GuardStatus("fallback" if watch.is_fallback else "rule", *counts)

    def report(self, loss: float | Tensor) -> None:
        """Keep the loss of the next step."""
        if isinstance(loss, Tensor):
            require(loss.numel() == 1 and not loss.is_complex(), "loss", tuple(loss.shape), "one real number")
            loss = loss.detach()
        elif not isinstance(loss, Real) or isinstance(loss, bool):
            raise TypeError(f"Parameter `loss` should be a number or a tensor of one. Found `loss = {loss!r}`.")
        if self._reported is not None and not self._may_replace:
            raise RuntimeError(
                "Two losses were reported for one step: report once before each `optimizer.step()`, the mean where "
                "gradients are accumulated, and not beside a closure; where a step is left out, as by a `GradScaler`, "
                "call `optimizer.zero_grad()`, not that of the model."
            )
        self._reported, self._may_replace = loss, False

    def forget(self) -> None:
        """Let the next loss take the place of one whose gradients were set to zero: the step was left out."""
        self._may_replace = True

    def expects_step(self, moves: bool) -> bool:
        """Return True if a loss was reported; raise an error if not, unless the step moves nothing.

        Steps at learning rate zero are how ``torch.distributed.checkpoint`` has the state begun.
        """
        if self._reported is None and moves:
            raise RuntimeError(
                "No loss was reported for this step, which the guard needs: call `optimizer.report(loss)` before "
                "`optimizer.step()`, or `optimizer.step(closure)` with a closure that returns the loss."
            )
        return self._reported is not None

    def decide(self, groups: list[dict[str, Any]]) -> Decision:
        """Decide by the loss that was reported, alike on all processes."""
        loss, self._reported = self._reported, None
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            device = next(param.device for group in groups for param in group["params"])
            total = torch.as_tensor(loss, dtype=torch.float64, device=device).reshape(()).clone()
            dist.all_reduce(total)
            loss = total / dist.get_world_size()
        signs = {group["maximize"] for group in groups}
        require(len(signs) == 1, "maximize", sorted(signs), "alike in all groups under a guard")
        loss = -float(loss) if signs.pop() else float(loss)
        group = groups[0]
        left = math.inf if group["total_steps"] is None else group["total_steps"] - group["n_steps"]
        for group in groups:
            group[PEAK_LR] = max(float(group["lr"]), group.get(PEAK_LR, 0.0))
        return self.watch.observe(loss, self.options, left)

    def lr(self, group: Mapping[str, Any]) -> float:
        """Factor on the fallback's update: of a schedule, and less than one after it failed."""
        peak = group.get(PEAK_LR, 0.0)
        return self.watch.factor * float(group["lr"]) / peak if peak > 0 else 0.0

    def saved(self) -> Tensor:
        """Watch and digest of the fallback, float64."""
        return torch.tensor([self.digest, *astuple(self.watch)], dtype=torch.float64)


def saved_watch(groups: list[dict[str, Any]], sentry: Sentry | None) -> Watch:
    """Return the watch of saved groups, a new one if they were saved without a guard.

    Those of another fallback are refused, and where there is no guard, which could not read the state of a fallback,
    those in which the fallback steps.
    """
    saved = next((group[SAVED_GUARD] for group in groups if group.get(SAVED_GUARD) is not None), None)
    if saved is None:
        return Watch()
    digest, *numbers = torch.as_tensor(saved).tolist()
    n = len(fields(Watch))
    require(len(numbers) == n, SAVED_GUARD, [digest, *numbers], f"{1 + n} numbers in the groups of `state_dict`")
    watch = Watch(*numbers)
    if sentry is not None:
        require(digest == sentry.digest, "guard", int(digest), f"saved with this fallback, of {sentry.digest}")
    else:
        wanted = "the one that `state_dict` was saved with, whose fallback steps there"
        require(not watch.is_fallback, "guard", None, wanted)
    return watch


def drop_saved(groups: Iterable[dict[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Forget what the guard of another optimizer kept in its groups and in the state of its parameters."""
    for group in groups:
        for name in (SAVED_GUARD, PEAK_LR):
            group.pop(name, None)
    for held in state.values():
        held.pop(SNAPSHOT, None)


def take_snapshot(params: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Keep the parameters, in the place of those that were kept before."""
    for param in params:
        if SNAPSHOT in state[param]:
            state[param][SNAPSHOT].copy_(param)
        else:
            state[param][SNAPSHOT] = param.detach().clone()


def restore_snapshot(params: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Put the kept parameters back; those that had no gradient when they were kept stay as they are."""
    for param in params:
        if SNAPSHOT in state[param]:
            param.copy_(state[param][SNAPSHOT])
