r"""Random numbers without a generator: a number is a function of its name.

The name is ``(seed, stream, step, index, lane)``. Whoever asks for a task's numbers gets the same ones,
whatever batch the task is in, whatever was drawn before, on the CPU and on CUDA; so a run can be split over
processes or resumed without any generator state to carry. Each name is hashed by the finaliser of SplitMix64,
in wrapping arithmetic on 64 bits, one stage per part of the name; the lanes of a name are a SplitMix64
sequence started at its hash.

References:
    Steele, Lea, Flood (2014), Fast splittable pseudorandom number generators, OOPSLA, Section 3.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from functools import lru_cache
from numbers import Integral
from typing import TypeVar

import torch
from torch import Tensor

from odeopt.checks import require

# of streams that meta-training never draws from, the same for all meta-seeds, so that their scores compare
VALIDATION_SEED, TUNING_SEED, EVALUATION_SEED = 1_000_003, 2_000_003, 3_000_017
T = TypeVar("T", int, Tensor)
_WORD = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)


def random_bits(indices: Tensor, n_lanes: int, *, seed: int, stream: str, step: int = 0) -> Tensor:
    """Draw 64 random bits per index and lane.

    Args:
        indices: Global task numbers, int64, shape ``(n_tasks,)``; gives the device.
        n_lanes: Numbers per task; lane ``j`` does not depend on it.
        seed: Any integer, taken modulo 2^64.
        stream: Name of what the numbers are for; streams are independent of each other.
        step: Step of a run, for numbers that change from step to step.

    Returns:
        int64, shape ``(n_tasks, n_lanes)``, all 64 bits random (so negative numbers too).

    Raises:
        ValueError: If ``indices`` is not one-dimensional int64.
        TypeError: If ``seed`` or ``step`` is not an integer.
    """
    if not isinstance(indices, Tensor) or indices.dtype != torch.int64 or indices.ndim != 1:
        found = f"{indices.dtype} {tuple(indices.shape)}" if isinstance(indices, Tensor) else repr(indices)
        raise ValueError(f"Parameter `indices` should be a one-dimensional int64 tensor. Found `indices = {found}`.")
    for name, value in (("seed", seed), ("step", step)):
        if not isinstance(value, Integral):
            raise TypeError(f"Parameter `{name}` should be an integer. Found `{name} = {value!r}`.")
    keys = _mix(indices ^ _signed(_host_key(int(seed), stream, int(step))))
    lanes = torch.arange(1, n_lanes + 1, device=indices.device) * _signed(_GOLDEN)
    return _mix(keys.unsqueeze(1) + lanes)


def uniform(
    indices: Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    stream: str,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Draw from the uniform distribution on [0, 1): 24 random bits in float32, 53 in float64.

    Args:
        indices: Global task numbers, int64, shape ``(n_tasks,)``.
        shape: Shape of one task's numbers.
        seed: See :func:`random_bits`.
        stream: See :func:`random_bits`.
        step: See :func:`random_bits`.
        dtype: ``torch.float32`` or ``torch.float64``.

    Returns:
        Shape ``(n_tasks, *shape)``; equal to the bit on every device.

    Raises:
        ValueError: If ``dtype`` is another one.
    """
    check_dtype(dtype)
    n_bits = 24 if dtype == torch.float32 else 53
    bits = random_bits(indices, math.prod(shape), seed=seed, stream=stream, step=step)
    return _unit(bits, n_bits, dtype).reshape(len(indices), *shape)


