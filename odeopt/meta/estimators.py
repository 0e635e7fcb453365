"""Estimators of the meta-gradient, behind one interface."""

from __future__ import annotations

import copy
import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from odeopt.checks import is_integer, is_list, is_number, require
from odeopt.meta.distributed import ALONE, World
from odeopt.meta.objective import MetaObjective
from odeopt.meta.perturbations import Noise, perturbed
from odeopt.meta.unroll import detached, unroll
from odeopt.rules.base import UpdateRule
from odeopt.tasks.base import Task


class Estimator(ABC):
    """Fills the ``.grad`` of a rule's parameters with an estimate of the gradient of the meta-loss.

    Attributes:
        is_stateful: Whether runs go on from call to call, each of which then has to have the same task and horizon.
    """

    is_stateful = False

    @abstractmethod
    def gradients(
        self,
        rule: UpdateRule,
        task: Task,
        objective: MetaObjective,
        *,
        indices: Tensor,
        horizon: int,
        seed: int,
        update_scale: float = 1.0,
        tells_horizon: bool = True,
        world: World = ALONE,
    ) -> Iterator[Tensor]:
        """Run one batch of tasks over ``horizon`` steps.

        Where several ranks work on the batch, each is given its own tasks, and the estimator decides what they
        exchange: gradient and meta-loss are those of the whole batch, the same on every rank.

        Args:
            rule: The rule; its gradients are set, its parameters left alone. The caller updates them and clears
                the gradients between two items.
            task: Where losses come from.
            objective: The meta-loss.
            indices: Global numbers of this rank's tasks, shape ``(n_tasks,)``.
            horizon: Number of optimizee steps.
            seed: Seed of initial parameters and batches.
            update_scale: Factor on the updates.
            tells_horizon: Whether the rule is told how far along the horizon it is.
            world: The ranks that work on the batch.

        Yields:
            The mean meta-loss over the tasks of all ranks, a detached 0-d tensor, each time a gradient is ready.
        """

    def state_dict(self, world: World = ALONE) -> dict[str, Any]:
        """What is carried from call to call, for a checkpoint; every rank has to ask. Nothing by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        return


class Backpropagation(Estimator):
    """Backpropagation through the unrolled optimizee, over the full horizon or truncated.

    By default the gradient is exact: full horizon, second derivatives of the optimizee included. The cheaper
    choices are biased: with ``detach`` training improves and then drifts away while its curve still looks fine.
    Ranks exchange their gradients, which are averaged by numbers of tasks.

    Args:
        truncation: Number of steps per segment, after which a gradient is yielded and the graph is cut;
            None for the full horizon.
        detach: Whether the gradients that the rule sees count as constants (the paper's setting).
        checkpoint: Number of steps per checkpointed segment, whose ends alone stay in memory until the backward
            pass, which computes each segment again; None keeps every step. See
            :class:`~odeopt.meta.settings.MetaConfig` for how to choose it.
        damping: Factor, per step, on the meta-gradient on its way back; see :class:`DampedBackpropagation`.

    Raises:
        ValueError: If ``truncation`` or ``checkpoint`` is not positive, or ``damping`` not in (0, 1].

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Sec. 2.1.
    """

    def __init__(
        self,
        *,
        truncation: int | None = None,
        detach: bool = False,
        checkpoint: int | None = None,
        damping: float = 1.0,
    ) -> None:
        for name, value in (("truncation", truncation), ("checkpoint", checkpoint)):
            require(value is None or value >= 1, name, value, "positive")
        require(is_number(damping) and 0 < damping <= 1, "damping", damping, "a number in (0, 1]")
        self.truncation, self.detach, self.checkpoint, self.damping = truncation, detach, checkpoint, damping

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0, tells_horizon=True,
                  world=ALONE):  # fmt: skip
        length = self.truncation or horizon
        params = states = first = None
        for start in range(0, horizon, length):
            n_steps = min(length, horizon - start)
            trajectory = unroll(
                rule,
                task,
                indices=indices,
                n_steps=n_steps,
                seed=seed,
                start=start,
                params=params,
                states=states,
                total_steps=horizon if tells_horizon else None,
                detach=self.detach,
                update_scale=update_scale,
                checkpoint=self.checkpoint,
                damping=self.damping,
                held_out=objective.held_out,
            )
            first = trajectory.losses[0].detach() if first is None else first
            meta_loss = objective(trajectory.losses[1:], start=start, horizon=horizon, first=first).mean()
            # a segment's weights sum to its share of the horizon; gradients of segments should be comparable
            (meta_loss * (horizon / n_steps)).backward()
            _, params, states = detached(trajectory)
            meta_loss = meta_loss.detach() * (horizon / n_steps)
            yield meta_loss if world.size == 1 else _averaged(rule, meta_loss, len(indices), world)


def _averaged(rule: UpdateRule, meta_loss: Tensor, n_tasks: int, world: World) -> Tensor:
    """Replace each rank's gradients and meta-loss by those of the whole batch."""
    parameters = [p for p in rule.parameters() if p.requires_grad]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    meta_loss, *grads = world.average([meta_loss, *grads], weight=n_tasks)
    for p, grad in zip(parameters, grads, strict=True):
        p.grad = grad
    return meta_loss


class _LeastDamped(Estimator):
    """What tries dampings in turn, from the least, until the gradient is short enough."""

    def __init__(
        self, dampings: Sequence[float], threshold: float, longest: int, *, checkpoint: int | None = None
    ) -> None:
        require_dampings(dampings)
        require(is_number(threshold) and threshold > 0, "threshold", threshold, "a positive number")
        require(is_integer(longest) and longest >= 1, "longest", longest, "a positive integer")
        self.threshold, self.longest = threshold, longest
        self.attempts = [Backpropagation(checkpoint=checkpoint, damping=damping) for damping in dampings]

    def fitting(self, horizon: int) -> list[Backpropagation]:
        """Attempts that a run of this length is worth: a long one leaves out the first."""
        return self.attempts if horizon <= self.longest else self.attempts[1:]

    def first_calm(
        self, attempts: list[Backpropagation], rule: UpdateRule, *args, world: World, **options
    ) -> tuple[Tensor | None, bool]:
        """Meta-loss of the first attempt whose gradient is short enough, or of the last one; and whether it is."""
        weights, meta_loss = [p for p in rule.parameters() if p.requires_grad], None
        for attempt in attempts:
            for p in weights:
                p.grad = None
            (meta_loss,) = attempt.gradients(rule, *args, world=world, **options)
            norm = torch.nn.utils.get_total_norm([p.grad for p in weights if p.grad is not None]).item()
            if world.agree(norm) <= self.threshold:  # NaN is not below anything
                return meta_loss, True
        return meta_loss, False


def require_dampings(dampings: Sequence[float]) -> None:
    """Refuse what is not a list of falling factors."""
    is_right = is_list(dampings) and len(dampings) > 0 and all(is_number(x) and 0 < x <= 1 for x in dampings)
    is_falling = is_right and all(a > b for a, b in itertools.pairwise(dampings))
    require(is_falling, "dampings", dampings, "one falling number in (0, 1] or more")


class DampedBackpropagation(_LeastDamped):
    r"""Backpropagation over the full horizon that is damped where the run is chaotic.

    With a damping :math:`\gamma` what a loss says of an update :math:`k` steps earlier counts :math:`\gamma^k` (the
    last loss, after which no step begins, :math:`\gamma^{k-1}`): a soft truncation after about :math:`1 / (1 - \gamma)`
    steps, of one gradient over all parts of the run. At the edge of stability, where good step sizes lie, the exact
    gradient grows without bound and says nothing; its short-sighted part still says which updates lower the losses soon
    after them, for every weight of the rule. So the dampings are tried in turn, from the least, until the gradient is
    no longer than ``threshold``; the last one counts whatever its length. A calm run of at most ``longest`` steps keeps
    its exact gradient.

    It is short-sighted: on runs much longer than its window it may point the wrong way. And a run that overflows gives
    no gradient at all, so that nothing leads back from weights under which most do: :class:`Hybrid` knows what to do.

    Args:
        dampings: Factors per step, falling; 1 is the exact gradient.
        threshold: Norm of a gradient up to which it counts.
        longest: Steps up to which the first damping is tried; longer runs begin with the second, if there is one.
        checkpoint: As that of :class:`Backpropagation`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Metz et al. (2021), Gradients are not all you need: why the gradients of long runs explode.
    """

    def __init__(
        self,
        *,
        dampings: Sequence[float] = (1.0, 0.95, 0.85),
        threshold: float = 5.0,
        longest: int = 150,
        checkpoint: int | None = None,
    ) -> None:
        super().__init__(dampings, threshold, longest, checkpoint=checkpoint)

    def gradients(self, rule, task, objective, *, world=ALONE, **options):
        attempts = self.fitting(options["horizon"]) or self.attempts
        meta_loss, _ = self.first_calm(attempts, rule, task, objective, world=world, **options)
        yield meta_loss


class EvolutionStrategies(Estimator):
    r"""Antithetic evolution strategies over the full horizon: the gradient of a smoothed meta-loss, from losses alone.

    .. math:: \hat g = \frac{1}{n} \sum_{k=1}^{n} \frac{L(w + \sigma\epsilon_k) - L(w - \sigma\epsilon_k)}{2\sigma}\,
              \epsilon_k, \qquad \epsilon_k \sim N(0, I), \qquad
              \mathbb{E}\,\hat g = \nabla_w\, \mathbb{E}_\epsilon L(w + \sigma\epsilon)

    Nothing is differentiated through the run, so that chaos in it costs neither memory nor a meta-gradient of 1e8: the
    smoothing averages over what is finer than ``sigma``. Every perturbation meets the same tasks, initialisations and
    batches. A perturbation is a function of the seed, the first task of the batch, the number of its pair and the name
    of the weight, so each rank draws all of them by itself; it runs them on its own tasks, and what ranks exchange is
    one number per task and perturbation.

    A loss :math:`f_t` of a task counts at most as :math:`f_0 + c\,|f_0|`, and so does one that is not a number;
    :math:`c` is the ``ceiling``. A run that diverges thus says "not this way" with a bounded voice. Were its pair
    dropped, the estimate would be one over the runs that go well only, which has no slope away from the cliff.

    Args:
        n_pairs: Number of antithetic pairs, so half that of perturbations.
        sigma: Standard deviation of the perturbations, the same for every weight, in the units of the
            weights: absolute, not relative to their size.
        chunk: Perturbations that are run at a time, which bounds the memory; None for all. With 1 each runs by itself
            and nothing is mapped by ``torch.func.vmap``, which is how a rule is run that vmap cannot take. Rules whose
            solver chooses its step sizes run so whatever is said here. Batches save overhead, so they help most where
            tasks are small (a fifth of the time of single runs on the quadratics); the LSTM on networks is fastest
            with 1, its gates staying in cache.
        ceiling: What a loss counts at most, as above.
        clip: What the meta-losses of a pair are taken to differ by at most, in units of the meta-loss; None for no
            limit. Beyond the edge of stability the difference says which way is back, its size says nothing.
        subspace: Beginning of the names of the weights that are perturbed; all by default. Fewer dimensions need
            fewer pairs; the other weights get no gradient.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Salimans et al. (2017), Evolution strategies as a scalable alternative to reinforcement learning, Sec. 2.1.
        Metz et al. (2019), Understanding and correcting pathologies in the training of learned optimizers, Sec. 3.
    """

    def __init__(
        self,
        *,
        n_pairs: int = 16,
        sigma: float = 0.01,
        chunk: int | None = None,
        ceiling: float = 10.0,
        clip: float | None = None,
        subspace: str = "",
    ) -> None:
        require(is_integer(n_pairs) and n_pairs >= 1, "n_pairs", n_pairs, "a positive integer")
        require(is_number(sigma) and sigma > 0, "sigma", sigma, "a positive number")
        require(chunk is None or (is_integer(chunk) and chunk >= 1), "chunk", chunk, "a positive integer or None")
        require(is_number(ceiling) and ceiling > 0, "ceiling", ceiling, "a positive number")
        require(clip is None or (is_number(clip) and clip > 0), "clip", clip, "a positive number or None")
        require(isinstance(subspace, str), "subspace", subspace, "the beginning of a name")
        self.n_pairs, self.sigma, self.chunk, self.ceiling = n_pairs, sigma, chunk, ceiling
        self.clip, self.subspace = clip, subspace

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0, tells_horizon=True,
                  world=ALONE):  # fmt: skip
        weights = {name: p for name, p in rule.named_parameters() if p.requires_grad and name.startswith(self.subspace)}
        require(len(weights) > 0, "subspace", self.subspace, "the beginning of the name of a weight of the rule")
        noise = Noise(weights, seed, world.agree(int(indices[0])))
        n_runs = 2 * self.n_pairs  # w + sigma eps and w - sigma eps of a pair come one after the other
        # an adaptive solver would choose its steps for all perturbations together
        length = min(self.chunk or n_runs, n_runs) if getattr(rule, "has_fixed_step", True) else 1
        losses = []
        for start in range(0, n_runs, length):
            runs = range(start, min(start + length, n_runs))
            stacked = perturbed(rule, noise.perturbed(runs, self.sigma))
            trajectory = self._trajectory(stacked, task, indices.repeat(len(runs)), horizon, seed, update_scale,
                                          tells_horizon, objective.held_out)  # fmt: skip
            losses.append(self._meta_losses(trajectory.losses, objective).view(len(runs), len(indices)).mT)
        # in double precision: what follows are small differences
        losses = world.gather(torch.cat(losses, dim=1).double())
        differences = losses[:, 0::2] - losses[:, 1::2]
        if self.clip is not None:
            differences = differences.clamp(-self.clip, self.clip)
        slopes = differences.mean(0) / (2 * self.sigma)
        for name, grad in noise.combined(slopes / self.n_pairs, max(1, length // 2)).items():
            weights[name].grad = grad
        yield losses.mean().to(task.dtype)

    @torch.no_grad()
    def _trajectory(self, rule, task, indices, horizon, seed, update_scale, tells_horizon, held_out):
        total = horizon if tells_horizon else None
        options = {"n_steps": horizon, "seed": seed, "total_steps": total, "update_scale": update_scale}
        options["held_out"] = held_out
        return unroll(rule, task, indices=indices, **options)

    def _meta_losses(self, losses: Tensor, objective: MetaObjective) -> Tensor:
        """Meta-loss of each run, its losses bounded."""
        first, losses = losses[0], bounded(losses[1:], losses[0], self.ceiling)
        return objective(losses, start=0, horizon=len(losses), first=first)


def bounded(losses: Tensor, first: Tensor, ceiling: float) -> Tensor:
    """Losses that count at most as the first one of their run plus ``ceiling`` times its size.

    Args:
        losses: Shape ``(n_steps, n_tasks)``; numbers that are not one count as infinite.
        first: Shape ``(n_tasks,)``.
        ceiling: The factor.

    Returns:
        Shape ``(n_steps, n_tasks)``.
    """
    highest = first + ceiling * first.abs()
    return torch.where(losses <= highest, losses, highest)  # NaN is not below anything


class Hybrid(_LeastDamped):
    r"""Backpropagation where the run is calm, evolution strategies where it is not.

    At the edge of stability, where good step sizes lie, the exact gradient of a long run grows without bound and says
    nothing. Left out, nothing would hold the weights back: the calm runs all ask for longer steps. So such a run is
    done again under perturbed weights, whose losses do say which way is back. Of several ranks the first does that, on
    its first task, which is the first of the whole batch, and tells the others; they wait. In between, gradients can
    be tried that are damped, as by :class:`DampedBackpropagation`. Much damping is short-sighted, and on long runs it
    points the wrong way as often as not; what is chaotic under little of it is better left to the perturbations.

    Args:
        evolution: What evaluates the rest, on the first task of the batch only.
        threshold: Norm of a gradient up to which it counts.
        longest: Steps up to which the first damping is tried; longer runs begin with the second, or go to the
            perturbations at once if there is none.
        dampings: Factors per step, falling; 1 is the exact gradient.
        coordinates: Coordinates times perturbations at a time, of which there are fewer for larger tasks (two pairs at
            least).

    Raises:
        ValueError: If an argument is out of range.

    References:
        Metz et al. (2019), Understanding and correcting pathologies in the training of learned optimizers, Sec. 4:
        a combination of the two estimators, weighted by their variances.
    """

    def __init__(
        self,
        evolution: EvolutionStrategies,
        *,
        threshold: float = 5.0,
        longest: int = 150,
        dampings: Sequence[float] = (1.0,),
        coordinates: float = 1.5e5,
    ) -> None:
        super().__init__(dampings, threshold, longest)
        require(is_number(coordinates) and coordinates > 0, "coordinates", coordinates, "a positive number")
        self.evolution, self.coordinates = evolution, coordinates

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0, tells_horizon=True,
                  world=ALONE):  # fmt: skip
        options = {"horizon": horizon, "seed": seed, "update_scale": update_scale, "tells_horizon": tells_horizon}
        run = {"indices": indices, "world": world} | options
        meta_loss, is_calm = self.first_calm(self.fitting(horizon), rule, task, objective, **run)
        if is_calm:
            yield meta_loss
            return
        weights = [p for p in rule.parameters() if p.requires_grad]
        for p in weights:
            p.grad = None
        n = sum(shape.numel() for shape in task.param_shapes.values())
        fewer = copy.copy(self.evolution)
        while fewer.n_pairs > 2 and 2 * fewer.n_pairs * n > self.coordinates:
            fewer.n_pairs = max(2, fewer.n_pairs // 2)

        def perturbations() -> tuple[Tensor, list[Tensor | None]]:
            (meta_loss,) = fewer.gradients(rule, task, objective, indices=indices[:1], **options)
            # where every rank can receive them
            return meta_loss.cpu(), [None if p.grad is None else p.grad.cpu() for p in weights]

        meta_loss, grads = world.from_first(perturbations)
        for p, grad in zip(weights, grads, strict=True):
            p.grad = None if grad is None else grad.to(p.device)
        yield meta_loss.to(task.device)
