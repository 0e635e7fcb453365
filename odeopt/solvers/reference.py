"""Reference solutions and their gradients, which runs of solvers are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from odeopt.checks import require
from odeopt.ode.checks import State, tensors_of
from odeopt.ode.integrate import integrate
from odeopt.ode.recorder import map_state, restore
from odeopt.ode.solution import Solution
from odeopt.solvers.initial_value import Problem

# dopri8 at 1e-12 is off by up to 1e-10 on these problems, at 1e-14 by 1e-12; SciPy takes nothing under 2e-14
REFERENCE_TOLERANCE, STIFF_TOLERANCE = 1e-14, 1e-12
_MAX_STEPS = 50_000  # between outputs; on a clock far from zero rounding of the time would ask for steps without end


def reference(problem: Problem) -> State:
    """Solution that runs are measured against, in float64.

    The closed form where there is one; else dopri8 at 1e-14 with its steps on the output times, or, of a stiff
    problem, SciPy's Radau at 1e-12 from each output time to the next, so that nothing is interpolated. Within 1e-11
    of the values in the literature.

    Args:
        problem: The problem.

    Returns:
        States at its output times, each of shape ``(n_times, *shape)``, on the CPU.

    Raises:
        ValueError: If the solver fails, or the closed form has another shape or start than the problem.
    """
    problem = problem.to()
    if problem.exact is not None:
        return _exact(problem)
    with torch.no_grad():
        if not problem.is_stiff:
            return _tight(problem).states
        states = [problem.x0]
        for t in problem.t.unfold(0, 2, 1):
            options = {"solver": "Radau"}
            tolerances = {"rtol": STIFF_TOLERANCE, "atol": 1e-3 * STIFF_TOLERANCE}
            solution = integrate(problem.field, states[-1], t, method="scipy_solver", options=options, **tolerances)
            _check(problem, solution)
            states.append(map_state(lambda x: x[-1], solution.states))
    return restore(problem.x0, [torch.stack(parts) for parts in zip(*map(tensors_of, states), strict=True)])


def _exact(problem: Problem) -> State:
    """States of the closed form, which broadcasting would take in another shape, too."""
    states = problem.exact(problem.t)
    for x, x0 in zip(tensors_of(states), tensors_of(problem.x0), strict=True):
        shape, is_right = (len(problem.t), *x0.shape), x.shape == (len(problem.t), *x0.shape)
        found = tuple(x.shape)
        require(is_right, "exact", found, f"a function that returns states of shape {shape} ({problem.name})")
        is_start = torch.allclose(x[0], x0.to(x), rtol=1e-6, atol=1e-9 + 1e-6 * x0.abs().max().item())
        require(is_start, "exact", x[0].tolist(), f"one that begins at `x0 = {x0.tolist()}` ({problem.name})")
    return states


def loss_of(states: State) -> Tensor:
    """Loss whose gradient is compared: half the mean square distance of the outputs from the origin, a 0-d tensor."""
    return 0.5 * sum(x[1:].square().sum() / (len(x) - 1) for x in tensors_of(states))


@torch.inference_mode(False)  # which also undoes `torch.no_grad()`
def reference_gradient(problem: Problem) -> Tensor | None:
    """Gradient of :func:`loss_of` with respect to the initial state, through dopri8 at 1e-14.

    Args:
        problem: The problem.

    Returns:
        The gradient, shape ``(n,)`` in float64; None for a stiff problem, which that method does not solve.

    Raises:
        ValueError: If the solver fails.
    """
    if problem.is_stiff:
        return None
    problem = problem.to()
    x0 = map_state(lambda x: x.clone().requires_grad_(), problem.x0)
    return gradient_of(loss_of(_tight(problem, x0).states), x0)


def gradient_of(loss: Tensor, x0: State) -> Tensor:
    """Gradient of a loss with respect to a state, flattened, in float64."""
    gradients = torch.autograd.grad(loss, tensors_of(x0), materialize_grads=True)
    return torch.cat([gradient.flatten().double() for gradient in gradients])


def _tight(problem: Problem, x0: State | None = None) -> Solution:
    tolerances = {"rtol": REFERENCE_TOLERANCE, "atol": REFERENCE_TOLERANCE}
    options, x0 = {"step_t": problem.t, "max_num_steps": _MAX_STEPS}, problem.x0 if x0 is None else x0
    solution = integrate(problem.field, x0, problem.t, method="dopri8", options=options, **tolerances)
    _check(problem, solution)
    return solution


def _check(problem: Problem, solution: Solution) -> None:
    if not solution.is_success:
        raise ValueError(f"Problem {problem.name} has no reference: {solution.message}")
