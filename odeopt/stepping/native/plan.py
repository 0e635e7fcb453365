"""Plan of a native step: all tensors of an optimizer, by their addresses."""

from __future__ import annotations

import ctypes
import itertools
import math
import os
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from odeopt.modes import has_values, is_watched
from odeopt.rules.base import UpdateRule
from odeopt.rules.port_hamiltonian import PortHamiltonianUpdate
from odeopt.rules.port_hamiltonian.coefficients import Outputs
from odeopt.stepping.buckets import Bucket
from odeopt.stepping.checks import extent_of, overlapping, rule_obstacle
from odeopt.stepping.loops import StepOptions
from odeopt.stepping.native.library import Group, Options, Rule, TensorState, library

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
# psi of a solver (see odeopt.ode.linear_step) as a polynomial of the friction D = -z. For the exponential solver it is
# the best one on [0, 2], where D lies: its error is below 2.5e-8, a unit of rounding, without cases to tell apart.
_PSI = {
    "euler": (),
    "midpoint": (1 / 2,),
    "heun2": (1 / 2,),
    "heun3": (1 / 2, -1 / 6),
    "rk4": (1 / 2, -1 / 6, 1 / 24),
    "exponential": (1 / 2, -0.166665971, 0.0416596718, -0.00830979832, 0.00135202205, -1.68384824e-4, 1.18975959e-5),
}
_PROCESS = os.getpid()
# Coordinates for each thread, at least: waking one takes as long as stepping a few thousand.
_PER_THREAD = 2**15
# The shorter side of the matrices whose products are taken in C, at most. They take half as long as torch's on one
# thread, in bfloat16 less; but one matrix is stepped on one thread, and each thread needs room for the largest.
_LARGEST_SIDE, _LARGEST_SIDE_IN_BFLOAT16 = 1024, 2048


def native_obstacle(rule: UpdateRule, bucket: Bucket) -> str | None:
    """Return why a bucket cannot be stepped natively, as a half sentence; None where it can."""
    found = library()
    if isinstance(found, str):
        return found
    if obstacle := rule_obstacle(rule):
        return obstacle
    if any(weight.dtype != torch.float32 for weight in rule.coefficient_network.parameters()):
        return "the weights of the rule are not float32"
    if bucket.is_whole:
        if rule.matrix_polynomial == "learned":
            return "products of learned polynomials are left to torch"
        in_bfloat16 = rule.matrix_products == "bfloat16"
        if _short_side(bucket.shapes[0]) > (_LARGEST_SIDE_IN_BFLOAT16 if in_bfloat16 else _LARGEST_SIDE):
            return "products of large matrices are left to torch"
        if in_bfloat16 and not found.has_bfloat16:
            return "there are no units for products in bfloat16 (AMX)"
    is_on_host = bucket.is_on_host and has_values(bucket.n_skipped)
    if bucket.is_shared or not is_on_host or any(type(x) not in (Tensor, nn.Parameter) for x in bucket.params):
        return "the parameters are not plain tensors on a CPU"
    if bucket.param_dtype not in _TYPES or bucket.state.p[0].dtype not in _TYPES:
        return "parameters or state are neither float32 nor bfloat16"
    return None


def _short_side(shape: torch.Size) -> int:
    """Shorter side of a tensor as a matrix (out, rest)."""
    return min(shape[0], shape[1:].numel())


def _sharing(params: list[Tensor], numbers: list[int]) -> list[int]:
    """Numbers of those parameters that share a byte with others, one of all being copied; extents may interleave.

    The parameters come in the order of their addresses.
    """
    if len(params) == 1 or all(param.is_contiguous() for param in params):
        return []
    start, end = params[0].data_ptr(), max(sum(extent_of(param)) for param in params)
    users, places = torch.zeros(end - start, dtype=torch.int8, device="cpu"), []
    for param in params:
        shape, stride = (*param.shape, param.itemsize), (*(param.itemsize * n for n in param.stride()), 1)
        places.append(users.as_strided(shape, stride, param.data_ptr() - start).add_(1))
    return [number for number, place in zip(numbers, places, strict=True) if (place > 1).any()]


