"""Parameters packed into rows, so that one call steps many tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.modes import has_values
from odeopt.rules.base import UpdateRule, initial_state, state_dtype
from odeopt.rules.rows import Rows
from odeopt.stepping.checks import extent_of, overlapping
from odeopt.stepping.shards import Shard

# Most coordinates per row of a packed bucket, and fewest; the last row of a tensor is filled up with zeros.
ROW, SHORT_ROW = 1024, 16
_N_MASKS = 64  # that are kept


class Bucket:
    """One tensor, or many packed, as rows of coordinates: ``(n_rows, *, n_columns, *)``.

    A bucket of one tensor is a single row, and works on gradient and parameter in place. Several tensors are packed
    into rows of :data:`ROW` coordinates, shorter ones where all tensors are smaller, of which no two tensors share one;
    one call copies their gradients and values in, and one the values out again.

    A stack is a parameter that holds several tensors of one shape, along its first axis. They are stepped as if each
    were a parameter; their state lies in the shape of the stack, or has that axis in front where a tensor holds it
    once. A tensor whose gradient is zero throughout counts as one without a gradient.

    Args:
        rule: The rule, on the device of the parameters.
        params: Parameters of one device, dtype and mesh.
        dtype: Of the state per coordinate; None for float32 or better.
        is_whole: Whether the rule steps each tensor as a whole; all have one shape then, and a row each, unless each
            process holds a piece of them: then the bucket holds the pieces, and :meth:`wholes` gathers one after the
            other.
        is_stack: Whether each parameter is a stack, of which this process holds at least one tensor.
        n_blocks: Blocks of rows of which each tensor consists.
        features: Of the tensors, as :meth:`odeopt.rules.base.StagedRule.features` gives them, if they are at hand.

    Attributes:
        params: The parameters.
        shards: Placement of each of them.
        is_gathered: Whether they are stepped as wholes, and each process holds pieces.
        counts: Number of tensors of each parameter: one, but for stacks.
        shapes: Shape of each tensor, across all processes; or of each of its blocks.
        tensors: Of each tensor its parameter, and its number there.
        dtype: Dtype in which the step is computed.
        state: State of the rule in rows.
        rows: The layout.
        columns: For each field of the state, which axis the columns are; None where the field holds one value per row.
        has_values: Whether there are numbers, as :func:`odeopt.modes.has_values` tells.
        is_on_host: Whether there are, and reading them takes no host synchronisation.
        taken: Of wholes, the rows that have a gradient, as :meth:`load` found them; None for all.
        n_skipped: Gradients skipped because they were not finite, int64, ``(n_tensors, 1)``.
    """

    def __init__(
        self,
        rule: UpdateRule,
        params: Sequence[Tensor],
        *,
        dtype: torch.dtype | None = None,
        is_whole: bool = False,
        is_stack: bool = False,
        n_blocks: int = 1,
        features: Tensor | None = None,
    ) -> None:
        self.params, self.is_whole, self.is_stack, self.n_blocks = list(params), is_whole, is_stack, n_blocks
        self.shards = [Shard.of(param) for param in self.params]
        self.is_gathered = is_whole and not is_stack and self.shards[0].n_shards > 1
        self._kept_dtype = dtype
        local = self._local_params()
        self.device, self.param_dtype, self.dtype = local[0].device, local[0].dtype, state_dtype(local[0].dtype)
        self.has_values = has_values(local[0])
        self.is_on_host = self.has_values and self.device.type == "cpu"
        # an empty piece has no row of its own, and one that is not contiguous has to be copied
        self.is_packed = len(params) > 1 or local[0].numel() == 0 or not local[0].is_contiguous()
        self.is_packed |= is_stack and not is_whole  # a chunk of columns would cut all of its tensors at once
        self.is_shared = self.shards[0].mesh is not None
        self.counts = [param.shape[0] if is_stack else 1 for param in local]
        self._shapes = [param.shape for param in local]
        shapes = [block_shape(shard.shape[1:] if is_stack else shard.shape, n_blocks) for shard in self.shards]
        self.shapes = [shape for shape, n in zip(shapes, self.counts, strict=True) for _ in range(n)]
        starts = [shard.first_tensor if is_stack else 0 for shard in self.shards]
        places = zip(self.params, starts, self.counts, strict=True)
        self.tensors = [(param, start + k) for param, start, n in places for k in range(n)]
        sizes = [param.numel() // n for param, n in zip(local, self.counts, strict=True) for _ in range(n)]
        has_rows = self.is_packed and (not is_whole or self.is_gathered)
        n_columns = min(ROW, max(SHORT_ROW, 1 << (max(sizes) - 1).bit_length())) if has_rows else sizes[0]
        n_rows = [max(1, -(-n // n_columns)) for n in sizes] if has_rows else [1] * len(sizes)
        self._sizes, self._starts = sizes, [0, *accumulate(n_rows)]
        # of the tensors of each parameter
        self._numbers = [range(*pair) for pair in pairwise([0, *accumulate(self.counts)])]
        self.shape = (self._starts[-1], n_columns)
        if features is None:
            options = {"n_blocks": n_blocks} if n_blocks > 1 else {}
            features = [rule.features(shape, **options) if rule.is_staged else () for shape in self.shapes]
            features = torch.tensor(features, dtype=self.dtype, device="cpu").to(self.device)  # whatever the default is
        self.rows = Rows.packed(features, n_rows) if has_rows else Rows(features)
        self.n_skipped = torch.zeros((len(sizes), 1), dtype=torch.int64, device=self.device)
        self._masks: dict[tuple[bool, ...], tuple[Tensor, Tensor | None]] = {}
        self.taken: Tensor | None = None
        self._addresses: list[int] = []
        self._overlaps = False

        self._type, self._axes, template = state_fields(rule, local[0].new_zeros(3, dtype=self.dtype), dtype)
        self._storage: dict[str, Tensor] = {}
        for name, axis in self._axes.items():
            shape, kept = template[name]
            shape = (self.shape[0], *shape) if axis is None else (*shape[:axis], *self.shape, *shape[axis + 1 :])
            self._storage[name] = torch.zeros(shape, dtype=kept, device=self.device)
        # with the rows first
        self.state = self._type(*(x.movedim(self._axes[name] or 0, 0) for name, x in self._storage.items()))
        self.columns = tuple(None if axis is None else axis + 1 for axis in self._axes.values())
        self.grad = self.theta = None  # of a packed bucket, from the first step on that needs them

    def has_moved(self) -> bool:
        """Return True if a parameter has changed its shape, device or dtype, or can no longer be stepped as it is.

        Those that are copied into rows must not have come to share memory: the last one written would undo the others.
        """
        if not self.is_packed and not self.shards[0].local(self.params[0]).is_contiguous():
            return True
        for param, shard in zip(self.params, self.shards, strict=True):
            if param.device != self.device or param.dtype != self.param_dtype or param.shape != shard.shape:
                return True
        if len(self.params) > 1 and self.has_values and not self.is_shared:
            addresses = [*map(Tensor.data_ptr, self.params)]
            if addresses != self._addresses:
                self._addresses, self._overlaps = addresses, bool(overlapping(map(extent_of, self.params)))
            return self._overlaps
        return False

    def load(self) -> tuple[Tensor, Tensor, Tensor]:
        """Bring gradients and parameters into rows.

        Returns:
            Gradient and parameter, shape ``(n_rows, n_columns)``; and which tensors have a gradient, of a stack those
            where it is not zero throughout, bool, ``(n_tensors, 1)``.
        """
        grads, params = [param.grad for param in self.params], self._local_params()
        has_grad = tuple(grad is not None for grad in grads)
        if self.is_shared:
            pairs = zip(self.shards, grads, strict=True)
            grads = [None if grad is None else shard.local(grad) for shard, grad in pairs]
        mask, self.taken = self._mask(has_grad)
        if self.is_stack:
            pairs = zip(grads, self.counts, strict=True)
            driven = [mask.new_zeros(n) if grad is None else are_driven(grad, n) for grad, n in pairs]
            mask = torch.cat(driven).unsqueeze(-1)
        if not self.is_packed:
            n = self.counts[0]
            return grads[0].reshape(n, -1), params[0].view(n, -1), mask
        if self.grad is None:
            self.grad, self.theta = (torch.zeros(self.shape, dtype=self.dtype, device=self.device) for _ in range(2))
            parts = range(len(self.params))
            self._grads, self._thetas = ([self._view(x, i, 0) for i in parts] for x in (self.grad, self.theta))
        torch._foreach_copy_(self._thetas, params)
        if all(has_grad):
            torch._foreach_copy_(self._grads, grads)
        else:
            there = [(view, grad) for view, grad in zip(self._grads, grads, strict=True) if grad is not None]
            torch._foreach_copy_(*map(list, zip(*there, strict=True)))
        return self.grad, self.theta, mask

    def store(self) -> None:
        """Bring the parameters back out of the rows, rounded once."""
        if self.is_packed:
            torch._foreach_copy_(self._local_params(), self._thetas)

    def wholes(self, rule: UpdateRule) -> Iterator[Bucket]:
        """Gather one parameter that has a gradient after the other, with its state, into a bucket to be stepped.

        All processes that share the parameters take the same step, and keep their pieces of what came of it.
        """
        along = {name: axis for name, axis in self._axes.items() if axis is not None}
        once = self._axes.keys() - along
        for index, (shard, param) in enumerate(zip(self.shards, self.params, strict=True)):
            if param.grad is None:
                continue
            pieces = [(shard.local(x).detach(), 0) for x in (param, param.grad)]
            pieces += [(self._view(self._storage[name], index, axis), axis) for name, axis in along.items()]
            theta, theta.grad, *state = shard.gathered(pieces)
            features = self.rows.features[index : index + 1]
            options = {"dtype": self._kept_dtype, "is_whole": True, "n_blocks": self.n_blocks, "features": features}
            bucket = Bucket(rule, [theta], **options)
            held = {name: self._field(name, index) for name in once}
            bucket.set_state(0, held | dict(zip(along, state, strict=True)))
            yield bucket
            pieces[0][0].copy_(shard.local(theta))
            self.set_state(index, bucket.views(0))
            self.n_skipped[index] += bucket.n_skipped[0]
            del theta, state, bucket  # before the next ones are gathered

    def add_up(self, sums: Tensor) -> Tensor:
        """All-reduce over the processes that share the parameters; each tensor of a stack belongs to one of them."""
        return sums if self.is_stack else self.shards[0].add_up(sums)

    def views(self, index: int) -> dict[str, Tensor]:
        """State of one parameter under the rule's names, in the shape of the parameter; it changes with each step."""
        return {name: self._field(name, index) for name in self._axes}

    def flat_views(self, number: int) -> dict[str, Tensor]:
        """State of one tensor, flattened; of what it holds once a copy in each of its rows."""
        (start, end), views = self._starts[number : number + 2], {}
        for name, axis in self._axes.items():
            rows = self._storage[name].narrow(axis or 0, start, end - start)
            views[name] = rows if axis is None else rows.flatten(axis, axis + 1).narrow(axis, 0, self._sizes[number])
        return views

    def shapes_of(self, index: int) -> list[torch.Size]:
        """Shapes of the tensors of one parameter, or of their blocks, as the rule takes them."""
        return [self.shapes[number] for number in self._numbers[index]]

    def rule_states(self, index: int) -> list[NamedTuple]:
        """State of each tensor of one parameter as the rule takes it, flattened, in the dtype of the step."""
        states = []
        for number in self._numbers[index]:
            views = self.flat_views(number).items()
            wide = {name: x[0] if self._axes[name] is None else x.to(self.dtype) for name, x in views}
            states.append(self._type(**wide))
        return states

    def set_state(self, index: int, state: dict[str, Tensor]) -> None:
        """Overwrite the state of one parameter."""
        for name, axis in self._axes.items():
            value = state[name].detach()
            if axis is None:
                value = self.shards[index].per_tensor.local(value).unsqueeze(1) if self.is_stack else value
                self._rows_of(self._storage[name], index).copy_(value.to(self.device))
            else:
                self._view(self._storage[name], index, axis).copy_(self.shards[index].local(value, axis))

    def init_state(self, index: int, rule: UpdateRule) -> None:
        """Set the state of one parameter to the initial one."""
        if rule.starts_at_zero:  # as the storage does
            return
        shard = self.shards[index]
        param = shard.local(self.params[index]).detach()
        if self.is_gathered:  # pieces of what a rule makes of the whole
            whole = Bucket(rule, shard.gathered([(param, 0)]), dtype=self._kept_dtype, is_whole=True)
            whole.init_state(0, rule)
            self.set_state(index, whole.views(0))
            return
        tensors = param.reshape(self.counts[index], -1).to(self.dtype)
        for number, tensor in zip(self._numbers[index], tensors, strict=True):
            for view, value in zip(self.flat_views(number).values(), rule.init_state(tensor), strict=True):
                view.copy_(value)

    def _local_params(self) -> list[Tensor]:
        """This process's pieces of the parameters."""
        return [shard.local(param).detach() for shard, param in zip(self.shards, self.params, strict=True)]

    def _field(self, name: str, index: int) -> Tensor:
        """Field of the state of one parameter, as :meth:`views` gives it."""
        shard, storage, axis = self.shards[index], self._storage[name], self._axes[name]
        if axis is not None:
            return shard.whole(self._view(storage, index, axis), axis)
        held = self._rows_of(storage, index)[:, 0]
        return shard.per_tensor.whole(held, 0) if self.is_stack else held[0]

    def _view(self, storage: Tensor, index: int, axis: int) -> Tensor:
        """Coordinates of one parameter in its own shape; ``axis`` is that of the rows, columns follow."""
        shape, n = self._shapes[index], self.counts[index]
        flat = self._rows_of(storage, index, axis).flatten(axis + 1, axis + 2).narrow(axis + 1, 0, shape.numel() // n)
        return flat.view((*flat.shape[:axis], *shape, *flat.shape[axis + 2 :]))

    def _rows_of(self, storage: Tensor, index: int, axis: int = 0) -> Tensor:
        """Rows of one parameter, ``axis``, as two axes: its tensors, and the rows of each."""
        numbers = self._numbers[index]
        start, end = self._starts[numbers.start], self._starts[numbers.stop]
        return storage.narrow(axis, start, end - start).unflatten(axis, (len(numbers), -1))

    def _mask(self, has_grad: tuple[bool, ...]) -> tuple[Tensor, Tensor | None]:
        """Which tensors have a gradient; and their rows, if only those are to be stepped."""
        if has_grad in self._masks:
            return self._masks[has_grad]
        of_tensors = [has for has, n in zip(has_grad, self.counts, strict=True) for _ in range(n)]
        if all(of_tensors):  # on the device itself, without a host synchronisation
            mask, taken = torch.ones((len(of_tensors), 1), dtype=torch.bool, device=self.device), None
        else:
            mask = torch.tensor(of_tensors, device="cpu")
            taken = mask.nonzero()[:, 0].to(self.device) if self.is_whole and not self.is_gathered else None
            mask = mask.to(self.device).unsqueeze(-1)
        if len(self._masks) < _N_MASKS:  # for good: captured graphs read them
            self._masks[has_grad] = mask, taken
        return mask, taken


def block_shape(shape: torch.Size, n_blocks: int) -> torch.Size:
    """Shape of each of the blocks of rows of a tensor."""
    return shape if n_blocks == 1 else torch.Size((shape[0] // n_blocks, *shape[1:]))


def are_driven(grad: Tensor, n: int) -> Tensor:
    """Tell which of the ``n`` tensors of a stack have a gradient that is not zero throughout, bool, ``(n,)``."""
    return torch.linalg.vector_norm(grad.reshape(n, -1), torch.inf, dim=-1) != 0


def state_template(
    rule: UpdateRule, param: Tensor, dtype: torch.dtype | None = None, *, is_stack: bool = False
) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of each field of the state of a parameter, as :meth:`Bucket.views` gives them."""
    like = torch.zeros(3, dtype=state_dtype(param.dtype), device=param.device)
    _, axes, template = state_fields(rule, like, dtype)
    for name, axis in axes.items():
        shape, kept = template[name]
        if axis is not None:
            template[name] = torch.Size((*shape[:axis], *param.shape, *shape[axis + 1 :])), kept
        elif is_stack:
            template[name] = torch.Size((param.shape[0], *shape)), kept
    return template


def state_fields(
    rule: UpdateRule, like: Tensor, dtype: torch.dtype | None
) -> tuple[type, dict[str, int | None], dict[str, tuple[torch.Size, torch.dtype]]]:
    """Type of the rule's state; the axis of each field along coordinates, None for once per tensor; shape and dtype."""
    n, axes, template = like.numel(), {}, {}
    state, larger = initial_state(rule, like), rule.init_state(like.new_zeros(n + 2))
    for name, a, b in zip(state._fields, state, larger, strict=True):
        along = [axis for axis, sizes in enumerate(zip(a.shape, b.shape, strict=True)) if sizes == (n, n + 2)]
        axes[name] = along[0] if along else None
        is_narrowed = along and dtype is not None and a.is_floating_point()
        template[name] = a.shape, dtype if is_narrowed else a.dtype
    return type(state), axes, template
