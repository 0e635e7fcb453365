"""The interface every update rule stands behind."""

from __future__ import annotations

import functools
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from odeopt.checks import require
from odeopt.rules.rows import Rows


class UpdateRule(nn.Module, ABC):
    r"""An optimizer as a pure function of gradients: ``(g_t, state_t) -> (update_t, state_{t+1})``.

    .. math:: \theta_{t+1} = \theta_t + \Delta_t, \qquad (\Delta_t, s_{t+1}) = \mathrm{rule}(\nabla f(\theta_t), s_t)

    A rule sees one parameter tensor at a time, flattened to its last axis; any leading axes are
    independent tasks. It holds no state, mutates nothing and draws no random numbers, so one object
    serves meta-training, evaluation and :class:`odeopt.LearnedOptimizer` and gives the same
    trajectory in all three.

    To write a rule, subclass, set up the networks in ``__init__``, and implement :meth:`init_state` and
    :meth:`forward`. Keep every constructor argument in :attr:`config` so that artefacts can rebuild the rule.

    Attributes:
        crosses_coordinates: Whether the update of a coordinate depends on anything but its own gradient, parameter
            and state, the step count and the progress. A rule that says False is handed the coordinates of many
            tensors at once by :class:`odeopt.LearnedOptimizer`, and no ``shape``.
        uses_layers: Whether weights enter only where ``nn.Linear`` layers are called on inputs whose first axis is that
            of the tasks. Such a rule runs many sets of weights at once cheaply.
        has_fixed_step: Whether the tasks of a batch take the steps that each would take alone. An adaptive solver
            chooses one step size for all of them.
        starts_at_zero: Whether :meth:`init_state` returns zeros whatever the parameter is, which then need not be
            written. A subclass with an ``init_state`` of its own has to say so itself.
        stores_q: Whether the system of a coordinate depends on its position, through networks that a compiler cannot
            trace.
        chunk_size: Coordinates that an eager step on a CPU takes at a time for each thread: its temporaries are to stay
            in cache.
        config: All constructor arguments, which rebuild the rule; values that JSON can hold.
        trained_for: Account of the training of a rule that :func:`odeopt.load` has read; None for others.
    """

    registry: ClassVar[dict[str, type[UpdateRule]]] = {}
    crosses_coordinates: bool = True
    uses_layers: bool = False
    has_fixed_step: bool = True
    starts_at_zero: bool = False
    stores_q: bool = False
    chunk_size: int = 2**16
    trained_for: Mapping[str, Any] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        known = UpdateRule.registry.get(cls.__name__)
        # names of the library's rules stand for these in files, whoever has a class of the same name
        if known is None or _is_ours(cls) or not _is_ours(known):
            UpdateRule.registry[cls.__name__] = cls
        # the class that `init_state` comes from, of a mixin, too, is the one that has to say so
        said = next(vars(base) for base in cls.__mro__ if {"init_state", "starts_at_zero"} & vars(base).keys())
        if "starts_at_zero" not in said:
            cls.starts_at_zero = False
        if "__init__" in vars(cls):
            cls.__init__ = _checked(cls.__init__)

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def init_state(self, param: Tensor) -> NamedTuple:
        """Return the state before the first step.

        Args:
            param: Flattened parameter, shape ``(*batch, n)``; gives shapes, device and dtype.

        Returns:
            A ``NamedTuple`` of tensors whose leading axes are ``batch``; in ``state_dtype(param.dtype)``.
        """

    @abstractmethod
    def forward(
        self,
        grad: Tensor,
        state: NamedTuple,
        *,
        param: Tensor | None = None,
        shape: torch.Size | tuple[int, ...] | None = None,
        progress: Tensor | None = None,
    ) -> tuple[Tensor, NamedTuple]:
        """Advance one optimizer step.

        Args:
            grad: Gradient of the loss, shape ``(*batch, n)``.
            state: State that :meth:`init_state` or the previous call returned.
            param: The parameter, shape ``(*batch, n)``, for rules that depend on it.
            shape: Shape of the parameter tensor itself, for signals such as its fan-in, or of each of several blocks of
                rows of which it consists; ``(n,)`` by default.
            progress: Fraction of the run that is done, a 0-d tensor in ``[0, 1]``, or None where unknown.

        Returns:
            The update, shape ``(*batch, n)``, to be ADDED to the parameter; and the next state.
        """

    def account(
        self,
        grad: Tensor,
        state: NamedTuple,
        *,
        param: Tensor | None = None,
        shape: torch.Size | tuple[int, ...] | None = None,
        progress: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Name what moves a tensor in the step that ``grad`` drives, for :meth:`odeopt.LearnedOptimizer.diagnostics`.

        Takes what :meth:`forward` takes; returns quantities of shape ``(*batch,)``, or ``(*batch, modes)``. A rule
        without such quantities has none.
        """
        return {}

    @property
    def is_staged(self) -> bool:
        """True if coordinates interact only through the sums of :class:`StagedRule`."""
        return False

    def is_whole(self, shape: torch.Size | tuple[int, ...] | None) -> bool:
        """True for the shape of a tensor that is stepped as a whole although the rule is staged.

        Such a tensor is stepped by :meth:`forward`, with all others of its shape as one more axis of the batch.
        """
        return False

    def is_matrix(self, shape: torch.Size | tuple[int, ...] | None) -> bool:
        """True for the shape of a tensor that counts in the depth of a network (:meth:`for_depth`)."""
        return self.is_whole(shape)

    def for_tables(self) -> Self:
        """The rule as it steps lookup tables, the rows of which are vectors of their own; shares the weights."""
        return self

    def for_transposed(self) -> Self:
        """The rule as it steps matrices that are stored (in, out), as ``x @ weight`` takes them; shares the weights."""
        return self

    def for_depth(self, n_matrices: int) -> Self:
        """The rule as it steps one of ``n_matrices`` :meth:`matrices <is_matrix>` of a network.

        Shares the weights, as :meth:`for_tables` does.
        """
        return self

    def with_options(self, **options: Any) -> Self:
        """Return a rule of the same weights with other constructor options, such as another ``solver``.

        Args:
            options: Those that differ from :attr:`config`; they may not change which weights there are.

        Returns:
            A new rule, on the same device and of the same dtype.

        Raises:
            ValueError: If the weights do not fit a rule of these options, or if an option decides with which weights
                a new rule begins: it would say what these weights are not.
        """
        rule, weights = built(type(self), self.config | options), self.state_dict()
        drawn, fresh = (
            {name: x for name, x in new.state_dict().items() if torch.is_tensor(x)}
            for new in (rule, built(type(self), self.config))
        )
        shapes, wanted = ({name: x.shape for name, x in tensors.items()} for tensors in (drawn, fresh))
        require(shapes == wanted, "options", options, "such that the weights stay as they are")
        decides = any(not torch.equal(x, fresh[name]) for name, x in drawn.items())
        require(not decides, "options", options, "without any that decides the weights of a new rule")
        device = next((x.device for x in weights.values() if torch.is_tensor(x)), torch.device("cpu"))
        adopt_weights(rule.to(device), weights)
        return rule

    def n_parameters(self) -> int:
        """Number of learned parameters; of a frozen rule there are none."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.config.items())


def _is_ours(rule_class: type) -> bool:
    """Whether a class is one of this library's."""
    return rule_class.__module__.partition(".")[0] == __name__.partition(".")[0]


class StagedRule(UpdateRule):
    r"""A rule under which the coordinates of a tensor interact only through a few sums over them.

    .. math:: c_0 = C_0\Big(\sum_i s_0(g_i, x_i)\Big), \quad c_1 = C_1\Big(\sum_i s_1(g_i, x_i, c_0)\Big), \ \ldots,
              \qquad (\Delta_i, x_i') = A(g_i, x_i, c)

    Sums add up over pieces, so the same methods serve one tensor, the packed tensors of a model, and a
    tensor of which each process holds a shard. Coordinates that pad a piece have gradient, parameter and state zero;
    they must contribute zero to every sum and keep a zero state.

    A tensor that sums are not enough for (:meth:`UpdateRule.is_whole`: a matrix that is stepped by its singular values)
    never comes to these methods; :meth:`UpdateRule.for_tables` is the rule to take for the tensors that a caller knows
    to be lookup tables, here too.

    In the methods below ``features`` and the fields of ``shared`` have one row per tensor, ``(*batch, k)``. Of
    ``state``, :meth:`coefficients` may read the fields that a tensor holds once, :meth:`statistics` and
    :meth:`advance` the others.
    """

    @property
    def is_staged(self) -> bool:
        """True if the stages make up the whole step; a subclass may have options under which they do not."""
        return True

    @property
    @abstractmethod
    def n_stages(self) -> int:
        """Number of sums that a step waits for, one after the other; at least 1."""

    @abstractmethod
    def features(self, shape: torch.Size | tuple[int, ...], n_blocks: int = 1) -> tuple[float, ...]:
        """Numbers that follow from the shape of a tensor, its size among them: ``n_features`` floats.

        Args:
            shape: Shape of the tensor.
            n_blocks: Of how many blocks of this shape it consists; more than one only where it is stepped as a whole.
        """

    @abstractmethod
    def statistics(
        self, stage: int, grad: Tensor, state: NamedTuple, features: Tensor, shared: NamedTuple | None, param: Tensor
    ) -> Tensor:
        """Sum over the coordinates of each tensor what a stage needs.

        Args:
            stage: Number of the stage, from 0.
            grad: Gradients, shape ``(*batch, n)``.
            state: State; its fields per coordinate have shape ``(*batch, ..., n)``.
            features: As :meth:`features` gives them, shape ``(*batch, k)``.
            shared: What :meth:`coefficients` returned at the stage before; None at the first.
            param: Parameters, shape ``(*batch, n)``.

        Returns:
            The sums over the last axis, shape ``(*batch, n_statistics)``; there may be none.
        """

    @abstractmethod
    def coefficients(
        self,
        stage: int,
        sums: Tensor,
        state: NamedTuple,
        features: Tensor,
        shared: NamedTuple | None,
        progress: Tensor | None,
        *,
        has_param: bool = True,
    ) -> NamedTuple:
        """Compute once per tensor, from the sums of a stage, the numbers that its coordinates share.

        Args:
            stage: Number of the stage, from 0.
            sums: The sums, of all pieces of a tensor, shape ``(*batch, n_statistics)``.
            state: State; its fields per tensor have shape ``(*batch, k)``.
            features: As :meth:`features` gives them, shape ``(*batch, k)``.
            shared: What this method returned at the stage before; None at the first.
            progress: Fraction of the run that is done, 0-d; None where unknown.
            has_param: False where parameters are not known, and the sums took them for zero.

        Returns:
            The numbers, each field of shape ``(*batch, k)``.
        """

    @abstractmethod
    def advance(self, grad: Tensor, state: NamedTuple, shared: NamedTuple) -> tuple[Tensor, NamedTuple]:
        """Step each coordinate.

        Args:
            grad: Gradients, shape ``(*batch, n)``.
            state: State, with the shapes that :meth:`UpdateRule.init_state` gives.
            shared: What :meth:`coefficients` returned at the last stage.

        Returns:
            The update, shape ``(*batch, n)``, and the next state.
        """

    @abstractmethod
    def forward_rows(
        self,
        grad: Tensor,
        state: NamedTuple,
        rows: Rows,
        *,
        param: Tensor | None = None,
        progress: Tensor | None = None,
    ) -> tuple[Tensor, NamedTuple]:
        """Advance several tensors at once, as :meth:`UpdateRule.forward` does one; differentiable.

        Args:
            grad: Gradients as rows of coordinates, shape ``(*batch, n_rows, n_columns)``, padded with zeros.
            state: State; fields per coordinate in rows, those once per tensor of shape ``(*batch, n_tensors, k)``.
            rows: Which tensor each row belongs to, and the :meth:`features` of each tensor.
            param: Parameters in rows.
            progress: As in :meth:`UpdateRule.forward`.

        Returns:
            The update in rows, and the next state in the form of ``state``.
        """


def _checked(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def initialise(self: UpdateRule, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        if "config" not in vars(self):
            raise TypeError(
                f"`{type(self).__name__}.__init__` should begin with `super().__init__(...)`, given its own arguments "
                "by name. Found that `UpdateRule.__init__` was not called."
            )
        given = inspect.signature(init).bind(self, *args, **kwargs)
        lost = [name for name in _named(given) if name not in self.config]
        if lost:
            raise TypeError(
                f"`{init.__qualname__}` should hand `{lost[0]}` on to `super().__init__`, by this name: the "
                "rule is built again from what that keeps, in files and in copies with other options. "
                f"Found `config = {self.config}`."
            )

    return initialise


def _named(given: inspect.BoundArguments) -> list[str]:
    """Names of the arguments of a call, those of ``**kwargs`` one by one; others have no name."""
    names = []
    for name, value in [*given.arguments.items()][1:]:  # all but `self`
        kind = given.signature.parameters[name].kind
        if kind is not inspect.Parameter.VAR_POSITIONAL:
            names += list(value) if kind is inspect.Parameter.VAR_KEYWORD else [name]
    return names


def initial_state(rule: UpdateRule, param: Tensor) -> NamedTuple:
    """State of a rule before the first step; raises where it is no NamedTuple of tensors."""
    state = rule.init_state(param)
    found = None if hasattr(state, "_fields") else f"a {type(state).__name__}"
    for name, value in state._asdict().items() if found is None else ():
        if not torch.is_tensor(value):
            found = f"`{name} = {value!r}`"
    if found is not None:
        raise TypeError(
            "Parameter `rule` should have a state that is a NamedTuple of tensors. "
            f"Found {found} from `{type(rule).__name__}.init_state`."
        )
    return state


def checked(rule: UpdateRule, grad: Tensor, step: Any) -> tuple[Tensor, NamedTuple]:
    """Return what ``rule`` made of ``grad``; refuse it unless it is an update of the shape of ``grad`` and a state."""
    name = f"`{type(rule).__name__}.forward`"
    if not (isinstance(step, tuple) and len(step) == 2 and torch.is_tensor(step[0]) and hasattr(step[1], "_fields")):
        parts = [type(x).__name__ for x in (step if isinstance(step, tuple) else (step,))]
        raise TypeError(
            "Parameter `rule` should return two things, the update, a tensor, and the next state, a NamedTuple. "
            f"Found {' and '.join(parts) or 'none'} from {name}."
        )
    if step[0].shape != grad.shape:
        raise ValueError(
            f"Parameter `rule` should return updates of the shape of `grad`, {tuple(grad.shape)}. Found "
            f"{tuple(step[0].shape)} from {name}."
        )
    return step


@torch.no_grad()
def check_tasks_apart(rule: UpdateRule) -> None:
    """Raise a ValueError where the step of a task depends on the tasks beside it."""
    if isinstance(rule, StagedRule) or not rule.has_fixed_step:
        return
    like = next(rule.parameters(), torch.zeros(()))
    grad = like.new_tensor([[0.1, -0.2, 0.3], [1.0, 2.0, -3.0]])
    param = grad + 1
    signals = {"shape": torch.Size((3,)), "progress": like.new_tensor(0.5)}
    steps = (
        rule.forward(grad[:n], initial_state(rule, param[:n]), param=param[:n], **signals)  # without the caller's hooks
        for n in (2, 1)
    )
    both, alone = (checked(rule, grad[:n], step)[0][:1] for n, step in zip((2, 1), steps, strict=True))
    if not torch.allclose(both, alone, rtol=1e-2, atol=1e-7, equal_nan=True):
        raise ValueError(
            "Parameter `rule` should step each task by itself: the leading axes of `grad` are tasks, so reduce over "
            f"the last axis only. Found `{type(rule).__name__}`, whose update of a task depends on the task beside it."
        )


def built(rule_class: type[UpdateRule], config: Mapping[str, Any]) -> UpdateRule:
    """Build a rule on the CPU, with random weights that leave the caller's generator alone: twice gives the same."""
    with _disable_current_modes(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return rule_class(**config)


def adopt_weights(rule: UpdateRule, weights: Mapping[str, Tensor]) -> None:
    """Give a rule that has just been built other weights, in their dtypes; tied weights and views stay so."""
    wanted, found = (
        {x.dtype for x in state.values() if torch.is_tensor(x) and x.is_floating_point()}
        for state in (weights, rule.state_dict())
    )
    if len(wanted) == 1 and wanted != found:  # then the other buffers have been brought to that dtype, too
        rule.to(next(iter(wanted)))
    for name, x in rule.state_dict(keep_vars=True).items():
        if torch.is_tensor(x) and (x.dtype != weights[name].dtype or 0 in x.stride()):  # one number in many places
            x.data = torch.empty(x.shape, dtype=weights[name].dtype, device=x.device)
    rule.load_state_dict(weights)


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of the state beside parameters of ``dtype``: float32 or better."""
    return torch.promote_types(dtype, torch.float32)


def per_coordinate(param: Tensor) -> Tensor:
    """Zeros for a state held per coordinate, shape ``(*batch, n)``."""
    return torch.zeros_like(param, dtype=state_dtype(param.dtype))


def per_tensor(param: Tensor) -> Tensor:
    """Zeros for a state held once per tensor, shape ``(*batch, 1)``.

    Step counts live here, not in Python numbers, which a compiled or captured step would freeze.
    """
    return torch.zeros((*param.shape[:-1], 1), dtype=state_dtype(param.dtype), device=param.device)
