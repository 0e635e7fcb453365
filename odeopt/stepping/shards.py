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
        return torch.Size(self.mesh.size(axis) for axis, divides in enumerate(self._divides) if divides).numel()

    @property
    def holds_tensors(self) -> bool:
        """Whether this process, as each, holds some of the tensors along the first axis, and the whole of them."""
        pieces = [placement for placement in self.placements if not placement.is_replicate()]
        n, n_shards = self.shape[:1].numel(), self.n_shards
        # the first processes take as many as they can, all alike
        return not pieces or (len(pieces) == 1 and pieces[0].is_shard(0) and -(-n // n_shards) * (n_shards - 1) < n)

    @property
    def _divides(self) -> tuple[bool, ...]:
        """For each axis of the mesh, True if the processes along it hold pieces, and not copies."""
        # not `is_shard`, which is False of the pieces of pieces that fully_shard makes after tensor parallelism
        return tuple(not placement.is_replicate() for placement in self.placements)

    def add_up(self, sums: Tensor) -> Tensor:
        """All-reduce over the processes that hold the pieces, in place: the one thing that they tell each other."""
        for axis, divides in enumerate(self._divides):
            if divides:
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
        """Wholes of tensors of which this process holds pieces, in one exchange of all processes that share them.

        Args:
            pieces: Each with the first one of its axes that are the parameter's.
        """
        n = len(self.shape)
        last = tuple(range(-n, 0))
        lasts = [x.movedim(tuple(range(axis, axis + n)), last) for x, axis in pieces]
        flat = [x.reshape(x.shape[: x.ndim - n].numel(), *x.shape[x.ndim - n :]) for x in lasts]
        wholes = self.whole(torch.cat(flat), 1).full_tensor().split([len(x) for x in flat])
        return [
            whole.reshape(*x.shape[: x.ndim - n], *self.shape).movedim(last, tuple(range(axis, axis + n))).to(x.dtype)
            for whole, x, (_, axis) in zip(wholes, lasts, pieces, strict=True)
        ]

    def whole(self, local: Tensor, axis: int, n_axes: int | None = None) -> Tensor:
        """Wrap this process's piece of a state whose axes from ``axis`` on are those of the parameter, or the first."""
        if self.mesh is None:
            return local
        from torch.distributed.tensor import DTensor

        axes = self.shape[:n_axes]
        shape = torch.Size((*local.shape[:axis], *axes, *local.shape[axis + len(axes) :]))
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
