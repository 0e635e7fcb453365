"""Diagnostics of the next step of an optimizer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.checks import require
from odeopt.stepping.buckets import are_driven
from odeopt.stepping.checks import parameter_names
from odeopt.stepping.layout import Group, Layout, Placed
from odeopt.stepping.loops import StepOptions


def diagnose(layout: Layout, groups: list[Group]) -> dict[str, dict[str, Tensor]]:
    """Tell what the next step will do to each parameter that has a gradient, by its name, in the order of the groups.

    Raises:
        ValueError: If a parameter is sharded.
    """
    found, names = {}, parameter_names(groups)
    with layout.without_autocast():
        for placed in layout.placed:
            for index, param in enumerate(placed.bucket.params):
                require(not placed.bucket.is_shared, names[param], "a shard of it", "whole on each process")
                if param.grad is not None:
                    found[param] = _diagnosed(layout, placed, index)
    return {name: found[param] for param, name in names.items() if param in found}


def _diagnosed(layout: Layout, placed: Placed, index: int) -> dict[str, Tensor]:
    """Quantities of one parameter of a bucket, of a stack those of its tensors along the first axis."""
    bucket, options, param = placed.bucket, layout.options(placed), placed.bucket.params[index]
    tensors = (param, param.grad) if bucket.is_stack else (param.unsqueeze(0), param.grad.unsqueeze(0))
    each = zip(*tensors, bucket.rule_states(index), bucket.shapes_of(index), strict=True)
    found = [_of_tensor(placed, *parts, options) for parts in each]
    if not bucket.is_stack:
        return found[0]
    total = {name: torch.stack([own[name] for own in found]) for name in found[0]}
    # what has no gradient stays
    total["update_to_weight"] = torch.where(are_driven(param.grad, len(found)), total["update_to_weight"], 0.0)
    return total


def _of_tensor(
    placed: Placed, param: Tensor, grad: Tensor, state: NamedTuple, shape: torch.Size, options: StepOptions
) -> dict[str, Tensor]:
    rule = placed.rule
    theta, grad = (x.detach().flatten().to(placed.bucket.dtype) for x in (param, grad))
    grad = -grad if options.maximize else grad
    signals = {"param": theta, "shape": shape, "progress": options.progress}
    change = options.lr * rule(grad, state, **signals)[0]
    if options.decay is not None:
        change = change - options.lr * options.decay * theta
    moved = torch.where(grad.isfinite().all(), change.norm() / theta.norm(), 0.0)  # else the step is skipped
    return {"update_to_weight": moved} | rule.account(grad, state, **signals)
