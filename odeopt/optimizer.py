"""Any update rule as a drop-in ``torch.optim.Optimizer``."""

from __future__ import annotations

import functools
import itertools
from collections import defaultdict
from collections.abc import Callable, Hashable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import ParamsT, StateDict

from odeopt.artifacts import digest, find_pretrained
from odeopt.checks import is_number, require, require_flags, shown
from odeopt.rules.base import UpdateRule, initial_state
from odeopt.stepping import averages
from odeopt.stepping.checkpoints import check_saved, in_order_of, read_states, warn_of_other_length
from odeopt.stepping.checks import (
    DTYPES,
    check_options,
    check_parts,
    check_spelling,
    is_supported,
    parameter_names,
    warn_caller,
)
from odeopt.stepping.copies import copied, frozen_copy
from odeopt.stepping.diagnostics import diagnose
from odeopt.stepping.guard import (
    PEAK_LR,
    SAVED_GUARD,
    SNAPSHOT,
    Guard,
    GuardStatus,
    Sentry,
    drop_saved,
    restore_snapshot,
    saved_watch,
    take_snapshot,
)
from odeopt.stepping.layout import Layout, is_within
from odeopt.stepping.traced import register, trace_step

# Parts of a parameter that weight decay may take per step without a word, under a learned rule, which may decay by
# itself, and under others; AdamW's usual setting takes 1e-5.
_LARGE_DECAY = {True: 1e-3, False: 1e-2}
# Learning rates up to here are those of other optimizers, for which they are the step size.
_SMALL_LR = 0.01
# What groups hold beside the options of the user.
_NOT_SHOWN = ("params", SAVED_GUARD, PEAK_LR, averages.SHOWS_AVERAGES)
# Numbers from here to 1 are decays of exponential averages, as ``MetaConfig(averaging=)`` has them, not powers.
_LIKE_DECAY = 0.9


