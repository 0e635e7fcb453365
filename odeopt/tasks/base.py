"""The interface every family of tasks stands behind."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from odeopt.checks import require
from odeopt.modes import outside_inference_mode

from .fingerprint import are_alike, digest
from .random import check_dtype, normal

Params = dict[str, Tensor]
Batch = tuple[Tensor, ...]
_HELD_OUT = 1 << 40  # where the steps of held-out batches start, which no run reaches
FINGERPRINT_SEED = 1_000_033  # neither meta-training nor its validation has it by default
_DISTANCES = (0.0, 0.1, 1.0, 10.0)  # from the start, at which a fingerprint looks at the loss


class Task(ABC):
    r"""A distribution of optimization problems, drawn and evaluated many at a time.

    .. math:: \theta_0 \sim p_0, \qquad f_t(\theta) = \ell(\theta, \mathrm{batch}_t)

    A problem is named by a global index and a seed: its initialisation and its batches are functions of
    ``(index, step, seed)`` (see :mod:`odeopt.tasks.random`), so any split of the indices over batches or
    processes, and any resumed run, draws the same problems. The first axis of every tensor is the axis of
    problems, and each problem's loss depends on its own slice alone, so
    ``torch.autograd.grad(loss.sum(), params)`` gives every problem's gradient at once.

    To write a task, subclass and implement :meth:`init_params`, :meth:`sample_batch` and :meth:`loss`; give
    ``super().__init__`` what :meth:`describe` should report.

    Args:
        device: Where the tasks live.
        dtype: Of parameters and losses, ``torch.float32`` or ``torch.float64``.
        **config: Arguments that tell this distribution from others of its class; values that JSON can hold.

    Attributes:
        tables: Names of the parameters that are looked up row by row, such as the weights of ``nn.Embedding``.

    Raises:
        ValueError: If ``dtype`` is another one.
    """

    tables: frozenset[str] = frozenset()

    def __init__(
        self, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **config: Any
    ) -> None:
        check_dtype(dtype)
        self.device = torch.device(device)
        self.dtype = dtype
        self.config = config

    @abstractmethod
    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Draw where each problem starts.

        Args:
            indices: Global numbers of the problems, int64, shape ``(n_tasks,)``.
            seed: Names, together with an index, one problem.

        Returns:
            Parameters by name, each of shape ``(n_tasks, *shape)``.
        """

    @abstractmethod
    def sample_batch(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw the data that one step of each problem sees.

        Args:
            indices: Global numbers of the problems, int64, shape ``(n_tasks,)``.
            step: Step of the run, from 0.
            seed: As in :meth:`init_params`.

        Returns:
            A tuple of tensors with first axis ``n_tasks``; empty where a problem has no data.
        """

    def sample_held_out(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw data that no step of a run trains on, for a held-out loss.

        By default a batch of a step that no run reaches: held out where batches never repeat, and the same as ever
        where they always do. A task with finitely many examples draws from those that the problem does not train on.

        Args:
            indices: Global numbers of the problems, int64, shape ``(n_tasks,)``.
            step: Number of the held-out batch, from 0.
            seed: As in :meth:`init_params`.

        Returns:
            As :meth:`sample_batch`.
        """
        return self.sample_batch(indices, step + _HELD_OUT, seed)

    def checked_loss(self, params: Params, batch: Batch) -> Tensor:
        """:meth:`loss`, or a ValueError where it is not one number per problem: other shapes would be broadcast."""
        loss, n_tasks = self.loss(params, batch), len(next(iter(params.values())))
        is_right = isinstance(loss, Tensor) and loss.shape == (n_tasks,)
        found = tuple(loss.shape) if isinstance(loss, Tensor) else loss
        require(is_right, "loss", found, f"of shape (n_tasks,), here ({n_tasks},), as {type(self).__name__} returns it")
        return loss

    def accuracy(self, params: Params) -> Tensor | None:
        """Fraction of held-out examples that are classified right, ``(n_tasks,)``; None where the task measures none.

        Args:
            params: Parameters by name, each of shape ``(n_tasks, *shape)``.
        """
        return None

    @abstractmethod
    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Evaluate the problems.

        Args:
            params: Parameters by name, each of shape ``(n_tasks, *shape)``.
            batch: What :meth:`sample_batch` returned for the same problems.

        Returns:
            Losses, shape ``(n_tasks,)``; twice differentiable in ``params``.
        """

    @property
    def param_shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter of one problem, by name."""
        first = torch.zeros(1, dtype=torch.int64, device=self.device)
        return {name: value.shape[1:] for name, value in self.init_params(first, 0).items()}

    def describe(self) -> dict[str, Any]:
        """Return the class and the configuration, in values that JSON can hold."""
        return {"task": type(self).__name__, **self.config}

    def fingerprint(self) -> dict[str, Any]:
        """Return what tells this distribution from another: what the task holds, and some of its losses.

        The digest is of the class and of all attributes (:func:`~odeopt.tasks.fingerprint.digest`); a class with a
        cache leaves it out of ``__getstate__``. Code has no digest that lasts, so what a function does shows in
        losses: of two problems at four steps, near their start and far from it. A function that differs elsewhere
        only, or by less than a thousandth of the loss, is taken for the same.

        Returns:
            ``content``, the digest, and ``losses``, a list of numbers. The same on every device, the losses to
            rounding; :func:`~odeopt.tasks.fingerprint.are_alike` compares two.

        Warns:
            RuntimeWarning: If the same problem, step and seed gave two losses: then nothing is said of functions.
        """
        content = digest([type(self), self.__getstate__()])
        found, again = ({"content": content, "losses": self._some_losses()} for _ in range(2))
        if not are_alike(found, again):
            warnings.warn(
                f"Task {self!r} gives other losses for the same indices, step and seed each time, so no run on it can "
                "be resumed exactly, nor told from one with other functions.",
                RuntimeWarning,
                stacklevel=2,
            )
            return {"content": content, "losses": []}
        return found

    def _some_losses(self) -> list[float]:
        indices, losses = torch.arange(2, device=self.device), []
        start = self.init_params(indices, FINGERPRINT_SEED)
        for step, distance in enumerate(_DISTANCES):
            params = {}
            for name, value in start.items():
                away = normal(indices, value.shape[1:], seed=step, stream=f"fingerprint/{name}", dtype=torch.float64)
                params[name] = value + (distance * away).to(value)
            losses += self.loss(params, self.sample_batch(indices, step, FINGERPRINT_SEED)).detach().double().tolist()
        return losses

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor, module and task, in containers too, to ``device``, in place, and return the task."""
        device = torch.empty(0, device=device).device  # fails before anything is moved where there is none
        for name, value in vars(self).items():
            setattr(self, name, tree_map_only((Tensor, nn.Module, Task), lambda x: x.to(device), value))
        self.device = device
        return self

    def _indices(self, indices: Tensor) -> Tensor:
        """Bring the indices to the device of the task; :mod:`~odeopt.tasks.random` checks them."""
        return indices.to(self.device) if isinstance(indices, Tensor) else indices

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in self.config.items())})"


def flattened(param: Tensor) -> Tensor:
    """Parameter of several tasks, the first axis, as one row for each."""
    return param.reshape(len(param), param.shape[1:].numel())


@dataclass(eq=False, repr=False, kw_only=True)
class DeclaredTask(Task):
    """A task whose arguments are the fields of a dataclass, which :meth:`describe` reports.

    To write one, derive a dataclass with a field for each further argument, and check them in ``__post_init__`` before
    calling this one's.

    Args:
        device: See :class:`Task`.
        dtype: See :class:`Task`.
    """

    device: torch.device | str = "cpu"
    dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        super().__init__(device=self.device, dtype=self.dtype, **declared(self))


def declared(task: Task) -> dict[str, Any]:
    """Fields of a task that is a dataclass, by name, other than where and in which precision it computes."""
    names = (field.name for field in fields(task) if field.name not in ("device", "dtype"))
    return {name: getattr(task, name) for name in names}


class FixedBatchTask(Task):
    """Problems whose data are the same at every step: drawn once, then remembered.

    Only the last draw is kept, which is what a run over steps asks for.
    """

    _last: tuple[Tensor, int, Batch] | None = None

    @abstractmethod
    def draw(self, indices: Tensor, seed: int) -> Batch:
        """Draw the data of each problem; as :meth:`Task.sample_batch`, for all steps."""

    @outside_inference_mode  # what is remembered serves later runs, too
    def sample_batch(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Return the data of each problem, whatever the step; see :meth:`Task.sample_batch`."""
        if self._last is not None:
            last_indices, last_seed, batch = self._last
            if seed == last_seed and indices.device == last_indices.device and torch.equal(indices, last_indices):
                return batch
        batch = self.draw(indices, seed)
        # A copy of the indices: the caller may write the next ones into the same tensor.
        self._last = (indices.clone(), seed, batch)
        return batch

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_last"}

    def to(self, device: torch.device | str) -> Self:
        """Move to ``device`` and forget the last draw; see :meth:`Task.to`."""
        self._last = None
        return super().to(device)
