"""Checks of the optimizer's options and parameters, and warnings that point to the caller's line."""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import odeopt.checks
from odeopt.checks import is_integer, require
from odeopt.modes import has_values
from odeopt.rules.base import UpdateRule
from odeopt.rules.port_hamiltonian import PortHamiltonianUpdate
from odeopt.stepping.shards import Shard, is_distributed

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # of parameters, and of their state
# Marks that others leave on tensors of which each process holds a piece, or which hold several tensors in a row:
# sums across such a tensor would be sums over something else, and only ``DTensor`` says what over.
_FOREIGN = {
    "_fsdp_flattened": "FullyShardedDataParallel",
    "ds_id": "DeepSpeed ZeRO",
    "local_shards": "ShardedTensor",
}
# Options that a group of parameters may set; other names in it belong to schedulers, trainers or the user.
OPTIONS = ("lr", "weight_decay", "maximize", "total_steps", "is_table", "is_stack", "is_transposed", "n_blocks")
# Similarity from which on a name is a misspelt one: `maximise` has .88, and `weight_decay_mult`, which is meant, .83.
_MISSPELT = 0.85
_LIBRARIES = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, odeopt.checks.__file__))


def rule_obstacle(rule: UpdateRule) -> str | None:
    """Return why there is no step of a rule but the eager one, as a half sentence; None where there may be."""
    if type(rule) is not PortHamiltonianUpdate:
        return f"there is no native step of {type(rule).__name__}"
    if not rule.is_linear:
        return "momenta are not stepped in closed form (`solver`, `backend`, networks of q)"
    return None


def check_options(options: dict[str, Any], *, may_wait: bool = True) -> None:
    """Raise a ValueError where an option of a parameter group is out of range.

    A number that is kept on another device is read only where the check ``may_wait`` for it.
    """
    for name in ("lr", "weight_decay"):
        value = options[name]
        if isinstance(value, Tensor):
            is_number, is_read = value.numel() == 1 and not value.is_complex(), has_values(value)
            is_read = is_read and (may_wait or value.device.type == "cpu")
        else:  # Real alone takes ten times as long
            is_number, is_read = isinstance(value, (float, int, Real)) and not isinstance(value, bool), True
        require(is_number, name, value, "a number or a one-element tensor")
        require(not is_read or bool(0 <= value < math.inf), name, value, "non-negative and finite")
    total_steps = options["total_steps"]
    is_length = total_steps is None or (is_integer(total_steps) and total_steps >= 1)
    require(is_length, "total_steps", total_steps, "a positive integer or None")
    for name in ("maximize", "is_table", "is_stack", "is_transposed"):
        require(isinstance(options[name], bool), name, options[name], "True or False")
    n_blocks = options["n_blocks"]
    require(is_integer(n_blocks) and n_blocks >= 1, "n_blocks", n_blocks, "a positive integer")
    is_free = not options["is_transposed"] or not (options["is_table"] or n_blocks > 1)
    require(is_free, "is_transposed", True, "False for tables (`is_table`) and for matrices of blocks (`n_blocks`)")


def check_spelling(group: Mapping[str, Any]) -> None:
    """Raise a ValueError where a name in a group of parameters is plainly a misspelt option.

    Other names pass, as in ``torch.optim``, also those in which an option is one of several words.
    """
    for name in (name for name in group if name not in OPTIONS):
        found = name.lower().replace("-", "_") if isinstance(name, str) else ""
        for option in get_close_matches(found, OPTIONS, n=1, cutoff=_MISSPELT):
            words = found.strip("_")
            if words == option or f"_{option}_" not in f"_{words}_":  # not `use_weight_decay`, of a trainer
                raise ValueError(
                    f"Parameter `{option}` should be given by this name in a group of parameters. "
                    f"Found `{name} = {group[name]!r}`."
                )


def parameter_names(groups: list[dict[str, Any]], first: int = 0) -> dict[Tensor, str]:
    """Name of each parameter in messages, in the order of the groups; those of the groups from the ``first`` on.

    Parameters without a name, or with one that another has too, are named by their place.
    """
    n_uses, names = Counter(name for group in groups for name in group.get("param_names", ())), {}
    for number, group in enumerate(groups[first:], first):
        given = group.get("param_names")
        for index, param in enumerate(group["params"]):
            is_named = given and n_uses[given[index]] == 1
            names[param] = given[index] if is_named else f"param_groups[{number}]['params'][{index}]"
    return names


def is_supported(tensor: Tensor) -> bool:
    """Return True for a parameter or a gradient that is dense and of one of :data:`DTYPES`."""
    return tensor.layout == torch.strided and tensor.dtype in DTYPES


def extent_of(x: Tensor) -> tuple[int, int]:
    """Address of a tensor's first byte, and the number of bytes up to its last one; none without a memory."""
    if not has_values(x) or x.numel() == 0 or x.data_ptr() == 0:
        return 0, 0
    reach = sum((n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), (1 + reach) * x.itemsize


def overlapping(pieces: Iterable[tuple[int, int]]) -> set[int]:
    """Return the numbers of pieces of memory that may share a byte with one before, by addresses and sizes in bytes."""
    found, reached = set(), 0
    for start, size, number in sorted((start, size, number) for number, (start, size) in enumerate(pieces) if size > 0):
        if start < reached:
            found.add(number)
        reached = max(reached, start + size)
    return found


def check_parts(param: Tensor, name: str, group: Mapping[str, Any]) -> None:
    """Raise a ValueError where a parameter is a piece of a tensor in a way that the sums across it cannot follow.

    Nor may its group say of it that it is a stack or consists of blocks where it cannot.
    """
    found = next((owner for mark, owner in _FOREIGN.items() if hasattr(param, mark)), None)
    if found is None and is_distributed(param) and any(placement.is_partial() for placement in param.placements):
        found = f"DTensor of placements {param.placements}"
    if found is not None:
        raise ValueError(
            f"Parameter `{name}` should be whole on each process, or sharded or replicated as a DTensor: shard the "
            f"model by `torch.distributed.fsdp.fully_shard`, or replicate it by `DistributedDataParallel`. "
            f"Found a tensor that belongs to {found}."
        )
    is_stack, n_blocks = group["is_stack"], group["n_blocks"]
    if is_stack and not (param.ndim > 0 and Shard.of(param).holds_tensors):
        placements = f", `placements = {param.placements}`" if is_distributed(param) else ""
        raise ValueError(
            f"Parameter `{name}` should hold several tensors along its first axis, and be whole on each process or "
            "sharded along that axis, by one axis of the mesh, with some for each process, as its group is one of "
            "stacks (`is_stack=True`): shard it so, replicate it (`DistributedDataParallel`), or step it by "
            f"coordinates (`is_table=True` in place of `is_stack`). Found shape {tuple(param.shape)}{placements}."
        )
    rows = param.shape[is_stack : is_stack + 1]
    if n_blocks > 1 and (not rows or rows[0] % n_blocks):
        raise ValueError(
            f"Parameter `{name}` should consist of {n_blocks} blocks of as many rows each, as its group says "
            f"(`n_blocks = {n_blocks}`). Found shape {tuple(param.shape)}."
        )


def warn_caller(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line outside of this library and torch, however many wrappers stand in between."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
