"""Layout of the parameters of an optimizer: the buckets that hold them, and what steps each bucket."""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterable, MutableMapping, Sequence
from contextlib import ExitStack
from operator import is_, itemgetter
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from odeopt.checks import require
from odeopt.modes import has_values
from odeopt.rules.base import UpdateRule
from odeopt.stepping.buckets import Bucket, block_shape, state_template
from odeopt.stepping.checks import check_parts, extent_of, overlapping, parameter_names, warn_caller
from odeopt.stepping.copies import copy_beside
from odeopt.stepping.loops import StepOptions, step_bucket
from odeopt.stepping.native import NativeStep, native_obstacle
from odeopt.stepping.shards import Shard, is_distributed
from odeopt.stepping.triton import TritonKernels, triton_obstacle

# Parameters from this size on are stepped in place, the others packed into a buffer. On a CPU copying
# costs as much as half a step; on a GPU a call of its own costs more, unless the tensor is large.
_STEPPED_IN_PLACE = {"cpu": 2**16, "cuda": 2**24}
# Shards from this size on: each of them exchanges its sums by itself, which takes as long as copying a million.
_EXCHANGES_ALONE = 2**22
# Steps with most parameters frozen, after which the others are placed anew: laying out takes as long as many steps.
_PATIENCE = 10
_KINDS = itemgetter("is_table", "is_stack", "is_transposed", "n_blocks")

Group = dict[str, Any]
States = MutableMapping[Tensor, dict[str, Any]]


class Placed(NamedTuple):
    """A bucket, its rule, the group whose options it follows, and what the state of each parameter was given.

    Attributes:
        local: What was given, or this process's pieces of it, where it has values.
        addresses: Those of its memory.
    """

    bucket: Bucket
    rule: UpdateRule
    group: Group
    given: dict[Tensor, dict[str, Tensor]]
    local: list[Tensor]
    addresses: list[int]

    @classmethod
    def of(cls, bucket: Bucket, rule: UpdateRule, group: Group, given: dict[Tensor, dict[str, Tensor]]) -> Self:
        """Note where the state lies."""
        local = _pieces(given.values())
        return cls(bucket, rule, group, given, local, [*map(Tensor.data_ptr, local)])

    def is_current(self, states: States) -> bool:
        """Return True while the bucket steps these parameters and this state."""
        is_there = self.addresses == [*map(Tensor.data_ptr, self.local)]
        return is_there and self.is_in(states) and not self.bucket.has_moved()

    def is_in(self, states: States) -> bool:
        """Return True while the state holds what it was given."""
        for param, given in self.given.items():
            held = states.get(param, {})
            if not all(map(is_, map(held.get, given), given.values())):
                return False
        return True

    def follow(self, states: States) -> bool:
        """Take up new addresses of the state, where it was moved together with the bucket's memory.

        ``share_memory_`` moves the memory that a tensor is a view of, and so the bucket's own.

        Returns:
            Whether the bucket steps these parameters and this state.
        """
        own = _pieces(map(self.bucket.views, range(len(self.bucket.params))))
        self.addresses[:] = map(Tensor.data_ptr, own)
        return self.is_current(states)


class Plan(NamedTuple):
    """Buckets that are stepped together in C, with their groups; or another bucket, with its kernels if any."""

    native: NativeStep | None
    placed: list[Placed]
    groups: Sequence[Group] = ()
    kernels: TritonKernels | None = None


