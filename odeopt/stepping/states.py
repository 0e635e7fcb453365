"""State of a parameter as an optimizer keeps and saves it: the rule's fields, and entries of others beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from odeopt.rules.base import UpdateRule
from odeopt.stepping.buckets import state_template
from odeopt.stepping.checks import warn_caller


def empty_state(rule: UpdateRule, param: Tensor, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """State of a parameter without elements, which checkpoints that are loaded strictly ask for."""
    template = state_template(rule, param, dtype)
    return {name: torch.zeros(shape, dtype=kept, device=param.device) for name, (shape, kept) in template.items()}


def matched_state(
    rule: UpdateRule, param: Tensor, state: dict[str, Any], dtype: torch.dtype | None, *, name: str | None
) -> dict[str, Tensor]:
    """The rule's part of a parameter's state, in the rule's dtypes; a ValueError where a field is missing or unfit."""
    template = state_template(rule, param, dtype)
    wanted = {field: tuple(shape) for field, (shape, _) in template.items()}
    found = {field: tuple(value.shape) if torch.is_tensor(value) else None for field, value in state.items()}
    if wanted.items() - found.items():
        raise ValueError(f"Parameter `{name}` should have a state of {wanted} under this rule. Found {found}.")
    return {field: state[field].to(dtype=kept) for field, (_, kept) in template.items()}


def saved_state(
    rule: UpdateRule,
    param: Tensor,
    state: dict[str, Any],
    dtype: torch.dtype | None,
    *,
    name: str | None,
    is_of_rule: bool,
) -> dict[str, Any]:
    """State out of a checkpoint: the rule's part matched, the rest on the parameter's device, in the dtype it has.

    Unless the state ``is_of_rule`` for certain, names alone tell the fields of another rule from entries of others, so
    a state without any field of the rule is refused, too.
    """
    fields = state_template(rule, param, dtype)
    others = {key: x.to(param.device) if torch.is_tensor(x) else x for key, x in state.items() if key not in fields}
    if (is_of_rule or not others) and not fields.keys() & state.keys():
        return others
    return others | matched_state(rule, param, state, dtype, name=name)


def check_rule(groups: list[dict[str, Any]], rule: UpdateRule, digest: int) -> None:
    """Refuse the saved groups of an optimizer of another rule; warn where the digest was removed."""
    found = {group.get("rule_digest") for group in groups}
    if found - {None, digest}:
        raise ValueError(
            "Parameter `rule` should be the one that `state_dict` was saved with: the same class, configuration and "
            f"weights. Found another one, {type(rule).__name__} (`rule_digest` {digest}; in `state_dict` "
            f"{', '.join(map(str, found - {None, digest}))}). To change the rule on purpose, remove `rule_digest` from "
            "the groups of `state_dict`."
        )
    if None in found:
        warn_caller("`state_dict` does not say by which rule it was made, so it may be another.", UserWarning)
