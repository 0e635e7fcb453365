"""The step of an optimizer as one operation of ``torch.library``, which ``torch.compile`` puts into its graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from odeopt.optimizer import LearnedOptimizer

_OPTIMIZERS: WeakValueDictionary[str, LearnedOptimizer] = WeakValueDictionary()
_HANDLES = map(str, itertools.count())
# Options of a group as numbers, and back; but for the learning rate, which is a tensor: graphs are compiled anew for
# each value of a number.
_FROM_NUMBER = {
    "weight_decay": float,
    "maximize": bool,
    "total_steps": lambda number: int(number) or None,
    "is_table": bool,
    "is_stack": bool,
    "is_transposed": bool,
    "n_blocks": int,
}


def register(optimizer: LearnedOptimizer) -> str:
    """Return a handle under which the operation finds this optimizer, and which no other of this process ever has."""
    handle = next(_HANDLES)
    _OPTIMIZERS[handle] = optimizer
    return handle


@torch.no_grad()
def trace_step(optimizer: LearnedOptimizer, handle: str) -> bool:
    """Put a step into the graph that Dynamo traces, or return False where it has to be left out of it.

    What the compiled code may have changed, and Python does not know of before the graph has run, is an argument:
    parameters, gradients, options and counts of steps. The state is not, as there is none before the first step.
    """
    if not optimizer.capturable or optimizer.averaging is not None:
        return False
    # through `optimizer.param_groups` Dynamo would guard each number in the groups, and add an entry to them
    groups = vars(optimizer)["param_groups"]
    params = [param for group in groups for param in group["params"]]
    grads = [param.grad for param in params]
    is_plain = all(type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" for x in params)
    # without any gradient, they may be some that Dynamo does not know of
    if not is_plain or all(grad is None for grad in grads):
        return False
    lrs, numbers = [group["lr"] for group in groups], [group[name] for group in groups for name in _FROM_NUMBER]
    if not all(isinstance(lr, Tensor) for lr in lrs) or any(isinstance(x, Tensor) for x in numbers):
        return False
    _step(handle, params, grads, [group["n_steps"] for group in groups], lrs, [float(x or 0) for x in numbers])
    return True


@torch.library.custom_op(
    "odeopt::step",
    mutates_args=("params", "n_steps"),
    device_types="cpu",
    schema="(str handle, Tensor(a0!)[] params, Tensor?[] grads, Tensor(a1!)[] n_steps, Tensor[] lrs, float[] numbers)"
    " -> ()",
)
def _step(
    handle: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    n_steps: Sequence[Tensor],
    lrs: Sequence[Tensor],
    numbers: Sequence[float],
) -> None:
    optimizer = _OPTIMIZERS[handle]
    own = [param for group in optimizer.param_groups for param in group["params"]]
    if [param.shape for param in own] != [param.shape for param in params]:
        raise RuntimeError("Parameters were added to the optimizer, or taken from it, in the code that was compiled.")
    with _standing_in(own, params, grads), _options(optimizer, n_steps, lrs, numbers):
        optimizer._step_now(None)


@_step.register_fake
def _(*_: object) -> None:
    return None


@contextmanager
def _standing_in(own: Sequence[Tensor], params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Iterator[None]:
    """Let the parameters have these values, in the memory of ``params``, and these gradients.

    A graph in which nothing is changed in place, as compilers make them, holds copies of the parameters. The parameters
    themselves may be read after the step for what they were before it.
    """
    before = [(param.data, param.grad) for param in own]
    try:
        for param, value, grad in zip(own, params, grads, strict=True):
            param.data, param.grad = value.data, grad
        yield
    finally:
        for param, (value, grad) in zip(own, before, strict=True):
            param.data, param.grad = value, grad


@contextmanager
def _options(
    optimizer: LearnedOptimizer, n_steps: Sequence[Tensor], lrs: Sequence[Tensor], numbers: Sequence[float]
) -> Iterator[None]:
    """Let the groups have these options and count in these tensors."""
    rows = [numbers[k : k + len(_FROM_NUMBER)] for k in range(0, len(numbers), len(_FROM_NUMBER))]
    before = [group.copy() for group in optimizer.param_groups]
    try:
        for group, count, lr, row in zip(optimizer.param_groups, n_steps, lrs, rows, strict=True):
            given = {name: read(x) for (name, read), x in zip(_FROM_NUMBER.items(), row, strict=True)}
            group.update(given | {"n_steps": count, "lr": lr})
        yield
    finally:
        for group, own in zip(optimizer.param_groups, before, strict=True):
            group.update({name: own[name] for name in (*_FROM_NUMBER, "n_steps", "lr")})
