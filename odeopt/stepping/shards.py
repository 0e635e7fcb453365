"""Parameters of which each process holds a part: ``DTensor``, as ``torch.distributed.fsdp.fully_shard`` makes them."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Shard(NamedTuple):
    """Mesh and placements of a parameter.

    Attributes:
        shape: Shape of the whole parameter.
        mesh: Mesh of the processes that share it; None for a parameter of this process alone.
        placements: Placement along each axis of the mesh.
    """

    shape: torch.Size
    mesh: object | None = None
    placements: tuple = ()

    @classmethod
    def of(cls, param: Tensor) -> Shard:
        """Read the mesh and the placements of ``param``."""
        if is_distributed(param):
            return cls(param.shape, param.device_mesh, tuple(param.placements))
        return cls(param.shape)

    @property
    def group_key(self) -> tuple:
        """Key that parameters share which are stepped, and have their sums all-reduced, together."""
        return (self.mesh, self._divides)

    @property
    def n_shards(self) -> int:
        """Number of pieces."""
        return torch.Size(self.mesh.size(axis) for axis in self._axes).numel()

    @property
    def holds_tensors(self) -> bool:
        """Whether this process, as each, holds some of the tensors along the first axis, and the whole of them."""
        axes = self._axes
        return not axes or (
            len(axes) == 1 and self.placements[axes[0]].is_shard(0) and self._most * (self.n_shards - 1) < self.shape[0]
        )

    @property
    def first_tensor(self) -> int:
        """Number of the first one that it holds."""
        return self._most * self.mesh.get_local_rank(self._axes[0]) if self._axes else 0

    @property
    def per_tensor(self) -> Shard:
        """Where what each of them has once lies, of shape ``(n, k)``."""
        return Shard(self.shape[:1], self.mesh, self.placements) if self._axes else Shard(self.shape[:1])

    @property
    def _axes(self) -> list[int]:
        """Axes of the mesh along which several processes hold pieces."""
        return [axis for axis, divides in enumerate(self._divides) if divides and self.mesh.size(axis) > 1]

    @property
    def _most(self) -> int:
        """Tensors along the first axis that a process holds at most: the first processes take as many, all alike."""
        return -(-self.shape[0] // self.n_shards)

    @property
    def _divides(self) -> tuple[bool, ...]:
        """For each axis of the mesh, True if the processes along it hold pieces, and not copies."""
        # not `is_shard`, which is False of the pieces of pieces that fully_shard makes after tensor parallelism
        return tuple(not placement.is_replicate() for placement in self.placements)

    def add_up(self, sums: Tensor) -> Tensor:
        """All-reduce over the processes that hold the pieces, in place: the one thing that they tell each other."""
        for axis in self._axes:
            torch.distributed.all_reduce(sums, group=self.mesh.get_group(axis))
        return sums

    def local(self, tensor: Tensor, axis: int = 0) -> Tensor:
        """This process's piece of the parameter, or of a tensor whose axes from ``axis`` on are the parameter's.

        A tensor of other placements, such as a gradient not yet summed, is redistributed to those of the parameter; one
        that is no ``DTensor`` beside a parameter that is one is the whole of it.
        """
        if self.mesh is None:
            return tensor
        if not is_distributed(tensor):
            from torch.distributed.tensor import DTensor, Replicate

            copies = [Replicate()] * len(self.placements)
            tensor = DTensor.from_local(tensor, self.mesh, copies, run_check=False)
        placements = self.piece_placements(axis)
        if tuple(tensor.placements) != placements:
            tensor = tensor.redistribute(self.mesh, placements)
        return tensor.to_local()

    def gathered(self, pieces: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
        """Wholes of tensors of which this process holds pieces, those of one dtype in one exchange.

        All processes that share them have to ask for them.

        Args:
            pieces: Each with the first one of its axes that are the parameter's.
        """
        n, wholes = len(self.shape), {}
        last = tuple(range(-n, 0))
        lasts = [x.movedim(tuple(range(axis, axis + n)), last) for x, axis in pieces]
        for dtype in dict.fromkeys(x.dtype for x in lasts):
            alike = [k for k, x in enumerate(lasts) if x.dtype == dtype]
            flat = [lasts[k].reshape(lasts[k].shape[:-n].numel(), *lasts[k].shape[-n:]) for k in alike]
            found = self.whole(torch.cat(flat), 1).full_tensor().split([len(x) for x in flat])
            wholes |= dict(zip(alike, found, strict=True))
        return [
            wholes[k].reshape(*lasts[k].shape[:-n], *self.shape).movedim(last, tuple(range(axis, axis + n)))
            for k, (_, axis) in enumerate(pieces)
        ]

    def whole(self, local: Tensor, axis: int) -> Tensor:
        """Wrap this process's piece of a state whose axes from ``axis`` on are those of the parameter."""
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor

        shape = torch.Size((*local.shape[:axis], *self.shape, *local.shape[axis + len(self.shape) :]))
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            local, self.mesh, self.piece_placements(axis), run_check=False, shape=shape, stride=stride
        )

    def piece_placements(self, axis: int) -> tuple:
        """Placements of a tensor whose axes from ``axis`` on are the parameter's."""
        return tuple(_shifted(placement, axis) for placement in self.placements) if axis else self.placements


def is_distributed(tensor: Tensor) -> bool:
    """Return True for a ``DTensor``."""
    # what has not been imported has made no tensors; importing it would double the time that `import odeopt` takes
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def _shifted(placement, axis: int):
    """The same placement where ``axis`` further axes stand in front."""
    if placement.is_replicate():
        return placement
    order = {"split_factor": placement.split_factor} if hasattr(placement, "split_factor") else {}
    return type(placement)(placement.dim + axis, **order)
