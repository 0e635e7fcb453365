"""Search configurations: TOML files with the values of a training configuration that are tried."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import os
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from odeopt.checks import is_integer, is_number, require
from odeopt.meta.config import MetaConfig
from odeopt.meta.files import SECTIONS, START, Config, check_keys, make_config, read_toml

SAMPLERS = ("grid", "random", "tpe")
PRUNERS = ("median", "none")
_DEFAULTS = {"pruner": "median", "startup_trials": 5, "warmup_steps": 1, "seed": 0}


class Choices(NamedTuple):
    """Values that are tried.

    Attributes:
        values: The values, all different.
    """

    values: tuple[Any, ...]


class Range(NamedTuple):
    """Numbers that are tried, integers where ``low``, ``high`` and ``step`` are.

    Attributes:
        low: The least.
        high: The greatest.
        log: Whether they are drawn evenly on a logarithmic scale.
        step: Distance between neighbours, from ``low`` on; None for every number.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None

    @property
    def is_integer(self) -> bool:
        """Whether only integers are tried."""
        return all(is_integer(number) for number in (self.low, self.high, self.step) if number is not None)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """A search, read from a TOML file with the sections of a training configuration and ``search``.

    In place of sections the file may name a training configuration as ``base``, whose keys it then adds to or replaces.

    Attributes:
        path: The file.
        sections: ``rule``, ``task`` and ``training``, as in :class:`odeopt.meta.files.Config`.
        space: What is tried, by the dotted name of what it replaces, as ``training.lr``.
        sampler: ``"grid"``, every combination in order; ``"random"``; or ``"tpe"``, Optuna's tree-structured Parzen
            estimator.
        n_trials: Trials in all; by default the size of the grid, where there is one.
        pruner: ``"median"``, which ends a trial whose best validation so far is worse than the median of those that
            completed had at that meta-step; or ``"none"``.
        startup_trials: Complete trials before the pruner, trials before the TPE, begin.
        warmup_steps: Meta-steps before which nothing is pruned.
        seed: Seed of the sampler; trials all train with ``training.seed``.
    """

    path: Path
    sections: dict[str, dict[str, Any]]
    space: dict[str, Choices | Range]
    sampler: str
    n_trials: int
    pruner: str = _DEFAULTS["pruner"]
    startup_trials: int = _DEFAULTS["startup_trials"]
    warmup_steps: int = _DEFAULTS["warmup_steps"]
    seed: int = _DEFAULTS["seed"]

    @property
    def name(self) -> str:
        """Name of the file without its suffix."""
        return self.path.stem

    def at(self, values: dict[str, Any]) -> Config:
        """Put values, by dotted names, in the place of those of the training configuration.

        Raises:
            ValueError: If that is not a configuration, or not one of a rule that can be built.
        """
        sections = copy.deepcopy(self.sections)
        for name, value in values.items():
            *tables, option = name.split(".")
            functools.reduce(lambda table, key: table.setdefault(key, {}), tables, sections)[option] = value
        try:
            config = make_config(self.path, sections)
            config.build_rule()
        except (ValueError, TypeError) as error:
            reason = str(error).removeprefix(f"{self.path}: ")
            raise ValueError(f"{self.path} with {assignments(values)}: {reason}") from error
        return config

    def grid(self) -> list[dict[str, Any]]:
        """Every combination of the values, the last name changing fastest."""
        lists = [choices.values for choices in self.space.values()]
        return [dict(zip(self.space, values, strict=True)) for values in itertools.product(*lists)]

    def probes(self) -> list[dict[str, Any]]:
        """Combinations in which each value, and each end of a range, comes up: those to check before any work."""
        if self.sampler == "grid":
            return self.grid()
        tried = {name: x.values if isinstance(x, Choices) else (x.low, x.high) for name, x in self.space.items()}
        first = {name: values[0] for name, values in tried.items()}
        others = ({**first, name: value} for name, values in tried.items() for value in values[1:])
        return [first, *others]

    def identity(self) -> dict[str, Any]:
        """Settings that two searches share if they are one, by dotted names; a search may go on to more trials."""
        search = {name: getattr(self, name) for name in ("sampler", *_DEFAULTS)}
        space = {name: x.values if isinstance(x, Choices) else x._asdict() for name, x in self.space.items()}
        tables = {**self.sections, "search": search}
        return json.loads(json.dumps({**_flat(tables), **space}, default=str))


