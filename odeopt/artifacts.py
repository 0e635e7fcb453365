"""Trained rules as files: one safetensors file each, checked field by field when it is loaded."""

from __future__ import annotations

import hashlib
import importlib.resources
import inspect
import itertools
import json
import os
import tempfile
from collections.abc import Mapping
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from odeopt._version import __version__
from odeopt.checks import is_integer, require, require_flags, suggestion
from odeopt.files import replaced
from odeopt.modes import has_values
from odeopt.rules.base import UpdateRule, adopt_weights, built

FORMAT = "odeopt-rule"
FORMAT_VERSION = 1

# the bare names of these stand for the MNIST rules
_ALIASES = {"lstm": "lstm-mnist", "hamiltonian": "hamiltonian-mnist"}


def save(
    rule: UpdateRule, path: str | os.PathLike[str], *, trained_for: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Write a rule to one file, all of it or nothing.

    Args:
        rule: The rule; its class must be importable under its name and rebuild from ``rule.config``.
        path: The file, by convention ``NAME.safetensors``.
        trained_for: Account of the training: ``horizon``, a number of steps, ``task``, a name or a
            dictionary that describes the distribution, and anything else that JSON can hold.
        overwrite: Whether an existing file may be replaced.

    Raises:
        FileExistsError: If the file exists and ``overwrite`` is False.
        ValueError: If ``trained_for`` is incomplete, or the file would not load again as the same rule.
    """
    require_flags(overwrite=overwrite)
    path = Path(path)
    require(path.parent.is_dir(), "path", str(path), "in a folder that exists")
    require(not path.is_dir(), "path", str(path), "a file, not a folder")
    if path.exists() and not overwrite:
        raise FileExistsError(f"Parameter `path` should be a new file, or `overwrite` be True. Found `path = {path}`.")
    with replaced(path) as temporary:
        _write(rule, path, temporary, trained_for)


def check_can_be_saved(rule: UpdateRule, path: str | os.PathLike[str], *, trained_for: Mapping[str, Any]) -> None:
    """Raise what :func:`save` would raise of a rule, and write nothing to ``path``: before a training, say."""
    with tempfile.TemporaryDirectory() as folder:
        _write(rule, Path(path), Path(folder, "rule.safetensors"), trained_for)


def _fields(rule_class: str, config: Mapping[str, Any], trained_for: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of a file but for the checksum; each is JSON in a metadata string, which any safetensors reader shows."""
    return {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "class": rule_class,
        "config": config,
        "output_scale": config.get("output_scale"),
        "solver": config.get("solver"),
        "horizon": trained_for.get("horizon"),
        "task": trained_for.get("task"),
        "trained_for": dict(trained_for),
        "library_version": __version__,
    }


_FIELDS = {*_fields("", {}, {}), "sha256"}


def _write(rule: UpdateRule, path: Path, temporary: Path, trained_for: Mapping[str, Any]) -> None:
    """Write what will be ``path``, which messages name, to a temporary file, and read it again."""
    rule_class = type(rule).__name__
    is_known = UpdateRule.registry.get(rule_class) is type(rule)
    require(is_known, "rule", rule, "of a class in `UpdateRule.registry`, by a name that no rule of odeopt has")
    wanted = "a dictionary with `horizon` and `task`"
    is_complete = isinstance(trained_for, Mapping) and {"horizon", "task"} <= trained_for.keys()
    require(is_complete, "trained_for", trained_for, f"{wanted}: a number of steps, and a name or `task.describe()`")
    fields = _fields(rule_class, rule.config, trained_for)
    metadata = {}
    for name, value in fields.items():
        try:
            metadata[name] = json.dumps(value, sort_keys=True, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise _error(path, name, "what JSON can hold", fields) from error
    weights = {name: _storable(path, name, value) for name, value in rule.state_dict().items()}
    metadata["sha256"] = json.dumps(checksum(weights, metadata))
    try:
        temporary.write_bytes(safetensors.torch.save(weights, metadata))
        _check_same(temporary, load(temporary), rule)
    except ValueError as error:
        raise ValueError(f"{path}: not saved: {str(error).removeprefix(f'{temporary}: ')}") from error


@_disable_current_modes()
def load(path: str | os.PathLike[str]) -> UpdateRule:
    """Read a rule from a file of :func:`save`; nothing is unpickled and no code is imported.

    Args:
        path: The file.

    Returns:
        The rule, on the CPU, in the dtypes of the file; ``rule.trained_for`` is the account of its training.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, was made by a newer version, names a class that is not known, or
            does not fit its class; the message names the file and the field.
    """
    fields, weights = _read(path)
    rule_class = UpdateRule.registry.get(fields["class"])
    if rule_class is None:
        known = ", ".join(sorted(UpdateRule.registry))
        raise _error(path, "class", f"a known rule ({known}); import its module first", fields)
    try:
        rule = built(rule_class, fields["config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: field `config` does not build a {fields['class']}: {error}") from error
    for name in ("output_scale", "solver"):
        if fields[name] != rule.config.get(name):
            raise _error(path, name, f"{rule.config.get(name)!r}, as in `config`", fields)
    _check_weights(path, weights, rule.state_dict())
    adopt_weights(rule, weights)
    rule.trained_for = fields["trained_for"]
    return rule


def load_pretrained(name: str) -> UpdateRule:
    """Load a rule that ships with the library.

    Args:
        name: One of :func:`available_pretrained`. ``port-hamiltonian-spectral`` is the rule for today's
            architectures, the default of :class:`odeopt.LearnedOptimizer`; ``port-hamiltonian`` was trained on a
            mixture of small tasks; the bare names ``lstm`` and ``hamiltonian`` stand for the rules trained on MNIST.

    Returns:
        The rule, on the CPU.

    Raises:
        ValueError: If there is no rule of that name.

    Example:
        >>> rule = load_pretrained("lstm")
        >>> rule.trained_for["horizon"]
        100
    """
    return find_pretrained(name, "name")


def find_pretrained(name: str, parameter: str) -> UpdateRule:
    """:func:`load_pretrained` for a caller whose own ``parameter`` the name is."""
    names = available_pretrained()
    if name not in names:
        hint = suggestion(name, names)
        if str(name).endswith(".safetensors") or "/" in str(name):
            hint = " Files, and rules on the Hub, are read by `odeopt.load`."
        raise ValueError(
            f"Parameter `{parameter}` should be one of {', '.join(names) or '(none is installed)'}. "
            f"Found `{parameter} = {name!r}`.{hint}"
        )
    with importlib.resources.as_file(_folder() / f"{_ALIASES.get(name, name)}.safetensors") as path:
        return load(path)


def available_pretrained() -> tuple[str, ...]:
    """Names that :func:`load_pretrained` takes, aliases included, sorted."""
    folder = _folder()
    files = {entry.name for entry in folder.iterdir()} if folder.is_dir() else set()
    names = {file.removesuffix(".safetensors") for file in files if file.endswith(".safetensors")}
    return tuple(sorted(names | {alias for alias, name in _ALIASES.items() if name in names}))


def _folder() -> Traversable:
    return importlib.resources.files("odeopt") / "pretrained"


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Fields and weights, each of them checked on its own."""
    if not Path(path).is_file():
        is_name = os.fspath(path) in available_pretrained()
        hint = " `odeopt.load_pretrained` loads the rules that ship by their names." if is_name else ""
        raise FileNotFoundError(f"Parameter `path` should be a file. Found `path = {os.fspath(path)!r}`.{hint}")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file: {error}") from error
    fields = {}
    for name, text in metadata.items():
        try:
            fields[name] = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{path}: field `{name}` is not JSON: {text!r}") from error
    _check_fields(path, fields, metadata, weights)
    for name, value in weights.items():
        wide = value.double() if value.is_floating_point() else value  # float8 has no isfinite
        if not wide.isfinite().all():
            raise ValueError(f"{path}: weight `{name}` should be finite. Found {wide[~wide.isfinite()][0]}.")
    return fields, weights


def _check_fields(
    path: str | os.PathLike[str], fields: dict[str, Any], metadata: dict[str, str], weights: dict[str, Tensor]
) -> None:
    def check(name: str, is_right: bool, wanted: str) -> None:
        if not is_right:
            raise _error(path, name, wanted, fields)

    # format and version come first: they decide what the other fields should be
    check("format", fields.get("format") == FORMAT, repr(FORMAT))
    version = fields.get("format_version")
    check("format_version", isinstance(version, int) and version >= 1, "a positive integer")
    check("format_version", version <= FORMAT_VERSION, f"at most {FORMAT_VERSION}; a newer odeopt reads it")
    for name in sorted(_FIELDS ^ fields.keys()):
        check(name, False, "there" if name in _FIELDS else "absent in this format")
    sealed = checksum(weights, {name: text for name, text in metadata.items() if name != "sha256"})
    check("sha256", fields["sha256"] == sealed, f"{sealed!r}, the checksum of the contents")
    horizon, task, version = fields["horizon"], fields["task"], fields["library_version"]
    account = fields["trained_for"] if isinstance(fields["trained_for"], dict) else {}
    agrees = (account.get("horizon"), account.get("task")) == (horizon, task)
    check("class", isinstance(fields["class"], str), "the name of a class")
    check("config", isinstance(fields["config"], dict), "a dictionary of constructor arguments")
    check("horizon", is_integer(horizon) and horizon > 0, "a positive number of steps (from `trained_for`)")
    is_description = isinstance(task, str | dict) and len(task) > 0
    check("task", is_description, "a name or a description (from `trained_for`)")
    check("trained_for", agrees, "a dictionary that agrees with `horizon` and `task`")
    check("library_version", isinstance(version, str) and version != "", "a version")


def _check_weights(path: str | os.PathLike[str], found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name in sorted(found.keys() ^ wanted.keys()):
        raise ValueError(f"{path}: weight `{name}` is {'missing' if name in wanted else 'not one of the rule'}.")
    for name, value in found.items():
        shape = wanted[name].shape
        if value.shape != shape:
            raise ValueError(f"{path}: weight `{name}` should have shape {tuple(shape)}. Found {tuple(value.shape)}.")
        if _kind(value) != _kind(wanted[name]):
            raise ValueError(f"{path}: weight `{name}` should be {wanted[name].dtype}. Found {value.dtype}.")


def _kind(value: Tensor) -> tuple[bool, bool]:
    return value.is_floating_point(), value.is_complex()


def _storable(path: Path, name: str, value: Any) -> Tensor:
    """A copy of a weight as a file can hold it, of which no other weight is a part."""
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{path}: not saved: weight `{name}` should be a tensor; `config` holds the rest. Found {value!r}."
        )
    try:
        copy = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        safetensors.torch.save({name: copy})
    except Exception as error:  # each kind of tensor that has no bytes fails in its own way
        raise ValueError(
            f"{path}: not saved: weight `{name}` should be of a kind that safetensors can hold. "
            f"Found {value.layout}, {value.dtype}, on {value.device}."
        ) from error
    return copy


def _check_same(path: Path, found: UpdateRule, wanted: UpdateRule) -> None:
    """Refuse a file that does not give back its rule, ties and buffers outside the file included."""
    if digest(found) != digest(wanted):
        raise ValueError(f"{path}: the rule should keep the weights that it is given. Found others after loading.")
    ties, buffers = [_ties(rule) for rule in (found, wanted)], dict(found.named_buffers())
    for a, b in sorted(ties[0] ^ ties[1]):
        shares = "and not in the rule" if (a, b) in ties[0] else "in the rule, and not once it is loaded"
        raise ValueError(f"{path}: weights should share memory if a new rule's do. Found `{a}` and `{b}`: {shares}.")
    for name, value in wanted.named_buffers():
        other = buffers.get(name, value.new_empty(0))
        # a rule in another precision has them in that one, too
        dtype = min((value.dtype, other.dtype), key=lambda dtype: dtype.itemsize)
        if checksum({"": _dense(value).to(dtype)}, {}) != checksum({"": _dense(other).to(dtype)}, {}):
            raise ValueError(f"{path}: buffer `{name}` should be persistent, or follow from `config`. Found {value}.")


def _ties(rule: UpdateRule) -> set[tuple[str, str]]:
    """Pairs of weights or buffers that overlap in memory."""
    spans = []
    for name, x in (*rule.named_parameters(remove_duplicate=False), *rule.named_buffers(remove_duplicate=False)):
        if x.layout == torch.strided and x.numel() > 0:
            reach = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
            spans.append((name, x.device, x.data_ptr(), x.data_ptr() + reach * x.element_size()))
    return {
        (min(a, b), max(a, b))
        for (a, device_a, start_a, end_a), (b, device_b, start_b, end_b) in itertools.combinations(spans, 2)
        if device_a == device_b and start_a < end_b and start_b < end_a
    }


def checksum(weights: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """SHA-256 over the metadata strings and, by name, every weight's dtype, shape and bytes."""
    total = hashlib.sha256(json.dumps(dict(metadata), sort_keys=True).encode())
    for name, value in sorted(weights.items()):
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(_bytes(value))
    return total.hexdigest()


@_disable_current_modes()  # FakeTensorMode, for instance, under which tensors have no bytes
def fingerprint(rule: UpdateRule) -> str:
    """Tell rules apart by class, configuration and weights, whatever they are called.

    Options at their defaults do not count, so that a new one changes no rule that was there before; a default that
    changes later would make unlike rules look alike, so none may. A rule without values, on the meta device for
    instance, is told apart by class and configuration.
    """

    def text(x: Any) -> str:
        return json.dumps(x, sort_keys=True, default=lambda value: type(value).__name__)

    parameters = inspect.signature(type(rule)).parameters
    defaults = {name: text(parameter.default) for name, parameter in parameters.items()}
    chosen = {name: x for name, x in rule.config.items() if text(x) != defaults.get(name)}
    total = hashlib.sha256(text([type(rule).__name__, chosen]).encode())
    for name, value in sorted(rule.state_dict().items()):
        if isinstance(value, Tensor) and has_values(value):
            total.update(name.encode() + _bytes(_dense(value)))
    return total.hexdigest()[:16]


def digest(rule: UpdateRule) -> int:
    """:func:`fingerprint` as a number: 48 bits, which a float64 can hold, too."""
    return int(fingerprint(rule)[:12], 16)


def _bytes(value: Tensor) -> bytes:
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _dense(value: Tensor) -> Tensor:
    """The numbers of any kind of tensor, on the CPU."""
    value = value.detach().cpu()
    return value.int_repr() if value.is_quantized else value.to_dense().resolve_conj().resolve_neg()


def _error(path: str | os.PathLike[str], name: str, wanted: str, fields: Mapping[str, Any]) -> ValueError:
    found = f"`{name} = {fields[name]!r}`" if name in fields else "nothing"
    return ValueError(f"{path}: field `{name}` should be {wanted}. Found {found}.")
