"""The one loop that optimizes a batch of tasks with a rule."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.rules.base import UpdateRule, require
from odeopt.tasks.base import Task


class Trajectory(NamedTuple):
    """What a run leaves behind.

    Attributes:
        losses: ``f_t(theta_t)`` for ``t = start .. start + n_steps``, shape ``(n_steps + 1, n_tasks)``: the loss
            before each update, and the one after the last.
        params: Parameters after the last update, each ``(n_tasks, *shape)``.
        states: State of the rule for each parameter.
    """

    losses: Tensor
    params: dict[str, Tensor]
    states: dict[str, NamedTuple]


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
) -> Trajectory:
    """Optimize the tasks ``indices`` with ``rule``, all of them as one batched computation.

    Under ``torch.no_grad`` nothing is kept for differentiation. With gradients enabled the losses are
    differentiable with respect to the rule; the optimizee's second derivatives are part of that unless
    ``detach`` is set, which treats the gradients that the rule sees as constants (the dashed edges of
    the paper's Figure 2).

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

    Returns:
        Losses, final parameters and final states.

    Raises:
        ValueError: If ``n_steps`` or ``total_steps`` is out of range.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Fig. 2.
    """
    require(n_steps >= 1, "n_steps", n_steps, "at least 1")
    is_long_enough = total_steps is None or total_steps >= start + n_steps
    require(is_long_enough, "total_steps", total_steps, f"at least `start + n_steps = {start + n_steps}`")
    is_exact = torch.is_grad_enabled() and not detach
    params = task.init_params(indices, seed) if params is None else dict(params)
    shapes = {name: param.shape for name, param in params.items()}
    flat = {name: param.reshape(len(indices), shapes[name][1:].numel()) for name, param in params.items()}
    if states is None:
        states = {name: rule.init_state(param) for name, param in flat.items()}
    losses = []
    for step in range(start, start + n_steps + 1):
        with torch.enable_grad():
            variables = {name: _variable(param, shapes[name]) for name, param in flat.items()}
            loss = task.loss(variables, task.sample_batch(indices, step, seed))
            total = loss.sum()
        losses.append(loss if torch.is_grad_enabled() else loss.detach())
        if step == start + n_steps:
            break
        # where the run is differentiated the graph of the loss is needed again by the meta-gradient
        grads = torch.autograd.grad(
            total, list(variables.values()), create_graph=is_exact, retain_graph=torch.is_grad_enabled()
        )
        progress = None if total_steps is None else loss.new_tensor(step / total_steps)
        states, new_flat = dict(states), {}
        for (name, param), grad in zip(flat.items(), grads, strict=True):
            update, states[name] = rule(
                grad.reshape(param.shape),
                states[name],
                param=param,
                shape=shapes[name][1:],
                progress=progress,
            )
            new_flat[name] = param + (update if update_scale == 1 else update_scale * update)
        flat = new_flat
    params = {name: param.view(shapes[name]) for name, param in flat.items()}
    return Trajectory(torch.stack(losses), params, states)


def _variable(param: Tensor, shape: torch.Size) -> Tensor:
    """View of a flat parameter in its own shape, with respect to which a gradient can be taken."""
    variable = param.view(shape)
    return variable if variable.requires_grad else variable.requires_grad_()


def detached(trajectory: Trajectory) -> Trajectory:
    """Cut a trajectory off from the graph, to continue it as a new segment."""
    return Trajectory(
        trajectory.losses.detach(),
        {name: param.detach() for name, param in trajectory.params.items()},
        {name: type(state)(*(s.detach() for s in state)) for name, state in trajectory.states.items()},
    )
