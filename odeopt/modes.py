"""Modes of torch in which a computation may not read numbers: compiling, ``torch.func``, dispatch, fake tensors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _get_current_dispatch_mode

P, T = ParamSpec("P"), TypeVar("T")


def outside_inference_mode(function: Callable[P, T]) -> Callable[P, T]:
    """Make a function that takes gradients by itself work as under ``torch.no_grad`` where it is in inference mode."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if not torch.is_inference_mode_enabled():
            return function(*args, **kwargs)
        with torch.inference_mode(False), torch.no_grad():
            return function(*args, **kwargs)

    return call


def is_traced() -> bool:
    """Return True while a computation is compiled or mapped (``torch.func``): then no value may decide what it does."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def is_in_forward_mode() -> bool:
    """Return True where tensors may carry tangents, which ``torch.no_grad`` does not stop."""
    return forward_ad._current_level >= 0


def is_watched() -> bool:
    """Return True inside of what has to see each operation on tensors: a mode of dispatch, or ``torch.func``."""
    return _get_current_dispatch_mode() is not None or torch._C._are_functorch_transforms_active()


def has_values(tensor: Tensor) -> bool:
    """Return True for a tensor of numbers; on the meta device, or under ``FakeTensorMode``, it has only a shape."""
    return tensor.device.type != "meta" and not is_fake(tensor)


def is_readable(tensor: Tensor) -> bool:
    """Return True where numbers of a tensor may decide what is computed: on a CPU, and where nothing is traced."""
    if torch.compiler.is_compiling() or is_watched():
        return False
    return tensor.device.type == "cpu" and has_values(tensor)
