"""Search configurations: TOML files with the values of a training configuration that are tried."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import os
import warnings
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from odeopt.checks import MissingExtraError, install_command, is_integer, is_number, require
from odeopt.meta.config import MetaConfig
from odeopt.meta.files import SECTIONS, USE, Config, check_keys, check_option, check_table, make_config, read_toml

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("grid", "random", "tpe")
PRUNERS = ("median", "none")
_DEFAULTS = {"pruner": "median", "startup_trials": 5, "warmup_steps": 1, "seed": 0}
_READ_BY = {"startup_trials": {"tpe", "median"}, "warmup_steps": {"median"}, "seed": {"random", "tpe"}}


def import_optuna() -> ModuleType:
    """Import Optuna, or raise :class:`~odeopt.checks.MissingExtraError`."""
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError(f"Searching needs Optuna: {install_command('search')} ({error}).") from error
    return optuna


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """A search, read from a TOML file with the sections of a training configuration and ``search``.

    In place of sections the file may name a training configuration as ``base``, whose keys it then adds to or replaces.

    Attributes:
        path: The file.
        sections: ``rule``, ``task``, ``training`` and, where there is one, ``use``, as in
            :class:`odeopt.meta.files.Config`.
        space: What is tried, by the dotted name of what it replaces, as ``training.lr``: a list of values, or a range,
            a table of the arguments ``low``, ``high``, ``log`` and ``step`` of Optuna's ``suggest_float``, or, where
            they are integers, ``suggest_int``.
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
    space: dict[str, list[Any] | dict[str, Any]]
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
        try:
            for name, value in values.items():
                _put(sections, name, value)
            config = make_config(self.path, sections)
            config.in_use(config.build_rule())
        except (ValueError, TypeError) as error:
            reason = str(error).removeprefix(f"{self.path}: ")
            given = ", ".join(f"`{name} = {value!r}`" for name, value in values.items())
            raise ValueError(f"{self.path} with {given}: {reason}") from error
        return config

    def suggest(self, trial: optuna.trial.BaseTrial, name: str) -> Any:
        """Let an Optuna trial choose among the values of a name."""
        tried = self.space[name]
        if isinstance(tried, list):  # which may hold lists and tables, that Optuna does not keep
            values = {repr(value): value for value in tried}
            return values[trial.suggest_categorical(name, list(values))]
        are_integers = all(is_integer(value) for key, value in tried.items() if key != "log")
        return (trial.suggest_int if are_integers else trial.suggest_float)(name, **tried)

    def probes(self) -> list[dict[str, Any]]:
        """Combinations to check before any work: those of a grid, else some with each value and end of a range."""
        tried = {name: x if isinstance(x, list) else [x["low"], x["high"]] for name, x in self.space.items()}
        if self.sampler == "grid":
            return [dict(zip(tried, values, strict=True)) for values in itertools.product(*tried.values())]
        first = {name: values[0] for name, values in tried.items()}
        return [first, *({**first, name: value} for name, values in tried.items() for value in values[1:])]

    def identity(self) -> dict[str, Any]:
        """Settings that two searches share if they are one, by dotted names; a search may go on to more trials."""
        tables = {**self.sections, "search": {name: getattr(self, name) for name in ("sampler", *_DEFAULTS)}}
        return json.loads(json.dumps({**_flat(tables), **self.space}, default=str))


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
    check_keys(path, "top level", content, {"base", "search", *SECTIONS, USE})
    for section in set(content) - {"base"}:
        check_table(path, section, content[section])
    if "search" not in content:
        raise ValueError(f"{path} should have a section [search]. Found {', '.join(content)}.")
    sections, options = _sections(path, content), dict(content["search"])
    make_config(path, sections)
    check_keys(path, "search", options, {"sampler", "n_trials", "space", *_DEFAULTS})
    space = _read_space(path, options.pop("space", None))
    if n_trials is not None:
        options["n_trials"] = n_trials
    if n_meta_steps is not None:
        require(n_meta_steps >= 1, "n_meta_steps", n_meta_steps, "positive")
        is_free = "training.n_meta_steps" not in space
        require(is_free, "n_meta_steps", n_meta_steps, f"left out where {path} searches over it")
        _shorten(sections["training"], options, n_meta_steps)
    _check_search(path, options, space)
    config = SearchConfig(path, sections, space, **options)
    for values in config.probes():
        config.at(values)
    return config


