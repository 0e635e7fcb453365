"""Distributions over tasks, for rules that are to serve more than one."""

from __future__ import annotations

import bisect
import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from odeopt.checks import is_integer, is_list, is_number, require, require_counts, require_positive

from .base import Task
from .fingerprint import digest, elements
from .random import uniform
from .scaled import ScaledTask

# A task may hold a copy of its data (55 MB of MNIST on a GPU), and a mixture has thousands; one that was forgotten is
# built again in two milliseconds.
_N_KEPT = 64
HORIZONS = "two rising integers of at least 1"
_OWN = ("task", "choices", "share", "log_range")  # what a description says of a family beside its fixed arguments


@dataclass(frozen=True)
class TaskFamily:
    """Tasks of one class.

    Attributes:
        make: Builds a task from keyword arguments, of which ``device`` is always one.
        fixed: Arguments that all tasks have in common.
        choices: Arguments that differ: for each a list of values, which are equally likely and drawn independently.
        share: Weight of the family in the mixture.
        name: What :meth:`Mixture.describe` calls it; the name of ``make`` by default.
        log_range: Where positive, half of the family's tasks come in other units (:class:`~odeopt.tasks.ScaledTask`).
    """

    make: Callable[..., Task]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    share: float = 1.0
    log_range: float = 0.0
    name: str = ""

    def __post_init__(self) -> None:
        require(callable(self.make), "make", self.make, "a class of tasks, or a function that builds one")
        require(isinstance(self.name, str), "name", self.name, "a string")
        for name in ("fixed", "choices"):
            arguments = getattr(self, name)
            is_right = isinstance(arguments, Mapping) and all(isinstance(key, str) for key in arguments)
            require(is_right, name, arguments, "a dictionary of arguments by name")
            require("device" not in arguments, name, arguments, "without `device`, which is the mixture's")
        for name, values in self.choices.items():
            require(is_list(values) and len(values) > 0, f"choices[{name!r}]", values, "a list of values")
            require(name not in self.fixed, f"choices[{name!r}]", values, "left out, since it is fixed")
        require_positive(share=self.share)
        is_range = is_number(self.log_range) and self.log_range >= 0
        require(is_range, "log_range", self.log_range, "a number of at least 0")


class Draw(NamedTuple):
    """A draw from a mixture: some problems of one task, and how long they are worked on.

    Attributes:
        task: The task.
        indices: Global numbers of its problems, shape ``(n_tasks,)``.
        horizon: Optimizer steps.
        tells_horizon: Whether the rule is told how far along it is.
    """

    task: Task
    indices: Tensor
    horizon: int
    tells_horizon: bool