class Layout:
    """Buckets of the parameters of an optimizer that have had a gradient, and what steps each bucket.

    Args:
        rule: The rule that steps.
        lr: Returns the factor on the updates of a group.
        implementation: ``"auto"``, ``"native"`` or ``"eager"``, as of :class:`odeopt.LearnedOptimizer`.
        state_dtype: Dtype of the state per coordinate; None for float32 or better.

    Attributes:
        params: Parameters that have their state.
        placed: The buckets.
        plans: The same, as they are stepped.
    """

    def __init__(
        self,
        rule: UpdateRule,
        lr: Callable[[Group], float | Tensor],
        implementation: str,
        state_dtype: torch.dtype | None,
    ) -> None:
        self.rule, self.lr, self.implementation, self.state_dtype = rule, lr, implementation, state_dtype
        self._rules: dict[tuple[torch.device, bool], Callable[[Group], UpdateRule]] = {}
        self._dictionaries: dict[Tensor, dict[str, Any]] = {}  # that were put into the state here
        self._forget()

    def update(self, groups: list[Group], states: States) -> None:
        """Place parameters that have their first gradient, and all of them anew where someone has changed a thing."""
        found = [[id(group), *_KINDS(group), *map(id, group["params"])] for group in groups]
        # what is frozen for good is not copied and computed with the others for ever
        is_kept = found == self._groups and self._n_idle < _PATIENCE
        if not is_kept or not all(placed.is_current(states) for placed in self.placed):
            if is_kept and all(placed.follow(states) for placed in self.placed):
                self.plans = self._make_plans()
            else:
                self.count_skipped(groups)
                self._forget()
                self._groups = found
        trained = [_is_trained(param) for group in groups for param in group["params"]]
        if trained != self._trained:
            self._trained = trained
            self._deepen(self._n_matrices(groups))
            sizes = [0, 0]
            for param in self.params:
                sizes[_is_trained(param)] += param.numel()
            self._is_idle, self._n_idle = sizes[False] > sizes[True], 0
        self._n_idle += self._is_idle
        if len(self.params) == sum(len(group["params"]) for group in groups):
            return  # all are placed
        new = [[p for p in group["params"] if p.grad is not None and p not in self.params] for group in groups]
        if any(new):
            # all groups at once: each parameter may have a group of its own
            self._deepen(self._n_matrices(groups))  # shapes may have changed, of those that are yet to be placed
            names, placed = parameter_names(groups), []
            for group, params in zip(groups, new, strict=True):
                placed += self._place(group, [p for p in params if p.numel() > 0], states, names)
                # checkpoints that are loaded strictly ask for the state of empty ones, too
                for param in (p for p in params if p.numel() == 0):
                    rule, is_stack = self.rule_for(param, group), group["is_stack"]
                    template = state_template(rule, param, self.state_dtype, is_stack=is_stack)
                    begun = {name: param.new_zeros(shape, dtype=kept) for name, (shape, kept) in template.items()}
                    states[param] = begun | states.get(param, {})
            # only now: none of them counts as placed if the state of one is refused
            self.placed += placed
            kinds = {placed.bucket.device.type for placed in self.placed}
            self._autocast_kinds = [*filter(torch.amp.is_autocast_available, kinds)]
            self.params.update(*new)
            self.plans = self._make_plans()

    def step(self) -> bool:
        """Step all buckets; return True if gradients were skipped, as far as the host knows without waiting."""
        with self.without_autocast():
            return sum(map(self._step, self.plans)) > 0

    def count_skipped(self, groups: list[Group], *, is_on_host: bool = False) -> None:
        """Bring the counts of skipped gradients to the groups, or those on the host, and warn of the first ones."""
        had = any(group["n_skipped"] for group in groups)
        first = None
        for bucket, _, group, *_ in self.placed:
            if bucket.is_on_host if is_on_host else bucket.has_values:
                counts = bucket.n_skipped.flatten().tolist()
                for (param, index), count in zip(bucket.tensors, counts, strict=True):
                    if count and first is None and (first := parameter_names(groups).get(param)) is not None:
                        first += f"[{index}]" if bucket.is_stack else ""
                    group["n_skipped"] += count
                bucket.n_skipped.zero_()
        if first is not None and not had:
            warn_caller(
                f"Parameter `{first}` was not moved at {'' if is_on_host else 'or before '}step "
                f"{int(groups[0]['n_steps'])}: its gradient is not finite. Later such steps are skipped and counted in "
                "`n_skipped` without a warning.",
                RuntimeWarning,
            )

    def rule_for(self, param: Tensor, group: Group) -> UpdateRule:
        """Return the copy of the rule that steps a parameter of a group, on its device."""
        key = param.device, has_values(param)
        if key not in self._rules:
            self._rules[key] = _variants(copy_beside(self.rule, param))
        return self._rules[key](group)

    def options(self, placed: Placed) -> StepOptions:
        """Options of the next step of a bucket, on its device."""
        bucket, group = placed.bucket, placed.group

        def scalar(x: float | Tensor) -> Tensor:
            return x.reshape(()) if isinstance(x, Tensor) else torch.tensor(x, dtype=bucket.dtype, device="cpu")

        progress, within = _share_done(group), is_within(group)
        if isinstance(progress, Tensor):  # counted on one device, also where the group has parameters on others
            progress, within = (x.to(bucket.device, bucket.dtype) for x in (progress, within))
        elif progress is not None:
            progress = torch.full((), progress, dtype=bucket.dtype, device=bucket.device)
        decay = scalar(group["weight_decay"]) * within if group["weight_decay"] != 0 else None
        return StepOptions(scalar(self.lr(group)), decay, progress, group["maximize"])

    def without_autocast(self) -> ExitStack:
        """Compute in the dtypes of rule and state: what autocast narrows in a model it would narrow in a rule, too."""
        stack = ExitStack()
        for kind in filter(torch.is_autocast_enabled, self._autocast_kinds):
            stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    def _forget(self) -> None:
        """Let the next update place all parameters anew, with the state that it is given."""
        self.placed: list[Placed] = []
        self.plans: list[Plan] = []
        self.params: set[Tensor] = set()
        self._autocast_kinds: list[str] = []
        self._groups: list[list[int]] = []
        self._trained: list[bool] = []
        self._n_deep: int | None = None
        self._is_idle, self._n_idle = False, 0  # whether most is frozen of what is placed, and for how many steps

    def _deepen(self, n_matrices: int) -> None:
        """Let matrices be stepped as those of a network of so many."""
        if n_matrices != self._n_deep:
            self._n_deep = n_matrices
            self._deepened = functools.cache(lambda rule: rule.for_depth(n_matrices))
            if self.placed:
                self.placed = [
                    x._replace(rule=self._deepened(x.rule)) if x.bucket.is_whole and x.rule.is_staged else x
                    for x in self.placed
                ]
                self.plans = self._make_plans()

    def _place(self, group: Group, params: list[Tensor], states: States, names: dict[Tensor, str]) -> list[Placed]:
        """Lay out parameters of a group that have their first gradient, and begin or take up their state."""
        placed, alike, is_stack = [], defaultdict(list), group["is_stack"]
        for param in params:
            # again: models are wrapped after their optimizer is built, too
            check_parts(param, names[param], group)
        shards = [Shard.of(param) for param in params]
        # each of which is stepped after those before it
        shared = overlapping(extent_of(shard.local(param)) for shard, param in zip(shards, params, strict=True))
        for number, (shard, param) in enumerate(zip(shards, params, strict=True)):
            rule = self.rule_for(param, group)
            is_alone = rule.crosses_coordinates and not rule.is_staged
            shape = tensor_shape(param, group)
            # blocks that are too narrow for singular values of their own are not told apart
            blocks = [n for n in (group["n_blocks"], 1) if not is_alone and rule.is_whole(block_shape(shape, n))]
            stacked = (shape, blocks[0]) if blocks else None
            # by the average piece, so that all processes choose alike
            size = param.numel() // shard.n_shards
            threshold = _STEPPED_IN_PLACE.get(param.device.type, _STEPPED_IN_PLACE["cpu"])
            if shard.n_shards > 1:
                threshold = max(threshold, _EXCHANGES_ALONE)
            is_large = size >= threshold and (shard.mesh is not None or param.is_contiguous())
            alone = param if is_alone or is_large or number in shared else None
            alike[rule, param.dtype, shard.group_key, alone, is_alone, stacked].append(param)
        for (rule, *_, is_alone, stacked), together in alike.items():
            if stacked is not None:  # one for all matrices, which go through one call then
                rule = self._deepened(rule)
            options = {"dtype": self.state_dtype, "is_whole": is_alone or stacked is not None, "is_stack": is_stack}
            bucket = Bucket(rule, together, n_blocks=1 if stacked is None else stacked[1], **options)
            given = {}
            for index, param in enumerate(together):
                held = states.get(param, {})  # others may keep something of theirs there too
                begun = {name: held[name] for name in bucket.state._fields if name in held}
                if begun:
                    matched = matched_state(rule, param, begun, self.state_dtype, name=names[param], is_stack=is_stack)
                    bucket.set_state(index, matched)
                else:
                    bucket.init_state(index, rule)
                given[param] = bucket.views(index)
                if states.get(param) is self._dictionaries.get(param, states):  # in place: others may hold it
                    held.update(given[param])
                else:
                    states[param] = self._dictionaries[param] = {**held, **given[param]}
            placed.append(Placed.of(bucket, rule, group, given))
        return placed

    def _n_matrices(self, groups: list[Group]) -> int:
        """Number of matrices, but those that are frozen; some are trained by gradients that are put there by hand.

        A stack counts once: its matrices are not layers that follow each other.
        """
        rule_of = _variants(self.rule)
        members = ((group, param) for group in groups for param in group["params"])
        trained = (member for member in members if member[1].numel() > 0 and _is_trained(member[1]))
        return sum(rule_of(group).is_matrix(tensor_shape(param, group)) for group, param in trained)

    def _make_plans(self) -> list[Plan]:
        """Gather the buckets that are stepped in C, and give kernels to those that can have them."""
        if self.implementation == "eager":
            return [Plan(None, [placed]) for placed in self.placed]
        # constants of the rule depend on the depth of the network, which the steps of matrices alone ask for
        matrices: dict[float, list[Placed]] = defaultdict(list)
        others, plans = [], []
        for placed in self.placed:
            obstacle = native_obstacle(placed.rule, placed.bucket)
            if obstacle is None:
                (matrices[placed.rule.depth_factor] if placed.bucket.is_whole else others).append(placed)
                continue
            is_matrix = placed.bucket.is_whole and placed.rule.is_staged
            on_cuda = triton_obstacle(placed.rule, placed.bucket)
            kernels = TritonKernels(placed.rule, placed.bucket) if on_cuda is None else None
            obstacle = on_cuda if placed.bucket.device.type == "cuda" else obstacle
            if self.implementation == "native" and kernels is None and not is_matrix:
                self._forget()
                require(False, "implementation", "native", f"'auto' or 'eager' here: {obstacle}")
            plans.append(Plan(None, [placed], kernels=kernels))
        first, *further = matrices.values() or [[]]
        return plans + [_native_plan(some) for some in ([*first, *others], *further) if some]

    def _step(self, plan: Plan) -> int:
        """Step the buckets of a plan; return how many skipped gradients are known of without a host synchronisation."""
        n_skipped, left = 0, plan.placed
        if plan.native is not None:
            n_skipped, numbers = plan.native.step([*map(self._native_options, plan.groups)])
            left = [plan.placed[number] for number in numbers]
        moved = [placed for placed in left if any(param.grad is not None for param in placed.bucket.params)]
        for placed in moved:
            step_bucket(placed.rule, placed.bucket, self.options(placed), plan.kernels)
        return n_skipped + sum(placed.bucket.is_on_host and bool(placed.bucket.n_skipped.any()) for placed in moved)

    def _native_options(self, group: Group) -> StepOptions:
        done = _share_done(group)
        progress = None if done is None else float(done)
        decay = float(group["weight_decay"] * is_within(group))
        return StepOptions(float(self.lr(group)), decay, progress, group["maximize"])


