"""Tasks from any ``nn.Module``."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves

from odeopt.checks import require, require_counts
from odeopt.parameters import param_groups

from .base import Batch, Params, Task, declared
from .examples import Examples, count_of
from .random import random_bits

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


class ModuleTask(Task):
    r"""Fit a module to data, one initialisation and one order of minibatches per problem.

    .. math:: f_t(\theta) = \ell(\mathrm{module}_\theta(x_t), y_t)

    All problems are evaluated at once, by ``torch.func.functional_call`` under ``torch.func.vmap``.
    Parameters that require gradients belong to each problem; buffers and frozen parameters are shared, as
    the first module built has them, and stay so: a module that changes them in ``forward`` is refused, and what it
    assigns to other attributes is undone after each evaluation, so that a loss depends on parameters and batch alone.
    Attention runs on its math kernel, the one with second derivatives.

    Args:
        make_module: Builds the module, on the CPU, drawing from torch's global generator; called once per
            problem, under that problem's seed. Call ``.eval()`` in it to switch dropout off.
        data: Tensors that share their first axis, ``(inputs, *targets)``, from which ``batch_size`` examples
            per step are drawn with replacement; or a function ``(indices, step, seed)`` that returns the
            tensors of a step, with a leading axis of problems.
        loss_fn: Maps ``(module output, *targets)`` of one problem to a 0-d tensor.
        batch_size: Examples per step; not used where ``data`` is a function.
        n_examples: Number of the examples in ``data``, or fraction of them, that each problem trains on: a draw of its
            own. The others are for held-out losses, which there are none of by default.
        name: What :meth:`describe` calls the task; the module's class by default.
        device: See :class:`Task`.

    Raises:
        TypeError: If ``data`` is neither a function nor a tuple of tensors, or another argument is of another class.
        ValueError: If the module is one that ``vmap`` cannot take (running statistics, torch's recurrent
            kernels, active dropout), changes its buffers in ``forward`` (at any later evaluation too), has parameters
            of several dtypes, or is not built on the CPU; if data or loss do not have these shapes; if the same
            problem has another loss at its second evaluation; if ``n_examples`` is out of range, or given where
            ``data`` is a function.

    Warns:
        RuntimeWarning: If ``make_module`` or ``data`` gives something else when it is asked for the same once more.
        UserWarning: If buffers or frozen parameters are drawn, so that each module has others, of which all problems
            get those of the first; or if there are stacks of matrices, which are stepped as one tensor each.

    Example:
        >>> x = torch.linspace(-1, 1, 256).unsqueeze(1)
        >>> task = ModuleTask(lambda: nn.Linear(1, 1), (x, 3 * x), loss_fn=nn.functional.mse_loss)
        >>> indices = torch.arange(4)
        >>> task.loss(task.init_params(indices, seed=0), task.sample_batch(indices, step=0, seed=0)).shape
        torch.Size([4])
    """

    def __init__(
        self,
        make_module: Callable[[], nn.Module],
        data: tuple[Tensor, ...] | Callable[[Tensor, int, int], Batch],
        *,
        loss_fn: Callable[..., Tensor],
        batch_size: int = 128,
        n_examples: float | None = None,
        name: str | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if callable(data):
            require(n_examples is None, "n_examples", n_examples, "None where `data` is a function")
        else:
            _check_data(data)
            self.n_trained = count_of(n_examples, len(data[0]))
            if n_examples is not None:  # neighbours, of which a problem gets many, are often alike
                first = torch.zeros(1, dtype=torch.int64)
                self.order = random_bits(first, len(data[0]), seed=0, stream="module/order")[0].argsort()
        for parameter, value in (("make_module", make_module), ("loss_fn", loss_fn)):
            if not callable(value) or (parameter == "make_module" and isinstance(value, nn.Module)):
                raise TypeError(f"Parameter `{parameter}` should be a function. Found `{parameter} = {value!r}`.")
        require_counts(batch_size=batch_size)
        self.make_module, self._default_dtype = make_module, torch.get_default_dtype()
        module = self._build(0)
        if not isinstance(module, nn.Module):
            raise TypeError(f"Parameter `make_module` should return a module. Found `{module!r}`.")
        _check_module(module)
        trained = _trained(module)
        if not trained:
            raise _unfit("a module with parameters", f"`{type(module).__name__}`")
        dtypes = {str(value.dtype): name for name, value in trained.items()}
        if len(dtypes) > 1 or not dtypes.keys() <= {"torch.float32", "torch.float64"}:
            found = ", ".join(f"{name} ({dtype})" for dtype, name in dtypes.items())
            raise _unfit("a module whose parameters are all torch.float32 or all torch.float64", found)
        super().__init__(
            device=device,
            dtype=next(iter(trained.values())).dtype,
            name=type(module).__name__ if name is None else name,
            batch_size=None if callable(data) else batch_size,
            **({} if n_examples is None else {"n_examples": n_examples}),
        )
        self.module, self.data, self.loss_fn, self.batch_size = module, data, loss_fn, batch_size
        self.tables = _tables(module)
        self._warn_of_shared()  # on the CPU, where modules are built
        self.to(device)
        self._try()

    def init_params(self, indices: Tensor, seed: int) -> Params:
        """Build one module per problem, leaving torch's generator as it was; see :meth:`Task.init_params`."""
        seeds = random_bits(self._indices(indices), 1, seed=seed, stream="module/init")[:, 0]
        require(len(seeds) > 0, "indices", indices, "the number of at least one problem")
        draws = [_trained(self._build(s)) for s in seeds.tolist()]
        return {name: torch.stack([draw[name] for draw in draws]).to(self.device) for name in draws[0]}

    def sample_batch(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw the examples of a step, each ``(n_tasks, batch_size, ...)``; see :meth:`Task.sample_batch`."""
        if callable(self.data):
            return tuple(self.data(self._indices(indices), step, seed))
        return self._draw(indices, step, seed)

    def sample_held_out(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw examples that a problem does not train on; see :meth:`Task.sample_held_out`.

        A subclass that changes what :meth:`sample_batch` gives has to change this, too.

        Raises:
            ValueError: If each problem trains on all examples.
        """
        if callable(self.data):
            return super().sample_held_out(indices, step, seed)
        n_all = len(self.data[0])
        wanted = f"fewer than all {n_all} examples of the data, so that some are held out"
        require(self.n_trained < n_all, "n_examples", self.n_trained, wanted)
        return self._draw(indices, step, seed, held_out=True)

    def _draw(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        examples = Examples(len(self.data[0]), self.n_trained, "module")
        chosen = examples.draw(self._indices(indices), self.batch_size, step=step, seed=seed, held_out=held_out)
        chosen = self.order[chosen] if self.n_trained < len(self.data[0]) else chosen
        return tuple(part.index_select(0, chosen.flatten()).unflatten(0, chosen.shape) for part in self.data)

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Loss of each problem, shape ``(n_tasks,)``; see :meth:`Task.loss`."""
        with sdpa_kernel(SDPBackend.MATH), _no_fused_attention(), _kept_as_it_is(self.module):
            return vmap(self._loss_of_one)(params, batch)

    def _loss_of_one(self, params: Params, batch: Batch) -> Tensor:
        output = functional_call(self.module, params, (batch[0],))
        loss = self.loss_fn(output, *batch[1:])
        if not isinstance(loss, Tensor):
            raise TypeError(f"Parameter `loss_fn` should return a 0-d tensor. Found `{loss!r}`.")
        return loss

    def _build(self, seed: int) -> nn.Module:
        """Build a module under a seed of torch's generator of the CPU and the first one's default dtype."""
        now = torch.get_default_dtype()
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            # Not torch.manual_seed, which would reseed the accelerators too, and nobody restores those.
            torch.default_generator.manual_seed(seed)
            torch.set_default_dtype(self._default_dtype)
            try:
                return self.make_module()
            finally:
                torch.set_default_dtype(now)

    def _warn_of_shared(self) -> None:
        """Warn where modules of other seeds have other buffers or frozen parameters."""
        first = _shared(self.module)
        second = _shared(self._build(1)) if first else {}
        drawn = [name for name, x in first.items() if name in second and not _are_equal(x, second[name])]
        if drawn:
            warnings.warn(
                f"Parameter `make_module` should draw trained parameters alone. Found other `{'`, `'.join(drawn)}` "
                "under another seed, of which all problems get those of the first module.",
                UserWarning,
                stacklevel=3,
            )

    @torch.no_grad()
    def _try(self) -> None:
        """Evaluate two problems, so that what vmap cannot take fails here and not inside a training run."""
        indices = torch.arange(2)
        params, batch = self.init_params(indices, 0), self.sample_batch(indices, 0, 0)
        found = [tuple(part.shape) if isinstance(part, Tensor) else part for part in batch]
        is_batch = len(batch) > 0 and all(isinstance(part, Tensor) and part.shape[:1] == (2,) for part in batch)
        wanted = "a function that returns tensors, each with a first axis as long as `indices`, here 2"
        require(is_batch, "data", found, wanted)
        try:
            losses = self.loss(params, batch)
            with torch.enable_grad():
                again = self.loss({name: x.detach().requires_grad_() for name, x in params.items()}, batch)
        except (RuntimeError, NotImplementedError) as error:
            found = f"`{type(self.module).__name__}`, where it fails: {error}"
            raise _unfit("a module whose loss `torch.func.vmap` can take", found) from error
        found = f"a function that returns shape {tuple(losses.shape[1:])}"
        require(losses.shape == indices.shape, "loss_fn", found, "one that returns a 0-d tensor, such as a mean")
        has_gradient = again.requires_grad or torch.is_inference_mode_enabled()
        require(has_gradient, "loss_fn", self.loss_fn, "a loss that can be differentiated by the parameters")
        if not torch.allclose(losses, again, equal_nan=True):
            raise ValueError(
                "Parameters `make_module` and `loss_fn` should give a loss that depends on parameters and batch alone. "
                f"Found {losses.tolist()}, and {again.tolist()} when evaluated again."
            )
        both = (
            ("make_module", "torch's own generator", params, self.init_params(indices, 0)),
            ("data", "`indices`, `step` and `seed`", batch, self.sample_batch(indices, 0, 0)),
        )
        for name, source, first, second in both:
            pairs = zip(tree_leaves(first), tree_leaves(second), strict=True)
            if not all(_are_equal(x, y) for x, y in pairs):
                warnings.warn(
                    f"`{name}` gives something else each time for the same index and seed, so rules are compared on "
                    f"unlike problems and runs cannot be resumed exactly. Draw its random numbers by {source} alone.",
                    RuntimeWarning,
                    stacklevel=3,
                )


@dataclass(eq=False, repr=False, kw_only=True)
class NetworkTask(ModuleTask):
    """A network on data that are drawn anew at each step; its arguments are the fields of a dataclass.

    To write one, derive a dataclass with a field for each further argument, check them in ``__post_init__`` before
    calling this one's, and implement :meth:`build` and :meth:`draw`. :meth:`describe` reports the fields.

    Args:
        batch_size: Examples per step.
        device: See :class:`Task`.

    Raises:
        ValueError: If an argument is out of range.
    """

    batch_size: int = 16
    device: torch.device | str = "cpu"

    def __post_init__(self) -> None:
        super().__init__(self.build, self.draw, loss_fn=self.criterion, batch_size=self.batch_size, device=self.device)
        self.config = declared(self)

    @abstractmethod
    def build(self) -> nn.Module:
        """Build the network of a problem; see :class:`ModuleTask`."""

    @abstractmethod
    def draw(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        """Draw the inputs and the target of a step, each ``(n_tasks, batch_size, ...)``."""

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        """Loss of one problem, a 0-d tensor: the mean cross-entropy in nats."""
        return F.cross_entropy(output.flatten(0, -2), target.flatten())

    def sample_held_out(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw data that a problem does not train on; see :meth:`Task.sample_held_out`."""
        return self.draw(self._indices(indices), step, seed, held_out=True)


def _trained(module: nn.Module) -> Params:
    """The parameters that belong to each problem."""
    return {name: p.detach() for name, p in module.named_parameters() if p.requires_grad}


def _shared(module: nn.Module) -> Params:
    """The buffers and frozen parameters, which all problems share."""
    frozen = ((name, p.detach()) for name, p in module.named_parameters() if not p.requires_grad)
    return dict([*module.named_buffers(), *frozen])


def _are_equal(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and torch.allclose(x, y, equal_nan=True)


def _tables(module: nn.Module) -> frozenset[str]:
    """Names of the trained parameters that are tables of vectors; a warning where there are stacks of matrices."""
    groups = param_groups(module)
    found = {kind: [name for group in groups if group.get(kind) for name, p in group["params"] if p.requires_grad]
             for kind in ("is_table", "is_stack")}  # fmt: skip
    if found["is_stack"]:
        warnings.warn(
            f"Parameters {', '.join(found['is_stack'])} are stacks, which a task steps as one tensor each: "
            "`LearnedOptimizer(odeopt.param_groups(module))` steps them matrix by matrix.",
            UserWarning,
            stacklevel=3,
        )
    return frozenset(found["is_table"])


def _check_data(data: tuple[Tensor, ...]) -> None:
    """Raise unless the data are tensors with a common, non-empty first axis."""
    if not isinstance(data, tuple) or not data or not all(isinstance(part, Tensor) for part in data):
        raise TypeError(f"Parameter `data` should be a tuple of tensors or a function. Found `{type(data).__name__}`.")
    sizes = [len(part) if part.ndim else None for part in data]
    is_right = len(set(sizes)) == 1 and bool(sizes[0])
    require(is_right, "data", sizes, "tensors of one, positive number of examples")


def _unfit(wanted: str, found: str) -> ValueError:
    return ValueError(f"Parameter `make_module` should build {wanted}. Found {found}.")


def _check_module(module: nn.Module) -> None:
    """Raise where a submodule is known to fail under vmap, or a parameter was not seeded."""
    for name, submodule in module.named_modules():
        if reason := _refusal(submodule):
            found = f"{name} = {type(submodule).__name__}" if name else type(submodule).__name__
            raise _unfit("a module that `torch.func.vmap` can take", f"`{found}`: {reason}")
    for name, parameter in module.named_parameters():
        if parameter.device.type != "cpu":
            raise _unfit("the module on the CPU; `device` moves the task", f"`{name}` on {parameter.device}")


def _refusal(module: nn.Module) -> str | None:
    """Why vmap cannot take a module itself, its children aside; None if it can."""
    if isinstance(module, nn.RNNBase | nn.LSTMCell):
        return "torch's recurrent kernels have no batching rule; write the recurrence with linear layers"
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        for name in ("sparse", "max_norm"):
            if getattr(module, name):
                return f"`{name}` has no second derivatives, or writes into the weights of all problems; leave it out"
    if not module.training:
        return None
    if getattr(module, "running_mean", None) is not None:
        return (
            "its running statistics would be written by all problems at once; "
            "use GroupNorm or LayerNorm, or track_running_stats=False"
        )
    p = module.p if isinstance(module, _DROPOUTS) else getattr(module, "dropout", 0.0)
    if isinstance(p, int | float) and p > 0:
        return "its dropout is active, and a loss may draw no random numbers; set it to 0 or call .eval()"
    return None


@contextmanager
def _kept_as_it_is(module: nn.Module) -> Iterator[None]:
    """Undo what forward assigns, and refuse changes of buffers and frozen parameters: they would reach later runs.

    Buffers are lent as copies, which forward may spoil.
    """
    kept, lent = [(each, dict(vars(each))) for each in module.modules()], {}
    for prefix, each in module.named_modules():
        each._buffers = {name: None if buffer is None else buffer.clone() for name, buffer in each._buffers.items()}
        each._parameters = dict(each._parameters)
        for name, value in (each._buffers | each._parameters).items():
            lent[f"{prefix}.{name}".lstrip(".")] = each, name, value, _version(value)
    try:
        yield
        changed = [
            full_name
            for full_name, (each, name, value, version) in lent.items()
            if (each._buffers | each._parameters).get(name) is not value or _version(value) != version
        ]
    finally:
        for each, attributes in kept:
            vars(each).clear()
            vars(each).update(attributes)
    if changed:
        raise _unfit(
            "a module that changes neither buffers nor frozen parameters in `forward`: they are shared by all problems "
            "and runs",
            f"`{type(module).__name__}`, which changes {', '.join(changed)}; pass what changes with the step as data, "
            "or call .eval() if that keeps it",
        )


def _version(value: Tensor | None) -> int:
    """Number of changes in place, which tensors made in inference mode do not count."""
    return 0 if value is None or value.is_inference() else value._version


@contextmanager
def _no_fused_attention() -> Iterator[None]:
    """Keep nn.MultiheadAttention off its fused inference kernel, which has no derivative.

    It takes that path in evaluation mode unless a parameter requires gradients, which vmap hides from it.
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