@dataclass(eq=False, repr=False)
class Mixture:
    """A distribution over tasks; a draw is a function of its number and a seed, like all that tasks draw.

    :func:`odeopt.meta_train` takes a mixture where it takes a task. Horizons are log-uniform, and shorter for large
    tasks; small tasks come several at once, so that draws cost about the same.

    Args:
        families: What is mixed.
        horizons: Least and greatest number of steps.
        told: Probability that the rule is told how far along it is.
        n_problems: Problems per draw at most.
        coordinates: Coordinates of all problems of a draw at most (one problem at least).
        work: Coordinates of a problem times steps at most (the least horizon at least).
        device: Where the tasks live.

    Raises:
        ValueError: If an argument is out of range.

    Example:
        >>> from odeopt.tasks import MLPClassification, RandomQuadratic
        >>> mixture = Mixture([
        ...     TaskFamily(RandomQuadratic, choices={"dim": [5, 10, 20]}),
        ...     TaskFamily(MLPClassification, {"dataset": "digits"}, {"activation": ["tanh", "relu"]}),
        ... ])
        >>> mixture.draw(0, seed=0).horizon
        218
    """

    families: Sequence[TaskFamily]
    _: KW_ONLY
    horizons: Sequence[int] = (30, 300)
    told: float = 0.7
    n_problems: int = 6
    coordinates: float = 4e4
    work: float = 5e6
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        families, horizons = self.families, self.horizons
        is_given = is_list(families, TaskFamily) and len(families) > 0
        require(is_given, "families", families, "at least one family, in a list")
        require(are_horizons(horizons), "horizons", horizons, HORIZONS)
        require(is_number(self.told) and 0 <= self.told <= 1, "told", self.told, "a number between 0 and 1")
        require_counts(n_problems=self.n_problems)
        require_positive(coordinates=self.coordinates, work=self.work)
        self.families, self.horizons, self.device = tuple(families), tuple(horizons), torch.device(self.device)
        self._built: dict[tuple, Task] = {}  # in the order of their last use

    def draw(self, number: int, seed: int) -> Draw:
        """Draw problems of one task.

        Args:
            number: Number of the draw, from 0.
            seed: Names, together with the number, one draw.

        Returns:
            The task, its problems and a horizon. The last 64 tasks are kept: a draw of the same family, choices and
            units as one of them has that very object.
        """
        index = torch.tensor([number])

        def unit(name: str) -> float:
            return uniform(index, (1,), seed=seed, stream=f"mixture/{name}", dtype=torch.float64).item()

        bounds = list(itertools.accumulate(family.share for family in self.families))
        which = min(bisect.bisect(bounds, bounds[-1] * unit("family")), len(bounds) - 1)
        choices = self.families[which].choices
        picked = tuple(int(len(values) * unit(f"{which}/{name}")) for name, values in choices.items())
        task = self._task(which, picked, is_rescaled=unit("rescaled") < 0.5)
        n = sum(shape.numel() for shape in task.param_shapes.values())
        low, high = self.horizons
        high = max(low, min(high, int(self.work / n)))
        horizon = min(high, int(low * ((high + 1) / low) ** unit("horizon")))
        n_problems = max(1, min(self.n_problems, int(self.coordinates / n)))
        indices = torch.arange(self.n_problems * number, self.n_problems * number + n_problems)
        return Draw(task, indices, horizon, unit("told") < self.told)

    def _task(self, which: int, picked: tuple[int, ...], *, is_rescaled: bool) -> Task:
        family = self.families[which]
        is_rescaled = is_rescaled and family.log_range > 0
        key = (which, picked, is_rescaled)
        task = self._built.pop(key, None)
        if task is None:
            task = self._make(which, picked)
            task = ScaledTask(task, log_range=family.log_range) if is_rescaled else task
        self._built[key] = task
        if len(self._built) > _N_KEPT:
            del self._built[next(iter(self._built))]
        return task

    def _make(self, which: int, picked: tuple[int, ...]) -> Task:
        family = self.families[which]
        options = {name: values[k] for (name, values), k in zip(family.choices.items(), picked, strict=True)}
        return family.make(**family.fixed, **options, device=self.device)

    def describe(self) -> dict[str, Any]:
        """Return the families, in values that JSON can hold and that are the same in every process.

        Functions, data sets and the like stand there by name, tensors by shape and digest.
        """
        families = []
        for family in self.families:
            described = {"task": _title(family)}
            for name, value in family.fixed.items():
                described[f"fixed {name}" if name in _OWN else name] = _plain(value)
            described["choices"] = {name: [_plain(v) for v in values] for name, values in family.choices.items()}
            families.append(described | {"share": _plain(family.share), "log_range": _plain(family.log_range)})
        numbers = {name: _plain(getattr(self, name)) for name in ("told", "n_problems", "coordinates", "work")}
        return {"task": type(self).__name__, "families": families, "horizons": _plain(self.horizons)} | numbers

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this mixture from another; see :meth:`Task.fingerprint`.

        Every value of every choice is looked at in one task, those of the other choices being the first.
        """
        fingerprints = []
        for which, family in enumerate(self.families):
            first = (0,) * len(family.choices)
            others = ((*first[:k], i, *first[k + 1 :]) for k, values in enumerate(family.choices.values())
                      for i in range(1, len(values)))  # fmt: skip
            fingerprints += [self._make(which, picked).fingerprint() for picked in (first, *others)]
        content = digest([self.describe(), *(each["content"] for each in fingerprints)])
        return {"content": content, "losses": [loss for each in fingerprints for loss in each["losses"]]}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(_title, self.families))}; horizons={self.horizons})"

    def to(self, device: torch.device | str) -> Self:
        """Move the tasks that are kept to ``device``, in place, where later ones are built; return the mixture."""
        device = torch.empty(0, device=device).device  # fails before anything is moved where there is none
        for task in self._built.values():
            task.to(device)
        self.device = device
        return self


def are_horizons(value: object) -> bool:
    """Whether a value is what :data:`HORIZONS` says."""
    is_pair = is_list(value) and len(value) == 2 and all(map(is_integer, value))
    return is_pair and 1 <= value[0] <= value[1]


def _title(family: TaskFamily) -> str:
    return family.name or _name(family.make)


def _name(function: Callable) -> str:
    """Name of a function or class; of ``functools.partial`` with what it fills in."""
    if isinstance(function, functools.partial):
        filled = [repr(_plain(value)) for value in function.args]
        filled += [f"{name}={_plain(value)!r}" for name, value in function.keywords.items()]
        return f"{_name(function.func)}({', '.join(filled)})"
    return getattr(function, "__name__", None) or _text(function)


def _text(value: object) -> str:
    """Representation of a value without its address, which is another one in every process."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))


def _plain(value: Any) -> Any:
    """A value that JSON and a checkpoint can hold."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int | str):
        return int(value) if isinstance(value, int) else str(value)  # not a subclass, which a checkpoint cannot hold
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else repr(float(value))
    if isinstance(value, Tensor):
        sha256 = hashlib.sha256(elements(value)).hexdigest()[:16]
        return {"shape": list(value.shape), "dtype": str(value.dtype), "sha256": sha256}
    if isinstance(value, Mapping):
        return {str(_plain(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, set | frozenset):  # which have no order
        return sorted((_plain(item) for item in value), key=repr)
    if isinstance(value, Task):
        return _plain(value.describe())
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if callable(value):
        return _name(value)
    name = getattr(value, "name", None)
    return name if isinstance(name, str) else _text(value)
