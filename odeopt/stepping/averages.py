"""Averages of the weights over a run, kept beside the rule's state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from odeopt.checks import require
from odeopt.rules.base import state_dtype

AVERAGE, _WEIGHTS = "averaging_average", "averaging_weights"  # names in the state of a parameter
SHOWS_AVERAGES = "shows_averages"  # and in the groups


def follow(params: Iterable[Tensor], state: Mapping[Tensor, dict[str, Any]], weight: float | Tensor) -> None:
    """Move the average of each parameter towards its present weights; it begins with the first that it sees.

    Args:
        params: Parameters that have been stepped at least once.
        state: Their states, in which the averages are kept, in float32 or better.
        weight: Part of the way that the averages move.
    """
    for param in params:
        held, dtype = state[param], state_dtype(param.dtype)
        if AVERAGE not in held:
            held[AVERAGE] = param.detach().to(dtype, copy=True)
        else:
            part = weight.to(param.device, dtype) if isinstance(weight, Tensor) else weight
            held[AVERAGE] = held[AVERAGE].to(param.device, dtype)  # the model may have been moved
            held[AVERAGE].lerp_(param.detach().to(dtype), part)


@torch.no_grad()
def show(state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Put the averages into the parameters, and keep the weights; parameters that show theirs stay so."""
    for param, held in _of_params(state):
        if AVERAGE in held and _WEIGHTS not in held:
            held[_WEIGHTS] = param.detach().clone()
            param.copy_(held[AVERAGE])


@torch.no_grad()
def hide(state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Put the weights back into the parameters that show averages."""
    for param, held in _of_params(state):
        if _WEIGHTS in held:
            param.copy_(held.pop(_WEIGHTS))


@torch.no_grad()
def give_way(state: Mapping[Tensor, dict[str, Any]], after: Mapping[Tensor, dict[str, Any]]) -> None:
    """Put the weights back before another state takes the place of this one, unless that shows averages, too.

    Parameters that no longer hold their average, as those of a model that was loaded first, stay as they are.
    """
    for param, held in _of_params(state):
        is_shown = _WEIGHTS in held and torch.equal(param, held[AVERAGE].to(param.device, param.dtype))
        if is_shown and _WEIGHTS not in after.get(param, {}):
            param.copy_(held[_WEIGHTS])


def drop(state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Forget averages that are not shown: nothing keeps them up to date from here on, or they begin anew."""
    for _, held in _of_params(state):
        if _WEIGHTS not in held:
            held.pop(AVERAGE, None)


def check_shown(groups: Iterable[Mapping[str, Any]], state: Mapping[Tensor, dict[str, Any]]) -> None:
    """Refuse a state that was saved while averages were shown, and has lost the weights on the way.

    Some tools save only the entries of the state that a new optimizer has, too.
    """
    is_shown = any(group.get(SHOWS_AVERAGES) for group in groups)
    wanted = f"saved after `optimizer.train()`, or with the entries {_WEIGHTS!r} of the state"
    require(not is_shown or are_shown(state), "state_dict", "averages in place of the weights", wanted)


def are_shown(state: Mapping[Tensor, dict[str, Any]]) -> bool:
    """Return True if any parameter shows its average."""
    return any(_WEIGHTS in held for _, held in _of_params(state))


def _of_params(state: Mapping[Any, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Entries of parameters; callers may keep something else under names of their own."""
    return ((param, held) for param, held in state.items() if isinstance(param, Tensor))
