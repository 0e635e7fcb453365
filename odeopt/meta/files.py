"""Training configurations: TOML files that name a rule, its tasks and the settings of the training."""

from __future__ import annotations

import dataclasses
import inspect
import math
import os
import pkgutil
import tomllib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from odeopt import rules, tasks
from odeopt.checks import suggestion
from odeopt.meta.config import MetaConfig, MetaResult
from odeopt.meta.estimators import ESTIMATORS, Estimator
from odeopt.meta.objective import MetaObjective
from odeopt.rules.base import UpdateRule
from odeopt.tasks.base import Task
from odeopt.tasks.mixture import HORIZONS, are_horizons

T = TypeVar("T")
SECTIONS = ("rule", "task", "training")
START, USE = "start", "use"
_SHIPPED = Path(__file__).parents[1] / "configs"
_TASKS = {
    task.__name__: task
    for task in (
        tasks.Autoencoder,
        tasks.CoordinateNetwork,
        tasks.ImageNetwork,
        tasks.MLPClassification,
        tasks.NoisyQuadratic,
        tasks.RandomQuadratic,
        tasks.SequencePrediction,
        tasks.TeacherStudent,
        tasks.TextRecurrence,
        tasks.TextTransformer,
        tasks.VisionTransformer,
    )
}
_RULES = {
    "port-hamiltonian": rules.PortHamiltonianUpdate,
    "lstm": rules.LSTMUpdate,
    "hamiltonian": rules.HamiltonianUpdate,
}


@dataclasses.dataclass(frozen=True)
class Config:
    """A training configuration, read from a TOML file with the sections ``rule``, ``task`` and ``training``.

    Attributes:
        name: Name of the file without its suffix.
        rule: ``class`` (``"port-hamiltonian"``, ``"lstm"``, ``"hamiltonian"`` or ``"package.module:Name"``, an update
            rule that can be imported) and the rule's arguments.
        task: ``class`` (of a task, ``"package.module:Name"``, or ``"Mixture"``) and its arguments. A mixture has tables
            ``families``, each with ``class``, arguments, and in ``choices`` lists of values for further ones.
        training: Settings of :func:`odeopt.meta_train`. In the file the section has the tables ``estimator``, with
            ``class`` (as in :data:`odeopt.meta.estimators.ESTIMATORS`, or ``"package.module:Name"``) and its options,
            and ``objective``, with the options of :class:`odeopt.meta.MetaObjective`.
        start: Settings of an earlier training of the same rule on the same tasks, from which this one goes on: the
            optional section ``start``.
        use: Options of the rule in use in place of those in training, which change no weight: the optional section
            ``use``.
    """

    name: str
    rule: dict[str, Any]
    task: dict[str, Any]
    training: MetaConfig
    start: MetaConfig | None = None
    use: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def stages(self) -> tuple[MetaConfig, ...]:
        """The settings of each training, in their order; each goes on from the rule of the one before."""
        return (self.training,) if self.start is None else (self.start, self.training)

    def trained_for(self, *results: MetaResult) -> dict[str, Any]:
        """Describe for an artefact what it was trained on, and how it went: one result for each of :attr:`stages`."""
        result = results[-1]
        horizons = (self.training.horizon,)
        if self.task["class"] == "Mixture":
            horizons = self.task.get("horizons", tasks.Mixture.horizons)
        own = {} if self.start is None else {START: self.start.describe()}
        own |= {USE: self.use} if self.use else {}
        return own | {
            "horizon": horizons[-1],
            "task": self.task,
            "config": self.name,
            "training": self.training.describe(),
            "tasks_per_meta_step": result.n_tasks_per_step,
            "seconds": round(sum(each.seconds for each in results), 1),
            "best_meta_step": result.best_step,
            # an untrained rule may diverge and learn not to
            "validation_loss": finite(result.best_score),
            "validations": [(step, finite(score)) for step, score in result.validation],
        }

    def with_seed(self, seed: int) -> Config:
        """The same training from another meta-seed: other initial weights, tasks and batches."""
        *start, training = (dataclasses.replace(stage, seed=seed) for stage in self.stages)
        return dataclasses.replace(self, training=training, start=start[0] if start else None)

    def with_dataset(self, name: str) -> Config:
        """The same training on other images, which take the place of every dataset of the task or its families.

        Args:
            name: As :func:`odeopt.tasks.load_dataset` takes it.
        """
        if self.task["class"] != "Mixture":
            return dataclasses.replace(self, task=self.task | ({"dataset": name} if "dataset" in self.task else {}))
        families = []
        for family in self.task["families"]:
            if "dataset" in family.get("choices", {}):
                choices = {key: values for key, values in family["choices"].items() if key != "dataset"}
                family = family | {"choices": choices, "dataset": name}
            families.append(family | {"dataset": name} if "dataset" in family else family)
        return dataclasses.replace(self, task=self.task | {"families": families})

    def build_rule(self) -> UpdateRule:
        """Build the untrained rule; the same weights every time, whatever the caller's random state."""
        options = dict(self.rule)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            return _found(options.pop("class"), _RULES)(**options)

    def in_use(self, rule: UpdateRule) -> UpdateRule:
        """The trained rule as it is used; see :attr:`use`."""
        return rule.with_options(**self.use) if self.use else rule

    def build_task(
        self,
        split: str = "meta-train",
        *,
        data_dir: str | os.PathLike | None = None,
        device: torch.device | str = "cpu",
    ) -> Task | tasks.Mixture:
        """Build the task distribution.

        Args:
            split: ``"meta-train"`` or ``"evaluation"``, where the task has data to split.
            data_dir: Where image datasets lie; see :func:`odeopt.tasks.load_dataset`.
            device: Where the tasks live.
        """
        options = dict(self.task)
        if options.pop("class") != "Mixture":
            return _task(**self.task, split=split, data_dir=data_dir, device=device)
        families = []
        for options_of_family in options.pop("families"):
            fixed = dict(options_of_family)
            choices = fixed.pop("choices", {})
            numbers = {name: fixed.pop(name) for name in ("share", "log_range") if name in fixed}
            make = partial(_task, split=split, data_dir=data_dir)
            first = {name: values[0] for name, values in choices.items()}
            for name, value in ((name, value) for name, values in choices.items() for value in values):
                make(**fixed | first | {name: value}, device="cpu")  # what is missing or wrong should show at once
            families.append(tasks.TaskFamily(make, fixed, choices, name=fixed["class"], **numbers))
        return tasks.Mixture(families, **options, device=device)