class LearnedOptimizer(torch.optim.Optimizer):
    r"""Steps the parameters of a model with an update rule.

    .. math:: \theta_{t+1} = (1 - \eta\lambda)\,\theta_t + \eta\,\Delta_t, \qquad
              (\Delta_t, s_{t+1}) = \mathrm{rule}(\nabla f(\theta_t), s_t)

    Learning-rate schedulers, gradient clipping, ``GradScaler``, hooks, parameter groups, checkpoints, pickling,
    ``DistributedDataParallel`` and ``fully_shard`` work as with any optimizer of ``torch.optim``; ``torch.compile``
    leaves a step out, as one graph break, or holds it as one operation (``capturable``). The rule's state lives in
    ``state[param]`` under the names of the rule's ``NamedTuple``, in the shape of the parameter; as in ``torch.optim``,
    each step changes it in place, and what is edited, replaced or deleted there, or in the groups, counts from the next
    step on.

    The native step updates all parameters in place, in one call. The eager step updates large parameters in place and
    packs the others (under 2**16 coordinates on a CPU, 2**24 on a GPU) into one buffer per device and dtype, each of
    them padded, with its state, to a multiple of 1,024 coordinates, or to the power of two that holds the largest if
    that is less. Matrices that a rule steps by their singular values are batched by shapes. Rules that are not a
    :class:`odeopt.rules.base.StagedRule` are called once per tensor.

    The tensors of a stack (``is_stack`` in its group) are stepped as if each were a parameter; in the number of
    matrices of the network the stack counts once. State per coordinate has the shape of the stack, state per tensor has
    its first axis in front. A tensor whose gradient is all zero, such as that of an expert that no input was sent to,
    is left alone. A gradient that is not finite is skipped for that tensor alone.

    A matrix may consist of blocks of rows (``n_blocks`` in its group), such as query, key and value, or the gates of a
    recurrent layer. Its spectral energy is the sum of those of its blocks then: each is stepped by its own singular
    values, in its own shape. All else is of the matrix as a whole, which counts once. Matrices that are stored (in,
    out), ``is_transposed``, are stepped as the same ones stored (out, in).

    Of a sharded parameter each process holds its piece of the state. Matrices that are stepped by their singular values
    are gathered for the step, one after the other. Stacks may be sharded along their first axis if no process is left
    without a tensor: each process steps its own tensors, and counts the gradients that it skips.

    The default rule takes shorter steps the more matrices there are, up to five. Frozen ones (``requires_grad=False``)
    do not count; what is frozen or unfrozen in the middle of a run counts from the next step on.

    A gradient that holds an infinity or a NaN is skipped: its parameter and state stay as they are, without
    weight decay. The count of skipped gradients is kept on the device; reading :attr:`n_skipped`, or
    :meth:`state_dict`, waits for the device. The first ones raise a warning: at once on a CPU, else when the count is
    read. Parameters without a gradient, or without elements, are left alone.

    A rule has no momentum that a scheduler could cycle: under ``OneCycleLR`` and ``CyclicLR`` only ``lr`` moves, as a
    warning says unless they are told ``cycle_momentum=False``.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either with their own ``lr``,
            ``weight_decay``, ``maximize``, ``total_steps``, ``is_table`` (whether the parameters of the group are
            lookup tables, the rows of which are vectors of their own: rules that step matrices by their singular values
            step these by coordinates), ``is_stack`` (whether each of them holds several tensors of one shape along its
            first axis, such as the weights of experts, ``(experts, out, in)``, which are to be stepped one by one),
            ``is_transposed`` (whether its matrices are stored (in, out), as ``x @ weight`` takes them, and not (out,
            in), as ``nn.Linear`` does: step sizes go by both) and ``n_blocks`` (of how many blocks of rows each matrix
            consists: 3 for query, key and value in one; other tensors, and rules without singular values, have no use
            for it). False and 1 by default; :func:`odeopt.param_groups` makes such groups.
        rule: The update rule, or the name of one that :func:`odeopt.load_pretrained` takes. A frozen copy is taken, so
            training ``rule`` further changes nothing here; the copy follows each parameter to its device, in the dtype
            that the rule has.
        lr: Multiplier :math:`\eta` of the update, dimensionless; a number or a one-element tensor. 1 uses the step
            sizes that the rule was trained with. With a learned rule 0.01 or less, as is usual for Adam, raises a
            warning.
        weight_decay: Decoupled decay :math:`\lambda`, per step and unit of ``lr``, as in AdamW; a number or a
            one-element tensor. There ``lr`` is the step size, here it is a factor, usually 1: what AdamW does with
            ``lr=1e-3, weight_decay=1e-2`` is ``weight_decay=1e-5`` here. More than 1e-3 per step raises a warning
            (.01 under a hand-designed rule), once. Beyond ``total_steps`` nothing decays.
        maximize: Whether to climb instead of descend.
        total_steps: Length of the run in steps; the rule then sees the fraction of it that is done. None
            where unknown. The first step beyond it raises a warning, unless ``capturable`` keeps the count on the
            device.
        implementation: ``"auto"`` uses the native step of port-Hamiltonian rules where there is one: in C on a CPU
            (:func:`odeopt.native_status`) or in Triton on CUDA, for float32 or bfloat16 and momenta that are stepped in
            closed form. It equals the eager step to rounding. ``"native"`` raises an error where there is none;
            ``"eager"`` never uses it. Matrices that are stepped by their singular values are left to torch, even under
            ``"native"``, on CUDA, and on a CPU if their shorter side is above 1,024, or above 2,048 with products in
            bfloat16 (``matrix_products`` of the rule), or if the processor has no units for these products.
        state_dtype: Dtype of the state per coordinate, for instance ``torch.bfloat16``, which halves it; the step is
            computed in float32 or better all the same. None keeps float32 or better, whatever the parameter's dtype.
            (``torch.float16`` is too narrow for squares of gradients, such as :class:`odeopt.AdamUpdate` keeps.)
        capturable: Whether the step may be captured in a CUDA graph: the count of steps is then kept on the device.
            A number given as ``lr`` is frozen into the graph; a tensor is not. On a CPU, with a tensor as ``lr`` and
            without ``averaging``, ``torch.compile`` then puts the step into its graphs as one operation, also with
            ``fullgraph=True``. Compiled code must not touch :attr:`state`, of which the graph does not know.
        averaging: Power r of an average of the weights over the run, :math:`\bar\theta_t \propto \sum_{s \le t} s^r
            \theta_s` (about; see the reference), in place of a schedule where the length of the run is not known: 8 is
            a good value. (Values in [.9, 1) raise a warning, as they look like the decay of an exponential average.)
            :meth:`eval` puts the averages into the parameters, :meth:`train` the weights back. None keeps none.
            Statistics of BatchNorm belong to the weights: refresh them by :func:`torch.optim.swa_utils.update_bn`
            after :meth:`eval`.
        guard: A :class:`odeopt.Guard`, under which a hand-designed fallback takes over where the losses say that the
            rule fails; True takes the default one, None has none. Each step is then told its loss, by
            :meth:`report` or by the closure; reading it is a host synchronisation. While the rule does not fail, every
            step is what it would be without a guard.

    Raises:
        TypeError: If ``params`` is a module, or ``rule`` neither a name nor an instance of
            :class:`odeopt.rules.base.UpdateRule`.
        ValueError: If there is no rule of that name, an option is out of range, an option of a group is misspelt, or a
            parameter is complex or sparse and requires a gradient, a stack that is sharded along another axis than the
            first, or sharded but not a ``DTensor`` (as under ``FullyShardedDataParallel``).

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
        weight_decay: float | Tensor = 0.0,
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
            found = f"the class {rule.__name__} itself" if isinstance(rule, type) else shown(rule)
            hint = f" A learning rate is given by its name, `lr={rule}`." if is_number(rule) else ""
            raise TypeError(
                "Parameter `rule` should be an instance of UpdateRule, built by its class or loaded by "
                f"`odeopt.load_pretrained`, or the name of a shipped one. Found `rule = {found}`.{hint}"
            )
        choices = ("auto", "native", "eager")
        require(implementation in choices, "implementation", implementation, "'auto', 'native' or 'eager'")
        is_dtype = state_dtype in (None, *DTYPES)
        require(is_dtype, "state_dtype", state_dtype, "a floating-point dtype of 16 to 64 bits or None")
        require_flags(capturable=capturable)
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
        self._warned: set[Hashable] = set()
        self._handle = register(self)
        self._layout = self._new_layout(is_fallback=False)
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "total_steps": total_steps}
        defaults |= {"is_table": False, "is_stack": False, "is_transposed": False, "n_blocks": 1}
        check_options(defaults)
        if self._sentry is not None:
            defaults |= {SAVED_GUARD: self._sentry.saved(), PEAK_LR: 0.0}
        if averaging is not None:
            defaults[averages.SHOWS_AVERAGES] = False
        # in every group, and as a number, because that is what tools that flatten or merge state dictionaries carry
        super().__init__(params, defaults | {"n_steps": 0, "n_skipped": 0, "rule_digest": digest(self.rule)})
        if self._sentry is not None and any(group["total_steps"] is None for group in self.param_groups):
            self._sentry.check_without_length()
        self._check_size_of_lr(self.param_groups)
        if averaging is not None and _LIKE_DECAY <= averaging < 1:
            warn_caller(
                "Parameter `averaging` should be a power, 8 for instance: the higher, the more the last weights count. "
                f"Found `averaging = {averaging}`, as if it were the decay of an exponential average."
            )
        self.defaults["momentum"] = 0.0  # schedulers that cycle one ask here whether they may; see step()

    def __repr__(self) -> str:
        guard = "" if self._sentry is None else f", guard: {type(self._sentry.options.fallback).__name__}"
        lines = [f"{type(self).__name__} (rule: {self._rule_name}{guard}"]
        for number, group in enumerate(self.param_groups):  # as torch.optim has them, without what the guard keeps
            options = [f"    {key}: {group[key]}" for key in sorted(group) if key not in _NOT_SHOWN]
            lines += [f"Parameter Group {number}", *options, ""]
        return "\n".join([*lines[:-1], ")"])

    @property
    def n_steps(self) -> int:
        """Number of calls of :meth:`step` so far, those in a captured graph included."""
        return int(self.param_groups[0]["n_steps"])

    @property
    @torch._disable_dynamo
    def n_skipped(self) -> int:
        """Number of gradients skipped so far, one per tensor and step, because they were not finite."""
        self._layout.count_skipped(self.param_groups)
        return sum(group["n_skipped"] for group in self.param_groups)

    @property
    def guard_status(self) -> GuardStatus | None:
        """Account of the guard: which rule steps now, and how often the fallback took over; None without a guard."""
        return None if self._sentry is None else self._sentry.status

    @torch._disable_dynamo
    def report(self, loss: float | Tensor) -> None:
        """Tell the guard the loss whose gradients the next step takes; ignored without a guard.

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

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss; called once, with gradients enabled.

        Returns:
            The loss that ``closure`` returned, or None.

        Raises:
            ValueError: If a gradient is sparse or complex, an option that was put into a group out of range, a state
                that was put into :attr:`state` not the rule's or no longer of the shape of its parameter, or
                ``implementation="native"`` cannot step these parameters; nothing has moved then.
            RuntimeError: If the parameters hold averages (:meth:`eval`), or a guard was not told the loss.
        """
        if not torch.compiler.is_dynamo_compiling():
            return self._step_now(closure)
        return None if closure is None and trace_step(self, self._handle) else self._step_beside_graph(closure)

    @torch._disable_dynamo  # unlike torch.compiler.disable it does not import the compiler before it is needed
    def _step_beside_graph(self, closure: Callable[[], Any] | None) -> Any:
        """Step, left out of what is compiled."""
        return self._step_now(closure)

    @torch.no_grad()
    def _step_now(self, closure: Callable[[], Any] | None) -> Any:
        self._check_shown("a step")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
            self.report(loss)
        for group in self.param_groups:
            check_options(group, may_wait=False)  # again: a scheduler, or the user, may have set one since
            # a count on the device is not read, which would be a host synchronisation
            is_beyond = not self.capturable and not is_within(group)
            if is_beyond and self._is_first(("total_steps", group["total_steps"])):  # where a longer run ends, too
                warn_caller(
                    f"Parameter `total_steps` should be the number of optimizer steps of the whole run. Found step "
                    f"{group['n_steps'] + 1} and `total_steps = {group['total_steps']}`: rules with a schedule, the "
                    "default one among them, no longer move the parameters. To go on, set `total_steps` in each group "
                    "of `optimizer.param_groups`."
                )
        self._check_gradients()
        sentry = self._sentry
        is_told = sentry is not None and sentry.expects_step(any(float(group["lr"]) for group in self.param_groups))
        self._layout.update(self.param_groups, self.state)
        if sentry is not None and not is_told:
            take_snapshot(self._begun_params(), self.state)
        # the gradients of a step that restores belong to the parameters that were given up
        is_restored = is_told and self._follow_guard(sentry)
        may_warn = not is_restored and self._layout.step()
        for group in self.param_groups:
            group["n_steps"] += 1
            if self.averaging is not None:
                weight = (self.averaging + 1) / (group["n_steps"] + self.averaging)
                averages.follow(filter(self._has_begun, group["params"]), self.state, weight)
        for group in self.param_groups:  # a warning may be an error, which comes after the step
            if "momentum" in group and self._is_first("momentum"):
                warn_caller(
                    "A scheduler cycles `momentum`, which the rule does not have: only `lr` follows the schedule. "
                    "`cycle_momentum=False` does the same without a warning."
                )
            if "initial_lr" in group and not self.capturable:
                self._warn_of_second_schedule(group)
        if may_warn:
            self._layout.count_skipped(self.param_groups, is_on_host=True)
        return loss

    def _check_shown(self, what: str) -> None:
        if averages.are_shown(self.state):
            raise RuntimeError(f"The parameters hold the averaged weights: call `optimizer.train()` before {what}.")

    def _follow_guard(self, sentry: Sentry) -> bool:
        """Let the guard decide who steps; return True where the parameters went back to the last good ones."""
        decision, params = sentry.decide(self.param_groups), self._begun_params()
        if decision.restores:
            restore_snapshot(params, self.state)
            averages.drop(self.state)
        elif decision.snapshots:
            take_snapshot(params, self.state)
        if decision.begins_anew:
            self._layout.count_skipped(self.param_groups)
            for param in params:
                for name in self._begun_names - {averages.AVERAGE, SNAPSHOT}:
                    self.state[param].pop(name, None)
            self._layout = self._new_layout(is_fallback=sentry.is_fallback)
            self._layout.update(self.param_groups, self.state)
        return decision.restores

    def _begun_params(self) -> list[Tensor]:
        """Parameters that have a state: those with a gradient now, and those that had one before they were frozen."""
        return [param for group in self.param_groups for param in group["params"] if self._has_begun(param)]

    def _has_begun(self, param: Tensor) -> bool:
        """Whether a parameter has been stepped; its state may also hold what the user has put there."""
        held = self.state.get(param)
        return param in self._layout.params or (bool(held) and not held.keys().isdisjoint(self._begun_names))

    @functools.cached_property
    def _begun_names(self) -> frozenset[str]:
        """Names in the state of a parameter that has been stepped, by the rule or by the fallback of a guard."""
        rules = (self.rule,) if self._sentry is None else (self.rule, self._sentry.rule)
        fields = (type(initial_state(rule, torch.zeros(3, device="cpu")))._fields for rule in rules)
        return frozenset(itertools.chain((averages.AVERAGE, SNAPSHOT), *fields))

    def _new_layout(self, *, is_fallback: bool) -> Layout:
        """Layout in which all parameters are yet to be placed, for the rule or for the fallback of a guard."""
        if not is_fallback:
            return Layout(self.rule, itemgetter("lr"), self.implementation, self.state_dtype)
        implementation = "eager" if self.implementation == "eager" else "auto"  # "native" is asked of the rule alone
        return Layout(self._sentry.rule, self._sentry.lr, implementation, self.state_dtype)

    @torch._disable_dynamo
    @torch.no_grad()
    def diagnostics(self) -> dict[str, dict[str, Tensor]]:
        """Tell what the next step will do to each parameter that has a gradient; nothing moves.

        Call it between ``backward`` and :meth:`step`, as often as is of use: it costs about three eager steps, and the
        singular values of matrices that a spectral energy steps; where it is not called, nothing.

        Returns:
            By the name of each parameter, tensors on its device: ``update_to_weight``, the norm of the change over that
            of the parameter (infinite where that is zero); and what the rule's ``account`` gives. Of
            port-Hamiltonian rules: ``energy``, ``energy_rate``, ``dissipated`` and ``supplied`` power per step,
            ``step_size``, all 0-d, and ``friction`` and ``gain`` of each mode, shape ``(modes,)``. Those of a stack
            have its first axis in front.

        Raises:
            ValueError: If a parameter is sharded, or a gradient sparse or complex.
            RuntimeError: If the parameters hold averages (:meth:`eval`).

        Example:
            >>> weight = torch.nn.Parameter(torch.ones(3, 2))
            >>> optimizer = LearnedOptimizer([("weight", weight)])
            >>> weight.square().sum().backward()
            >>> sorted(optimizer.diagnostics()["weight"])[:3]
            ['dissipated', 'energy', 'energy_rate']
        """
        self._check_shown("diagnostics")
        self._check_gradients()
        self._layout.update(self.param_groups, self.state)
        return diagnose(self._layout, self.param_groups)

    def eval(self) -> None:
        """Put the averaged weights into the parameters, where there are any (``averaging``); else nothing changes."""
        if self.averaging is not None:
            averages.show(self.state)

    def train(self) -> None:
        """Put the weights that are trained back into the parameters."""
        averages.hide(self.state)
        if self.averaging is None:
            averages.drop(self.state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, also in the middle of a run.

        Args:
            param_group: ``params`` and the options that differ from the defaults; it is not changed. Other names are
                kept as they are, as in ``torch.optim``, unless they look like an option that is misspelt. A parameter
                that is listed twice is kept, and stepped, once.

        Raises:
            ValueError: If an option is out of range or misspelt, or a parameter is there already, complex or sparse and
                requires a gradient, sharded otherwise than as a ``DTensor``, or, where it is a stack, than along its
                first axis.
        """
        if isinstance(param_group, dict):
            check_spelling(param_group)
            param_group = dict(param_group)  # the base class fills it in: optimizers would share the counters in it
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        first: dict[Tensor, int] = {}
        for index, param in enumerate(group["params"]):
            first.setdefault(param, index)
        if len(first) < len(group["params"]):  # torch warns of it
            for name in {"params", "param_names"} & group.keys():
                group[name] = [group[name][index] for index in first.values()]
        n_steps = self.param_groups[0]["n_steps"] if len(self.param_groups) > 1 else 0
        group.update(n_steps=n_steps.clone() if isinstance(n_steps, Tensor) else n_steps, n_skipped=0)
        group["rule_digest"] = self.defaults["rule_digest"]  # of a group of another optimizer too
        group.pop("momentum", None)
        if self._sentry is None:  # of a group of another optimizer
            drop_saved([group], {})
        self._place_counters()
        try:
            check_options(group)
            names = parameter_names(self.param_groups, len(self.param_groups) - 1)
            for param in group["params"]:
                check_parts(param, names[param], group)
                if param.requires_grad and not is_supported(param):
                    self._raise_unsupported(
                        param, param, "be dense, real and of a floating-point type of 16 to 64 bits"
                    )
        except ValueError:
            self.param_groups.pop()
            raise
        if group["lr"] * group["weight_decay"] > _LARGE_DECAY[self._is_learned] and self._is_first("weight_decay"):
            warn_caller(
                "Parameter `weight_decay` takes `lr * weight_decay` of every parameter per step. Found `weight_decay = "
                f"{float(group['weight_decay'])}` and `lr = {float(group['lr'])}`; AdamW's weight decay times its "
                "learning rate is what corresponds to it: 1e-5 for `AdamW(lr=1e-3, weight_decay=1e-2)`."
            )
        if "momentum" in self.defaults:  # later than the groups of the constructor, which are looked at together
            self._check_size_of_lr([group])

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue bit for bit where the optimizer that gave ``state_dict`` stood.

        Eager steps do so to rounding where parameters had their first gradients at different steps: they are stepped
        apart until the run is resumed, and together from then on.

        The dictionary holds no rule, only a digest of its class, configuration and weights, as ``rule_digest`` in each
        group. To change the rule on purpose, remove the digest; the dictionary then loads with a warning. The groups
        take their options from ``state_dict``, with a warning if ``total_steps`` differs. What a guard has seen is
        dropped if this optimizer has no guard.

        Parameters that have the same names there and here may stand in another order in their groups; elsewhere, as in
        ``torch.optim``, the order tells them apart.

        Args:
            state_dict: Dictionary that :meth:`state_dict` returned.

        Raises:
            ValueError: If the rule, the groups, or the names or shapes of the state are not those of this optimizer, a
                parameter of the same name is in another group, or an option of a group is out of range.
        """
        watch = layout = restored = None
        before = self.state

        # The base class casts state to the parameter's dtype, which would round that of bfloat16 parameters.
        # Hooks, not code after super(): the user's own edit the dict before and see the exact state after.
        def read(_: torch.optim.Optimizer, final: StateDict) -> StateDict:
            nonlocal watch, layout, restored
            check_saved(final, self.rule, self.defaults["rule_digest"])
            final = in_order_of(self.param_groups, final)
            watch = saved_watch(final["param_groups"], self._sentry)
            layout = self._new_layout(is_fallback=bool(watch.is_fallback))
            restored = read_states(layout, self.param_groups, final)
            averages.check_shown(final["param_groups"], restored)
            return final

        def take_up(_: torch.optim.Optimizer) -> None:
            averages.give_way(before, restored)
            # what is not kept up to date from here on would be taken for current later
            if self.averaging is None:
                averages.drop(restored)
            if self._sentry is None:
                drop_saved(self.param_groups, restored)
            else:
                self._sentry.watch = watch
            self.state.update(restored)
            self._layout = layout

        given = [group["total_steps"] for group in self.param_groups]
        with (
            self.register_load_state_dict_pre_hook(read),
            self.register_load_state_dict_post_hook(take_up, prepend=True),
        ):
            super().load_state_dict(state_dict)
        self._place_counters()
        warn_of_other_length(given, self.param_groups)

    def state_dict(self) -> StateDict:
        """State and options, in the form of ``torch.optim``, as they are now.

        Returns:
            Copies of all tensors: unlike that of ``torch.optim`` the dictionary does not change with later steps, and
            takes as much memory as the state; :attr:`state` itself is live. Beside the options each group holds the
            counts of steps and of skipped gradients, and ``rule_digest``.
        """

        # hooks: the user's own edit the optimizer before, and the dictionary after
        def note(_: torch.optim.Optimizer) -> None:
            self._layout.count_skipped(self.param_groups)
            for group in self.param_groups:
                if self._sentry is not None:
                    group[SAVED_GUARD] = self._sentry.saved()
                if self.averaging is not None or averages.SHOWS_AVERAGES in group:
                    group[averages.SHOWS_AVERAGES] = averages.are_shown(self.state)

        def detach(_: torch.optim.Optimizer, final: StateDict) -> None:
            final["state"] = copied(final["state"])
            final["param_groups"] = [copied(group) for group in final["param_groups"]]

        with self.register_state_dict_pre_hook(note), self.register_state_dict_post_hook(detach, prepend=True):
            return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._layout.count_skipped(self.param_groups)
        state = defaultdict(dict, copied(self.state))  # a pickle would hold the padding of packed tensors
        names = ("rule", "_rule_name", "implementation", "state_dtype", "capturable", "averaging", "_sentry")
        own = {name: getattr(self, name) for name in names} | {"_warned": set()}
        return super().__getstate__() | {"state": state} | own

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._handle = register(self)
        self._layout = self._new_layout(is_fallback=self._sentry is not None and self._sentry.is_fallback)
        for group in self.param_groups:
            group["rule_digest"] = self.defaults["rule_digest"]

    def _place_counters(self) -> None:
        """Keep the count of steps on the device, where a captured step can raise it, or as a number."""
        params = [param for group in self.param_groups for param in group["params"]]
        for group in self.param_groups:
            if self.capturable:
                device = next((param.device for param in group["params"] or params), None)
                group["n_steps"] = torch.as_tensor(group["n_steps"], dtype=torch.float32, device=device)
            else:
                group["n_steps"] = int(group["n_steps"])

    def _warn_of_second_schedule(self, group: dict[str, Any]) -> None:
        """Warn where a scheduler has halved the learning rate by the second half of a run, as the rule does, too."""
        total_steps, lr = group["total_steps"], group["lr"]
        if total_steps is None or 2 * group["n_steps"] < total_steps or self.rule.config.get("schedule") != "power":
            return
        if not isinstance(lr, Tensor) and 0 < lr < 0.5 * group["initial_lr"] and self._is_first("schedule"):
            warn_caller(
                f"A scheduler has brought `lr` from {group['initial_lr']:g} to {lr:g}, on top of the rule's own "
                f"schedule, which `total_steps = {total_steps}` begins: step sizes fall twice. Leave it out."
            )

    def _check_gradients(self) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None and not is_supported(param.grad):
                    self._raise_unsupported(param.grad, param, "have a dense, real gradient")

    def _raise_unsupported(self, tensor: Tensor, param: Tensor, wanted: str) -> None:
        raise ValueError(
            f"Parameter `{parameter_names(self.param_groups)[param]}` should {wanted} (embeddings: `sparse=False`; "
            f"complex numbers: `torch.view_as_real`). Found {tensor.layout}, {tensor.dtype}."
        )

    def _check_size_of_lr(self, groups: list[dict[str, Any]]) -> None:
        """Warn where a learned rule is to take steps of another optimizer's learning rate in all of these groups."""
        lr = max(float(group["lr"]) for group in groups)
        if 0 < lr <= _SMALL_LR and self._is_learned and self._is_first("lr"):
            warn_caller(
                "Parameter `lr` should be about 1: it multiplies the rule's own step sizes, and 1 takes those that the "
                f"rule was trained for. Found `lr = {lr:g}`, as if it were Adam's."
            )

    @property
    def _is_learned(self) -> bool:
        return any(True for _ in self.rule.parameters())

    def _is_first(self, what: Hashable) -> bool:
        """Return True the first time that it is asked, for warnings that are given once."""
        n_before = len(self._warned)
        self._warned.add(what)
        return len(self._warned) > n_before
