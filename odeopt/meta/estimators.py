"""Estimators of the meta-gradient, behind one interface."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from odeopt.meta.distributed import ALONE, World
from odeopt.meta.objective import MetaObjective
from odeopt.meta.unroll import detached, unroll
from odeopt.rules import PortHamiltonianUpdate
from odeopt.rules.base import UpdateRule, is_integer, is_number, require
from odeopt.tasks.base import Task
from odeopt.tasks.random import normal


class Estimator(ABC):
    """Fills the ``.grad`` of a rule's parameters with an estimate of the gradient of the meta-loss."""

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
            world: The ranks that work on the batch.

        Yields:
            The mean meta-loss over the tasks of all ranks, a detached 0-d tensor, each time a gradient is ready.
        """


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

    Raises:
        ValueError: If ``truncation`` or ``checkpoint`` is not positive.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Sec. 2.1.
    """

    def __init__(self, *, truncation: int | None = None, detach: bool = False, checkpoint: int | None = None) -> None:
        for name, value in (("truncation", truncation), ("checkpoint", checkpoint)):
            require(value is None or value >= 1, name, value, "positive")
        self.truncation, self.detach, self.checkpoint = truncation, detach, checkpoint

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0, world=ALONE):
        length = self.truncation or horizon
        params = states = None
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
                total_steps=horizon,
                detach=self.detach,
                update_scale=update_scale,
                checkpoint=self.checkpoint,
            )
            meta_loss = objective(trajectory.losses[1:], start=start, horizon=horizon).mean()
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
            and nothing is mapped by ``torch.func.vmap``, which is how a rule is run that it cannot map: among the
            rules of this library those that differentiate an energy or choose their step size. For them 1 is taken
            whatever is said here. Batches save overhead, so they help most where tasks are small (a fifth of the time
            of single runs on the quadratics); the LSTM on networks is fastest with 1, its gates staying in cache.
        ceiling: What a loss counts at most, as above.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Salimans et al. (2017), Evolution strategies as a scalable alternative to reinforcement learning, Sec. 2.1.
        Metz et al. (2019), Understanding and correcting pathologies in the training of learned optimizers, Sec. 3.
    """

    def __init__(
        self, *, n_pairs: int = 16, sigma: float = 0.01, chunk: int | None = None, ceiling: float = 10.0
    ) -> None:
        require(is_integer(n_pairs) and n_pairs >= 1, "n_pairs", n_pairs, "a positive integer")
        require(is_number(sigma) and sigma > 0, "sigma", sigma, "a positive number")
        require(chunk is None or (is_integer(chunk) and chunk >= 1), "chunk", chunk, "a positive integer or None")
        require(is_number(ceiling) and ceiling > 0, "ceiling", ceiling, "a positive number")
        self.n_pairs, self.sigma, self.chunk, self.ceiling = n_pairs, sigma, chunk, ceiling

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0, world=ALONE):
        weights = {name: p for name, p in rule.named_parameters() if p.requires_grad}
        noise = _Noise(weights, seed, world.agree(int(indices[0])))
        n_runs = 2 * self.n_pairs  # w + sigma eps and w - sigma eps of a pair come one after the other
        length = min(self.chunk or n_runs, n_runs) if _is_mappable(rule) else 1
        losses = []
        for first in range(0, n_runs, length):
            runs = range(first, min(first + length, n_runs))
            perturbed = _Perturbed(rule, noise.perturbed(runs, self.sigma))
            losses.append(self._losses(perturbed, task, objective, indices, horizon, seed, update_scale))
        # in double precision: what follows are small differences
        losses = world.gather(torch.cat(losses, dim=1).double())
        slopes = (losses[:, 0::2] - losses[:, 1::2]).mean(0) / (2 * self.sigma)
        for name, grad in noise.combined(slopes / self.n_pairs, max(1, length // 2)).items():
            weights[name].grad = grad
        yield losses.mean().to(task.dtype)

    @torch.no_grad()
    def _losses(self, rule: _Perturbed, task, objective, indices, horizon, seed, update_scale) -> Tensor:
        """Meta-loss of each task under each perturbation, shape ``(n_tasks, n_perturbations)``."""
        trajectory = unroll(
            rule,
            task,
            indices=indices.repeat(rule.n),
            n_steps=horizon,
            seed=seed,
            total_steps=horizon,
            update_scale=update_scale,
        )
        start, losses = trajectory.losses[0], trajectory.losses[1:]
        highest = start + self.ceiling * start.abs()
        losses = torch.where(losses <= highest, losses, highest)  # NaN is not below anything
        return objective(losses, start=0, horizon=horizon).view(rule.n, len(indices)).mT


class _Noise(NamedTuple):
    """Perturbations of some weights, each a function of its name: drawn where and whenever they are needed."""

    weights: dict[str, Tensor]
    seed: int
    step: int  # what tells the meta-steps of a run apart

    def draw(self, name: str, pairs: range) -> Tensor:
        """Standard normal perturbations of a weight, shape ``(n_pairs, *shape)``."""
        weight = self.weights[name]
        dtype = torch.promote_types(weight.dtype, torch.float32)
        numbers = torch.arange(pairs.start, pairs.stop, device=weight.device)
        return normal(
            numbers, weight.shape, seed=self.seed, stream=f"meta/perturbation/{name}", step=self.step, dtype=dtype
        )

    @torch.no_grad()
    def perturbed(self, runs: range, sigma: float) -> dict[str, Tensor]:
        """Weights of some runs, each ``(n_runs, *shape)``; runs ``2k`` and ``2k + 1`` are pair ``k``."""
        pairs, stacks = range(runs.start // 2, (runs.stop + 1) // 2), {}
        for name, weight in self.weights.items():
            eps = self.draw(name, pairs)
            both = torch.stack((sigma * eps, -sigma * eps), dim=1).flatten(0, 1)
            first = runs.start - 2 * pairs.start
            stacks[name] = (weight + both[first : first + len(runs)]).to(weight.dtype)
        return stacks

    @torch.no_grad()
    def combined(self, factors: Tensor, n_at_once: int) -> dict[str, Tensor]:
        """Sum over all pairs of ``factors``, shape ``(n_pairs,)``, times what the pair draws."""
        sums = {name: torch.zeros_like(weight, dtype=torch.float64) for name, weight in self.weights.items()}
        for first in range(0, len(factors), n_at_once):
            pairs = range(first, min(first + n_at_once, len(factors)))
            for name, total in sums.items():
                part = factors[first : pairs.stop].to(total.device)
                total += torch.tensordot(part, self.draw(name, pairs).double(), dims=1)
        return {name: total.to(self.weights[name].dtype) for name, total in sums.items()}


class _Perturbed:
    """A rule under several sets of weights, which :func:`~odeopt.meta.unroll` takes for one rule with more tasks.

    Batches have ``n_perturbations * n_tasks`` entries, those of a perturbation together.

    Args:
        rule: The rule.
        weights: Its weights by name, each ``(n_perturbations, *shape)``.
    """

    def __init__(self, rule: UpdateRule, weights: dict[str, Tensor]) -> None:
        self.rule, self.weights = _Methods(rule), {f"rule.{name}": value for name, value in weights.items()}
        self.n = len(next(iter(weights.values())))

    def init_state(self, param: Tensor) -> NamedTuple:
        def one(weights, param):
            return functional_call(self.rule, weights, ("init_state", param))

        if self.n == 1:
            return one(self._only(), param)
        return _each(self._joined, vmap(one)(self.weights, self._apart(param)))

    def __call__(self, grad, state, *, param, shape, progress):
        def one(weights, grad, state, param):
            signals = {"param": param, "shape": shape, "progress": progress}
            return functional_call(self.rule, weights, ("__call__", grad, state), signals)

        if self.n == 1:
            return one(self._only(), grad, state, param)
        state = _each(self._apart, state)
        update, state = vmap(one)(self.weights, self._apart(grad), state, self._apart(param))
        return self._joined(update), _each(self._joined, state)

    def _only(self) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.weights.items()}

    def _apart(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (self.n, len(x) // self.n))

    def _joined(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1)


class _Methods(nn.Module):
    """A rule whose methods ``functional_call`` can call, all of them."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, method, *args, **kwargs):
        return getattr(self.rule, method)(*args, **kwargs)


def _each(function: Callable[[Tensor], Tensor], state: NamedTuple) -> NamedTuple:
    return type(state)(*(function(x) for x in state))


def _is_mappable(rule: UpdateRule) -> bool:
    """Whether ``torch.func.vmap`` can map the steps of a rule.

    It cannot map an energy that is differentiated inside the step, nor a solver that decides from the numbers what to
    do next.
    """
    if not isinstance(rule, PortHamiltonianUpdate):
        return True
    return rule.has_fixed_step and "network" not in (rule.config["mass"], rule.config["potential"])
