"""The step of a bucket: as compiled loops over its coordinates, or eagerly in chunks that stay in cache."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.rules.base import UpdateRule
from odeopt.stepping.buckets import Bucket, Rows
from odeopt.stepping.checks import warn_caller

# Coordinates under which the whole step is compiled as one: less to launch, but what a tensor shares is worked out
# again for each vector of its coordinates, which beyond this costs more than launching every stage by itself.
_ONE_CALL = 2**16

_GUARDS = ("SHAPE_ENV", "TENSOR_MATCH", "GRAD_MODE", "DEFAULT_DEVICE", "GLOBAL_STATE")

_COMPILED: dict[tuple, Callable] = {}
_WORKED: set[tuple] = set()
_FAILED: set[tuple] = set()


class StepOptions(NamedTuple):
    """Options of a step, beside gradients and state.

    Attributes:
        lr: Factor on the update, 0-d.
        decay: Decoupled weight decay per unit of ``lr``, 0-d; None for none.
        progress: Fraction of the run that is done, 0-d; None where unknown.
        maximize: Whether to climb.
    """

    lr: Tensor
    decay: Tensor | None = None
    progress: Tensor | None = None
    maximize: bool = False


class Piece(NamedTuple):
    """Some of the rows or columns of a bucket.

    Attributes:
        rows: Their layout.
        grad: Gradient, shape ``(n_rows, n_columns)``.
        theta: Parameter, likewise.
        state: State, rows first.
        columns: Axis of the columns in each field of the state; None for a field that a tensor holds once.
        shape: Shape of the bucket's first parameter, for rules that are called per tensor.
        is_staged: Whether the rule takes its stages one by one; else it is called.
    """

    rows: Rows
    grad: Tensor
    theta: Tensor
    state: NamedTuple
    columns: tuple[int | None, ...]
    shape: torch.Size
    is_staged: bool


def step_bucket(rule: UpdateRule, bucket: Bucket, options: StepOptions, *, compile: bool) -> None:
    """Step every tensor of a bucket that has a finite gradient, and count those whose gradient is not finite.

    Args:
        rule: The rule, on the device of the bucket; staged, or one that does not cross coordinates.
        bucket: Parameters and state; both change in place.
        options: The step's factors.
        compile: Whether to compile the loops. Where that fails a warning says so, once for each kind of bucket, and
            the step is done eagerly.
    """
    grad, theta, has_grad = bucket.load()
    is_staged = rule.is_staged and not bucket.is_whole
    piece = Piece(bucket.rows, grad, theta, bucket.state, bucket.columns, bucket.params[0].shape, is_staged)
    is_compiled = compile and not bucket.is_whole
    is_done, sums = _step_compiled(rule, bucket, piece, has_grad, options) if is_compiled else (False, ())
    if not is_done:
        _step_in_chunks(rule, bucket, piece, has_grad, options, sums)
    bucket.store()


# -------------------- parts of a step, as functions of tensors


def _sums(rule: UpdateRule, stage: int, piece: Piece, shared: NamedTuple | None, options: StepOptions) -> Tensor:
    """Sums of one stage for each row; those of the first one after a count of rows that are not finite."""
    rows, grad = piece.rows, _gradient(piece, options)
    sums = [_is_broken(grad)] if stage == 0 else []
    if piece.is_staged:
        state = _wide(piece.state, grad.dtype)
        sums.append(
            rule.statistics(stage, grad, state, rows.spread(rows.features), rows.spread_all(shared), piece.theta)
        )
    return torch.cat(sums, dim=-1)


def _shared(
    rule: UpdateRule, stage: int, piece: Piece, sums: Tensor, shared: NamedTuple | None, options: StepOptions
) -> NamedTuple:
    """Numbers that the coordinates of each tensor share after a stage, from :func:`_sums` added up over rows."""
    fields = (piece.rows.first(x) if axis is None else None for x, axis in zip(piece.state, piece.columns, strict=True))
    sums = sums[:, 1:] if stage == 0 else sums
    state = type(piece.state)(*fields)
    return rule.coefficients(stage, sums, state, piece.rows.features, shared, options.progress)


def _stage(
    rule: UpdateRule, stage: int, piece: Piece, shared: NamedTuple | None, options: StepOptions
) -> tuple[Tensor, NamedTuple | None]:
    sums = piece.rows.sum(_sums(rule, stage, piece, shared, options))
    return sums[:, :1], _shared(rule, stage, piece, sums, shared, options) if piece.is_staged else None


def _moved(
    rule: UpdateRule, piece: Piece, shared: NamedTuple | None, options: StepOptions
) -> tuple[Tensor, NamedTuple]:
    """Parameters and state after the step."""
    grad, theta = _gradient(piece, options), piece.theta.to(piece.rows.features.dtype)
    state = _wide(piece.state, grad.dtype)
    if piece.is_staged:
        update, state = rule.advance(grad, state, piece.rows.spread_all(shared))
    else:
        state = type(state)(*(torch.stack(x, dim=1) if isinstance(x, tuple) else x for x in state))
        if rule.crosses_coordinates:
            # the step of a gradient that is not finite is thrown away, but an adaptive solver would stumble over it
            update, state = _stepped_whole(rule, piece, torch.where(grad.isfinite(), grad, 0.0), state, theta, options)
        else:
            update, state = rule(grad, state, param=theta, progress=options.progress)
    if options.decay is not None:
        theta = theta * (1 - options.lr * options.decay)
    return theta + options.lr * update, state


def _stepped_whole(rule, piece: Piece, grad: Tensor, state: NamedTuple, theta: Tensor, options: StepOptions) -> tuple:
    """Update and next state of whole tensors of one shape, which a staged rule takes as a batch."""
    signals = {"shape": piece.shape, "progress": options.progress}
    if rule.is_staged:
        return rule(grad, state, param=theta, **signals)
    # others step one, as they see it elsewhere: an adaptive solver chooses one step size for a batch
    update, state = rule(grad[0], type(state)(*(x[0] for x in state)), param=theta[0], **signals)
    return update, type(state)(*(x.unsqueeze(0) for x in state))


def _write(old: Tensor | tuple, new: Tensor | tuple, moves: Tensor | None) -> None:
    """Write a field of the state where its row ``moves``; everywhere if that is None."""
    if isinstance(old, tuple):
        new = new if isinstance(new, tuple) else new.unbind(1)
        for old_part, new_part in zip(old, new, strict=True):
            _write(old_part, new_part, moves)
    elif old.numel() > 0:
        if moves is not None:
            new = torch.where(moves.reshape(-1, *[1] * (old.dim() - 1)), new, old)
        old.copy_(new)


def _move(
    rule: UpdateRule,
    piece: Piece,
    shared: NamedTuple | None,
    options: StepOptions,
    broken: Tensor,
    has_grad: Tensor,
    n_skipped: Tensor,
) -> None:
    """The last part as a compiled loop takes it: everything written in place, by masks and not by branches."""
    moves = piece.rows.spread(has_grad & (broken == 0))
    theta, state = _moved(rule, piece, shared, options)
    n_skipped.add_(has_grad & (broken > 0))
    _write(piece.theta, theta, moves)
    for old, new in zip(piece.state, state, strict=True):
        _write(old, new, moves)


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
    return type(state)(
        *(tuple(_widened(y, dtype) for y in x) if isinstance(x, tuple) else _widened(x, dtype) for x in state)
    )


def _widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.dtype in (torch.bfloat16, torch.float16) else x


# -------------------- eagerly, in chunks


def _step_in_chunks(
    rule: UpdateRule,
    bucket: Bucket,
    piece: Piece,
    has_grad: Tensor,
    options: StepOptions,
    known: tuple[Tensor, ...],
) -> None:
    """Step chunk by chunk; ``known`` are the sums of the first stages, where they have been all-reduced already."""
    chunks, is_packed = list(_chunks(rule, bucket, piece)), bucket.is_packed
    broken, shared = None, None
    for stage in range(rule.n_stages if piece.is_staged else 1):
        if stage < len(known):
            sums = known[stage]
        else:
            sums = [_sums(rule, stage, chunk, shared, options) for chunk in chunks]
            # chunks of columns are parts of one row, chunks of rows are not
            sums = bucket.add_up(piece.rows.sum(torch.cat(sums)) if is_packed else torch.stack(sums).sum(0))
        broken = sums[:, :1] if stage == 0 else broken
        shared = _shared(rule, stage, piece, sums, shared, options) if piece.is_staged else None
    moves = has_grad & (broken == 0)
    bucket.n_skipped += has_grad & (broken > 0)
    # where every tensor moves no mask is needed; on a CPU that is known without a host synchronisation
    needs_mask = not bucket.is_on_host or not bool(moves[: len(bucket.params)].all())
    for chunk in chunks:
        theta, state = _moved(rule, chunk, shared, options)
        mask = chunk.rows.spread(moves) if needs_mask else None
        _write(chunk.theta, theta, mask)
        for old, new in zip(chunk.state, state, strict=True):
            _write(old, new, mask)


def _chunks(rule: UpdateRule, bucket: Bucket, piece: Piece) -> Iterator[Piece]:
    """Pieces whose temporaries stay in the cache of a CPU; on other devices each would cost launches."""
    n_rows, n_columns = piece.grad.shape
    is_whole = rule.crosses_coordinates and not piece.is_staged
    size = rule.chunk_size * torch.get_num_threads()
    if is_whole or bucket.device.type != "cpu" or n_rows * n_columns <= size:
        yield piece
        return
    along, n, length = (0, n_rows, max(1, size // n_columns)) if bucket.is_packed else (1, n_columns, size)
    # alike in size: for a last one of size one a loop would be compiled again
    n_chunks = -(-n // length)
    for start, stop in pairwise(n * i // n_chunks for i in range(n_chunks + 1)):

        def cut(x: Tensor | tuple, axis: int | None, start=start, stop=stop) -> Tensor | tuple:
            if isinstance(x, tuple):
                return tuple(cut(y, axis) for y in x)
            if axis is None:  # common to the chunks of a row: all read it as it was, the last one writes it
                return x if stop == n else x.clone()
            return x.narrow(axis, start, stop - start)

        axes = [0] * len(piece.columns) if bucket.is_packed else piece.columns
        yield Piece(
            piece.rows.part(slice(start, stop)) if bucket.is_packed else piece.rows,
            cut(piece.grad, along),
            cut(piece.theta, along),
            type(piece.state)(*map(cut, piece.state, axes)),
            piece.columns,
            piece.shape,
            piece.is_staged,
        )


# -------------------- compiled


def _step_compiled(
    rule: UpdateRule, bucket: Bucket, piece: Piece, has_grad: Tensor, options: StepOptions
) -> tuple[bool, tuple[Tensor, ...]]:
    """Run the step as compiled loops, and warn where compiling fails.

    Returns:
        Whether the step is done; and the sums that have been all-reduced so far: a process that fails later, and alone,
        must not ask the others for them again.
    """
    key = _kind(rule, bucket, options)
    if key in _FAILED:
        return False, ()
    # Sizes that happen to be equal in the first model are not to be taken for one size.
    is_first = key not in _WORKED
    tracing = torch.fx.experimental._config.patch(use_duck_shape=False) if is_first else nullcontext()
    broken, shared, exchanged = None, None, ()
    try:
        with tracing:
            if _is_one_call(rule, bucket):
                _compiled(_step, key)(rule, piece, options, has_grad, bucket.n_skipped)
                failure = None
            else:
                for stage in range(rule.n_stages if rule.is_staged else 1):
                    if bucket.is_shared:
                        sums = bucket.add_up(_compiled(_row_sums, key, stage)(rule, stage, piece, shared, options))
                        exchanged = (*exchanged, sums)
                        if rule.is_staged:
                            shared = _compiled(_shared, key, stage)(rule, stage, piece, sums, shared, options)
                    else:
                        sums, shared = _compiled(_stage, key, stage)(rule, stage, piece, shared, options)
                    broken = sums[:, :1] if stage == 0 else broken
                failure = _move_compiled(rule, bucket, piece, shared, options, broken, has_grad, key)
    except Exception as error:
        if not is_first and not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        _give_up(key, error)
        return False, exchanged
    if failure is None:
        _WORKED.add(key)
    else:
        _give_up(key, failure)
    return True, exchanged


def _give_up(key: tuple, failure: Exception) -> None:
    """Step this kind of bucket eagerly from now on."""
    _FAILED.add(key)
    reason = str(failure).strip().splitlines()
    warn_caller(
        f"The step of {key[0].__name__} could not be compiled and runs eagerly, several times slower "
        f"(`compile=False` does so without a warning). {type(failure).__name__}: {reason[0] if reason else ''}"
    )


def _move_compiled(rule, bucket: Bucket, piece: Piece, shared, options, broken, has_grad, key) -> Exception | None:
    """Move chunk by chunk; return the error of one beside the first that did not compile, and was moved eagerly."""
    move, n_skipped, failure = _compiled(_move, key), bucket.n_skipped, None
    for number, part in enumerate([piece] if rule.fuses else _chunks(rule, bucket, piece)):
        arguments = rule, part, shared, options, broken, has_grad, n_skipped
        try:
            move(*arguments)
        except Exception as error:
            if number == 0:  # nothing has been written so far, and the whole step can be done again
                raise
            move, failure = _move, error
            move(*arguments)
        n_skipped = torch.zeros_like(n_skipped)  # counted once
    return failure


def _step(rule: UpdateRule, piece: Piece, options: StepOptions, has_grad: Tensor, n_skipped: Tensor) -> None:
    broken, shared = None, None
    for stage in range(rule.n_stages if rule.is_staged else 1):
        counts, shared = _stage(rule, stage, piece, shared, options)
        broken = counts if stage == 0 else broken
    _move(rule, piece, shared, options, broken, has_grad, n_skipped)


def _row_sums(rule, stage: int, piece: Piece, shared, options: StepOptions) -> Tensor:
    return piece.rows.sum(_sums(rule, stage, piece, shared, options))


def _compiled(function: Callable, key: tuple, stage: int = -1) -> Callable:
    """A compiled copy of a function for one kind of bucket."""
    name = (*key, function.__name__, stage)
    if name not in _COMPILED:
        # A code object of its own: torch.compile counts recompilations by code object, and would give up on a
        # process that uses a few rules, dtypes and layouts.
        code = function.__code__.replace(co_name=f"{function.__name__}_{len(_COMPILED)}")
        copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__)
        _COMPILED[name] = torch.compile(
            copy, dynamic=True, fullgraph=True, options=_compiler_options(is_small=function is _step)
        )
    return _COMPILED[name]


@lru_cache(maxsize=2)
def _compiler_options(*, is_small: bool) -> dict:
    """Options of the installed compiler that make a small step cheaper to launch, and a large one to compute."""
    options = {"size_asserts": False, "cpp.enable_floating_point_contract_flag": "fast"}
    if is_small:  # waking a second thread takes longer than the loops do
        options["cpp.threads"] = 1
    options = {name: value for name, value in options.items() if name in torch._inductor.list_options()}
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 9):
        # What Python objects hold, _kind tells apart; looking at all of it again takes a fifth of a small step.
        options["guard_filter_fn"] = lambda guards: [guard.guard_type in _GUARDS for guard in guards]
    return options


def _kind(rule: UpdateRule, bucket: Bucket, options: StepOptions) -> tuple:
    """Key of compiled code: all that it depends on. Sizes, weights and the values of the options do not enter."""
    flags = options.decay is None, options.progress is None, options.maximize, options.lr.device.type
    state = tuple(x[0].dtype if isinstance(x, tuple) else x.dtype for x in bucket.state)
    dtypes = bucket.param_dtype, bucket.dtype, state
    layout = bucket.is_packed, bucket.is_shared, _is_one_call(rule, bucket)
    return type(rule), _constants(rule), layout, bucket.device.type, dtypes, flags


def _is_one_call(rule: UpdateRule, bucket: Bucket) -> bool:
    return rule.fuses and not bucket.is_shared and math.prod(bucket.shape) < _ONE_CALL


@lru_cache(maxsize=64)
def _constants(rule: UpdateRule) -> str:
    """Constants of compiled code of a rule: its configuration, and plain attributes of all its parts."""
    parts = [
        (path, type(part).__qualname__, [(name, x) for name, x in vars(part).items() if _is_plain(x)])
        for path, part in rule.named_modules()
    ]
    # as text, which keeps its hash, and in which True is not 1
    return json.dumps(rule.config, sort_keys=True, default=repr) + repr(parts)


def _is_plain(x: object) -> bool:
    if isinstance(x, tuple | list):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, bool | int | float | str)