def assignments(values: dict[str, Any]) -> str:
    """Values as text."""
    return ", ".join(f"`{name} = {value!r}`" for name, value in values.items())


def load_search(
    name: str | os.PathLike, *, n_trials: int | None = None, n_meta_steps: int | None = None
) -> SearchConfig:
    """Read a search configuration.

    Args:
        name: Path of a TOML file, or the name of one that ships with the package.
        n_trials: Trials in all, in place of the file's.
        n_meta_steps: Meta-steps per trial, in place of the file's; as many validations, so much closer together.

    Returns:
        The configuration, every key and every value checked, short of loading data.

    Raises:
        FileNotFoundError: If there is no such file and no configuration of that name.
        ValueError: If the file is not TOML, or a section, key or value is missing, unknown or out of range.
    """
    path, content = read_toml(name, "search")
    check_keys(path, "top level", content, {"base", "search", *SECTIONS})
    for section in set(content) - {"base"}:
        if not isinstance(content[section], dict):
            raise ValueError(f"{path}: `{section}` should be a section. Found `{section} = {content[section]!r}`.")
    if "search" not in content:
        raise ValueError(f"{path} should have a section [search]. Found {', '.join(content)}.")
    sections, options = _sections(path, content), dict(content["search"])
    check_keys(path, "search", options, {"sampler", "n_trials", "space", *_DEFAULTS})
    space = _read_space(path, options.pop("space", None))
    if n_trials is not None:
        options["n_trials"] = n_trials
    if n_meta_steps is not None:
        require(n_meta_steps >= 1, "n_meta_steps", n_meta_steps, "positive")
        is_free = "training.n_meta_steps" not in space
        require(is_free, "n_meta_steps", n_meta_steps, f"left out where {path} searches over it")
        _shorten(sections["training"], options, n_meta_steps)
    make_config(path, sections)
    _check_search(path, options, space)
    if options["sampler"] == "grid":
        size = len(SearchConfig(path, sections, space, "grid", 1).grid())
        options.setdefault("n_trials", size)
        _require(options["n_trials"] <= size, path, options, "n_trials", f"at most {size}, the size of the grid")
    config = SearchConfig(path, sections, space, **options)
    for values in config.probes():
        config.at(values)
    return config


