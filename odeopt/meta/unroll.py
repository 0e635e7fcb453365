"""Optimization of a batch of tasks with a rule: the loop that training and evaluation share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten
from torch.utils.checkpoint import checkpoint as activation_checkpoint

from odeopt.checks import is_integer, is_number, require, require_counts
from odeopt.meta.layouts import Separate, layout_for
from odeopt.modes import outside_inference_mode
from odeopt.rules.base import UpdateRule, initial_state
from odeopt.tasks.base import Task, flattened


class Trajectory(NamedTuple):
    """Losses, parameters and states of a run.

    Attributes:
        losses: ``f_t(theta_t)`` for ``t = start .. start + n_steps``, shape ``(n_steps + 1, n_tasks)``: the loss
            before each update, and the one after the last.
        params: Parameters after the last update, each ``(n_tasks, *shape)``.
        states: State of the rule for each parameter.
    """

    losses: Tensor
    params: dict[str, Tensor]
    states: dict[str, NamedTuple]


@outside_inference_mode
def unroll(
    rule: UpdateRule,
    task: Task,
    *,
    indices: Tensor,
    n_steps: int,
    seed: int = 0,
    start: int = 0,
    params: dict[str, Tensor] | None = None,
    states: dict[str, NamedTuple] | None = None,
    total_steps: int | None = None,
    detach: bool = False,
    update_scale: float = 1.0,
    checkpoint_every: int | None = None,
    damping: float = 1.0,
    held_out: float = 0.0,
) -> Trajectory:
    """Optimize the tasks ``indices`` with ``rule``, all of them as one batched computation.

    Under ``torch.no_grad`` or ``torch.inference_mode`` nothing is kept for differentiation. With gradients enabled the
    losses are differentiable with respect to the rule; the optimizee's second derivatives are part of that unless
    ``detach`` is set, which treats the gradients that the rule sees as constants (the dashed edges of
    the paper's Figure 2).

    A differentiated run keeps what every step computed. With ``checkpoint_every`` (activation checkpointing) it keeps
    parameters and states at the ends of segments only, and the backward pass computes each segment again: the same
    gradient to rounding, for twice the evaluations. Derivatives then come from ``.backward()`` without ``inputs``;
    ``torch.autograd.grad`` raises.

    Args:
        rule: The update rule.
        task: Where losses come from.
        indices: Global numbers of the tasks, shape ``(n_tasks,)``, int64.
        n_steps: Number of updates.
        seed: Seed of initial parameters and batches; equal seeds give common random numbers.
        start: Number of the first step, when a run is continued.
        params: Parameters to continue from; the task's initial ones by default.
        states: States to continue from; the rule's initial ones by default.
        total_steps: Length of the whole run, told to the rule as its progress; None leaves it unknown.
        detach: Whether the meta-gradient ignores how gradients depend on the rule.
        update_scale: Factor on the updates, the ``lr`` of :class:`odeopt.LearnedOptimizer`.
        checkpoint_every: Steps per segment of activation checkpointing; None keeps the whole run in memory.
        damping: Factor on the meta-gradient that goes back through parameters and states where a step begins; 1 is
            exact. The run itself is the same.
        held_out: Share of the loss on a batch that no step trains on (:meth:`odeopt.tasks.Task.sample_held_out`) in the
            losses that are returned. The run itself is the same.

    Returns:
        Losses, final parameters and final states.

    Raises:
        ValueError: If ``n_steps``, ``start``, ``total_steps``, ``checkpoint_every``, ``damping`` or ``held_out`` is
            out of range.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Fig. 2.
    """
    require_counts(n_steps=n_steps)
    require_counts(total_steps=total_steps, or_none=True)
    require(is_integer(start) and start >= 0, "start", start, "an integer of at least 0")
    is_long_enough = total_steps is None or total_steps >= start + n_steps
    require(is_long_enough, "total_steps", total_steps, f"at least `start + n_steps = {start + n_steps}`")
    require_counts(checkpoint_every=checkpoint_every, or_none=True)
    require(is_number(damping) and 0 < damping <= 1, "damping", damping, "a number in (0, 1]")
    require(is_number(held_out) and 0 <= held_out <= 1, "held_out", held_out, "a number in [0, 1]")
    params = task.init_params(indices, seed) if params is None else dict(params)
    shapes = {name: param.shape for name, param in params.items()}
    flat = {name: flattened(param) for name, param in params.items()}
    if states is None:
        states = {name: initial_state(rule, param) for name, param in flat.items()}
    layout = layout_for(rule, shapes, next(iter(flat.values())), task.tables)
    flat, states = layout.pack(flat, states)
    run = _Unroll(rule, task, indices, seed, layout, total_steps, detach, update_scale, damping, held_out)
    steps = run.checkpointed if checkpoint_every is not None and torch.is_grad_enabled() else run.steps
    end, length, losses = start + n_steps, checkpoint_every or n_steps, []
    for first in range(start, end, length):
        piece, flat, states = steps(first, min(first + length, end), flat, states)
        losses += piece
    losses.append(run.evaluate(flat, end)[0])
    flat, states = layout.unpack(flat, states)
    params = {name: param.view(shapes[name]) for name, param in flat.items()}
    return Trajectory(torch.stack(losses), params, states)


class _Damped(torch.autograd.Function):
    """The identity, whose derivative is a number below one."""

    @staticmethod
    def forward(ctx, value, damping):
        ctx.damping = damping
        return value.view_as(value)

    @staticmethod
    def backward(ctx, grad):
        return ctx.damping * grad, None


class _Unroll(NamedTuple):
    """Arguments that the steps of a run have in common."""

    rule: UpdateRule
    task: Task
    indices: Tensor
    seed: int
    layout: Separate
    total_steps: int | None
    detach: bool
    update_scale: float
    damping: float
    held_out: float

    def evaluate(self, flat: dict[str, Tensor], step: int) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Losses of a step, what they sum to on its batch, and the parameters by which that can be differentiated.

        The losses have a graph only where gradients are enabled, so where the run is to be differentiated.
        """
        with torch.enable_grad():
            variables = {name: _differentiable(param) for name, param in flat.items()}
            params = self.layout.views(variables)
            loss = self.task.checked_loss(params, self.task.sample_batch(self.indices, step, self.seed))
            total = loss.sum()
        loss = loss if torch.is_grad_enabled() else loss.detach()
        if self.held_out > 0:
            held_out = self.task.checked_loss(params, self.task.sample_held_out(self.indices, step, self.seed))
            loss = torch.lerp(loss, held_out, self.held_out)
        return loss, total, list(variables.values())

    def steps(
        self, start: int, end: int, flat: dict[str, Tensor], states: dict[str, NamedTuple]
    ) -> tuple[list[Tensor], dict[str, Tensor], dict[str, NamedTuple]]:
        """Take some steps: the loss before each of them, and what they lead to."""
        is_exact, losses = torch.is_grad_enabled() and not self.detach, []
        is_damped = torch.is_grad_enabled() and self.damping < 1
        for step in range(start, end):
            if is_damped:  # the same numbers; what a later loss says of them is damped on its way back
                flat, states = tree_map(lambda x: _Damped.apply(x, self.damping), (flat, states))
            loss, total, variables = self.evaluate(flat, step)
            losses.append(loss)
            # where the run is differentiated the graph of the loss is needed again by the meta-gradient
            # zeros for parameters that the loss does not reach
            options = {"create_graph": is_exact, "retain_graph": torch.is_grad_enabled(), "materialize_grads": True}
            grads = torch.autograd.grad(total, variables, **options)
            progress = None if self.total_steps is None else loss.new_tensor(step / self.total_steps)
            states, new_flat = dict(states), {}
            for (name, param), grad in zip(flat.items(), grads, strict=True):
                update, states[name] = self.layout.step(self.rule, name, grad, states[name], param, progress)
                new_flat[name] = param + (update if self.update_scale == 1 else self.update_scale * update)
            flat = new_flat
        return losses, flat, states

    def checkpointed(self, start, end, flat, states):
        """As :meth:`steps`, but nothing inside is kept: the backward pass takes the steps again."""
        inputs, kind = tree_flatten((flat, states))

        def packed_steps(*tensors):
            losses, *after = self.steps(start, end, *tree_unflatten(tensors, kind))
            return *losses, *tree_leaves(after)

        # the reentrant form: the non-reentrant one computes everything before a segment again for each inner gradient;
        # it differentiates only what depends on an input that requires it. Random numbers are counter-based.
        inputs = map(_differentiable, inputs)
        outputs = activation_checkpoint(packed_steps, *inputs, use_reentrant=True, preserve_rng_state=False)
        return list(outputs[: end - start]), *tree_unflatten(outputs[end - start :], kind)


def _differentiable(value: Tensor) -> Tensor:
    """View of a tensor with respect to which a gradient can be taken, where its dtype can have one."""
    view = value.view(value.shape)
    return view if view.requires_grad or not view.is_floating_point() else view.requires_grad_()
