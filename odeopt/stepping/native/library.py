"""The compiled library: where it is, the structures that it takes, and whether it can be used here."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

_VERSION = 12  # of the structures; step.c has the same
_FOLDER, _NAME = Path(__file__).parent, "step.native.dll" if os.name == "nt" else "step.native.so"  # as in setup.py
_INSTRUCTIONS = ("baseline instructions", "AVX2", "AVX-512")


class Rule(ctypes.Structure):
    """Constants of a rule, as step.c declares them."""

    _fields_ = (
        *((name, c_void_p) for name in ("weights", "start", "time_scales", "widths", "is_relativistic", "is_spectral")),
        ("factors", c_void_p),
        ("speed_limit", c_double),
        ("psi", c_float * 7),
        ("decays", c_float * 2),
        *((name, c_float) for name in ("initial_kappa", "horizon_power", "log_floor")),
        *((name, c_float) for name in ("initial_matrix_kappa", "initial_lookahead", "initial_decay")),
        *((name, c_float) for name in ("initial_coherence", "decay_growth", "decay_onset", "decay_horizon")),
        *((name, c_float) for name in ("alignment_rate", "alignment_horizon", "trust_ratio", "row_power")),
        *((name, c_int32) for name in ("n_layers", "n_modes", "n_gain", "n_friction", "n_time_scales")),
        *((name, c_int32) for name in ("n_memory", "n_moved")),
        *((name, c_int32) for name in ("at_kappa", "at_memory", "at_exponent", "at_matrix")),
        *((name, c_int32) for name in ("n_spectral", "matrix_interval")),
        *((name, c_int32) for name in ("n_factors", "n_psi", "coordinatewise", "uses_progress", "in_bfloat16")),
    )


class TensorState(ctypes.Structure):
    """Where the state of one tensor lies, as step.c declares it."""

    _fields_ = (
        *((name, c_void_p) for name in ("p", "second_moment", "scale", "slow_scale", "step", "memory")),
        *((name, c_void_p) for name in ("features", "n_skipped")),
        *((name, c_int64) for name in ("n", "mode_stride", "work", "n_rows", "n_blocks")),
        ("operator_scale", c_float),
        *((name, c_int32) for name in ("param_type", "state_type", "is_transposed", "skips_zeros", "group")),
    )


class Group(ctypes.Structure):
    """Options of a group of tensors, as step.c declares them."""

    _fields_ = (
        *((name, c_float) for name in ("lr", "keep", "progress")),
        *((name, c_int32) for name in ("knows_progress", "maximize")),
    )


class Options(ctypes.Structure):
    """Options of a step, as step.c declares them."""

    _fields_ = (
        *((name, c_int32) for name in ("n_threads", "instructions")),
        ("parallel", c_void_p),
    )


class Library(NamedTuple):
    """Functions of the library, and the instruction set that they use."""

    step: ctypes._CFuncPtr
    functions: ctypes._CFuncPtr
    instructions: int
    has_bfloat16: bool  # whether it takes products of matrices in bfloat16
    parallel: int | None  # address of GOMP_parallel, see _parallel


def native_status() -> str:
    """Tell whether the compiled step of the port-Hamiltonian rules is used on a CPU, and why not if it is not.

    Returns:
        ``"native (...)"`` with the instruction set, or ``"eager: ..."`` with the reason.

    Example:
        >>> native_status().split()[0] in ("native", "eager:")
        True
    """
    found = library()
    return f"eager: {found}" if isinstance(found, str) else f"native ({_INSTRUCTIONS[found.instructions]})"


@cache
def library() -> Library | str:
    """Load the library, once, or say why it cannot be used."""
    file = _FOLDER / _NAME
    if not file.is_file():
        return "the step was not compiled when odeopt was installed (no C compiler?); reinstall it where there is one"
    try:
        loaded = ctypes.CDLL(str(file))
        layout = loaded.odeopt_layout
        layout.restype = c_int64
        sizes = map(ctypes.sizeof, (Rule, TensorState, Group, Options))
        if layout() != _VERSION + sum(1000**k * size for k, size in enumerate(sizes, 1)):
            return f"{file.name} belongs to another version of odeopt; reinstall it"
        step, functions = loaded.odeopt_step, loaded.odeopt_functions
        instructions, has_bfloat16 = loaded.odeopt_instructions, loaded.odeopt_has_bfloat16
    except (OSError, AttributeError) as error:
        return f"{file.name} cannot be loaded ({error}); reinstall odeopt"
    step.restype = c_int64
    step.argtypes = POINTER(Rule), POINTER(TensorState), c_int64, c_void_p, c_void_p, POINTER(Group), POINTER(Options)
    functions.restype, functions.argtypes = None, (c_void_p, c_int64, c_int, c_int)
    return Library(step, functions, instructions(), bool(has_bfloat16()), _parallel())


def _parallel() -> int | None:
    """Find how the OpenMP runtime that torch runs on begins work on its threads, where there is one with such a call.

    Threads of another kind would wait for processors on which those of torch still spin.
    """
    try:
        found = ctypes.CDLL(torch._C.__file__).GOMP_parallel  # among what torch's library depends on
    except (OSError, AttributeError):
        return None
    return ctypes.cast(found, c_void_p).value
