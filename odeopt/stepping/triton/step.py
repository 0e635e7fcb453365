"""Step of a bucket by kernels: what they are launched with, and where they can be."""

from __future__ import annotations

import math
import os
from functools import cache
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from odeopt.modes import is_watched
from odeopt.ode.steps import TABLEAUX
from odeopt.rules.base import UpdateRule
from odeopt.rules.port_hamiltonian import PortHamiltonianUpdate
from odeopt.stepping.buckets import Bucket
from odeopt.stepping.checks import rule_obstacle
from odeopt.stepping.loops import StepOptions

_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK, _SHORT_BLOCK = 1024, 16  # coordinates of a program, at most and at least
_ROWS = 128  # rows that a program adds up at a time


def triton_obstacle(rule: UpdateRule, bucket: Bucket) -> str | None:
    """Return why a bucket cannot be stepped by kernels in Triton, as a half sentence; None where it can."""
    # under Triton's interpreter, which computes without a device, tensors on a CPU are taken as well
    is_interpreted = os.environ.get("TRITON_INTERPRET") == "1" and bucket.device.type == "cpu"
    if not bucket.has_values or not (bucket.device.type == "cuda" or is_interpreted):
        return "the parameters are not on CUDA"
    if obstacle := rule_obstacle(rule):
        return obstacle
    if bucket.is_whole:
        return "matrices are stepped by their singular values"
    if bucket.param_dtype not in _TYPES or bucket.state.p.dtype not in _TYPES:
        return "parameters or state are neither float32 nor of half precision"
    found = _kernels_on(bucket.device)
    return found if isinstance(found, str) else None


@cache
@_disable_current_modes()
def _kernels_on(device: torch.device) -> ModuleType | str:
    """Import the kernels and launch a small one, once per device; say what is missing where that fails."""
    try:
        from odeopt.stepping.triton import kernels

        partial, offsets = torch.ones((3, 1), device=device), torch.tensor([0, 3], device=device)
        _launch(kernels.totals, 1, partial, offsets, torch.empty_like(partial[0]), N_SUMS=1, WIDTH=1, BLOCK=2)
    except Exception as error:  # there may be no Triton, no compiler for its launchers, or a device it does not know
        return f"Triton does not work here ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"
    return kernels