def _pieces(states: Iterable[dict[str, Tensor]]) -> list[Tensor]:
    """The tensors of some states, or this process's pieces of them, that lie in memory."""
    local = (x.to_local() if is_distributed(x) else x for state in states for x in state.values())
    return [*filter(has_values, local)]


def _native_plan(placed: list[Placed]) -> Plan:
    """Plan of buckets of one rule, those of matrices, if any, first."""
    groups = list({id(x.group): x.group for x in placed}.values())
    numbers = {id(group): number for number, group in enumerate(groups)}
    native = NativeStep(placed[0].rule, [x.bucket for x in placed], [numbers[id(x.group)] for x in placed])
    return Plan(native, placed, groups)


def _variants(rule: UpdateRule) -> Callable[[Group], UpdateRule]:
    """The rule as it steps the parameters of a group; always the same object for groups of one kind."""
    plain, tables, transposed = rule, rule.for_tables(), rule.for_transposed()
    return lambda group: tables if group["is_table"] else transposed if group["is_transposed"] else plain


def _is_trained(param: Tensor) -> bool:
    """Whether a parameter counts in the depth of the network: frozen ones do not, unless they are given gradients."""
    return param.requires_grad or param.grad is not None


def tensor_shape(param: Tensor, group: Group) -> torch.Size:
    """Shape in which a parameter of a group is stepped: that of a tensor of a stack."""
    return param.shape[1:] if group["is_stack"] else param.shape


