"""Any update rule as a drop-in ``torch.optim.Optimizer``."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT, StateDict

from odeopt.rules.base import UpdateRule, require, state_dtype

_COUNTERS = ("n_steps", "n_skipped")


class LearnedOptimizer(torch.optim.Optimizer):
    r"""Steps the parameters of a model with an update rule.

    .. math:: \theta_{t+1} = (1 - \eta\lambda)\,\theta_t + \eta\,\Delta_t, \qquad
              (\Delta_t, s_{t+1}) = \mathrm{rule}(\nabla f(\theta_t), s_t)

    Learning-rate schedulers, gradient clipping, ``GradScaler``, hooks, parameter groups, checkpoints and
    pickling work as with any optimizer of ``torch.optim``. The rule's state lives in ``state[param]`` under
    the names of the rule's ``NamedTuple``, in float32 or better whatever the dtype of the parameter; the step
    is computed so too, and a bfloat16 parameter is rounded once.

    A gradient that holds an infinity or a NaN is skipped: its parameter and state stay as they are, without
    weight decay, :attr:`n_skipped` counts it, and the first one is warned of. Looking for them costs one
    transfer to the host a step. Parameters without a gradient, or without elements, are left alone.

    Args:
        params: Parameters, ``(name, parameter)`` pairs, or groups of either with their own ``lr``,
            ``weight_decay``, ``maximize`` and ``total_steps``.
        rule: The update rule. A frozen copy is taken, so training ``rule`` further changes nothing here; the
            copy follows each parameter to its device, in the dtype that the rule has.
        lr: Factor :math:`\eta` on the update, dimensionless; a number or a one-element tensor.
        weight_decay: Decoupled decay :math:`\lambda`, per step and unit of ``lr``, as in AdamW.
        maximize: Whether to climb instead of descend.
        total_steps: Length of the run in steps; the rule then sees the fraction of it that is done. None
            where unknown.

    Raises:
        TypeError: If ``rule`` is not an instance of :class:`odeopt.rules.base.UpdateRule`.
        ValueError: If an option is out of range, or a parameter is complex or sparse.

    References:
        Loshchilov, Hutter (2019), Decoupled weight decay regularization, Algorithm 2.

    Example:
        >>> optimizer = LearnedOptimizer(model.named_parameters(), odeopt.load_pretrained("port-hamiltonian"))
        >>> loss(model).backward(); optimizer.step(); optimizer.zero_grad()
    """

    def __init__(
        self,
        params: ParamsT,
        rule: UpdateRule,
        lr: float | Tensor = 1.0,
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        total_steps: int | None = None,
    ) -> None:
        if not isinstance(rule, UpdateRule):
            found = f"the class {rule.__name__} itself" if isinstance(rule, type) else repr(rule)
            raise TypeError(
                "Parameter `rule` should be an instance of UpdateRule, built by its class or loaded by "
                f"`odeopt.load_pretrained`. Found `rule = {found}`."
            )
        self.rule = copy.deepcopy(rule).requires_grad_(False).eval()
        self._placed_rules: dict[torch.device, UpdateRule] = {}
        self._state_type: Callable[..., NamedTuple] | None = None
        defaults = {"lr": lr, "weight_decay": weight_decay, "maximize": maximize, "total_steps": total_steps}
        _check_options(defaults)
        super().__init__(params, defaults | dict.fromkeys(_COUNTERS, 0))

    @property
    def n_steps(self) -> int:
        """Number of calls of :meth:`step` so far."""
        return self.param_groups[0]["n_steps"]

    @property
    def n_skipped(self) -> int:
        """Number of gradients skipped so far, one per tensor and step, because they were not finite."""
        return sum(group["n_skipped"] for group in self.param_groups)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: Evaluates the model again and returns the loss; called once, with gradients enabled.

        Returns:
            What ``closure`` returned, or None.

        Raises:
            ValueError: If a gradient is sparse or complex; nothing has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:  # a scheduler, or the user, may have set it since it was checked
            if not isinstance(group["lr"], Tensor):
                require(0 <= group["lr"] < float("inf"), "lr", group["lr"], "non-negative and finite")
        pending = [
            (param, number, index)
            for number, group in enumerate(self.param_groups)
            for index, param in enumerate(group["params"])
            if param.grad is not None and param.numel() > 0
        ]
        for param, number, index in pending:
            if _is_unsupported(param.grad):
                self._raise_unsupported(param.grad, number, index, "have a dense, real gradient")
        skipped = []
        are_finite = _are_finite([param.grad for param, *_ in pending])
        for (param, number, index), is_finite in zip(pending, are_finite, strict=True):
            if is_finite:
                self._move(param, self.param_groups[number])
            else:
                skipped.append((number, index))
        self._count(skipped)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, also in the middle of a run.

        Args:
            param_group: ``params`` and the options that differ from the defaults; it is not changed.

        Raises:
            ValueError: If an option is out of range, or a parameter is complex, sparse or there already.
        """
        # a copy, because the base class fills it in: two optimizers given one dict would share its counters
        super().add_param_group(dict(param_group) if isinstance(param_group, dict) else param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        group.update(n_steps=self.n_steps if number else 0, n_skipped=0)
        try:
            _check_options(group)
            for index, param in enumerate(group["params"]):
                if _is_unsupported(param) or not param.is_floating_point():
                    self._raise_unsupported(param, number, index, "be dense, real and of a floating-point type")
        except ValueError:
            self.param_groups.pop()
            raise

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Continue bit for bit where the optimizer that gave ``state_dict`` stood; the rule is not in it.

        Args:
            state_dict: What :meth:`state_dict` returned.

        Raises:
            ValueError: If the groups, or the names or shapes of the state, are not those of this optimizer.
        """
        restored: dict[Tensor, dict[str, Tensor]] = {}

        # The base class casts state to the parameter's dtype, which would round that of bfloat16 parameters.
        # Hooks, not code after super(): the user's own edit the dict before and see the exact state after.
        def read(_: torch.optim.Optimizer, final: StateDict) -> None:
            is_ours = all("n_steps" in group for group in final.get("param_groups", [{}]))
            require(is_ours, "state_dict", sorted(final), "the state of a LearnedOptimizer")
            restored.update(self._read_state(final))

        reading = self.register_load_state_dict_pre_hook(read)
        writing = self.register_load_state_dict_post_hook(lambda _: self.state.update(restored), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            reading.remove()
            writing.remove()

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"rule": self.rule}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_placed_rules", {})
        self.__dict__.setdefault("_state_type", None)
        for group in self.param_groups:
            for option in ("weight_decay", "maximize", "total_steps", *_COUNTERS):
                group.setdefault(option, self.defaults[option])

    def _name(self, number: int, index: int) -> str:
        names = self.param_groups[number].get("param_names")
        return names[index] if names else f"param_groups[{number}]['params'][{index}]"

    def _raise_unsupported(self, tensor: Tensor, number: int, index: int, wanted: str) -> None:
        raise ValueError(
            f"Parameter `{self._name(number, index)}` should {wanted} (embeddings: `sparse=False`; "
            f"complex numbers: `torch.view_as_real`). Found {tensor.layout}, {tensor.dtype}."
        )

    def _rule_for(self, param: Tensor) -> UpdateRule:
        if param.device not in self._placed_rules:
            self._placed_rules[param.device] = copy.deepcopy(self.rule).to(param.device)
        return self._placed_rules[param.device]

    def _move(self, param: Tensor, group: dict[str, Any]) -> None:
        rule, dtype = self._rule_for(param), state_dtype(param.dtype)
        flat, grad = param.detach().reshape(-1).to(dtype), param.grad.reshape(-1).to(dtype)
        saved = self.state.get(param)
        if not saved or self._state_type is None:
            state = rule.init_state(flat)
            self._state_type = type(state)
        if saved:
            state = self._state_type(**saved)
        if group["maximize"]:
            grad = -grad
        progress = None
        if group["total_steps"] is not None:
            done = min(group["n_steps"] / group["total_steps"], 1.0)
            progress = torch.full((), done, dtype=dtype, device=param.device)
        update, state = rule(grad, state, param=flat, shape=param.shape, progress=progress)
        # a new dict, never a write into the old one, which a state_dict taken earlier still holds
        self.state[param] = state._asdict()

        update, lr, alpha = update.reshape(param.shape), group["lr"], 1
        if isinstance(lr, Tensor):
            lr = lr.reshape(())
            update = update * lr
        else:
            alpha = lr  # saves a temporary; takes host numbers only
        moved = param.to(dtype)  # the parameter itself where it has the dtype already
        if group["weight_decay"] != 0:
            moved.mul_(1 - lr * group["weight_decay"])
        moved.add_(update, alpha=alpha)
        if moved is not param:
            param.copy_(moved)

    def _count(self, skipped: list[tuple[int, int]]) -> None:
        is_first = self.n_skipped == 0
        for number, _ in skipped:
            self.param_groups[number]["n_skipped"] += 1
        for group in self.param_groups:
            group["n_steps"] += 1
        if skipped and is_first:
            warnings.warn(
                f"Parameter `{self._name(*skipped[0])}` was not moved at step {self.n_steps}: its gradient "
                "is not finite. Later such steps are skipped and counted in `n_skipped` without a warning.",
                RuntimeWarning,
                stacklevel=5,  # the caller of step(), past the wrappers of no_grad and of the base class
            )

    def _read_state(self, state_dict: StateDict) -> dict[Tensor, dict[str, Tensor]]:
        """Saved state by parameter, checked against the rule, in the rule's dtypes and on its devices."""
        restored = {}
        pairs = zip(self.param_groups, state_dict["param_groups"], strict=False)  # lengths: the base class's job
        for number, (group, saved_group) in enumerate(pairs):
            for index, (param, key) in enumerate(zip(group["params"], saved_group["params"], strict=False)):
                saved = state_dict["state"].get(key)
                if saved:
                    flat = param.detach().reshape(-1).to(state_dtype(param.dtype))
                    template = self._rule_for(param).init_state(flat)._asdict()
                    restored[param] = _matched(saved, template, self._name(number, index))
        return restored


def _matched(saved: dict[str, Tensor], template: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    def shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...] | None]:
        return {field: tuple(value.shape) if torch.is_tensor(value) else None for field, value in state.items()}

    wanted, found = shapes(template), shapes(saved)
    if found != wanted:
        raise ValueError(f"Parameter `{name}` should have a state of {wanted} under this rule. Found {found}.")
    return {field: saved[field].to(like.device, like.dtype) for field, like in template.items()}


