"""Any update rule as a drop-in ``torch.optim.Optimizer``."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from operator import attrgetter, is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT, StateDict

from odeopt.artifacts import digest, find_pretrained
from odeopt.checks import is_number, require
from odeopt.rules.base import UpdateRule, has_values
from odeopt.stepping import averages
from odeopt.stepping.buckets import Bucket, state_template
from odeopt.stepping.checks import check_options, check_sharding, is_supported, warn_caller
from odeopt.stepping.copies import copied, copy_beside, frozen_copy
from odeopt.stepping.guard import (
    SAVED_GUARD,
    Guard,
    GuardStatus,
    Sentry,
    check_unguarded,
    restore_snapshot,
    take_snapshot,
)
from odeopt.stepping.loops import StepOptions, step_bucket
from odeopt.stepping.native import NativeStep, native_obstacle
from odeopt.stepping.shards import Shard
from odeopt.stepping.states import check_rule, empty_state, matched_state, saved_state
from odeopt.stepping.triton import TritonKernels, triton_obstacle

# Parameters from this size on are stepped in place, the others packed into a buffer. On a CPU copying
# costs as much as half a step; on a GPU a call of its own costs more, unless the tensor is large.
_STEPPED_IN_PLACE = {"cpu": 2**16, "cuda": 2**24}
# Shards from this size on: each of them exchanges its sums by itself, which takes as long as copying a million.
_EXCHANGES_ALONE = 2**22
# Part of a parameter that weight decay may take per step without a word; AdamW's usual setting takes 1e-5.
_LARGE_DECAY = 0.01
# False for frozen matrices, which do not count in the depth of a network.
_REQUIRES_GRAD = attrgetter("requires_grad")
# Learning rates up to here are those of other optimizers, for which they are the step size.
_SMALL_LR = 0.01


class _Placed(NamedTuple):
    """A bucket, its rule, the group whose options it follows, and the state that it handed out, field by field."""

    bucket: Bucket
    rule: UpdateRule
    group: dict[str, Any]
    handed: list[Tensor]

    def is_current(self, state: dict[Tensor, dict[str, Tensor]]) -> bool:
        """Return True while the bucket steps these parameters and this state."""
        names = self.bucket.state._fields
        found = (x for param in self.bucket.params for x in map(state.get(param, {}).get, names))
        return all(map(is_, found, self.handed)) and not self.bucket.has_moved()


class _Plan(NamedTuple):
    """Buckets of one group and rule that are stepped together in C; or another bucket, with its kernels if any."""

    native: NativeStep | None
    placed: list[_Placed]
    kernels: TritonKernels | None = None


def _share_done(group: dict[str, Any]) -> float | Tensor | None:
    """Fraction of the run that is done, at most one: a tensor where the steps are counted by one; None if unknown."""
    if group["total_steps"] is None:
        return None
    done = group["n_steps"] / group["total_steps"]
    return done.clamp(max=1.0) if isinstance(done, Tensor) else min(done, 1.0)


def _is_within(group: dict[str, Any]) -> bool | Tensor:
    """Whether the next step is one of those that `total_steps` counts: a tensor where steps are counted by one."""
    return group["total_steps"] is None or group["n_steps"] < group["total_steps"]


class LearnedOptimizer(torch.optim.Optimizer):
    r"""Steps the parameters of a model with an update rule.

    .. math:: \theta_{t+1} = (1 - \eta\lambda)\,\theta_t + \eta\,\Delta_t, \qquad
              (\Delta_t, s_{t+1}) = \mathrm{rule}(\nabla f(\theta_t), s_t)

    Learning-rate schedulers, gradient clipping, ``GradScaler``, hooks, parameter groups, checkpoints, pickling,
    ``DistributedDataParallel`` and ``fully_shard`` work as with any optimizer of ``torch.optim``; ``torch.compile``
    leaves a step out, as one graph break. The rule's state lives in ``state[param]`` under the names of the rule's
    ``NamedTuple``, in the shape of the parameter; as in ``torch.optim``, each step changes it in place, and what is
    edited, replaced or deleted there, or in the groups, counts from the next step on.

    The native step takes all parameters of a group in place, in one call. Elsewhere they are stepped in a few calls:
    large ones in place, all others (under 2**16
    coordinates on a CPU, 2**24 on a GPU) of one device and dtype packed into a buffer. There each is padded to a
    multiple of 1,024 coordinates, state included, or to the power of two that holds the largest if that is less.
    Matrices that a rule steps by their singular values are stacked by shapes. Rules under which coordinates
    interact otherwise than by sums (:class:`odeopt.rules.base.StagedRule`) are called once per tensor.

    The default rule takes shorter steps the more matrices there are, up to five. Frozen ones (``requires_grad=False``)
    do not count; what is frozen or unfrozen in the middle of a run counts from the next step on.

    A gradient that holds an infinity or a NaN is skipped: its parameter and state stay as they are, without
    weight decay. Skipped gradients are counted where the parameters are; reading :attr:`n_skipped` (or
    :meth:`state_dict`) fetches the count, and the first are warned of then, on a CPU at once. Parameters without
    a gradient, or without elements, are left alone.

    A rule has no momentum that a scheduler could cycle: under ``OneCycleLR`` and ``CyclicLR`` only ``lr`` moves, as a
    warning says unless they are told ``cycle_momentum=False``.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either with their own ``lr``,
            ``weight_decay``, ``maximize``, ``total_steps`` and ``is_table`` (whether the parameters of the group are
            lookup tables, the rows of which are vectors of their own, or stacks of matrices: rules that step matrices
            by their singular values step these by coordinates; False by default). :func:`odeopt.param_groups` makes
            such groups.
        rule: The update rule, or the name of one that :func:`odeopt.load_pretrained` takes. A frozen copy is taken, so
            training ``rule`` further changes nothing here; the copy follows each parameter to its device, in the dtype
            that the rule has.
        lr: Factor :math:`\eta` on the update, dimensionless; a number or a one-element tensor. 1 takes the steps that
            the rule was trained for; at most 0.01, as is usual for Adam, is warned of under a learned rule.
        weight_decay: Decoupled decay :math:`\lambda`, per step and unit of ``lr``, as in AdamW. There ``lr`` is the
            step size, here it is a factor, usually 1: what AdamW does with ``lr=1e-3, weight_decay=1e-2`` is
            ``weight_decay=1e-5`` here. A decay that takes more than one percent per step is warned of once. Beyond
            ``total_steps`` nothing decays.
        maximize: Whether to climb instead of descend.
        total_steps: Length of the run in steps; the rule then sees the fraction of it that is done. None
            where unknown. The first step beyond it is warned of, unless ``capturable`` keeps the count on the device.
        implementation: ``"auto"`` takes the native step of port-Hamiltonian rules where it can: in C on a CPU
            (:func:`odeopt.native_status`), in Triton on CUDA; for float32 or bfloat16, momenta stepped in closed form.
            It is the eager step to rounding. ``"native"`` raises where it cannot, ``"eager"`` never takes it. Matrices
            stepped by their singular values are left to torch, also under ``"native"``, on CUDA, and on a CPU if their
            shorter side is above 512, or above 128 and the longer one under twice as long.
        state_dtype: Dtype of the state per coordinate, for instance ``torch.bfloat16``, which halves it; the step is
            computed in float32 or better all the same. None keeps float32 or better, whatever the parameter's dtype.
        capturable: Whether the step may be captured in a CUDA graph: the count of steps is then kept on the device.
            A number given as ``lr`` is frozen into the graph; a tensor is not.
        averaging: Power r of an average of the weights over the run, :math:`\bar\theta_t \propto \sum_{s \le t} s^r
            \theta_s` (about; see the reference), in place of a schedule where the length of the run is not known: 8 is
            a good value. :meth:`eval` puts the averages into the parameters, :meth:`train` the weights back. None
            keeps none. Statistics of BatchNorm belong to the weights: refresh them by
            :func:`torch.optim.swa_utils.update_bn` after :meth:`eval`.
        guard: A :class:`odeopt.Guard`, under which a hand-designed fallback takes over where the losses say that the
            rule fails; True takes the default one, None has none. Each step is then told its loss, by
            :meth:`report` or by the closure; reading it is a host synchronisation. While the rule does not fail, every
            step is what it would be without a guard.

    Raises:
        TypeError: If ``params`` is a module, or ``rule`` neither a name nor an instance of
            :class:`odeopt.rules.base.UpdateRule`.
        ValueError: If there is no rule of that name, an option is out of range, or a parameter is complex, sparse, or
            sharded otherwise than as a ``DTensor``: by ``FullyShardedDataParallel``, for instance.

    References:
        Loshchilov, Hutter (2019), Decoupled weight decay regularization, Algorithm 2.
        Shamir, Zhang (2013), Stochastic gradient descent for non-smooth optimization, Sec. 4: polynomial-decay
        averaging.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = LearnedOptimizer(model.parameters(), total_steps=100)
        >>> model(torch.ones(8, 3)).square().mean().backward()
        >>> optimizer.step()
        >>> optimizer.zero_grad()
    """

    def __init__(
        self,
        params: ParamsT,
        rule: UpdateRule | str = "port-hamiltonian-spectral",
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        total_steps: int | None = None,
        implementation: str = "auto",
        state_dtype: torch.dtype | None = None,
        capturable: bool = False,
        averaging: float | None = None,
        guard: Guard | bool | None = None,
    ) -> None:
        if isinstance(params, nn.Module):
            raise TypeError(
                "Parameter `params` should be parameters or groups of them: `model.parameters()` or "
                f"`odeopt.param_groups(model)`. Found a module, `params = {type(params).__name__}(...)`."
            )
        self._rule_name = rule if isinstance(rule, str) else type(rule).__name__
        if isinstance(rule, str):
            rule = find_pretrained(rule, "rule")
        if not isinstance(rule, UpdateRule):
            found = f"the class {rule.__name__} itself" if isinstance(rule, type) else repr(rule)
            hint = f" A learning rate is given by its name, `lr={rule}`." if is_number(rule) else ""
            raise TypeError(
                "Parameter `rule` should be an instance of UpdateRule, built by its class or loaded by "
                f"`odeopt.load_pretrained`, or the name of a shipped one. Found `rule = {found}`.{hint}"
            )
        choices = ("auto", "native", "eager")
        require(implementation in choices, "implementation", implementation, "'auto', 'native' or 'eager'")
        is_dtype = state_dtype is None or (isinstance(state_dtype, torch.dtype) and state_dtype.is_floating_point)
        require(is_dtype, "state_dtype", state_dtype, "a floating-point dtype or None")
        require(isinstance(capturable, bool), "capturable", capturable, "True or False")
        is_power = averaging is None or (is_number(averaging) and averaging >= 0)
        require(is_power, "averaging", averaging, "a non-negative number or None")
        is_guard = guard is None or isinstance(guard, Guard | bool)
        require(is_guard, "guard", guard, "an instance of odeopt.Guard, True, False or None")
        require(not (guard and capturable), "guard", guard, "None where `capturable = True`: the host decides")
        self.rule = frozen_copy(rule)
        guard = Guard() if guard is True else guard
        self._sentry = Sentry(guard, digest(guard.fallback)) if guard else None
        self.implementation, self.state_dtype = implementation, state_dtype
        self.capturable, self.averaging = capturable, averaging
        self._rules: dict[tuple[torch.device, bool, bool], UpdateRule] = {}
        self._warned: set[str] = set()
        self._forget_buckets()
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "total_steps": total_steps}
        defaults["is_table"] = False
        check_options(defaults)
        if self._sentry is not None:
            defaults[SAVED_GUARD] = self._sentry.saved()
        # in every group, and as a number, because that is what tools that flatten or merge state dictionaries carry
        super().__init__(params, defaults | {"n_steps": 0, "n_skipped": 0, "rule_digest": digest(self.rule)})
        self._check_size_of_lr(self.param_groups)
        self.defaults["momentum"] = 0.0  # schedulers that cycle one ask here whether they may; see step()

    def __repr__(self) -> str:
        guard = "" if self._sentry is None else f", guard: {type(self._sentry.options.fallback).__name__}"
        lines = [f"{type(self).__name__} (rule: {self._rule_name}{guard}"]
        for number, group in enumerate(self.param_groups):  # as torch.optim has them, without what the guard keeps
            options = [f"    {key}: {group[key]}" for key in sorted(group) if key not in ("params", SAVED_GUARD)]
            lines += [f"Parameter Group {number}", *options, ""]
        return "\n".join([*lines[:-1], ")"])

    @property
    def n_steps(self) -> int:
        """Number of calls of :meth:`step` so far, those in a captured graph included."""
        return int(self.param_groups[0]["n_steps"])

    @property
    def n_skipped(self) -> int:
        """Number of gradients skipped so far, one per tensor and step, because they were not finite."""
        self._fetch_skipped()
        return sum(group["n_skipped"] for group in self.param_groups)

    @property
    def guard_status(self) -> GuardStatus | None:
        """Account of the guard: which rule steps now, and how often the fallback took over; None without a guard."""
        return None if self._sentry is None else self._sentry.status

    @torch._disable_dynamo
    def report(self, loss: float | Tensor) -> None:
        """Tell the guard the loss whose gradients the next step takes; without a guard it is not looked at.

        Args:
            loss: A number, or a tensor of one. In a process group it is averaged over all processes, each of which must
                report and step; with accumulated gradients it is the mean over the micro-batches.

        Raises:
            TypeError: If ``loss`` is neither a number nor a tensor.
            ValueError: If ``loss`` has several elements.
            RuntimeError: If a loss was reported since the last step, and its gradients were not set to zero.
        """
        if self._sentry is not None:
            self._sentry.report(loss)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, as in ``torch.optim``."""
        super().zero_grad(set_to_none)
        if self._sentry is not None:
            self._sentry.forget()

    @torch._disable_dynamo  # unlike torch.compiler.disable it does not import the compiler before it is needed
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss; called once, with gradients enabled.

        Returns:
            The loss that ``closure`` returned, or None.

        Raises:
            ValueError: If a gradient is sparse or complex, a learning rate out of range, a state that was put into
                :attr:`state` not the rule's, or ``implementation="native"`` cannot step these parameters; nothing has
                moved then.
            RuntimeError: If the parameters hold averages (:meth:`eval`), or a guard was not told the loss.
        """
        if averages.are_shown(self.state):
            raise RuntimeError("The parameters hold the averaged weights: call `optimizer.train()` before a step.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self.report(loss)
        sentry = self._sentry
        if sentry is not None:
            moves = any(float(group["lr"]) != 0 for group in self.param_groups)
            if not sentry.expects_step(moves=moves):
                sentry = None
        for group in self.param_groups:
            if not isinstance(group["lr"], Tensor):  # a scheduler, or the user, may have set it since it was checked
                require(0 <= group["lr"] < float("inf"), "lr", group["lr"], "non-negative and finite")
            # a count on the device is not read, which would be a host synchronisation
            if not self.capturable and not _is_within(group):
                self._warn_once(
                    f"total_steps = {group['total_steps']}",  # again where a longer run ends, too
                    f"Parameter `total_steps` should be the number of optimizer steps of the whole run. Found step "
                    f"{group['n_steps'] + 1} and `total_steps = {group['total_steps']}`: rules with a schedule, the "
                    "default one among them, no longer move the parameters. To go on, set `total_steps` in each group "
                    "of `optimizer.param_groups`.",
                )
            for param in group["params"]:
                if param.grad is not None and not is_supported(param.grad):
                    self._raise_unsupported(param.grad, param, "have a dense, real gradient")
        self._lay_out()
        if sentry is None and self._sentry is not None:
            take_snapshot(self._is_placed, self.state)
        is_restored = sentry is not None and self._follow_guard(sentry)
        may_warn = False
        with self._without_autocast():
            # the gradients of a step that restores belong to the parameters that were given up
            for plan in () if is_restored else self._plans:
                may_warn |= self._step_plan(plan) > 0
        for group in self.param_groups:
            group["n_steps"] += 1
            if "momentum" in group:
                self._warn_once(
                    "momentum",
                    "A scheduler cycles `momentum`, which the rule does not have: only `lr` follows the schedule. "
                    "`cycle_momentum=False` does the same without a warning.",
                )
            if self.averaging is not None:
                weight = (self.averaging + 1) / (group["n_steps"] + self.averaging)
                averages.follow(filter(self._is_placed.__contains__, group["params"]), self.state, weight)
        if may_warn:
            self._fetch_skipped(is_on_host=True)
        return loss

    def _without_autocast(self) -> AbstractContextManager:
        """Compute in the dtypes of rule and state: what autocast narrows in a model it would narrow in a rule, too."""
        stack = ExitStack()
        for kind in {placed.bucket.device.type for placed in self._placed}:
            if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        return stack

    def _follow_guard(self, sentry: Sentry) -> bool:
        """Let the guard decide who steps; return True where the parameters went back to the last good ones."""
        had = self._stepping_rule
        decision = sentry.decide(self.param_groups)
        if decision.restores:
            restore_snapshot(self._is_placed, self.state)
            averages.restart(self.state)
        elif decision.snapshots:
            take_snapshot(self._is_placed, self.state)
        if decision.begins_anew:
            self._fetch_skipped()
            for param in self._is_placed:
                for name in state_template(had, param, self.state_dtype):
                    self.state[param].pop(name, None)
            self._forget_buckets()
            self._rules.clear()
            self._lay_out()
        return decision.restores

    @property
    def _stepping_rule(self) -> UpdateRule:
        """The rule, or the fallback of a guard."""
        return self._sentry.rule if self._sentry is not None and self._sentry.is_fallback else self.rule

    def _step_plan(self, plan: _Plan) -> int:
        """Step the buckets of a plan; return how many skipped gradients are known of without a host synchronisation."""
        if plan.native is not None:
            group = plan.placed[0].group
            done = _share_done(group)
            progress = None if done is None else float(done)
            lr, decay = float(self._lr(group)), float(group["weight_decay"] * _is_within(group))
            n_skipped = plan.native.step(lr, decay, progress, maximize=group["maximize"])
            if n_skipped is not None:
                return n_skipped
        moved = [placed for placed in plan.placed if any(param.grad is not None for param in placed.bucket.params)]
        for bucket, rule, group, _ in moved:
            step_bucket(rule, bucket, self._options(group, bucket), plan.kernels)
        return sum(placed.bucket.is_on_host and bool(placed.bucket.n_skipped.any()) for placed in moved)

    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """Tell what the next step will do to each parameter that has a gradient; nothing moves.

        Call it between ``backward`` and :meth:`step`, as often as is of use: it costs about three eager steps, and the
        singular values of matrices that a spectral energy steps; where it is not called, nothing.

        Returns:
            By the name of each parameter, tensors on its device: ``update_to_weight``, the norm of the change over that
            of the parameter (infinite where that is zero); and what the rule's ``account`` gives. Of
            port-Hamiltonian rules: ``energy``, ``energy_rate``, ``dissipated`` and ``supplied`` power per step,
            ``step_size``, all 0-d, and ``friction`` and ``gain`` of each mode, shape ``(modes,)``.

        Raises:
            ValueError: If a parameter is sharded.

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(3, 2))
            >>> optimizer = LearnedOptimizer([("weight", weight)])
            >>> weight.square().sum().backward()
            >>> sorted(optimizer.diagnostics()["weight"])[:3]
            ['dissipated', 'energy', 'energy_rate']
        """
        self._lay_out()
        found = {}
        with self._without_autocast():
            for bucket, rule, group, _ in self._placed:
                options = self._options(group, bucket)
                for index, param in enumerate(bucket.params):
                    require(not bucket.is_shared, self._name(param), "a shard of it", "whole on each process")
                    if param.grad is not None:
                        found[self._name(param)] = self._diagnosed(bucket, index, rule, options)
        names = (self._name(param) for group in self.param_groups for param in group["params"])
        return {name: found[name] for name in names if name in found}

    @staticmethod
    def _diagnosed(bucket: Bucket, index: int, rule: UpdateRule, options: StepOptions) -> dict[str, Tensor]:
        """Quantities of one parameter of a bucket."""
        theta, grad = (x.detach().flatten().to(bucket.dtype) for x in (bucket.params[index], bucket.params[index].grad))
        grad, state = -grad if options.maximize else grad, bucket.rule_state(index)
        signals = {"param": theta, "shape": bucket.params[index].shape, "progress": options.progress}
        change = options.lr * rule(grad, state, **signals)[0]
        if options.decay is not None:
            change = change - options.lr * options.decay * theta
        return {"update_to_weight": change.norm() / theta.norm()} | rule.account(grad, state, **signals)

    def eval(self) -> None:
        """Put the averaged weights into the parameters, where there are any (``averaging``); else nothing changes."""
        averages.show(self.state)

    def train(self) -> None:
        """Put the weights that are trained back into the parameters."""
        averages.hide(self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, also in the middle of a run.

        Args:
            param_group: ``params`` and the options that differ from the defaults; it is not changed.

        Raises:
            ValueError: If an option is out of range, or a parameter is complex, sparse, there already, sharded
                otherwise than as a ``DTensor``, or sharded where the rule steps it as a whole.
        """
        # a copy, because the base class fills it in: two optimizers given one dict would share its counters
        super().add_param_group(dict(param_group) if isinstance(param_group, dict) else param_group)
        group = self.param_groups[-1]
        group.update(n_steps=self.n_steps if len(self.param_groups) > 1 else 0, n_skipped=0)
        group["rule_digest"] = self.defaults["rule_digest"]  # of a group of another optimizer too
        group.pop("momentum", None)
        self._place_counters()
        try:
            check_options(group)
            rule = self.rule.for_tables() if group["is_table"] else self.rule
            for param in group["params"]:
                check_sharding(param, self._name(param))
                if not is_supported(param):
                    self._raise_unsupported(param, param, "be dense, real and of a floating-point type")
                if self.rule.crosses_coordinates and not self.rule.is_staged and Shard.of(param).n_shards > 1:
                    raise ValueError(
                        f"Parameter `rule` should look across a tensor by sums only (StagedRule), or not at all, where "
                        f"parameters are sharded. Found `rule = {type(self.rule).__name__}`."
                    )
                if rule.is_whole(param.shape) and Shard.of(param).n_shards > 1:
                    raise ValueError(
                        f"Parameter `{self._name(param)}` should be whole on each process, because the rule steps "
                        "matrices by their singular values: replicate it (`DistributedDataParallel`), or step it by "
                        f"coordinates (`is_table=True` in its group). Found `placements = {param.placements}`."
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        if group["lr"] * group["weight_decay"] > _LARGE_DECAY:
            self._warn_once(
                "weight_decay",
                f"Parameter `weight_decay` takes `lr * weight_decay` of every parameter per step. Found "
                f"`weight_decay = {group['weight_decay']}` and `lr = {float(group['lr'])}`; AdamW's weight decay times "
                "its learning rate is what corresponds to it.",
            )
        if "momentum" in self.defaults:  # later than the groups of the constructor, which are looked at together
            self._check_size_of_lr([group])

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue bit for bit where the optimizer that gave ``state_dict`` stood.

        The rule is not in it, but a digest of its class, configuration and weights is, as ``rule_digest`` in each
        group. Whoever means to change the rule removes the digest; the dictionary then loads with a warning. Options of
        the groups are those of ``state_dict`` from then on; a ``total_steps`` that differs is warned of.

        Args:
            state_dict: Dictionary that :meth:`state_dict` returned.

        Raises:
            ValueError: If the rule, the groups, or the names or shapes of the state are not those of this optimizer.
        """
        restored: dict[Tensor, dict[str, Any]] = {}

        # The base class casts state to the parameter's dtype, which would round that of bfloat16 parameters.
        # Hooks, not code after super(): the user's own edit the dict before and see the exact state after.
        def read(_: torch.optim.Optimizer, final: StateDict) -> None:
            # loading leaves a default of torch's own behind, `differentiable`, which no group has
            options = self.defaults.keys() - {"rule_digest", "momentum", "differentiable", SAVED_GUARD}
            missing = {name for group in final.get("param_groups", [{}]) for name in options - group.keys()}
            lacks = f", with {', '.join(sorted(missing))} in each group"
            require(not missing, "state_dict", sorted(final), f"the state of a LearnedOptimizer{lacks}")
            check_rule(final["param_groups"], self.rule, self.defaults["rule_digest"])
            if self._sentry is None:
                check_unguarded(final["param_groups"])
            else:
                self._sentry.load(final["param_groups"])
                self._rules.clear()
            restored.update(self._read_state(final))

        self._forget_buckets()
        reading = self.register_load_state_dict_pre_hook(read)
        writing = self.register_load_state_dict_post_hook(lambda _: self.state.update(restored), prepend=True)
        watch = None if self._sentry is None else self._sentry.watch
        given = [group["total_steps"] for group in self.param_groups]
        try:
            super().load_state_dict(state_dict)
        except Exception:
            if self._sentry is not None:
                self._sentry.watch = watch
                self._rules.clear()
            raise
        finally:
            reading.remove()
            writing.remove()
        self._place_counters()
        loaded = [group["total_steps"] for group in self.param_groups]
        if had := [(old, new) for old, new in zip(given, loaded, strict=True) if old not in (None, new)]:
            warn_caller(
                f"Parameter `total_steps` is {had[0][1]} from now on, as in `state_dict`; this optimizer had "
                f"`total_steps = {had[0][0]}`. To train as long as that, set it again in each group of "
                "`optimizer.param_groups`.",
                UserWarning,
            )

    def state_dict(self) -> StateDict:
        """State and options, in the form of ``torch.optim``, as they are now.

        Returns:
            Copies of all tensors: unlike that of ``torch.optim`` the dictionary does not change with later steps, and
            takes as much memory as the state; :attr:`state` itself is live. Beside the options each group holds the
            counts of steps and of skipped gradients, and ``rule_digest``.
        """
        self._fetch_skipped()
        if self._sentry is not None:
            for group in self.param_groups:
                group[SAVED_GUARD] = self._sentry.saved()

        def detach(_: torch.optim.Optimizer, final: StateDict) -> None:
            final["state"] = copied(final["state"])
            final["param_groups"] = [copied(group) for group in final["param_groups"]]

        detaching = self.register_state_dict_post_hook(detach, prepend=True)  # before the user's own
        try:
            return super().state_dict()
        finally:
            detaching.remove()

    def __getstate__(self) -> dict[str, Any]:
        self._fetch_skipped()
        state = defaultdict(dict, copied(self.state))  # a pickle would hold the padding of packed tensors
        names = ("rule", "_rule_name", "implementation", "state_dtype", "capturable", "averaging", "_sentry")
        own = {name: getattr(self, name) for name in names} | {"_warned": set()}
        return super().__getstate__() | {"state": state} | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rules = {}
        self._forget_buckets()
        for group in self.param_groups:
            group["rule_digest"] = self.defaults["rule_digest"]

    def _forget_buckets(self) -> None:
        """Let the next step pack the parameters anew, with the state that :attr:`state` holds."""
        self._placed: list[_Placed] = []
        self._plans: list[_Plan] = []
        self._is_placed: set[Tensor] = set()
        self._placed_groups: list[list[int]] = []
        self._matrices: list[Tensor] = []
        self._are_trained: list[bool] = []

    def _place_counters(self) -> None:
        """Keep the count of steps on the device, where a captured step can raise it, or as a number."""
        params = [param for group in self.param_groups for param in group["params"]]
        for group in self.param_groups:
            if self.capturable:
                device = next((param.device for param in group["params"] or params), None)
                group["n_steps"] = torch.as_tensor(group["n_steps"], dtype=torch.float32, device=device)
            else:
                group["n_steps"] = int(group["n_steps"])

    def _name(self, param: Tensor) -> str | None:
        """Name of a parameter; None for one that has been removed."""
        for number, group in enumerate(self.param_groups):
            for index, other in enumerate(group["params"]):
                if other is param:
                    names = group.get("param_names")
                    return names[index] if names else f"param_groups[{number}]['params'][{index}]"
        return None

    def _raise_unsupported(self, tensor: Tensor, param: Tensor, wanted: str) -> None:
        raise ValueError(
            f"Parameter `{self._name(param)}` should {wanted} (embeddings: `sparse=False`; "
            f"complex numbers: `torch.view_as_real`). Found {tensor.layout}, {tensor.dtype}."
        )

    def _check_size_of_lr(self, groups: list[dict[str, Any]]) -> None:
        """Warn where a learned rule is to take steps of another optimizer's learning rate in all of these groups."""
        lr = max(float(group["lr"]) for group in groups)
        if 0 < lr <= _SMALL_LR and any(True for _ in self.rule.parameters()):
            self._warn_once(
                "lr",
                "Parameter `lr` should be about 1: it multiplies the rule's own step sizes, and 1 takes those that the "
                f"rule was trained for. Found `lr = {lr:g}`, as if it were Adam's.",
            )

    def _warn_once(self, what: str, message: str) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warn_caller(message, UserWarning)

    def _rule_for(self, param: Tensor, is_table: bool = False) -> UpdateRule:
        key = param.device, has_values(param)
        if (*key, is_table) not in self._rules:
            rule = copy_beside(self._stepping_rule, param)
            self._rules[*key, False], self._rules[*key, True] = rule, rule.for_tables()
        return self._rules[*key, is_table]

    def _find_matrices(self) -> list[Tensor]:
        """All matrices, frozen ones and those without a gradient so far included."""
        rules = {False: self._stepping_rule, True: self._stepping_rule.for_tables()}
        members = ((rules[group["is_table"]], param) for group in self.param_groups for param in group["params"])
        return [param for rule, param in members if param.numel() > 0 and rule.is_matrix(param.shape)]

    def _options(self, group: dict[str, Any], bucket: Bucket) -> StepOptions:
        def scalar(x: float | Tensor) -> Tensor:
            return x.reshape(()) if isinstance(x, Tensor) else torch.tensor(x, dtype=bucket.dtype, device="cpu")

        progress, within = _share_done(group), _is_within(group)
        if isinstance(progress, Tensor):  # counted on one device, also where the group has parameters on others
            progress, within = (x.to(bucket.device, bucket.dtype) for x in (progress, within))
        elif progress is not None:
            progress = torch.full((), progress, dtype=bucket.dtype, device=bucket.device)
        decay = scalar(group["weight_decay"]) * within if group["weight_decay"] != 0 else None
        return StepOptions(scalar(self._lr(group)), decay, progress, group["maximize"])

    def _lr(self, group: dict[str, Any]) -> float | Tensor:
        """Factor on the updates of the rule that steps now."""
        return group["lr"] if self._stepping_rule is self.rule else self._sentry.lr(group)

    def _lay_out(self) -> None:
        """Place parameters that have their first gradient, and all of them anew where someone has changed a thing."""
        groups = [[id(group), group["is_table"], *map(id, group["params"])] for group in self.param_groups]
        is_same = groups == self._placed_groups and self._are_trained == [*map(_REQUIRES_GRAD, self._matrices)]
        if not is_same or not all(placed.is_current(self.state) for placed in self._placed):
            self._fetch_skipped()
            self._forget_buckets()
            self._placed_groups, self._matrices = groups, self._find_matrices()
            self._are_trained = [*map(_REQUIRES_GRAD, self._matrices)]
        for group in self.param_groups:
            new = [p for p in group["params"] if p.grad is not None and p not in self._is_placed]
            if new:
                self._place(group, [p for p in new if p.numel() > 0])
                self._place_empty([p for p in new if p.numel() == 0])
                self._plans = self._make_plans()

    def _place(self, group: dict[str, Any], params: list[Tensor]) -> None:
        """Lay out parameters that have their first gradient, and begin or take up their state."""
        alike: dict[tuple, list[Tensor]] = defaultdict(list)
        for param in params:
            check_sharding(param, self._name(param))  # again: models are wrapped after their optimizer is built, too
            shard, rule = Shard.of(param), self._rule_for(param, group["is_table"])
            is_alone = rule.crosses_coordinates and not rule.is_staged
            stacked = param.shape if not is_alone and rule.is_whole(param.shape) else None
            # by the average piece, so that all processes choose alike
            size = param.numel() // shard.n_shards
            threshold = _STEPPED_IN_PLACE.get(param.device.type, _STEPPED_IN_PLACE["cpu"])
            if shard.n_shards > 1:
                threshold = max(threshold, _EXCHANGES_ALONE)
            is_large = size >= threshold and (shard.mesh is not None or param.is_contiguous())
            alone = param if is_alone or is_large else None
            alike[rule, param.dtype, shard.group_key, alone, is_alone, stacked].append(param)
        # gradients may also be put by hand where autograd is told to leave a parameter alone
        n_matrices = sum(param.requires_grad or param.grad is not None for param in self._matrices)
        deep: dict[UpdateRule, UpdateRule] = {}
        for (rule, *_, is_alone, stacked), together in alike.items():
            if stacked is not None:  # one for all matrices, which go through one call then
                rule = deep.setdefault(rule, rule.for_depth(n_matrices))
            bucket = Bucket(rule, together, dtype=self.state_dtype, is_whole=is_alone or stacked is not None)
            for index, param in enumerate(together):
                held = self.state.get(param, {})  # others may keep something of theirs there too
                begun = {name: held[name] for name in bucket.state._fields if name in held}
                if begun:
                    matched = matched_state(rule, param, begun, self.state_dtype, name=self._name(param))
                    bucket.set_state(index, matched)
                else:
                    bucket.init_state(index, rule)
                self.state[param] = {**held, **bucket.views(index)}
            handed = [self.state[param][name] for param in together for name in bucket.state._fields]
            self._placed.append(_Placed(bucket, rule, group, handed))
            self._is_placed.update(together)

    def _make_plans(self) -> list[_Plan]:
        """Gather the buckets that are stepped in C, by group and rule, and give kernels to those that can have them."""
        together: dict[tuple[int, int], list[_Placed]] = defaultdict(list)
        plans = []
        if self.implementation == "eager":
            return [_Plan(None, [placed]) for placed in self._placed]
        for placed in self._placed:
            obstacle = native_obstacle(placed.rule, placed.bucket)
            if obstacle is None:
                together[id(placed.group), id(placed.rule)].append(placed)
                continue
            is_matrix = placed.bucket.is_whole and placed.rule.is_staged
            on_cuda = triton_obstacle(placed.rule, placed.bucket)
            kernels = TritonKernels(placed.rule, placed.bucket) if on_cuda is None else None
            obstacle = on_cuda if placed.bucket.device.type == "cuda" else obstacle
            is_asked_for = self.implementation == "native" and self._stepping_rule is self.rule
            if is_asked_for and kernels is None and not is_matrix:
                self._forget_buckets()
                require(False, "implementation", "native", f"'auto' or 'eager' here: {obstacle}")
            plans.append(_Plan(None, [placed], kernels))
        plans += [_Plan(NativeStep(some[0].rule, [x.bucket for x in some]), some) for some in together.values()]
        return plans

    def _place_empty(self, params: list[Tensor]) -> None:
        """Give parameters without elements their state."""
        for param in params:
            begun = empty_state(self._rule_for(param), param, self.state_dtype)
            self.state[param] = begun | self.state.get(param, {})
        self._is_placed.update(params)

    def _fetch_skipped(self, *, is_on_host: bool = False) -> None:
        """Bring the counts of skipped gradients to the host, or those that are there, and warn of the first ones."""
        had = any(group["n_skipped"] for group in self.param_groups)
        first = None
        for bucket, _, group, _ in self._placed:
            if bucket.is_on_host if is_on_host else bucket.has_values:
                for param, count in zip(bucket.params, bucket.n_skipped.flatten().tolist(), strict=True):
                    if count and first is None:
                        first = self._name(param)
                    group["n_skipped"] += count
                bucket.n_skipped.zero_()
        if first is not None and not had:
            warn_caller(
                f"Parameter `{first}` was not moved at {'' if is_on_host else 'or before '}step {self.n_steps}: its "
                "gradient is not finite. Later such steps are skipped and counted in `n_skipped` without a warning."
            )

    def _read_state(self, state_dict: StateDict) -> dict[Tensor, dict[str, Any]]:
        """Saved state by parameter, without those that have none."""
        restored = {}
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=False)  # lengths: the base class's job
        for group, saved_group in pairs:
            is_of_rule = "rule_digest" in saved_group
            for param, key in zip(group["params"], saved_group["params"], strict=False):
                if saved := state_dict["state"].get(key):
                    named = {"name": self._name(param), "is_of_rule": is_of_rule}
                    restored[param] = saved_state(self._rule_for(param), param, saved, self.state_dtype, **named)
        return restored
