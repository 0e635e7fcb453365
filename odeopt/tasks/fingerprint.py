"""Digests of content: two values that decide the same result have the same one, in every process."""

from __future__ import annotations

import dataclasses
import enum
import functools
import hashlib
import os
import types
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

_PLAIN = (bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, range, slice, types.NoneType, type(...))
_MODULES_OWN = set(vars(nn.Module())) - {"training", "_parameters", "_buffers", "_modules"}  # hooks and the like
_RTOL = 1e-3  # of losses, between devices whose products may have eleven bits


def digest(value: Any) -> str:
    """Hash what a value holds.

    Tensors and arrays count by dtype, shape and elements; containers by their items; functions by their name and by
    what they hold (default arguments, variables that they enclose, bound arguments); modules, data sets, dataclasses,
    tasks and other callables by their class and ``__getstate__()``. A parameter that requires a gradient counts by
    dtype and shape: its value is where something starts. Devices and paths do not count: they say where data lie, not
    what they are. Neither does the code of a function; any other object counts by its class.

    Args:
        value: Anything.

    Returns:
        A SHA-256, in hexadecimal digits.
    """
    return _hash(value, {}).hex()


def are_alike(fingerprint: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare two results of :meth:`Task.fingerprint`, whose losses may differ by rounding."""
    a, b = (torch.tensor(each["losses"], dtype=torch.float64) for each in (fingerprint, other))
    if fingerprint["content"] != other["content"] or a.shape != b.shape:
        return False
    # saturated losses are differences of larger numbers, so that zero is one up to the rounding of the others
    largest = a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
    return torch.allclose(a, b, rtol=_RTOL, atol=1e-6 * largest, equal_nan=True)


def _hash(value: Any, seen: dict[int, tuple[Any, bytes]]) -> bytes:
    if id(value) not in seen:
        seen[id(value)] = value, b"a cycle"  # the value too: what is kept alive shares its id with nothing else
        kind, content = _content(value)
        state = hashlib.sha256(kind.encode() + b"\0")
        if isinstance(content, bytes):
            state.update(content)
        else:
            hashes = [_hash(item, seen) for item in content]
            is_ordered = not isinstance(value, Mapping | set | frozenset)
            state.update(b"".join(hashes if is_ordered else sorted(hashes)))
        seen[id(value)] = value, state.digest()
    return seen[id(value)][1]


def _content(value: Any) -> tuple[str, bytes | Iterable[Any]]:
    """The kind of a value, and its bytes or its parts."""
    kind = type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if isinstance(value, _PLAIN):
        return name, repr(value).encode()
    if isinstance(value, Tensor):
        return "tensor", _bytes(value)
    if hasattr(value, "__array_interface__"):
        return f"{value.dtype} {value.shape}", value.tolist() if value.dtype.hasobject else value.tobytes()
    if isinstance(value, Mapping):
        return name, [(key, item) for key, item in value.items()]
    if isinstance(value, Sequence | set | frozenset):
        return name, value
    if isinstance(value, functools.partial):
        return name, (value.func, value.args, value.keywords)
    if isinstance(value, types.MethodType):
        return name, (value.__func__, value.__self__)
    if isinstance(value, type | types.FunctionType | types.BuiltinFunctionType):
        held = ()
        if isinstance(value, types.FunctionType):
            held = value.__defaults__, value.__kwdefaults__, [_cell(cell) for cell in value.__closure__ or ()]
        return f"{value.__module__}.{value.__qualname__}", held
    if isinstance(value, nn.Module):
        return name, [{key: item for key, item in value.__getstate__().items() if key not in _MODULES_OWN}]
    has_content = callable(value) or dataclasses.is_dataclass(value) or isinstance(value, Dataset)
    if (has_content or hasattr(value, "fingerprint")) and not isinstance(value, os.PathLike):
        return name, [value.__getstate__()]
    return name, b""


def _bytes(value: Tensor) -> bytes:
    header = f"{value.dtype} {tuple(value.shape)}".encode()
    if value.is_meta or (isinstance(value, nn.Parameter) and value.requires_grad):
        return header
    return header + elements(value)


def elements(value: Tensor) -> bytes:
    """Bytes of the elements of a tensor, in their order, whatever its layout and its device."""
    value = value.detach().to_dense().resolve_conj().resolve_neg().cpu()
    return value.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def _cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not bound yet
        return None