def normal(
    indices: Tensor,
    shape: Sequence[int],
    *,
    seed: int,
    stream: str,
    step: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Draw from the standard normal distribution, by Box and Muller's transform of 53-bit uniforms.

    .. math:: (z_1, z_2) = \sqrt{-2 \ln u_1}\,(\cos 2\pi u_2, \sin 2\pi u_2), \qquad u_1 \in (0, 1]

    The transform runs in float64 whatever the ``dtype``, so that float32 numbers agree across devices up to a
    rare difference in the last bit (their logarithms and cosines are rounded differently).

    Args:
        indices: Global task numbers, int64, shape ``(n_tasks,)``.
        shape: Shape of one task's numbers.
        seed: See :func:`random_bits`.
        stream: See :func:`random_bits`.
        step: See :func:`random_bits`.
        dtype: ``torch.float32`` or ``torch.float64``.

    Returns:
        Shape ``(n_tasks, *shape)``.

    Raises:
        ValueError: If ``dtype`` is another one.
    """
    check_dtype(dtype)
    n = math.prod(shape)
    n_pairs = (n + 1) // 2
    bits = random_bits(indices, 2 * n_pairs, seed=seed, stream=stream, step=step)
    u = _unit(bits, 53, torch.float64).unflatten(1, (n_pairs, 2))
    radius = (-2 * (u[..., 0] + 2.0**-53).log()).sqrt()
    angle = 2 * math.pi * u[..., 1]
    z = torch.stack((radius * angle.cos(), radius * angle.sin()), dim=-1).flatten(1)
    return z[:, :n].reshape(len(indices), *shape).to(dtype)


def integers(indices: Tensor, shape: Sequence[int], high: int, *, seed: int, stream: str, step: int = 0) -> Tensor:
    """Draw integers from 0 to ``high - 1``, equally likely up to a relative ``high / 2^32``.

    Args:
        indices: Global task numbers, int64, shape ``(n_tasks,)``.
        shape: Shape of one task's numbers.
        high: Number of values, from 1 to 2^31.
        seed: See :func:`random_bits`.
        stream: See :func:`random_bits`.
        step: See :func:`random_bits`.

    Returns:
        int64, shape ``(n_tasks, *shape)``.

    Raises:
        ValueError: If ``high`` is out of range.
    """
    require(1 <= high <= 1 << 31, "high", high, "between 1 and 2^31")
    bits = random_bits(indices, math.prod(shape), seed=seed, stream=stream, step=step)
    # Lemire's scaling of the upper word: a product below 2^63, where % would cost a division per number.
    return (_shift(bits, 32) * high >> 32).reshape(len(indices), *shape)


def permutation(n: int, *, seed: int, stream: str) -> Tensor:
    """Draw a permutation of ``0 ... n - 1``, int64, shape ``(n,)``, on the CPU."""
    bits = random_bits(torch.zeros(1, dtype=torch.int64, device="cpu"), n, seed=seed, stream=stream)
    return bits[0].argsort(stable=True)


def check_dtype(dtype: torch.dtype) -> None:
    """Raise a ValueError unless ``dtype`` is float32 or float64."""
    require(dtype in (torch.float32, torch.float64), "dtype", dtype, "torch.float32 or torch.float64")


@lru_cache(maxsize=4096)
def _host_key(seed: int, stream: str, step: int) -> int:
    """Hash the parts of the name that a whole batch shares."""
    number = int.from_bytes(hashlib.blake2b(stream.encode(), digest_size=8).digest(), "little")
    key = 0
    for part in (seed, number, step):
        # The constant keeps the fixed point of the mixing, 0, out of the way of the usual seed, 0.
        key = _mix((key ^ part) + _GOLDEN) & _WORD
    return key


def _mix(z: T) -> T:
    """SplitMix64's finaliser, a bijection of 64-bit words.

    Products of int64 tensors wrap; those of Python numbers grow, but no bit above the word finds its way down into it.
    """
    z = (z ^ _shift(z, 30)) * _signed(_MULTIPLIERS[0])
    z = (z ^ _shift(z, 27)) * _signed(_MULTIPLIERS[1])
    return z ^ _shift(z, 31)


def _shift(z: T, n: int) -> T:
    """Logical shift of a 64-bit word to the right; ``>>`` drags the sign along, or what is above the word."""
    return (z >> n) & ((1 << (64 - n)) - 1)


def _signed(z: int) -> int:
    """The int64 with the bits of an unsigned word."""
    return z - (1 << 64) if z >> 63 else z


def _unit(bits: Tensor, n_bits: int, dtype: torch.dtype) -> Tensor:
    """The upper bits as a number in [0, 1), exactly."""
    return _shift(bits, 64 - n_bits).to(dtype) * 2.0**-n_bits