def finite(score: float) -> float | None:
    """A score in JSON, which has no numbers that are not finite."""
    return score if math.isfinite(score) else None


def _task(*, split: str, data_dir: str | os.PathLike | None, device: torch.device | str, **options: Any) -> Task:
    """Build a task from the options that a configuration gives it."""
    task_class = _found(options.pop("class"), _TASKS)
    if "dataset" in options:
        options["dataset"] = tasks.load_dataset(options["dataset"], data_dir)
    read = inspect.signature(task_class).parameters
    given = {name: value for name, value in (("split", split), ("device", device)) if name in read}
    task = task_class(**options, **given)
    return task if "device" in read else task.to(device)


def load_config(name: str | os.PathLike) -> Config:
    """Read a configuration.

    Args:
        name: Path of a TOML file, or the name of one that ships with the package.

    Returns:
        The configuration, every key of it checked.

    Raises:
        FileNotFoundError: If there is no such file and no configuration of that name.
        ValueError: If the file is not TOML, or a section, a class or a key is missing or unknown.
    """
    return make_config(*read_toml(name))


def read_toml(name: str | os.PathLike, kind: str = "") -> tuple[Path, dict[str, Any]]:
    """Find and read a TOML file, given as a path or by the name of one that ships, of a kind.

    Returns:
        Path of the file, and its content.

    Raises:
        FileNotFoundError: If there is no such file and no configuration of that name.
        ValueError: If the file is not TOML.
    """
    path = Path(name)
    if path.suffix != ".toml":
        path = _SHIPPED / kind / f"{name}.toml"
    if not path.is_file():
        raise FileNotFoundError(
            f"Parameter `name` should be a TOML file or one of {', '.join(available_configs(kind))}. Found `{name}`."
            f"{suggestion(name, available_configs(kind))}"
        )
    try:
        return path, tomllib.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # of TOML, or of UTF-8
        raise ValueError(f"{path} is not valid TOML: {error}.") from error


def make_config(path: Path, content: dict[str, Any]) -> Config:
    """Check every key of a configuration that was read from ``path``, which messages name."""
    if set(content) - {START, USE} != set(SECTIONS):
        wanted = f"the sections {', '.join(SECTIONS)}, and may have {START} and {USE}"
        raise ValueError(f"{path} should have {wanted}. Found {', '.join(content)}.")
    for section, options in content.items():
        check_table(path, section, options)
    rule_class, use = _check_class(path, "rule", content["rule"], _RULES, UpdateRule), content.get(USE, {})
    check_keys(path, USE, use, set(inspect.signature(rule_class).parameters))
    _check_task(path, content["task"])
    config = Config(path.stem, content["rule"], content["task"], _settings(path, "training", content), use=use)
    if START in content:
        # its seed is that of the training
        check_keys(path, START, content[START], {field.name for field in dataclasses.fields(MetaConfig)} - {"seed"})
        config = dataclasses.replace(config, start=_settings(path, START, content)).with_seed(config.training.seed)
    return config


def _settings(path: Path, section: str, content: dict[str, Any]) -> MetaConfig:
    options = dict(content[section])
    if "estimator" in options:
        options["estimator"] = _estimator(path, f"{section}.estimator", options["estimator"])
    if "objective" in options:
        options["objective"] = _built(path, f"{section}.objective", MetaObjective, options["objective"])
    return _built(path, section, MetaConfig, options)


