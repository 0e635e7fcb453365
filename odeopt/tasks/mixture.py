"""Distributions over tasks: what a rule is meta-trained on that is to serve more than one."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from .base import Task
from .random import uniform
from .rescaled import Rescaled


@dataclass(frozen=True)
class Family:
    """Tasks of one class.

    Attributes:
        make: Builds a task from keyword arguments.
        fixed: Arguments that all tasks have in common.
        choices: Arguments that differ: for each a list of values, which are equally likely and drawn independently.
        share: Weight of the family in the mixture.
        name: What :meth:`Mixture.describe` calls it; the name of ``make`` by default.
        log_range: Where positive, half of the family's tasks come :class:`~odeopt.tasks.rescaled.Rescaled` by so much.
    """

    make: Callable[..., Task]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    choices: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    share: float = 1.0
    log_range: float = 0.0
    name: str = ""

    def __post_init__(self) -> None:
        for name, values in self.choices.items():
            if not isinstance(values, Sequence) or isinstance(values, str) or len(values) == 0:
                raise ValueError(f"Parameter `choices` should hold lists of values. Found `{name} = {values!r}`.")
            if name in self.fixed:
                raise ValueError(f"Parameter `choices` should name what is not fixed. Found `{name}` in both.")
        for name, value, is_right, wanted in (
            ("share", self.share, 0 < self.share < float("inf"), "a positive number"),
            ("log_range", self.log_range, 0 <= self.log_range < float("inf"), "a number of at least 0"),
        ):
            if not is_right:
                raise ValueError(f"Parameter `{name}` should be {wanted}. Found `{name} = {value!r}`.")


class Draw(NamedTuple):
    """What a mixture draws: some problems of one task, and how long they are worked on.

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
        >>> mixture = Mixture([
        ...     Family(RandomQuadratic, choices={"dim": [5, 10, 20]}),
        ...     Family(MLPClassification, {"dataset": "digits"}, {"activation": ["tanh", "relu"]}),
        ... ])
        >>> mixture.draw(0, seed=0).task
    """

    def __init__(
        self,
        families: Sequence[Family],
        *,
        horizons: Sequence[int] = (30, 300),
        told: float = 0.7,
        n_problems: int = 6,
        coordinates: float = 4e4,
        work: float = 5e6,
        device: torch.device | str = "cpu",
    ) -> None:
        for name, value, is_right, wanted in (
            ("families", families, len(families) > 0, "at least one family"),
            ("horizons", horizons, len(horizons) == 2 and 1 <= horizons[0] <= horizons[1], "two rising numbers"),
            ("told", told, 0 <= told <= 1, "between 0 and 1"),
            ("n_problems", n_problems, n_problems >= 1, "positive"),
            ("coordinates", coordinates, coordinates > 0, "positive"),
            ("work", work, work > 0, "positive"),
        ):
            if not is_right:
                raise ValueError(f"Parameter `{name}` should be {wanted}. Found `{name} = {value!r}`.")
        self.families, self.device = tuple(families), torch.device(device)
        self.horizons, self.told, self.n_problems = tuple(horizons), told, n_problems
        self.coordinates, self.work = coordinates, work
        self._built: dict[tuple, Task] = {}

    def draw(self, number: int, seed: int) -> Draw:
        """Draw problems of one task.

        Args:
            number: Number of the draw, from 0.
            seed: Names, together with the number, one draw.

        Returns:
            The task, its problems and a horizon; tasks that agree in everything are one object.
        """
        index = torch.tensor([number])

        def unit(name: str) -> float:
            return uniform(index, (1,), seed=seed, stream=f"mixture/{name}", dtype=torch.float64).item()

        bounds = list(itertools.accumulate(family.share for family in self.families))
        u = bounds[-1] * unit("family")
        which = next((k for k, bound in enumerate(bounds) if u < bound), len(bounds) - 1)
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
        if key not in self._built:
            options = {name: values[k] for (name, values), k in zip(family.choices.items(), picked, strict=True)}
            task = family.make(**family.fixed, **options, device=self.device)
            self._built[key] = Rescaled(task, family.log_range) if is_rescaled else task
        return self._built[key]

    def describe(self) -> dict[str, Any]:
        """Return the families, in values that JSON can hold."""
        families = []
        for family in self.families:
            described = {"task": family.name or getattr(family.make, "__name__", repr(family.make))}
            for name, values in family.fixed.items():
                described[name] = _plain(values)
            described["choices"] = {name: [_plain(v) for v in values] for name, values in family.choices.items()}
            families.append(described | {"share": family.share, "log_range": family.log_range})
        numbers = {name: getattr(self, name) for name in ("told", "n_problems", "coordinates", "work")}
        return {"task": type(self).__name__, "families": families, "horizons": list(self.horizons)} | numbers

    def to(self, device: torch.device | str) -> Self:
        """Move every task to ``device``, in place, and return the mixture."""
        self.device = torch.device(device)
        for task in self._built.values():
            task.to(device)
        return self


def _plain(value: Any) -> Any:
    """A value that JSON can hold: the name of what has one, lists for tuples."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return getattr(value, "name", value)