def _sections(path: Path, content: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Sections of a training configuration: those of ``base`` with what the file adds, or the file's own."""
    given = {section: table for section, table in content.items() if section not in ("base", "search")}
    if "base" not in content:
        return given
    base = str(content["base"])
    base_path, lent = read_toml(path.parent / base if base.endswith(".toml") else base)
    config = make_config(base_path, lent)
    require(config.start is None, "base", content["base"], f"of one training: {base_path} has a section [start]")
    return {section: _merged(lent.get(section, {}), given.get(section, {})) for section in lent | given}


def _merged(lent: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Keys of a table replaced or added to; those of an estimator go when another class is given."""
    if given.get("class", lent.get("class")) != lent.get("class"):
        return given
    tables = {name: _merged(lent[name], value) for name, value in given.items()
              if isinstance(value, dict) and isinstance(lent.get(name), dict)}  # fmt: skip
    return lent | given | tables


def _put(table: dict[str, Any], name: str, value: Any) -> None:
    """Set an entry of nested tables by its dotted name; tables that are missing are made."""
    *keys, option = name.split(".")
    for key in keys:
        table = table.setdefault(key, {})
        require(isinstance(table, dict), key, table, "a table where something in it is tried")
    table[option] = value


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    """Entries of nested tables by dotted names; a range is one of them."""
    flat = {}
    for key, value in table.items():
        is_table = isinstance(value, dict) and value and value.keys().isdisjoint(("low", "high"))
        flat |= {f"{key}.{name}": x for name, x in _flat(value).items()} if is_table else {key: value}
    return flat


def _shorten(training: dict[str, Any], options: dict[str, Any], n_meta_steps: int) -> None:
    before = training.get("n_meta_steps", MetaConfig.n_meta_steps)
    every = training.get("validate_every", MetaConfig.validate_every)
    training |= {"n_meta_steps": n_meta_steps, "validate_every": max(1, round(every * n_meta_steps / before))}
    if is_integer(options.get("warmup_steps")):
        options["warmup_steps"] = round(options["warmup_steps"] * n_meta_steps / before)


def _check_search(path: Path, options: dict[str, Any], space: dict[str, list[Any] | dict[str, Any]]) -> None:
    """Check the options of a search; a grid makes all of its trials unless they say how many."""

    def check(is_right: bool, name: str, wanted: str) -> None:
        check_option(path, "search", is_right, name, options.get(name), wanted)

    sampler, pruner = options.get("sampler"), options.get("pruner", _DEFAULTS["pruner"])
    check(sampler in SAMPLERS, "sampler", f"one of {', '.join(SAMPLERS)}")
    check(pruner in PRUNERS, "pruner", f"one of {', '.join(PRUNERS)}")
    if sampler == "grid":
        for name, tried in space.items():
            wanted = 'a list of values where `sampler = "grid"`'
            check_option(path, "search.space", isinstance(tried, list), name, tried, wanted)
        size = math.prod(map(len, space.values()))
        options.setdefault("n_trials", size)
    for name, least in (("n_trials", 1), ("startup_trials", 1), ("warmup_steps", 0), ("seed", 0)):
        value = options.get(name, _DEFAULTS.get(name))
        check(is_integer(value) and value >= least, name, f"an integer of at least {least}")
    if sampler == "grid":
        check(options["n_trials"] <= size, "n_trials", f"at most {size}, the size of the grid")
    wanted = f'left out where `sampler = "{sampler}"` and `pruner = "{pruner}"`, which have no such option'
    for name, readers in _READ_BY.items():
        check(name not in options or bool(readers & {sampler, pruner}), name, wanted)


def _read_space(path: Path, table: Any) -> dict[str, list[Any] | dict[str, Any]]:
    if not isinstance(table, dict) or not table:
        raise ValueError(f"{path} should have a section [search.space] with what is tried. Found `space = {table!r}`.")
    flat = _flat(table)  # training.lr = ... is a table in TOML, "training.lr" = ... is not
    for name, tried in flat.items():
        section, _, option = name.partition(".")
        if section not in SECTIONS or not option:
            wanted = f"names such as training.lr, in one of {', '.join(SECTIONS)}"
            raise ValueError(f"{path}: [search.space] should hold {wanted}. Found `{section}`.")
        wanted = _wanted_of(path, name, tried)
        check_option(path, "search.space", not wanted, name, tried, wanted)
    return flat


def _wanted_of(path: Path, name: str, tried: Any) -> str:
    """Say what the values of a name should be; nothing if they are that."""
    if isinstance(tried, list):
        is_good = tried and all(tried.count(value) == 1 for value in tried)
        return "" if is_good else "a list of different values"
    if not isinstance(tried, dict):
        return "a list of values, or a table with low and high, and log or step if wanted"
    if not all(isinstance(value, bool) if key == "log" else is_number(value) for key, value in tried.items()):
        return "a range of numbers, and log true or false"
    config = SearchConfig(path, {}, {name: tried}, "random", 1)
    try:
        with warnings.catch_warnings(action="error"):  # of a step that does not lead to the end
            config.suggest(import_optuna().trial.FixedTrial({name: tried.get("low")}), name)
    except (ValueError, TypeError, UserWarning) as error:
        return f"a table with low and high, and log or step if wanted, that Optuna takes ({str(error).rstrip('.')})"
    return ""