def _check_options(options: dict[str, Any]) -> None:
    lr, decay, total_steps = options["lr"], options["weight_decay"], options["total_steps"]
    if isinstance(lr, Tensor):
        require(lr.numel() == 1, "lr", lr, "a number or a one-element tensor")
    else:
        require(isinstance(lr, Real), "lr", lr, "a number or a one-element tensor")
    require(isinstance(decay, Real), "weight_decay", decay, "a number")
    for name in ("lr", "weight_decay"):
        require(bool(options[name] >= 0), name, options[name], "non-negative")
        require(bool(options[name] < float("inf")), name, options[name], "finite")
        require(not isinstance(options[name], bool), name, options[name], "a number")
    is_count = isinstance(total_steps, int) and not isinstance(total_steps, bool) and total_steps > 0
    require(total_steps is None or is_count, "total_steps", total_steps, "a positive integer or None")
    require(isinstance(options["maximize"], bool), "maximize", options["maximize"], "True or False")


def _is_unsupported(tensor: Tensor) -> bool:
    return tensor.layout != torch.strided or tensor.is_complex()


def _are_finite(grads: list[Tensor]) -> list[bool]:
    """Whether each gradient is finite, for one transfer to the host."""
    if not grads:
        return []
    # A finite sum has finite terms only, and costs a tenth of looking at each. One that is not finite may
    # just have overflowed, so then the terms are looked at.
    device = grads[0].device
    sums = torch.stack([grad.sum().isfinite().to(device) for grad in grads]).tolist()
    return [known or bool(grad.isfinite().all()) for known, grad in zip(sums, grads, strict=True)]