def is_within(group: Group) -> bool | Tensor:
    """Whether the next step is one of those that `total_steps` counts: a tensor where steps are counted by one."""
    return group["total_steps"] is None or group["n_steps"] < group["total_steps"]


def _share_done(group: Group) -> float | Tensor | None:
    """Fraction of the run that is done, at most one: a tensor where the steps are counted by one; None if unknown."""
    if group["total_steps"] is None:
        return None
    done = group["n_steps"] / group["total_steps"]
    return done.clamp(max=1.0) if isinstance(done, Tensor) else min(done, 1.0)


def matched_state(
    rule: UpdateRule, param: Tensor, state: dict[str, Any], dtype: torch.dtype | None, *, name: str, is_stack: bool
) -> dict[str, Tensor]:
    """The rule's part of a parameter's state, in the rule's dtypes; a ValueError where a field is missing or unfit."""
    template = state_template(rule, param, dtype, is_stack=is_stack)
    wanted = {field: tuple(shape) for field, (shape, _) in template.items()}
    found = {field: tuple(value.shape) if torch.is_tensor(value) else None for field, value in state.items()}
    if wanted.items() - found.items():
        raise ValueError(f"Parameter `{name}` should have a state of {wanted} under this rule. Found {found}.")
    return {field: state[field].to(dtype=kept) for field, (_, kept) in template.items()}
