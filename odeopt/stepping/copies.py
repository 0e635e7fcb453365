"""Copies: of a rule, beside the parameters that it steps; of what an optimizer holds, for checkpoints."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from odeopt.modes import has_values
from odeopt.rules.base import UpdateRule


def frozen_copy(rule: UpdateRule) -> UpdateRule:
    """Copy a rule for good: its weights take no gradient."""
    with _disable_current_modes():  # a rule of numbers is copied with them, also where FakeTensorMode is on
        return _copy(rule, lambda x: x.detach().clone()).requires_grad_(False).eval()


def copy_beside(rule: UpdateRule, param: Tensor) -> UpdateRule:
    """Copy a rule to where a parameter is; beside one without values the copy has none either."""
    if has_values(param):
        return copy.deepcopy(rule).to(param.device)
    return _copy(rule, lambda x: param.new_empty(x.shape, dtype=x.dtype))


def copied(held: Any) -> Any:
    """Copy the tensors in nested dictionaries, each to a storage of its own size; the rest is passed on."""
    if isinstance(held, Tensor):
        return held.detach().clone()
    return {key: copied(value) for key, value in held.items()} if isinstance(held, dict) else held


def _copy(rule: UpdateRule, convert: Any) -> UpdateRule:
    """Deep copy with the tensors converted, those that are used twice once."""
    memo = {id(x): convert(x) for x in (*rule.parameters(), *rule.buffers())}
    parameters = {id(x): nn.Parameter(memo[id(x)], requires_grad=x.requires_grad) for x in rule.parameters()}
    return copy.deepcopy(rule, memo | parameters)
