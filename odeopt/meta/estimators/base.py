"""The interface of estimators of the meta-gradient."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

from torch import Tensor

from odeopt.meta.distributed import ALONE, World
from odeopt.meta.objective import MetaObjective
from odeopt.rules.base import UpdateRule
from odeopt.tasks.base import Task


@dataclass(frozen=True, kw_only=True)
class Estimator(ABC):
    """Fills the ``.grad`` of a rule's parameters with an estimate of the gradient of the meta-loss.

    A subclass is a frozen dataclass too: its fields are its options, which :class:`~odeopt.meta.MetaConfig`,
    checkpoints and artefacts describe by name.

    Attributes:
        key: Name in configuration files; ``"module:Class"`` where there is none.
        is_stateful: Whether runs go on from call to call, each of which then has to have the same task and horizon.
        is_compilable: Whether every run is differentiated, so that compiled steps save time.
    """

    key: ClassVar[str] = ""
    is_stateful: ClassVar[bool] = False
    is_compilable: ClassVar[bool] = False

    @abstractmethod
    def gradients(
        self,
        rule: UpdateRule,
        task: Task,
        objective: MetaObjective,
        *,
        indices: Tensor,
        horizon: int,
        seed: int,
        update_scale: float = 1.0,
        tells_horizon: bool = True,
        world: World = ALONE,
    ) -> Iterator[Tensor]:
        """Run one batch of tasks over ``horizon`` steps.

        Where several ranks work on the batch, each is given its own tasks, and the estimator decides what they
        exchange: gradient and meta-loss are those of the whole batch, the same on every rank.

        Args:
            rule: The rule; its gradients are set, its parameters left alone. The caller updates them and clears
                the gradients between two items.
            task: Where losses come from.
            objective: The meta-loss.
            indices: Global numbers of this rank's tasks, shape ``(n_tasks,)``.
            horizon: Number of optimizee steps.
            seed: Seed of initial parameters and batches.
            update_scale: Factor on the updates.
            tells_horizon: Whether the rule is told how far along the horizon it is.
            world: The ranks that work on the batch.

        Yields:
            The mean meta-loss over the tasks of all ranks, a detached 0-d tensor, each time a gradient is ready.
        """

    def fresh(self) -> Self:
        """Return an estimator of the same options without any run under way; itself where it carries none."""
        return self

    def state_dict(self, world: World = ALONE) -> dict[str, Any]:
        """Return what is carried from call to call, for a checkpoint; every rank has to ask. Nothing by default."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what :meth:`state_dict` returned."""
        return

    def describe(self) -> dict[str, Any]:
        """Return the class and the options as a configuration file has them, in values that JSON can hold."""
        options = {field.name: _plain(getattr(self, field.name)) for field in fields(self)}
        return {"class": self.key or f"{type(self).__module__}:{type(self).__qualname__}", **options}


def _plain(value: Any) -> Any:
    if isinstance(value, Estimator):
        return value.describe()
    return list(value) if isinstance(value, tuple) else value
