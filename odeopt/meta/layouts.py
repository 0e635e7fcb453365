"""Layouts of the parameters of a task while it is optimized: separate, or packed so that one call steps all."""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from odeopt.checks import require
from odeopt.rules.base import StagedRule, UpdateRule, checked
from odeopt.rules.rows import Rows
from odeopt.stepping import state_fields

# Coordinates per row at most: few enough that small tensors are not mostly padding, enough that rows cost little.
_ROW = 256

Params = dict[str, Tensor]
States = dict[str, NamedTuple]


class Separate:
    """Every parameter by itself, shape ``(n_tasks, n)``, stepped by a call of its own.

    A layout takes what is its own out of parameters and states by name. Where it lays several parameters into one
    tensor, that has the name of the first of them.

    Args:
        shapes: Shape of each parameter, ``(n_tasks, *shape)``.
        tables: Names of the parameters that are looked up row by row.
        n_matrices: Number of all matrices of the task, by which the steps of matrices fall.
    """

    def __init__(self, shapes: dict[str, torch.Size], tables: Collection[str] = (), n_matrices: int = 1) -> None:
        self.shapes, self.tables, self.n_matrices = shapes, tables, n_matrices
        self.name = next(iter(shapes))

    def pack(self, params: Params, states: States) -> tuple[Params, States]:
        """Bring flat parameters ``(n_tasks, n)`` and their states into the form that the steps take."""
        return {name: params[name] for name in self.shapes}, {name: states[name] for name in self.shapes}

    def unpack(self, packed: Params, states: States) -> tuple[Params, States]:
        """The reverse of :meth:`pack`."""
        return self.pack(packed, states)

    def views(self, packed: Params) -> Params:
        """Each parameter in its own shape, as functions of the packed ones."""
        return {name: packed[name].view(shape) for name, shape in self.shapes.items()}

    def placed(self, rule: UpdateRule, name: str) -> UpdateRule:
        """The rule as it steps the parameter ``name``."""
        if name in self.tables:
            return rule.for_tables()
        return rule.for_depth(self.n_matrices) if rule.is_staged and rule.is_whole(self.shapes[name][1:]) else rule

    def step(self, rule: UpdateRule, name: str, grad: Tensor, state: NamedTuple, param: Tensor, progress) -> tuple:
        """Update and next state of one packed parameter."""
        rule = rule.rule if isinstance(rule, CompiledSteps) else rule
        rule, shape = self.placed(rule, name), self.shapes[name][1:]
        return checked(rule, grad, rule(grad, state, param=param, shape=shape, progress=progress))


