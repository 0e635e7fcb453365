"""Checks of the arguments of an integration: each names the parameter and the value found."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from odeopt.checks import require, suggestion

if TYPE_CHECKING:
    from odeopt.ode.grid import Times

State = Tensor | tuple[Tensor, ...]

# Steps of fewer roundings of the time than this blur the stages of a field that depends on time,
_ROUNDINGS_PER_STEP = 8
# and times larger than so many spans of time carry more rounding than the state does.
_SPANS_FROM_ZERO = 16


def tensors_of(x: Any) -> tuple[Tensor, ...]:
    """Return the tensors of a state, whether it is one or a tuple of them."""
    return tuple(x) if isinstance(x, (tuple, list)) else (x,)


def time_dtype(device: torch.device) -> torch.dtype:
    """Type in which times are kept: double precision where the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def real_dtype(x: Tensor) -> torch.dtype:
    """Type of the parts of the numbers of a tensor."""
    return x.real.dtype if x.is_complex() else x.dtype


def clock_dtype(x: Tensor, reach: float, step: float, span: float = math.inf) -> torch.dtype:
    """Type of the times that a field is called with: that of the state, unless it is too coarse for the steps.

    Args:
        x: The state.
        reach: Largest absolute time.
        step: Shortest step.
        span: From the first time to the last one.
    """
    is_fine = _ROUNDINGS_PER_STEP * torch.finfo(x.dtype).eps * reach <= step and reach <= _SPANS_FROM_ZERO * span
    return real_dtype(x) if is_fine else torch.float64


def check_choice(name: str, found: Any, known: Collection[str]) -> None:
    """Check that a value is one of the known names; suggest the closest one."""
    if not isinstance(found, str) or found not in known:
        raise ValueError(
            f"Parameter `{name}` should be one of {', '.join(sorted(known))}. Found `{name} = {found!r}`."
            + suggestion(found, known)
        )


def check_options(name: str, options: dict[str, Any] | None, method: str, accepted: Collection[str]) -> None:
    """Check that the method reads every option; torchdiffeq would only warn."""
    is_dictionary = options is None or isinstance(options, dict)  # a union of types cannot be compiled
    require(is_dictionary, name, options, "a dictionary or None")
    for key, value in (options or {}).items():
        if key not in accepted:
            raise ValueError(
                f"Parameter `{name}` of method {method!r} should only hold {', '.join(sorted(accepted))}. "
                f"Found `{name}[{key!r}] = {value!r}`." + suggestion(key, accepted)
            )
    step_size = (options or {}).get("step_size")
    name = f"{name}['step_size']"
    is_constant = not (isinstance(step_size, Tensor) and step_size.requires_grad)
    require(is_constant, name, step_size, "without gradient; differentiate with respect to `t` instead")
    is_right = step_size is None or (isinstance(step_size, int | float | Tensor) and bool(step_size > 0))
    require(is_right, name, step_size, "positive")


def check_state(x0: State, *, has_numbers: bool = True) -> None:
    """Check that a state is made of finite floating-point (or complex) tensors of one dtype on one device.

    Without ``has_numbers`` whether they are finite would take a host synchronisation, and is left open.
    """
    tensors = tensors_of(x0)
    is_state = not isinstance(x0, list) and len(tensors) > 0 and all(isinstance(x, Tensor) for x in tensors)
    require(is_state, "x0", x0, "a tensor or a tuple of tensors")
    for x in tensors:
        require(x.is_floating_point() or x.is_complex(), "x0.dtype", x.dtype, "floating point")
        kinds = [f"{part.dtype} on {part.device}" for part in (tensors[0], x)]
        require(kinds[0] == kinds[1], "x0", kinds, "of one dtype on one device")
        if has_numbers:
            check_finite("x0", x)


def check_finite(name: str, x: Tensor, where: str = "") -> None:
    """Check that the numbers of a tensor are finite; ``where`` follows in the message."""
    is_finite = x.isfinite()
    if not is_finite.all():
        bad, shape = x[~is_finite][0].item(), tuple(x.shape)
        raise ValueError(f"Parameter `{name}` should be finite{where}. Found `{bad}` in a tensor of shape {shape}.")


def check_numbers(t: Any, times: Times | None) -> None:
    """Check output times by their numbers, which the host knows also where a computation is traced."""
    numbers = [] if times is None else times.numbers
    require(len(numbers) >= 2, "t", t, "a tensor or a sequence of at least two floating-point numbers")
    steps = [end - start for start, end in itertools.pairwise(numbers)]
    is_right = all(map(math.isfinite, steps)) and (all(x > 0 for x in steps) or all(x < 0 for x in steps))
    require(is_right, "t", numbers, "finite and strictly increasing or decreasing")


def check_times(t: Tensor | Sequence[float], like: Tensor) -> Tensor:
    """Check output times and return them as a tensor on the device of the state."""
    if not isinstance(t, Tensor):
        try:
            t = torch.tensor(t, dtype=time_dtype(like.device))
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(
                f"Parameter `t` should be a tensor or a sequence of numbers. Found `t = {t!r}`."
            ) from error
    require(t.is_floating_point(), "t.dtype", t.dtype, "floating point")
    is_axis = t.ndim == 1 and len(t) >= 2
    require(is_axis, "t.shape", tuple(t.shape), "that of one dimension with at least two times")
    ahead = t.detach().diff() * (1 if t[-1] > t[0] else -1)
    is_bad = ~((ahead > 0) & ahead.isfinite())
    if is_bad.any():
        i = int(is_bad.nonzero()[0])
        raise ValueError(
            "Parameter `t` should be finite and strictly increasing or decreasing. "
            f"Found `t[{i}] = {digits_of(t[i])}` before `t[{i + 1}] = {digits_of(t[i + 1])}` in {t.dtype}."
        )
    return t.to(like.device, non_blocking=like.device.type == "cuda")  # nothing waits for a handful of numbers


def digits_of(t: Tensor) -> str:
    """A time with the digits that its type holds."""
    return f"{t.item():.{int(-math.log10(torch.finfo(t.dtype).eps))}g}"


def check_tolerances(**tolerances: Any) -> None:
    """Check that tolerances, numbers or tensors or one per tensor of the state, are not negative, complex or NaN."""
    for name, tolerance in tolerances.items():
        for value in tensors_of(tolerance):
            if isinstance(value, complex) or (isinstance(value, Tensor) and value.is_complex()):
                raise ValueError(f"Parameter `{name}` should be real. Found `{name} = {tolerance}`.")
            if value is not None and not torch.as_tensor(value >= 0).all():
                raise ValueError(f"Parameter `{name}` should not be negative. Found `{name} = {tolerance}`.")


def check_derivative(dx: Any, x0: State) -> None:
    """Check that a field returned the structure and shapes of the state; broadcasting would hide it."""
    expected = [tuple(x.shape) for x in tensors_of(x0)]
    is_matching = isinstance(dx, (tuple, list)) == isinstance(x0, tuple)
    found = [tuple(d.shape) if isinstance(d, Tensor) else type(d).__name__ for d in tensors_of(dx)]
    if not is_matching or found != expected:
        raise ValueError(
            f"Parameter `field` should return {'a tuple' if isinstance(x0, tuple) else 'a tensor'} with the "
            f"shapes of the state, {expected}. Found a {type(dx).__name__} with {found}."
        )
    for d, x in zip(tensors_of(dx), tensors_of(x0), strict=True):
        if d.is_complex() and not x.is_complex():
            raise ValueError(f"Parameter `field` should return real derivatives of a real state. Found `{d.dtype}`.")
