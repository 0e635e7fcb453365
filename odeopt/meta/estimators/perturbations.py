"""Rules under perturbed weights, many at a time: what evolution strategies evaluate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.utils._pytree import tree_map

from odeopt.rules.base import UpdateRule
from odeopt.tasks.random import normal


class Noise(NamedTuple):
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


class Perturbed:
    """A rule under several sets of weights, which :func:`~odeopt.meta.unroll` takes for one rule with more tasks.

    Batches have ``n_perturbations * n_tasks`` entries, those of a perturbation together.

    Args:
        rule: The rule.
        weights: Some of its weights by name, each ``(n_perturbations, *shape)``; the others are as the rule has them.
    """

    def __init__(self, rule: UpdateRule, weights: dict[str, Tensor]) -> None:
        self.rule, self.weights = rule, weights
        self.n = len(next(iter(weights.values())))

    @property
    def is_staged(self) -> bool:
        """As :attr:`odeopt.UpdateRule.is_staged`."""
        return self.rule.is_staged

    def is_whole(self, shape: torch.Size) -> bool:
        """As :meth:`odeopt.UpdateRule.is_whole`."""
        return self.rule.is_whole(shape)

    def is_matrix(self, shape: torch.Size) -> bool:
        """As :meth:`odeopt.UpdateRule.is_matrix`."""
        return self.rule.is_matrix(shape)

    def for_tables(self) -> Perturbed:
        """As :meth:`odeopt.UpdateRule.for_tables`."""
        return Perturbed(self.rule.for_tables(), self.weights)

    def for_depth(self, n_matrices: int) -> Perturbed:
        """As :meth:`odeopt.UpdateRule.for_depth`."""
        return Perturbed(self.rule.for_depth(n_matrices), self.weights)

    def init_state(self, param: Tensor) -> NamedTuple:
        """As :meth:`odeopt.UpdateRule.init_state`, for all perturbations."""
        return self._map(lambda rule, param: rule.init_state(param), param)

    def __call__(self, grad, state, *, param, shape, progress):
        def step(rule, grad, state, param):
            return rule(grad, state, param=param, shape=shape, progress=progress)

        return self._map(step, grad, state, param)

    def _map(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function of the rule under each set of weights, with the part of the batch that is its own."""
        held, weights = _Held(self.rule), {f"rule.{name}": value for name, value in self.weights.items()}

        def one(weights, *args):
            return functional_call(held, weights, (function, *args))

        if self.n == 1:
            return one({name: value[0] for name, value in weights.items()}, *args)
        parts = tree_map(lambda x: x.unflatten(0, (self.n, len(x) // self.n)), args)
        return tree_map(lambda x: x.flatten(0, 1), vmap(one)(weights, *parts))


class _Held(nn.Module):
    """A rule that ``functional_call`` can hand to any function."""

    def __init__(self, rule: UpdateRule) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, function, *args):
        return function(self.rule, *args)


def differences_of_pairs(losses: Tensor, clip: float | None) -> Tensor:
    """Differences of the losses of runs ``2k`` and ``2k + 1``, shape ``(n_tasks, n_runs)``, ``clip`` at most."""
    differences = losses[:, 0::2] - losses[:, 1::2]
    return differences if clip is None else differences.clamp(-clip, clip)


def perturbed(rule: UpdateRule, weights: dict[str, Tensor]) -> UpdateRule | Perturbed:
    """A rule under several sets of weights, in the form that is cheapest to step.

    Where all of them enter through ``nn.Linear`` layers (``UpdateRule.uses_layers``), the result is the rule itself
    with layers that have one set of weights for each part of the batch: it can still step its parameters side by
    side. Otherwise ``torch.func.vmap`` maps the rule.

    Args:
        rule: The rule.
        weights: Some of its weights by name, each ``(n_perturbations, *shape)``.

    Returns:
        A rule for batches of ``n_perturbations * n_tasks`` entries, those of a perturbation together.
    """
    layers = {name: layer for name, layer in rule.named_modules() if isinstance(layer, nn.Linear)}
    of_layers = {f"{name}.{part}" for name, layer in layers.items() for part, _ in layer.named_parameters()}
    if not rule.uses_layers or not weights.keys() <= of_layers:
        return Perturbed(rule, weights)
    n = len(next(iter(weights.values())))
    stacked = copy.deepcopy(rule)
    for name, layer in layers.items():
        own = dict(layer.named_parameters())
        parts = {part: weights.get(f"{name}.{part}", own[part].detach().expand(n, *own[part].shape)) for part in own}
        stacked.set_submodule(name, _StackedLinear(parts["weight"], parts.get("bias")))
    return stacked


class _StackedLinear(nn.Module):
    """Linear layers for the parts of a batch: inputs ``(n * n_tasks, ..., n_in)``, weights ``(n, n_out, n_in)``."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        n, n_out, n_in = self.weight.shape
        y = x.reshape(n, -1, n_in) @ self.weight.mT
        return (y if self.bias is None else y + self.bias.unsqueeze(1)).view(*x.shape[:-1], n_out)
