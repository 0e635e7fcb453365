"""Persistent evolution strategies: unbiased meta-gradients from a few steps at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from odeopt.checks import require, require_counts, require_positive
from odeopt.meta.distributed import ALONE, World
from odeopt.meta.estimators.base import Estimator
from odeopt.meta.estimators.es import bounded
from odeopt.meta.estimators.perturbations import Noise, differences_of_pairs, perturbed
from odeopt.meta.unroll import unroll
from odeopt.rules.base import UpdateRule
from odeopt.tasks.base import Task

_COUNTS = ("n_calls", "horizon", "n_tasks")  # of the runs under way


@dataclasses.dataclass
class _Group:
    """Tasks that are worked on together, under all perturbations; entries of a perturbation lie together.

    Attributes:
        indices: Global numbers of this rank's tasks of the group, shape ``(n_tasks,)``; there may be none.
        end: Step at which the run is over.
        xi: Sum of a pair's perturbations since the start, for each weight, ``(n_pairs, *shape)``.
        step: Steps taken.
        params: Parameters, each ``(2 * n_pairs * n_tasks, *shape)``; None before the first step.
        states: States of the rule; None before the first step.
        first: Losses before the first step, ``(2 * n_pairs * n_tasks,)``.
    """

    indices: Tensor
    end: int
    xi: dict[str, Tensor]
    step: int = 0
    params: dict[str, Tensor] | None = None
    states: dict[str, NamedTuple] | None = None
    first: Tensor | None = None


@dataclasses.dataclass
class _Runs:
    """Runs under way.

    Attributes:
        groups: The groups; None before the first call.
        n_calls: Number of calls so far.
        horizon: That of the first call.
        n_tasks: Number of tasks on all ranks in the first call.
        loaded: State that waits for the next call, which knows rule, task and rank.
    """

    groups: list[_Group | None]
    n_calls: int = 0
    horizon: int = 0
    n_tasks: int = 0
    loaded: dict[str, Any] | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class PersistentEvolutionStrategies(Estimator):
    r"""Antithetic evolution strategies on truncated runs, without the bias of the truncation.

    .. math:: \hat g_t = \frac{1}{2 n \sigma^2} \sum_{k=1}^{n} (L_t^{k+} - L_t^{k-})\, \xi_t^k, \qquad
              \xi_t^k = \sum_{\tau \le t} \sigma \epsilon_\tau^k, \qquad \epsilon_\tau^k \sim N(0, I)

    Every call advances runs that persist from call to call by one segment of ``truncation`` steps. A pair has two
    particles, which draw ``w + sigma eps`` and ``w - sigma eps`` anew for each segment and keep their own parameters
    and states. The losses of a segment depend on all perturbations so far, so they are weighted by their sum:
    for fixed weights the segments of a run together estimate the gradient of the whole meta-loss, while weights are
    learned after every segment. The price is variance, which grows with the number of segments.

    The tasks of the batch form groups, each with a run of its own; the first run of group ``g`` ends after a part
    ``(g + 1) / n_groups`` of the horizon, rounded up to segments, so that later on the groups are in different parts
    of the horizon and an estimate speaks for all of it. A finished run is replaced by one on the tasks of the current
    batch; tasks that a group is offered before are not used. Estimates of segments are multiplied by their
    number in a run, and averaged over groups, each counted with the number of its tasks.

    Perturbations are functions of the seed, the number of the call, that of the group and the name of the weight.
    Ranks share the groups' tasks as they lie in the batch and exchange one number per task and particle. Losses are
    bounded as by :class:`~odeopt.meta.estimators.EvolutionStrategies`, which this is where a segment is the horizon.

    An instance carries the state of the runs under way, :meth:`state_dict`; :meth:`fresh` gives one without any.

    Args:
        n_pairs: Number of antithetic pairs per group.
        sigma: Standard deviation of the perturbations, the same for every weight, in the units of the weights.
        truncation: Steps per segment, and so per call.
        n_groups: Number of groups; at most that of the tasks of the batch.
        ceiling: What a loss counts at most: the first one plus so many times its size.
        clip: What the meta-losses of a pair are taken to differ by at most, in units of the meta-loss; None for no
            limit.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Vicol, Metz, Sohl-Dickstein (2021), Unbiased gradient estimation in unrolled computation graphs with
        persistent evolution strategies, Sec. 4 and Algorithm 2.
    """

    key: ClassVar[str] = "pes"
    is_stateful: ClassVar[bool] = True

    n_pairs: int = 16
    sigma: float = 0.01
    truncation: int = 20
    n_groups: int = 4
    ceiling: float = 10.0
    clip: float | None = None

    def __post_init__(self) -> None:
        require_counts(n_pairs=self.n_pairs, truncation=self.truncation, n_groups=self.n_groups)
        require_positive(sigma=self.sigma, ceiling=self.ceiling)
        require_positive(clip=self.clip, or_none=True)
        object.__setattr__(self, "_runs", _Runs([None] * self.n_groups))  # no option: it changes from call to call

    def fresh(self) -> Self:
        return dataclasses.replace(self)

    def gradients(self, rule, task, objective, *, indices, horizon, seed, update_scale=1.0, tells_horizon=True,
                  world=ALONE):  # fmt: skip
        weights = {name: p for name, p in rule.named_parameters() if p.requires_grad}
        counts = world.gather(torch.tensor([len(indices)])).tolist()
        n_tasks, offset = sum(counts), sum(counts[: world.rank])
        self._check(n_tasks, horizon)
        # where the tasks of each group lie in the batch, and which of them are this rank's
        positions = [part - offset for part in torch.arange(n_tasks).tensor_split(self.n_groups)]
        is_mine = [(part >= 0) & (part < len(indices)) for part in positions]
        if self._runs.loaded is not None:
            self._restore(rule, task, seed, weights, is_mine)
        n_segments = -(-horizon // self.truncation)
        options = {"seed": seed, "total_steps": horizon if tells_horizon else None, "update_scale": update_scale}
        options["held_out"] = objective.held_out
        losses = []
        for g, (part, mine) in enumerate(zip(positions, is_mine, strict=True)):
            group = self._runs.groups[g]
            if group is None or group.step == group.end:
                # the first one is shorter, so that runs end at different times
                n_own = n_segments if group else -(-n_segments * (g + 1) // self.n_groups)
                xi = {name: p.new_zeros(self.n_pairs, *p.shape, dtype=torch.float64) for name, p in weights.items()}
                group = self._runs.groups[g] = _Group(indices[part[mine]], min(n_own * self.truncation, horizon), xi)
            noise = Noise(weights, seed, self._runs.n_calls * self.n_groups + g)
            losses.append(n_segments * self._advance(group, noise, rule, task, objective, horizon, options))
        self._runs.n_calls += 1
        losses = world.gather(torch.cat(losses))
        for name, grad in self._combined(losses.tensor_split(self.n_groups)).items():
            weights[name].grad = grad.to(weights[name].dtype)
        yield losses.mean().to(task.dtype)

    def _combined(self, losses: Sequence[Tensor]) -> dict[str, Tensor]:
        """Estimate from the meta-losses of the groups, each ``(n_tasks, 2 * n_pairs)``, of all ranks."""
        grads = {}
        for group, part in zip(self._runs.groups, losses, strict=True):
            # a task counts alike in a large group and in a small one
            differences = differences_of_pairs(part, self.clip).sum(0)
            slopes = differences / (2 * self.sigma**2 * self.n_pairs * self._runs.n_tasks)
            for name, xi in group.xi.items():
                grads[name] = grads.get(name, 0.0) + torch.tensordot(slopes.to(xi.device), xi, dims=1)
        return grads

    def _check(self, n_tasks: int, horizon: int) -> None:
        at_most = f"at most the number of tasks of the batch, which is {n_tasks}"
        require(self.n_groups <= n_tasks, "n_groups", self.n_groups, at_most)
        if self._runs.n_calls == 0:
            self._runs.horizon, self._runs.n_tasks = horizon, n_tasks
        before = f"{self._runs.horizon}, as in the first call: runs are under way"
        require(horizon == self._runs.horizon, "horizon", horizon, before)
        before = f"of {self._runs.n_tasks} tasks on all ranks, as in the first call: runs are under way"
        require(n_tasks == self._runs.n_tasks, "indices", n_tasks, before)

    @torch.no_grad()
    def _advance(self, group: _Group, noise: Noise, rule, task, objective, horizon, options) -> Tensor:
        """Take a segment under new perturbations; return meta-losses in double precision, ``(n_tasks, n_runs)``."""
        n, n_runs, start = len(group.indices), 2 * self.n_pairs, group.step
        n_steps = min(self.truncation, group.end - start)
        for name, xi in group.xi.items():
            group.xi[name] = xi + self.sigma * noise.draw(name, range(self.n_pairs)).double()
        group.step += n_steps
        if n == 0:  # all of the group's tasks are other ranks'
            if group.params is None:
                group.params, group.states, group.first = _nothing(rule, task, options["seed"])
            return torch.zeros(0, n_runs, dtype=torch.float64, device=group.first.device)
        # an adaptive solver would choose its steps for all perturbations together
        length, pieces = n_runs if rule.has_fixed_step else 1, []
        options = {"indices": group.indices.repeat(length), "n_steps": n_steps, "start": start, **options}
        for at in range(0, n_runs, length):
            stacked = perturbed(rule, noise.perturbed(range(at, at + length), self.sigma))
            rows = slice(at * n, (at + length) * n)
            params, states = tree_map_only(Tensor, lambda x, rows=rows: x[rows], (group.params, group.states))
            pieces.append(unroll(stacked, task, params=params, states=states, **options))
        losses = torch.cat([piece.losses for piece in pieces], dim=1)
        group.first = losses[0] if group.params is None else group.first
        ends = [(piece.params, piece.states) for piece in pieces]
        group.params, group.states = tree_map(lambda *parts: torch.cat(parts), *ends)
        losses = bounded(losses[1:], group.first, self.ceiling)
        meta_losses = objective(losses, start=start, horizon=horizon, first=group.first)
        return meta_losses.view(n_runs, n).mT.double()

    def state_dict(self, world: World = ALONE) -> dict[str, Any]:
        """Return the runs under way, those of all ranks, each of which has to make the call.

        Args:
            world: The ranks that work on the batch.

        Returns:
            Numbers and tensors, the same on every rank; nothing before the first call.
        """
        if self._runs.loaded is not None or self._runs.n_calls == 0:
            return self._runs.loaded or {}

        def whole(x: Tensor) -> Tensor:
            return world.gather(x.unflatten(0, (2 * self.n_pairs, len(x) // (2 * self.n_pairs))).transpose(0, 1))

        groups = []
        for group in self._runs.groups:
            saved = {"indices": world.gather(group.indices), "end": group.end, "step": group.step, "xi": dict(group.xi)}
            states = {name: list(state) for name, state in group.states.items()}
            parts = {"params": group.params, "states": states, "first": group.first}
            groups.append(saved | tree_map(whole, parts))
        return {"groups": groups} | {name: getattr(self._runs, name) for name in _COUNTS}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned, on any number of ranks.

        Args:
            state: Of an instance with the same options; the same on every rank.
        """
        if not state:
            return
        self._runs.loaded = state
        for name in _COUNTS:
            setattr(self._runs, name, state[name])

    def _restore(self, rule: UpdateRule, task: Task, seed: int, weights: dict[str, Tensor], is_mine) -> None:
        """Take this rank's part of what was loaded."""
        params, states, first = _nothing(rule, task, seed)
        for g, (saved, mine) in enumerate(zip(self._runs.loaded["groups"], is_mine, strict=True)):

            def part(x: Tensor, like: Tensor, mine: Tensor = mine) -> Tensor:
                return x[mine.to(x.device)].transpose(0, 1).flatten(0, 1).to(like)

            self._runs.groups[g] = _Group(
                indices=saved["indices"][mine],
                end=saved["end"],
                xi={name: x.to(weights[name].device) for name, x in saved["xi"].items()},
                step=saved["step"],
                params={name: part(saved["params"][name], x) for name, x in params.items()},
                states={name: type(x)(*map(part, saved["states"][name], x)) for name, x in states.items()},
                first=part(saved["first"], first),
            )
        self._runs.loaded = None


def _nothing(rule: UpdateRule, task: Task, seed: int) -> tuple[dict[str, Tensor], dict[str, NamedTuple], Tensor]:
    """Parameters, states and losses of no tasks."""
    params = task.init_params(torch.zeros(1, dtype=torch.int64), seed)
    states = {name: rule.init_state(param.reshape(1, param[0].numel())) for name, param in params.items()}
    params, states = tree_map(lambda x: x.detach()[:0], (params, states))
    return params, states, next(iter(params.values())).new_zeros(0)
