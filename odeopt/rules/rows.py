"""Rows of coordinates, which the steps of the optimizer and those of meta-training share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Rows(NamedTuple):
    """Rows of coordinates, packed per tensor; any leading axes are independent tasks.

    Attributes:
        features: Numbers that the rule derives from each tensor's shape, shape ``(n_tensors, n_features)``.
        tensor: Number of the tensor of each row, int64, shape ``(n_rows,)``; None where one tensor is one row.
        offsets: First row of each tensor, and the number of rows, int64, shape ``(n_tensors + 1,)``; None likewise.
        members: One where a tensor, of the first axis, has a row, of the second; None where rows are too many for it.
    """

    features: Tensor
    tensor: Tensor | None = None
    offsets: Tensor | None = None
    members: Tensor | None = None

    @classmethod
    def packed(cls, features: Tensor, n_rows: Sequence[int], *, has_tasks: bool = False) -> Rows:
        """Lay out tensors of ``n_rows`` rows each, for sums of tasks too if ``has_tasks``."""
        counts = torch.tensor(n_rows, device="cpu")
        numbers = torch.arange(len(counts), device="cpu")
        tensor = torch.repeat_interleave(numbers, counts, output_size=sum(n_rows)).to(features.device)
        if has_tasks:
            return cls(features, tensor, members=F.one_hot(tensor, len(n_rows)).mT.to(features.dtype))
        return cls(features, tensor, torch.cat((counts.new_zeros(1), counts.cumsum(0))).to(features.device))

    def sum(self, x: Tensor) -> Tensor:
        """Add up the rows of each tensor: ``(*batch, n_rows, k)`` to ``(*batch, n_tensors, k)``, in a fixed order."""
        if self.tensor is None:
            return x
        if self.members is not None:  # a product takes batches, and is compiled and differentiated like all else
            return self.members @ x
        # index_add_ adds in any order on CUDA: a run could not be repeated bit for bit
        return torch.segment_reduce(x, "sum", offsets=self.offsets, axis=0, unsafe=True)

    def broadcast(self, x: Tensor | NamedTuple | None) -> Tensor | NamedTuple | None:
        """Broadcast to the rows of each tensor, each field: ``(*batch, n_tensors, k)`` to ``(*batch, n_rows, k)``."""
        if x is None or self.tensor is None:
            return x
        if isinstance(x, tuple):
            return type(x)(*map(self.broadcast, x))
        return x.index_select(-2, self.tensor)

    def first(self, x: Tensor) -> Tensor:
        """Value of each tensor, which all of its rows hold: ``(n_rows, k)`` to ``(n_tensors, k)``."""
        return x if self.offsets is None else x[self.offsets[:-1]]

    def part(self, rows: slice) -> Rows:
        """Layout of some of the rows, for :meth:`broadcast`."""
        return self if self.tensor is None else self._replace(tensor=self.tensor[rows])
