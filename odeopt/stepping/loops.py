"""The step of a bucket: eagerly, in chunks that stay in cache, or with kernels for what is done per coordinate."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple, Self

import torch
from torch import Tensor

from odeopt.rules.base import UpdateRule, checked
from odeopt.rules.rows import Rows
from odeopt.stepping.buckets import Bucket

if TYPE_CHECKING:
    from odeopt.stepping.triton.step import TritonKernels


class StepOptions(NamedTuple):
    """Options of a step, beside gradients and state: 0-d tensors, or numbers for the step in C.

    Attributes:
        lr: Multiplier of the update.
        decay: Decoupled weight decay per unit of ``lr``; None for none.
        progress: Fraction of the run that is done; None where unknown.
        maximize: Whether to climb.
    """

    lr: Tensor | float
    decay: Tensor | float | None = None
    progress: Tensor | float | None = None
    maximize: bool = False


class Piece(NamedTuple):
    """Some of the rows or columns of a bucket.

    Attributes:
        rows: Their layout.
        grad: Gradient, shape ``(n_rows, n_columns)``.
        theta: Parameter, likewise.
        state: State, rows first.
        columns: Axis of the columns in each field of the state; None for a field that a tensor holds once.
        shape: Shape of the bucket's first tensor, for rules that are called per tensor.
        is_staged: Whether the rule takes its stages one by one; else it is called.
    """

    rows: Rows
    grad: Tensor
    theta: Tensor
    state: NamedTuple
    columns: tuple[int | None, ...]
    shape: torch.Size
    is_staged: bool

    def of(self, rows: Tensor) -> Self:
        """Take some of the rows, each of which is a whole tensor."""
        state = type(self.state)(*(x[rows] for x in self.state))
        return self._replace(grad=self.grad[rows], theta=self.theta[rows], state=state)


def step_bucket(rule: UpdateRule, bucket: Bucket, options: StepOptions, kernels: TritonKernels | None = None) -> None:
    """Step every tensor of a bucket that has a finite gradient, and count those whose gradient is not finite.

    Args:
        rule: The rule, on the device of the bucket.
        bucket: Parameters and state; both change in place.
        options: The step's factors.
        kernels: Kernels of this rule and bucket for the parts of a staged step that are done per coordinate; without
            any the step is taken in tensor operations.
    """
    if bucket.is_gathered:
        for whole in bucket.wholes(rule):
            step_bucket(rule, whole, options)
            del whole  # which is large
        return
    grad, theta, has_grad = bucket.load()
    is_staged = rule.is_staged and not bucket.is_whole
    piece = Piece(bucket.rows, grad, theta, bucket.state, bucket.columns, bucket.shapes[0], is_staged)
    kernels = kernels if kernels is not None and kernels.can_take(grad, theta) else None
    chunks = [] if kernels is not None else list(_chunks(rule, bucket, piece))
    broken, shared = None, None
    for stage in range(rule.n_stages if is_staged else 1):
        if kernels is not None:
            sums = kernels.sums(stage, grad, theta, shared, options)
        else:
            sums = [_sums(rule, stage, chunk, shared, options) for chunk in chunks]
            # chunks of columns are parts of one row, chunks of rows are not
            sums = piece.rows.sum(torch.cat(sums)) if bucket.is_packed else torch.stack(sums).sum(0)
        sums = bucket.add_up(sums)
        broken = sums[:, :1] if stage == 0 else broken
        shared = _shared(rule, stage, piece, sums, shared, options) if is_staged else None
    moves = has_grad & (broken == 0)
    bucket.n_skipped += has_grad & (broken > 0)
    if kernels is not None:
        kernels.move(grad, theta, shared, moves, options)
    # where every tensor moves no mask is needed; on a CPU that is known without a host synchronisation
    needs_mask = not bucket.is_on_host or not bool(moves.all())
    for chunk in chunks:
        # matrices are costly, and without a gradient they stay
        theta, state = _moved(rule, chunk if bucket.taken is None else chunk.of(bucket.taken), shared, options)
        mask = chunk.rows.broadcast(moves) if needs_mask else None
        for old, new in zip((chunk.theta, *chunk.state), (theta, *state), strict=True):
            _write(old, new if bucket.taken is None else old.index_copy(0, bucket.taken, new.to(old.dtype)), mask)
    bucket.store()


# -------------------- parts of a step, as functions of tensors


def _sums(rule: UpdateRule, stage: int, piece: Piece, shared: NamedTuple | None, options: StepOptions) -> Tensor:
    """Sums of one stage for each row; those of the first one after a count of rows that are not finite."""
    rows, grad = piece.rows, _gradient(piece, options)
    sums = [_is_broken(grad)] if stage == 0 else []
    if piece.is_staged:
        state = _wide(piece.state, grad.dtype)
        features, shared = rows.broadcast(rows.features), rows.broadcast(shared)
        sums.append(rule.statistics(stage, grad, state, features, shared, piece.theta))
    return torch.cat(sums, dim=-1)


def _shared(
    rule: UpdateRule, stage: int, piece: Piece, sums: Tensor, shared: NamedTuple | None, options: StepOptions
) -> NamedTuple:
    """Numbers that the coordinates of each tensor share after a stage, from :func:`_sums` added up over rows."""
    fields = (piece.rows.first(x) if axis is None else None for x, axis in zip(piece.state, piece.columns, strict=True))
    sums = sums[:, 1:] if stage == 0 else sums
    state = type(piece.state)(*fields)
    return rule.coefficients(stage, sums, state, piece.rows.features, shared, options.progress)


def _moved(
    rule: UpdateRule, piece: Piece, shared: NamedTuple | None, options: StepOptions
) -> tuple[Tensor, NamedTuple]:
    """Parameters and state after the step."""
    grad, theta = _gradient(piece, options), piece.theta.to(piece.rows.features.dtype)
    state = _wide(piece.state, grad.dtype)
    if piece.is_staged:
        update, state = rule.advance(grad, state, piece.rows.broadcast(shared))
    elif rule.crosses_coordinates:
        # the step of a gradient that is not finite is thrown away, but an adaptive solver would stumble over it
        update, state = _stepped_whole(rule, piece, torch.where(grad.isfinite(), grad, 0.0), state, theta, options)
    else:
        update, state = checked(rule, grad, rule(grad, state, param=theta, progress=options.progress))
    if options.decay is not None:
        theta = theta * (1 - options.lr * options.decay)
    return theta + options.lr * update, state


def _stepped_whole(rule, piece: Piece, grad: Tensor, state: NamedTuple, theta: Tensor, options: StepOptions) -> tuple:
    """Update and next state of whole tensors of one shape, which a staged rule takes as a batch."""
    signals = {"shape": piece.shape, "progress": options.progress}
    if rule.is_staged:
        return rule(grad, state, param=theta, **signals)
    # others step one by one, as they see it elsewhere: an adaptive solver chooses one step size for a batch
    steps = []
    for k, own in enumerate(grad):
        step = rule(own, type(state)(*(x[k] for x in state)), param=theta[k], **signals)
        steps.append(checked(rule, own, step))
    updates, states = zip(*steps, strict=True)
    return torch.stack(updates), type(states[0])(*map(torch.stack, zip(*states, strict=True)))


def _write(old: Tensor, new: Tensor, moves: Tensor | None) -> None:
    """Write a field of the state where its row ``moves``; everywhere if that is None."""
    if old.numel() > 0:
        if moves is not None:
            new = torch.where(moves.reshape(-1, *[1] * (old.dim() - 1)), new, old)
        old.copy_(new)


def _gradient(piece: Piece, options: StepOptions) -> Tensor:
    grad = piece.grad.to(piece.rows.features.dtype)
    return -grad if options.maximize else grad


def _is_broken(grad: Tensor) -> Tensor:
    """One for each row with an infinity or a NaN, zero for the others; shape ``(n_rows, 1)``."""
    if grad.shape[-1] == 0:  # an empty row has no largest number
        return grad.sum(-1, keepdim=True)
    largest = torch.linalg.vector_norm(grad, torch.inf, dim=-1, keepdim=True)
    return largest.isfinite().logical_not().to(grad.dtype)


def _wide(state: NamedTuple, dtype: torch.dtype) -> NamedTuple:
    """State in the dtype that the step is computed in, where it is kept in a narrower one."""
    return type(state)(*(x.to(dtype) if x.dtype in (torch.bfloat16, torch.float16) else x for x in state))


def _chunks(rule: UpdateRule, bucket: Bucket, piece: Piece) -> Iterator[Piece]:
    """Pieces whose temporaries stay in the cache of a CPU; on other devices each would cost launches."""
    n_rows, n_columns = piece.grad.shape
    is_whole = rule.crosses_coordinates and not piece.is_staged
    size = rule.chunk_size * torch.get_num_threads()
    if is_whole or bucket.device.type != "cpu" or n_rows * n_columns <= size:
        yield piece
        return
    along, n, length = (0, n_rows, max(1, size // n_columns)) if bucket.is_packed else (1, n_columns, size)
    for start, stop in pairwise((*range(0, n, length), n)):

        def cut(x: Tensor, axis: int | None, start=start, stop=stop) -> Tensor:
            if axis is None:  # common to the chunks of a row: all read it as it was, the last one writes it
                return x if stop == n else x.clone()
            return x.narrow(axis, start, stop - start)

        axes = [0] * len(piece.columns) if bucket.is_packed else piece.columns
        rows = piece.rows.part(slice(start, stop)) if bucket.is_packed else piece.rows
        state = type(piece.state)(*map(cut, piece.state, axes))
        yield piece._replace(rows=rows, grad=cut(piece.grad, along), theta=cut(piece.theta, along), state=state)