class TritonKernels:
    """Sums and step of all coordinates of a bucket, in kernels that nothing waits for.

    What is done once per tensor stays with the rule, in tensor operations. As many calls as of the bucket itself are
    made on the host, whatever the sizes, and nothing is read there: a CUDA graph can capture them.

    Args:
        rule: The rule, which :func:`triton_obstacle` allows beside the bucket.
        bucket: Parameters and their state.
    """

    def __init__(self, rule: PortHamiltonianUpdate, bucket: Bucket) -> None:
        self.bucket, self._kernels = bucket, _kernels_on(bucket.device)
        n_rows, self._n_columns = bucket.shape
        self._block = min(_BLOCK, max(_SHORT_BLOCK, 1 << (self._n_columns - 1).bit_length()))
        self._n_blocks = n_rows * -(-self._n_columns // self._block)
        tensor = bucket.rows.tensor
        self._tensor = torch.zeros(n_rows, dtype=torch.int64, device=bucket.device) if tensor is None else tensor
        kinds = {"coordinate": self._kernels.BY_COORDINATE, "tensor": self._kernels.BY_TENSOR}
        self._kind = self._kernels.BY_HISTORY if rule.coordinatewise else kinds[rule.normalization]
        self._modes = {"mode_stride": bucket.state.p.stride(1), "MODES": rule.modes, "KIND": self._kind}
        self._constants = {
            "speed_limit": rule.speed_limit,
            "MEMORY": rule.n_memory,
            "N_GAIN": rule.n_gain,
            "N_FRICTION": rule.n_friction,
            "LOG_FLOOR": math.log(rule.ratio_floor) if rule.ratio_floor > 0 else None,
            # an explicit method of as many stages as its order is a polynomial of that degree
            "STAGES": 0 if rule.solver == "exponential" else len(TABLEAUX[rule.solver].b),
            "IS_RELATIVISTIC": sum(1 << k for k, name in enumerate(rule.kinetic) if name == "relativistic"),
        }

    def can_take(self, grad: Tensor, theta: Tensor) -> bool:
        """Return True for tensors, as :meth:`Bucket.load` gives them, that lie in memory which kernels can read.

        They are torch's own, outside of all that would have to see each operation on them.
        """
        return not is_watched() and all(type(x) in (Tensor, nn.Parameter) for x in (grad, theta))

    def sums(self, stage: int, grad: Tensor, theta: Tensor, shared: NamedTuple | None, options: StepOptions) -> Tensor:
        """Sums of one stage for each tensor, shape ``(n_tensors, k)``; in the first one a count of what is not finite.

        The result does not depend on the order in which blocks are done.
        """
        state, features = self.bucket.state, self.bucket.rows.features
        if stage == 0:
            # coordinatewise there is nothing to add up but the count
            n_sums = 1 if self._kind == self._kernels.BY_HISTORY else 2
            out = features.new_empty((self._n_blocks, n_sums))  # in float32, whatever the default is
            arguments = _plain(grad), self._tensor, features, self._n_columns, out
            self._launch(self._kernels.magnitudes, *arguments, N_FEATURES=features.shape[1], N_SUMS=n_sums)
            return self._total(out)
        out = features.new_empty((self._n_blocks, 3 + 2 * self._modes["MODES"]))
        numbers = torch.cat((shared.weight, shared.divisor, shared.carried), dim=-1)
        self._launch(
            self._kernels.statistics,
            *(_plain(grad), theta, state.p, state.second_moment, self._tensor, numbers, self._n_columns),
            out=out,
            N_NUMBERS=numbers.shape[1],
            MAXIMIZE=options.maximize,
            **self._modes,
        )
        return self._total(out)

    def move(self, grad: Tensor, theta: Tensor, shared: NamedTuple, moves: Tensor, options: StepOptions) -> None:
        """Step parameters and state in place, of the tensors for which ``moves``, bool, ``(n_tensors, 1)``, is True."""
        state, kept = self.bucket.state, torch.ones_like(shared.kappa)
        if options.decay is not None:
            kept = kept - options.lr * options.decay
        rate = options.lr * shared.kappa
        numbers = (shared.weight, shared.divisor, shared.carried, shared.log_rms, rate, kept, moves, *shared.kept)
        numbers = torch.cat((*numbers, shared.per_mode), dim=-1)
        self._launch(
            self._kernels.advance,
            *(_plain(grad), theta, state.p, state.second_moment),
            *(state.scale, state.slow_scale, state.step, state.memory, self._tensor, numbers, self._n_columns),
            N_NUMBERS=numbers.shape[1],
            MAXIMIZE=options.maximize,
            **self._modes,
            **self._constants,
        )
        # autograd has to know that tensors which it keeps have changed
        torch.autograd.graph.increment_version(theta)

    def _launch(self, kernel, *arguments: Tensor | int, **options: object) -> None:
        _launch(kernel, self._n_blocks, *arguments, BLOCK=self._block, **options)

    def _total(self, partial: Tensor) -> Tensor:
        """Sums of the blocks of each tensor; a row of several tensors is one block."""
        offsets, n_sums = self.bucket.rows.offsets, partial.shape[1]
        if offsets is None:
            return partial.sum(0, keepdim=True)
        out = partial.new_empty((len(offsets) - 1, n_sums))
        width = 1 << (n_sums - 1).bit_length()
        _launch(self._kernels.totals, len(out), partial, offsets, out, N_SUMS=n_sums, WIDTH=width, BLOCK=_ROWS)
        return out


def _launch(kernel, n_programs: int, first: Tensor, *arguments: Tensor | int, **options: object) -> None:
    """Launch a kernel on the device of its first argument."""
    with torch.cuda.device_of(first):
        # said, because Triton warns that its default will change
        kernel[(n_programs,)](first, *arguments, **options, enable_fp_fusion=True)


def _plain(grad: Tensor) -> Tensor:
    """The gradient as it lies in memory: without strides, and without a sign that only a view knows of."""
    return grad.resolve_neg().contiguous()
