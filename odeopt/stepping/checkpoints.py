"""State dictionaries of an optimizer, which are checked and read back exactly."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import StateDict

from odeopt.checks import require
from odeopt.rules.base import UpdateRule
from odeopt.stepping.buckets import state_template
from odeopt.stepping.checks import OPTIONS, check_options, parameter_names, warn_caller
from odeopt.stepping.copies import copied
from odeopt.stepping.layout import Group, Layout, matched_state
from odeopt.stepping.shards import Shard


def check_saved(state_dict: StateDict, rule: UpdateRule, digest: int) -> None:
    """Refuse the state of another kind of optimizer or of another rule, or an option that is out of range.

    Where the rule's digest was removed, warn.
    """
    wanted = {*OPTIONS, "n_steps", "n_skipped"}
    missing = {name for group in state_dict.get("param_groups", [{}]) for name in wanted - group.keys()}
    lacks = f", with {', '.join(sorted(missing))} in each group"
    require(not missing, "state_dict", sorted(state_dict), f"the state of a LearnedOptimizer{lacks}")
    for group in state_dict["param_groups"]:
        check_options(group)
    found = {group.get("rule_digest") for group in state_dict["param_groups"]}
    if others := found - {None, digest}:
        raise ValueError(
            "Parameter `rule` should be the one that `state_dict` was saved with: the same class, configuration and "
            f"weights. Found another one, {type(rule).__name__} (`rule_digest` {digest}; in `state_dict` "
            f"{', '.join(map(str, others))}). To change the rule on purpose, remove `rule_digest` from the groups of "
            "`state_dict`."
        )
    if None in found:
        warn_caller("`state_dict` does not say by which rule it was made, so it may be another.")


def in_order_of(groups: list[Group], state_dict: StateDict) -> StateDict:
    """Bring the saved parameters into the order of these groups, where all names are the same and their order is not.

    Where names differ, which a wrapper or a new layer may have done, or one stands for two parameters, these are told
    apart by their places.
    """
    own, saved = ([group.get("param_names", []) for group in some] for some in (groups, state_dict["param_groups"]))
    places = {name: number for number, names in enumerate(saved) for name in names}
    are_same = [*map(len, own)] == [*map(len, saved)] and {*places} == {name for names in own for name in names}
    if own == saved or not are_same or len(places) < sum(map(len, saved)):
        return state_dict
    ordered = []
    for number, (names, found, group) in enumerate(zip(own, saved, state_dict["param_groups"], strict=True)):
        for name in sorted({*names} - {*found}):
            raise ValueError(
                f"Parameter `state_dict` should have `{name}` in group {number}, as this optimizer does. Found it in "
                f"group {places[name]}."
            )
        keys = dict(zip(found, group["params"], strict=True))
        ordered.append({**group, "params": [keys[name] for name in names], "param_names": names} if names else group)
    return {**state_dict, "param_groups": ordered}


def read_states(layout: Layout, groups: list[Group], state_dict: StateDict) -> dict[Tensor, dict[str, Any]]:
    """Return the saved state of each parameter that has one, in the dtypes that the rule of a layout keeps.

    Entries that are not the rule's keep their dtypes. Where a digest does not say that the state is the rule's, names
    alone tell the fields of another rule from entries of others, so a state without any field of the rule is refused.
    """
    sizes, saved_sizes = ([len(group["params"]) for group in some] for some in (groups, state_dict["param_groups"]))
    if sizes != saved_sizes:
        raise ValueError(
            f"Parameter `state_dict` should have groups of {sizes} parameters, as this optimizer does. Found groups of "
            f"{saved_sizes}. Build the optimizer as it was when it was saved, for instance from "
            "`odeopt.param_groups(model)`."
        )
    restored, names = {}, parameter_names(groups)
    for group, saved_group in zip(groups, state_dict["param_groups"], strict=True):
        for param, key in zip(group["params"], saved_group["params"], strict=True):
            if saved := state_dict["state"].get(key):
                rule, dtype = layout.rule_for(param, saved_group), layout.state_dtype
                is_stack = saved_group["is_stack"]
                fields = state_template(rule, param, dtype, is_stack=is_stack)
                others = {name: x for name, x in saved.items() if name not in fields}
                restored[param] = {name: _beside(x, param) for name, x in others.items()}
                if len(others) < len(saved) or "rule_digest" not in saved_group:
                    restored[param] |= matched_state(rule, param, saved, dtype, name=names[param], is_stack=is_stack)
    return restored


def _beside(value: Any, param: Tensor) -> Any:
    """A copy of an entry of a parameter's state where the parameter lies, sharded as it is if it has its shape."""
    if not torch.is_tensor(value):
        return copied(value)
    shard, value = Shard.of(param), value.to(param.device, copy=True)
    return shard.whole(shard.local(value), 0) if value.shape == shard.shape else value


def warn_of_other_length(given: list[int | None], groups: list[Group]) -> None:
    """Warn where ``total_steps`` of the groups that were loaded is not the one that was ``given`` before."""
    loaded = (group["total_steps"] for group in groups)
    if had := [(old, new) for old, new in zip(given, loaded, strict=True) if old not in (None, new)]:
        warn_caller(
            f"Parameter `total_steps` is {had[0][1]} from now on, as in `state_dict`; this optimizer had "
            f"`total_steps = {had[0][0]}`. To train as long as that, set it again in each group of "
            "`optimizer.param_groups`."
        )