class Packed(Separate):
    """All parameters as one, shape ``(n_tasks, n_rows * n_columns)``; the last row of each is padded with zeros.

    A step then costs as many operations as that of a single parameter. The state lies in rows.

    Args:
        shapes: Shape of each parameter, ``(n_tasks, *shape)``.
        rule: The rule.
        like: A tensor of the dtype and device of the parameters.
        tables: Names of the parameters that are looked up row by row.
    """

    def __init__(
        self, shapes: dict[str, torch.Size], rule: StagedRule, like: Tensor, tables: Collection[str] = ()
    ) -> None:
        super().__init__(shapes, tables)
        self.type, self.axes, _ = state_fields(rule, like.new_zeros(3), None)
        sizes = [shape[1:].numel() for shape in shapes.values()]
        self.n_columns = min(_ROW, max(sizes)) if len(sizes) > 1 else sizes[0]
        n_rows = [-(-n // self.n_columns) for n in sizes]
        self.padding = [rows * self.n_columns - n for n, rows in zip(sizes, n_rows, strict=True)]
        self.pieces = [size for pair in zip(sizes, self.padding, strict=True) for size in pair]
        features = [self.placed(rule, name).features(shape[1:]) for name, shape in shapes.items()]
        features = torch.tensor(features, dtype=like.dtype, device=like.device)
        self.rows = Rows.packed(features, n_rows, has_tasks=True)

    def pack(self, params, states):
        fields = {}
        for name, axis in self.axes.items():
            values = [getattr(states[key], name) for key in self.shapes]
            if axis is None:
                fields[name] = torch.stack(values, 1)
            else:  # the state of a batch of tasks has an axis in front; the rows follow it
                in_line = self._join(values, axis + 1)
                fields[name] = in_line.unflatten(axis + 1, (-1, self.n_columns)).movedim(axis + 1, 1)
        flat = self._join([params[key] for key in self.shapes], 1)
        return {self.name: flat}, {self.name: self.type(**fields)}

    def unpack(self, packed, states):
        fields = []
        for value, axis in zip(states[self.name], self.axes.values(), strict=True):
            if axis is None:
                fields.append(value.unbind(1))
            else:
                fields.append(self._split(value.movedim(1, axis + 1).flatten(axis + 1, axis + 2), axis + 1))
        params = dict(zip(self.shapes, self._split(packed[self.name], 1), strict=True))
        return params, {
            key: self.type(*values) for key, values in zip(self.shapes, zip(*fields, strict=True), strict=True)
        }

    def views(self, packed):
        pieces = self._split(packed[self.name], 1)
        return {name: x.view(shape) for (name, shape), x in zip(self.shapes.items(), pieces, strict=True)}

    def step(self, rule, name, grad, state, param, progress):
        grad, param = (x.unflatten(1, (-1, self.n_columns)) for x in (grad, param))
        update, state = rule.forward_rows(grad, state, self.rows, param=param, progress=progress)
        return update.flatten(1, 2), state

    def _join(self, values: list[Tensor], axis: int) -> Tensor:
        """Lay tensors along an axis, with zeros between them."""
        n_after = values[0].dim() - 1 - axis
        padded = [F.pad(x, [0, 0] * n_after + [0, n]) for x, n in zip(values, self.padding, strict=True)]
        return torch.cat(padded, dim=axis)

    def _split(self, x: Tensor, axis: int) -> tuple[Tensor, ...]:
        return x.split(self.pieces, dim=axis)[::2]


class Stacked(Separate):
    """Parameters of one shape as one, shape ``(n_tasks, n_tensors, n)``: to the rule an axis of its batch."""

    def pack(self, params, states):
        own = ((params[name], states[name]) for name in self.shapes)
        param, state = tree_map(lambda *parts: torch.stack(parts, 1), *own)
        return {self.name: param}, {self.name: state}

    def unpack(self, packed, states):
        state = states[self.name]
        fields = zip(*(field.unbind(1) for field in state), strict=True)
        params = dict(zip(self.shapes, packed[self.name].unbind(1), strict=True))
        return params, {name: type(state)(*values) for name, values in zip(self.shapes, fields, strict=True)}

    def views(self, packed):
        return super().views(dict(zip(self.shapes, packed[self.name].unbind(1), strict=True)))


class Grouped(Separate):
    """Parameters in several layouts, each with some of them.

    Args:
        shapes: Shape of each parameter, ``(n_tasks, *shape)``, in the order of the task, which its loss may rely on.
        layouts: The layouts.
    """

    def __init__(self, shapes: dict[str, torch.Size], layouts: Sequence[Separate]) -> None:
        super().__init__(shapes)
        self.layouts = layouts

    def pack(self, params, states):
        params, states = zip(*(layout.pack(params, states) for layout in self.layouts), strict=True)
        return _merged(params), _merged(states)

    def unpack(self, packed, states):
        params, states = zip(*(layout.unpack(packed, states) for layout in self.layouts), strict=True)
        return super().pack(_merged(params), _merged(states))

    def views(self, packed):
        views = _merged(layout.views(packed) for layout in self.layouts)
        return {name: views[name] for name in self.shapes}

    def step(self, rule, name, grad, state, param, progress):
        layout = next(layout for layout in self.layouts if name in layout.shapes)
        return layout.step(rule, name, grad, state, param, progress)


def _merged(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: value for part in parts for name, value in part.items()}


class CompiledSteps:
    """A staged rule whose steps :func:`odeopt.unroll` takes through ``torch.compile``, forward and backward.

    What the steps of a rule cost beside the task's own loss is mostly memory traffic between elementwise operations;
    fused it falls to about half. Compiling takes a minute: once for the first step of a run, once for those
    after it, once without derivatives.

    Args:
        rule: The rule; trained, it is the one that changes.

    Raises:
        ValueError: If the rule is not staged, or has networks of positions, which the compiler cannot trace.

    Warns:
        RuntimeWarning: If nothing can be compiled here; the steps are then taken as they are.
    """

    def __init__(self, rule: UpdateRule) -> None:
        require(rule.is_staged, "rule", type(rule).__name__, "a staged rule where its steps are to be compiled")
        is_simple = not rule.stores_q
        require(is_simple, "rule", rule, "one without networks of positions where its steps are to be compiled")
        self.rule = rule
        self._compiled = torch.compile(rule.forward_rows, dynamic=True, fullgraph=True)

    def forward_rows(self, *args, **options) -> tuple[Tensor, NamedTuple]:
        """As :meth:`odeopt.rules.base.StagedRule.forward_rows`, compiled where that works."""
        try:
            return self._compiled(*args, **options)
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = str(error).strip().splitlines()
            warnings.warn(
                f"The steps of {type(self.rule).__name__} could not be compiled and are taken as they are, about half "
                f"as fast. {type(error).__name__}: {reason[0] if reason else ''}",
                RuntimeWarning,
                stacklevel=2,
            )
            self._compiled = self.rule.forward_rows
            return self._compiled(*args, **options)

    def init_state(self, param: Tensor) -> NamedTuple:
        """As :meth:`odeopt.UpdateRule.init_state`."""
        return self.rule.init_state(param)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the rule."""
        return self.rule.parameters()


def layout_for(
    rule: UpdateRule | CompiledSteps, shapes: dict[str, torch.Size], like: Tensor, tables: Collection[str] = ()
) -> Separate:
    """Layout in which ``rule`` steps parameters of these shapes fastest.

    Args:
        rule: The rule.
        shapes: Shape of each parameter, ``(n_tasks, *shape)``.
        like: A tensor of the dtype and device of the parameters.
        tables: Names of the parameters that are looked up row by row.
    """
    staged = rule.rule if isinstance(rule, CompiledSteps) else rule
    matrices = (shape[1:] for name, shape in shapes.items() if name not in tables and shape[1:].numel() > 0)
    n_matrices = sum(map(staged.is_matrix, matrices))
    if not (isinstance(staged, StagedRule) and staged.is_staged):
        return Separate(shapes, tables, n_matrices)
    alike: dict[torch.Size, dict[str, torch.Size]] = defaultdict(dict)
    others, empty = {}, {}
    for name, shape in shapes.items():
        if shape[1:].numel() == 0:  # without rows of its own, so that it cannot lie beside others
            empty[name] = shape
        else:
            is_whole = name not in tables and staged.is_whole(shape[1:])
            (alike[shape] if is_whole else others)[name] = shape
    if not alike and (empty or (len(shapes) == 1 and staged is rule)):
        return Separate(shapes, tables)
    layouts: list[Separate] = [Packed(others, staged, like, tables)] if others else []
    layouts += [Stacked(shapes, n_matrices=n_matrices) for shapes in alike.values()]
    layouts += [Separate(empty)] if empty else []
    return layouts[0] if not alike else Grouped(shapes, layouts)
