"""Diagnostics of the next step of an optimizer."""

from __future__ import annotations

from torch import Tensor

from odeopt.checks import require
from odeopt.stepping.checks import parameter_names
from odeopt.stepping.layout import Group, Layout, Placed


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
    """Quantities of one parameter of a bucket."""
    bucket, rule, options = placed.bucket, placed.rule, layout.options(placed)
    param = bucket.params[index]
    theta, grad = (x.detach().flatten().to(bucket.dtype) for x in (param, param.grad))
    grad, state = -grad if options.maximize else grad, bucket.rule_state(index)
    signals = {"param": theta, "shape": param.shape, "progress": options.progress}
    change = options.lr * rule(grad, state, **signals)[0]
    if options.decay is not None:
        change = change - options.lr * options.decay * theta
    return {"update_to_weight": change.norm() / theta.norm()} | rule.account(grad, state, **signals)
