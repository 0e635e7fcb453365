"""Several processes that train one rule together: their exchanges, and the report of one that is lost.

Nothing here is needed by, or changes, what a single process computes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class LostRankError(RuntimeError):
    """Another rank stopped or cannot be reached, so this one cannot go on."""


class World:
    """The processes that train a rule together; this class is a single one, which exchanges nothing.

    An estimator of the meta-gradient decides what it exchanges through :meth:`average` and :meth:`gather`; every
    rank has to make the same calls in the same order, and gets the same numbers, to the bit.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """True on the rank that writes files and prints."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Part of ``n`` things that falls to this rank: contiguous, in the order of the ranks, sizes within one."""
        return slice(self.rank * n // self.size, (self.rank + 1) * n // self.size)

    def average(self, tensors: Sequence[Tensor], weight: float) -> list[Tensor]:
        """Mean over the ranks, each counted ``weight`` times.

        Args:
            tensors: Of the same shapes on every rank.
            weight: Positive; the number of tasks that this rank's tensors are a mean over, say.

        Returns:
            Tensors of the same shapes, dtypes and devices.

        Raises:
            LostRankError: If another rank is gone, as in every method that exchanges.
        """
        return list(tensors)

    def gather(self, values: Tensor) -> Tensor:
        """Concatenate the ranks' values along the first axis, which may be of different length on each."""
        return values

    def broadcast(self, value: T) -> T:
        """Return the first rank's value on every rank."""
        return value

    def broadcast_result(self, make: Callable[[], T]) -> T:
        """Call ``make`` on the first rank; return its value, or raise its exception, on every rank."""
        return make()

    def local_first(self, make: Callable[[], T]) -> T:
        """Call ``make`` on one process of each machine, then on the others, which find its files already there."""
        return make()


ALONE = World()


class Ranks(World):
    """The processes of torch.distributed's default group.

    Numbers go where the group's backends can reach them: sums of tensors on a CUDA device through NCCL where there
    is one, all else through the CPU where the group has a backend for it.
    """

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        backends = dict(part.split(":") for part in dist.get_backend_config().split(","))
        self._has_nccl = backends.get("cuda") == "nccl"
        self._device = torch.device("cpu") if "cpu" in backends else torch.device("cuda", torch.cuda.current_device())

    def average(self, tensors, weight):
        # The weights go first: where they go through gloo, a lost rank is an error here; NCCL would hang in the sum.
        total = self._sum(torch.tensor(weight, dtype=torch.float64, device=self._device)).item()
        on_cuda = self._has_nccl and any(tensor.is_cuda for tensor in tensors)
        device = torch.device("cuda", torch.cuda.current_device()) if on_cuda else self._device
        packed = torch.cat([tensor.detach().flatten().to(device, torch.float64) for tensor in tensors])
        packed = self._sum(packed * weight) / total
        parts = packed.split([tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape).to(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, values):
        parts: list[Any] = [None] * self.size
        with _lost_rank_is_told(self.rank):
            dist.all_gather_object(parts, values.detach().cpu())
        return torch.cat(parts).to(values.device)

    def broadcast(self, value):
        box = [value if self.is_first else None]
        with _lost_rank_is_told(self.rank):
            dist.broadcast_object_list(box, src=0, device=self._device)
        return box[0]

    def broadcast_result(self, make):
        value = error = None
        if self.is_first:
            try:
                value = make()
            except Exception as caught:
                error = caught
        value, error = self.broadcast((value, error))
        if error is not None:
            raise error
        return value

    def local_first(self, make):
        is_first_here = (local_rank() or 0) == 0
        value = make() if is_first_here else None
        self.gather(torch.zeros(0))
        return value if is_first_here else make()

    def _sum(self, tensor: Tensor) -> Tensor:
        with _lost_rank_is_told(self.rank):
            dist.all_reduce(tensor)
        return tensor


def current_world() -> World:
    """Return the ranks of torch.distributed's default group; one process alone where there is none."""
    is_group = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    return Ranks() if is_group else ALONE


def local_rank() -> int | None:
    """Number of this process among those that ``torchrun`` started on this machine; None without ``torchrun``."""
    return int(os.environ["LOCAL_RANK"]) if "LOCAL_RANK" in os.environ else None


@contextmanager
def joined_world(device: torch.device, *, timeout: float) -> Iterator[World]:
    """Join the processes that ``torchrun`` started, if it did, for as long as the context lasts.

    Args:
        device: Where this process computes. Tensors on a CUDA device are exchanged through NCCL, all else
            through gloo.
        timeout: Seconds that a rank waits for the others before it counts them as lost.

    Yields:
        The ranks; a single process where ``torchrun`` started none beside it.

    Raises:
        LostRankError: If the others do not come within ``timeout``.
    """
    is_launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    if not is_launched or int(os.environ["WORLD_SIZE"]) < 2 or dist.is_initialized():
        yield current_world()
        return
    backend = "gloo"
    if device.type == "cuda":
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    with _lost_rank_is_told(int(os.environ["RANK"])):
        dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    try:
        yield current_world()
    finally:
        dist.destroy_process_group()


@contextmanager
def _lost_rank_is_told(rank: int) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what gloo, NCCL and the store raise are all of this kind
        # gloo begins with the place in its own source
        reason = re.sub(r"^\[[^]]*\] ?", "", str(error).strip()).partition("\n")[0]
        raise LostRankError(f"Rank {rank} noticed that another rank stopped or cannot be reached ({reason})") from error