def _sections(path: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections of a training configuration: those of ``base`` with what the file adds, or the file's own."""
    given = {section: content[section] for section in SECTIONS if section in content}
    if "base" not in content:
        make_config(path, given)
        return given
    base = str(content["base"])
    base_path, lent = read_toml(path.parent / base if base.endswith(".toml") else base)
    config = make_config(base_path, lent)
    require(config.start is None, "base", content["base"], f"of one training: {base_path} has a section [{START}]")
    return {section: _merged(lent[section], given.get(section, {})) for section in SECTIONS}


def _merged(lent: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Keys of a table replaced or added to; those of an estimator go when another class is given."""
    if given.get("class", lent.get("class")) != lent.get("class"):
        return given
    tables = {name: _merged(lent[name], value) for name, value in given.items()
              if isinstance(value, dict) and isinstance(lent.get(name), dict)}  # fmt: skip
    return lent | given | tables


def _flat(table: dict[str, Any], is_value: Callable[[Any], bool] = lambda value: False) -> dict[str, Any]:
    """Entries of nested tables by dotted names."""
    flat = {}
    for key, value in table.items():
        is_table = isinstance(value, dict) and value and not is_value(value)
        flat |= {f"{key}.{name}": x for name, x in _flat(value, is_value).items()} if is_table else {key: value}
    return flat


def _shorten(training: dict[str, Any], options: dict[str, Any], n_meta_steps: int) -> None:
    before = training.get("n_meta_steps", MetaConfig.n_meta_steps)
    training["n_meta_steps"] = n_meta_steps
    every = training.get("validate_every", MetaConfig.validate_every)
    training["validate_every"] = max(1, round(every * n_meta_steps / before))
    if "warmup_steps" in options and is_integer(options["warmup_steps"]):
        options["warmup_steps"] = round(options["warmup_steps"] * n_meta_steps / before)


def _check_search(path: Path, options: dict[str, Any], space: dict[str, Choices | Range]) -> None:
    sampler, pruner = options.get("sampler"), options.get("pruner", _DEFAULTS["pruner"])
    _require(sampler in SAMPLERS, path, options, "sampler", f"one of {', '.join(SAMPLERS)}")
    _require(pruner in PRUNERS, path, options, "pruner", f"one of {', '.join(PRUNERS)}")
    for name, least in (("n_trials", 1), ("startup_trials", 1), ("warmup_steps", 0), ("seed", 0)):
        is_needed = name in options or (name == "n_trials" and sampler != "grid")
        is_good = is_integer(options.get(name)) and options[name] >= least
        _require(is_good or not is_needed, path, options, name, f"an integer of at least {least}")
    unread = {"seed": sampler == "grid", "warmup_steps": pruner == "none"}
    unread["startup_trials"] = pruner == "none" and sampler != "tpe"
    for name, is_unread in unread.items():
        wanted = f'left out where `sampler = "{sampler}"` and `pruner = "{pruner}"`, which have no such option'
        _require(not (is_unread and name in options), path, options, name, wanted)
    for name, tried in space.items():
        if sampler == "grid" and isinstance(tried, Range):
            wanted = 'a list of values where `sampler = "grid"`'
            raise ValueError(f"{path}: `{name}` in [search.space] should be {wanted}. Found a range.")


def _require(condition: bool, path: Path, options: dict[str, Any], name: str, wanted: str) -> None:
    if not condition:
        found = options.get(name)
        raise ValueError(f"{path}: `{name}` in [search] should be {wanted}. Found `{name} = {found!r}`.")


def _read_space(path: Path, table: Any) -> dict[str, Choices | Range]:
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} should have a section [search.space] with what is tried. Found `space = {table!r}`.")
    # training.lr = ... is a table in TOML, "training.lr" = ... is not
    flat = _flat(table, is_value=lambda value: not value.keys().isdisjoint(("low", "high")))
    for name in flat:
        section, _, option = name.partition(".")
        if section not in SECTIONS or not option:
            wanted = f"names such as training.lr, in one of {', '.join(SECTIONS)}"
            raise ValueError(f"{path}: [search.space] should hold {wanted}. Found `{section}`.")
    return {name: _read_tried(path, name, value) for name, value in flat.items()}


def _read_tried(path: Path, name: str, value: Any) -> Choices | Range:
    wanted = _wanted_of_list(value) if isinstance(value, list) else _wanted_of_range(value)
    if wanted is not None:
        raise ValueError(f"{path}: `{name}` in [search.space] should be {wanted}. Found `{name} = {value!r}`.")
    return Choices(tuple(value)) if isinstance(value, list) else Range(**value)


def _wanted_of_list(values: list[Any]) -> str | None:
    """Say what a list should be, unless it is that."""
    is_good = len(values) > 0 and not any(a == b for a, b in itertools.combinations(values, 2))
    return None if is_good else "a list of different values"


def _wanted_of_range(value: Any) -> str | None:
    """Say what a table should be, unless it is that."""
    if not isinstance(value, dict) or not {"low", "high"} <= set(value) <= set(Range._fields):
        return "a list of values, or a table with low and high, and log or step if wanted"
    low, high, log, step = Range(**value)
    numbers = [number for number in (low, high, step) if number is not None]
    if not all(map(is_number, numbers)) or not low < high:
        return "a range of numbers, its low less than its high"
    if not isinstance(log, bool) or (log and (low <= 0 or step is not None)):
        return "a range whose log is true or false, and true only where low is positive and there is no step"
    # in decimals, where 0.1 goes into 0.3
    low, high, step = (Decimal(str(number)) for number in (low, high, 1 if step is None else step))
    is_good = "step" not in value or (step > 0 and (high - low) % step == 0)
    return None if is_good else "a range with a positive step that leads from its low to its high"