class NativeStep:
    """Step of all parameters under one rule, in place where they lie.

    A gradient or parameter that is not contiguous is copied. The result does not depend on the number of threads.
    Parameters that overlap in memory are stepped one after the other, or left to the eager step if one is copied.

    Args:
        rule: The rule, which :func:`native_obstacle` allows beside each of the buckets.
        buckets: Parameters and their state.
        groups: Number of the group of each bucket.
    """

    def __init__(self, rule: PortHamiltonianUpdate, buckets: Sequence[Bucket], groups: Sequence[int]) -> None:
        self.buckets, self._rule = list(buckets), _constants(rule)
        self._groups = (Group * (1 + max(groups)))()
        self.params = [param for bucket in buckets for param in bucket.params]
        self._sizes, self._dtypes = zip(*((param.numel(), param.dtype) for param in self.params), strict=True)
        self._numbers = [number for number, bucket in enumerate(buckets) for _ in bucket.params]
        members = zip(buckets, groups, strict=True)
        tensors = [(bucket, group, *each) for bucket, group in members for each in enumerate(bucket.shapes)]
        sizes = [bucket.n_blocks * shape.numel() for bucket, *_, shape in tensors]
        # in coordinates: orthogonalising a matrix takes that much longer than stepping its coordinates
        self._work = [
            n * (1 + _short_side(shape) // 32 if bucket.is_whole else 1)
            for n, (bucket, *_, shape) in zip(sizes, tensors, strict=True)
        ]
        self._all_work = sum(self._work)
        self._n_bytes = [n * bucket.param_dtype.itemsize for n, (bucket, *_) in zip(sizes, tensors, strict=True)]
        # of the tensors of each parameter, in bytes
        totals = [n * dtype.itemsize for n, dtype in zip(self._sizes, self._dtypes, strict=True)]
        counts = [n for bucket in buckets for n in bucket.counts]
        self._offsets = [range(0, total, total // n) for total, n in zip(totals, counts, strict=True)]
        self._tensors, self._options = (TensorState * len(tensors))(), Options()
        self._pointers = ctypes.c_void_p * len(tensors)
        self._disjoint_at: list[int | None] = []
        self._entangled_at: tuple[list[int], set[int]] = [], set()
        self._lock = threading.Lock()
        zipped = zip(self._tensors, tensors, sizes, self._work, strict=True)
        for tensor, (bucket, group, index, shape), n, work in zipped:
            state = bucket.flat_views(index)
            for name in ("p", "scale", "slow_scale", "step", "memory"):
                setattr(tensor, name, state[name].data_ptr())
            normalization = rule.matrix_normalization if bucket.is_whole else rule.normalization
            if bucket.is_whole:
                tensor.n_rows, tensor.n_blocks = bucket.n_blocks * shape[0], bucket.n_blocks
                tensor.operator_scale, tensor.is_transposed = rule.operator_scale(shape), rule.steps_transposed
            if normalization == "coordinate":
                tensor.second_moment = state["second_moment"].data_ptr()
            tensor.features = bucket.rows.features[index].data_ptr()
            tensor.n_skipped = bucket.n_skipped[index].data_ptr()
            tensor.n, tensor.mode_stride, tensor.work = n, state["p"].stride(0), work
            tensor.param_type, tensor.state_type = _TYPES[bucket.param_dtype], _TYPES[state["p"].dtype]
            tensor.skips_zeros, tensor.group = bucket.is_stack, group

    def step(self, groups: Sequence[StepOptions]) -> tuple[int, Sequence[int]]:
        """Step every parameter that has a finite gradient, and count those whose gradient is not finite.

        Buckets are left to the eager step where one of their gradients is no plain tensor in the dtype and of the size
        of its parameter, and all are where something has to see each operation (modes of dispatch, ``torch.func``).

        Args:
            groups: Options of each group, as numbers.

        Returns:
            Number of gradients that were not finite; and numbers of the buckets that are left, which have not moved.

        Raises:
            MemoryError: If there is none for a few numbers per tensor.
        """
        if is_watched():
            return 0, range(len(self.buckets))
        grads, values, copies, odd = [], [], [], set()
        for param, n, dtype in zip(self.params, self._sizes, self._dtypes, strict=True):
            grad, value = param.grad, param
            if grad is None:
                value = None
            elif type(grad) is not Tensor or grad.dtype is not dtype or not n == grad.numel() == param.numel():
                odd.add(self._numbers[len(grads)])
            else:
                if not grad.is_contiguous() or grad.is_neg():
                    grad = grad.resolve_neg().contiguous()
                if not param.is_contiguous() or param.is_neg():
                    value = param.detach().resolve_neg().contiguous()
                    copies.append((len(values), value))
            grads.append(grad)
            values.append(value)
        if copies:
            odd |= self._entangled()
        if odd:
            grads, values = ([None if n in odd else x for n, x in zip(self._numbers, some, strict=True)]
                             for some in (grads, values))  # fmt: skip
        options, found = self._options, library()
        with self._lock:
            for group, (lr, decay, progress, maximize) in zip(self._groups, groups, strict=True):
                group.lr, group.keep, group.maximize = lr, 1 - lr * (decay or 0.0), maximize
                group.knows_progress, group.progress = progress is not None, progress or 0.0
            options.instructions = found.instructions
            # the threads of torch do not survive a fork
            options.parallel = found.parallel if os.getpid() == _PROCESS else None
            pointers = self._pointers_to(values)
            options.n_threads = self._n_threads(pointers)
            arrays = self._pointers(*self._pointers_to(grads)), self._pointers(*pointers)
            n_skipped = found.step(self._rule, self._tensors, len(pointers), *arrays, self._groups, options)
        if n_skipped < 0:
            raise MemoryError("There is no memory for the sums of a step.")
        for index, value in copies:
            if values[index] is not None:
                self.params[index].copy_(value)
        # autograd has to know that tensors which it keeps have changed
        torch.autograd.graph.increment_version([x for x in values if x is not None])
        return n_skipped, sorted(odd)

    def _entangled(self) -> set[int]:
        """Buckets of parameters that share memory, one of which is copied, and would undo the step of another."""
        addresses = [param.data_ptr() for param in self.params]
        if addresses != self._entangled_at[0]:
            clusters: list[list[int]] = []
            reached = 0
            for start, size, number in sorted((*extent_of(x), number) for number, x in enumerate(self.params)):
                if start >= reached:
                    clusters.append([])
                clusters[-1].append(number)
                reached = max(reached, start + size)
            found = {number for cluster in clusters for number in _sharing([self.params[k] for k in cluster], cluster)}
            self._entangled_at = addresses, {self._numbers[number] for number in found}
        return self._entangled_at[1]

    def _pointers_to(self, values: list[Tensor | None]) -> list[int | None]:
        """Addresses of all tensors, from the parameters or their gradients; None for those without a gradient."""
        if len(self._offsets) == len(self._tensors):  # no parameter is a stack
            return [None if x is None else x.data_ptr() for x in values]
        pointers = []
        for x, offsets in zip(values, self._offsets, strict=True):
            at = None if x is None else x.data_ptr()
            pointers += [None if at is None else at + offset for offset in offsets]
        return pointers

    def _n_threads(self, pointers: list[int | None]) -> int:
        """Threads that are worth beginning; one where parameters overlap, so that no two write to the same place."""
        if self._all_work < 2 * _PER_THREAD:  # too little, whichever tensors have a gradient
            return 1
        work = sum(n for n, pointer in zip(self._work, pointers, strict=True) if pointer is not None)
        n_threads, n_useful = torch.get_num_threads(), work // _PER_THREAD
        if n_useful <= 1 or not self._options.parallel:  # a smaller team of OpenMP would end the threads left out
            n_threads = min(n_threads, n_useful)
        if n_threads <= 1 or pointers == self._disjoint_at:
            return max(1, n_threads)
        if overlapping((at, n) for at, n in zip(pointers, self._n_bytes, strict=True) if at is not None):
            return 1
        self._disjoint_at = pointers
        return n_threads


@_disable_current_modes()
def _constants(rule: PortHamiltonianUpdate) -> Rule:
    """Constants of a rule; what is not computed here has the name that the rule itself gives it."""
    layers = [layer for layer in rule.coefficient_network if isinstance(layer, nn.Linear)]
    weights = torch.cat([x.detach().flatten() for layer in layers for x in (layer.weight.mT, layer.bias)])
    numbers = {"weights": weights, "start": rule.start.float(), "time_scales": rule.time_scales.float()}
    widths = [layers[0].in_features, *(layer.out_features for layer in layers)]
    numbers["widths"] = torch.tensor(widths, dtype=torch.int32, device="cpu")
    factors = rule.spectral_energy.coefficients if rule.is_spectral else ()
    numbers["factors"] = torch.as_tensor(factors, dtype=torch.float64, device="cpu").detach()
    numbers |= {"is_relativistic": rule.is_relativistic_mode.int(), "is_spectral": rule.is_spectral_mode.int()}
    numbers = {name: x.contiguous() for name, x in numbers.items()}
    at = dict(zip(Outputs._fields, itertools.accumulate((0, *rule.output_sizes)), strict=False))
    computed = {
        **{name: x.data_ptr() for name, x in numbers.items()},
        "psi": (ctypes.c_float * 7)(*_PSI[rule.solver]),
        "decays": (ctypes.c_float * 2)(*rule.decays.tolist()),
        "initial_matrix_kappa": rule.initial_matrix_kappa * rule.depth_factor * rule.matrix_interval,
        "initial_decay": rule.initial_decay / rule.depth_factor,
        "log_floor": math.log2(rule.ratio_floor) if rule.ratio_floor > 0 else -math.inf,
        "in_bfloat16": rule.matrix_products == "bfloat16",
        "n_layers": len(layers),
        "n_modes": rule.modes,
        "n_time_scales": len(rule.time_scales),
        "n_moved": rule.memory,
        "at_kappa": at["log_kappa"],
        "at_memory": at["memory_moves"],
        "at_exponent": at["log_exponent"] if rule.schedule == "power" else -1,
        "at_matrix": at["log_matrix_kappa"] if rule.is_spectral else -1,
        "n_spectral": len(rule.spectral_modes),
        "n_factors": len(numbers["factors"]),
        "n_psi": len(_PSI[rule.solver]),
    }
    others = {name: getattr(rule, name) for name, _ in Rule._fields_ if name not in computed}
    constants = Rule(**computed, **others)
    constants.numbers = numbers  # which own the memory that the constants point to
    return constants