def _estimator(path: Path, section: str, table: Any) -> Estimator:
    check_table(path, section, table)
    estimator = _check_class(path, section, table, ESTIMATORS, Estimator)
    options = {name: value for name, value in table.items() if name != "class"}
    for name, value in options.items():
        if isinstance(value, dict):  # an estimator within, which are evolution strategies unless it says otherwise
            options[name] = _estimator(path, f"{section}.{name}", {"class": "es"} | value)
    return _built(path, section, estimator, options)


def _built(path: Path, section: str, kind: Callable[..., T], options: Any) -> T:
    """Build from the options of a section, which errors name."""
    check_table(path, section, options)
    check_keys(path, section, options, set(inspect.signature(kind).parameters))
    try:
        return kind(**options)
    except ValueError as error:
        raise ValueError(f"{path}: [{section}]: {error}") from error


def available_configs(kind: str = "") -> tuple[str, ...]:
    """Names of the configurations that ship with the package: of trainings, or of ``kind = "search"``."""
    return tuple(sorted(path.stem for path in (_SHIPPED / kind).glob("*.toml")))


def _check_task(path: Path, options: dict[str, Any]) -> None:
    if options.get("class") != "Mixture":
        _check_class(path, "task", options, _TASKS, Task, others=("Mixture",))
        return
    allowed = set(inspect.signature(tasks.Mixture).parameters) - {"device"}
    check_keys(path, "task", {key: value for key, value in options.items() if key != "class"}, allowed)
    families = options.get("families")
    are_tables = isinstance(families, list) and families and all(isinstance(family, dict) for family in families)
    check_option(path, "task", are_tables, "families", families, "tables [[task.families]]")
    horizons = options.get("horizons", tasks.Mixture.horizons)
    check_option(path, "task", are_horizons(horizons), "horizons", horizons, HORIZONS)
    for family in families:
        own = {key: value for key, value in family.items() if key not in ("share", "log_range", "choices")}
        choices = family.get("choices", {})
        if not isinstance(choices, dict) or not all(isinstance(values, list) and values for values in choices.values()):
            raise ValueError(f"{path}: `choices` in [task.families] should hold lists of values. Found `{choices}`.")
        _check_class(path, "task.families", own | choices, _TASKS, Task)


def _check_class(
    path: Path, section: str, options: dict[str, Any], known: dict[str, type[T]], base: type[T], others=()
) -> type[T]:
    """Return the class that a section names, which should take the other options of the section."""
    name = options.get("class")
    try:
        found, reason = _found(name, known), ""
    except Exception as error:  # whatever a module of the user's raises when it is imported
        found, reason = None, f" ({error})" if isinstance(name, str) and ":" in name else ""
    if not (isinstance(found, type) and issubclass(found, base)) or inspect.isabstract(found):
        wanted = f"one of {', '.join((*known, *others))}, or package.module:Name of a subclass of {base.__name__}"
        raise ValueError(f"{path}: `class` in [{section}] should be {wanted}. Found `{name}`{reason}.")
    parameters = inspect.signature(found).parameters
    if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters.values()):
        given = {key: value for key, value in options.items() if key != "class"}
        own = {"device", "dtype", "split"}
        check_keys(path, section, given, set(parameters) - own)
        for key, parameter in parameters.items():
            is_needed = parameter.default is parameter.empty and parameter.kind is not parameter.VAR_POSITIONAL
            if is_needed and key not in given.keys() | own:
                raise ValueError(f"{path}: [{section}] of class {name} should hold `{key}`, too.")
    return found


def _found(name: str, known: dict[str, type[T]]) -> type[T]:
    """Find a class by its short name, or import it by ``package.module:Name``."""
    return pkgutil.resolve_name(name) if ":" in name else known[name]


def check_table(path: Path, section: str, table: Any) -> None:
    """Refuse a section that is none."""
    if not isinstance(table, dict):
        name = section.rpartition(".")[2]
        raise ValueError(f"{path}: `{name}` should be a section [{section}]. Found `{name} = {table!r}`.")


def check_keys(path: Path, section: str, options: dict[str, Any], allowed: set[str]) -> None:
    """Refuse a section that holds an unknown key."""
    unknown = sorted(set(options) - allowed)
    if unknown:
        raise ValueError(f"{path}: [{section}] should hold only {', '.join(sorted(allowed))}. Found `{unknown[0]}`.")


def check_option(path: Path, section: str, is_right: bool, name: str, value: Any, wanted: str) -> None:
    """Refuse the value of an option of a section, unless it is right."""
    if not is_right:
        raise ValueError(f"{path}: `{name}` in [{section}] should be {wanted}. Found `{name} = {value!r}`.")
