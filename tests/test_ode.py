"""Properties of the solver room: one step, whole integrations, their gradients."""

from typing import NamedTuple

import pytest
import torch
from cuda_toys import no_waiting
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchdiffeq import odeint

from odeopt.ode import (
    EXPLICIT_METHODS,
    available_methods,
    integrate,
    integrate_unit,
    is_fixed_step,
    nominal_order,
)
from odeopt.ode.integrate import _UNIT_TIMES

METHODS = available_methods()
FIXED = [method for method in METHODS if is_fixed_step(method)]
ORDERED = [method for method in METHODS if nominal_order(method) is not None]
ADAPTIVE = [method for method in ORDERED if not is_fixed_step(method)]
BACKENDS = ["odeopt", "torchdiffeq"]
F64 = torch.float64

# A damped, rotating system: neither symmetric nor commuting with its transpose.
A = torch.tensor([[-0.3, 1.1], [-0.9, -0.1]], dtype=F64)


class Pair(NamedTuple):
    q: Tensor
    p: Tensor


class Wave(nn.Module):
    """A nonlinear field with parameters and time in it."""

    def __init__(self) -> None:
        super().__init__()
        self.A = nn.Parameter(A.clone())

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.A.T) + torch.cos(3 * t + 1) * x


def waving(t: Tensor, x: Tensor) -> Tensor:
    return torch.cos(3 * t + 1) * torch.sin(x) - 0.4 * x


def linear(t: Tensor, x: Tensor) -> Tensor:
    return x @ A.T


def times(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=F64)


X0 = torch.tensor([[1.0, -0.5], [0.2, 0.7], [-1.3, 0.4]], dtype=F64)


# One step


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31 - 1),
    n=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, F64]),
    method=st.sampled_from(FIXED),
)
def test_unit_step_is_odeint_bit_for_bit_on_linear_systems(seed, n, dtype, method):
    generator = torch.Generator().manual_seed(seed)
    M, b, x0 = (torch.randn(s, generator=generator, dtype=dtype) for s in ((n, n), (n,), (3, n)))

    def field(t, x):
        return x @ M + torch.sin(3 * t + 1) * b

    t = torch.tensor([0.0, 1.0], dtype=dtype)
    expected = odeint(field, x0, t, method=method, options={"step_size": 1.0})[-1]
    assert torch.equal(integrate_unit(field, x0, method=method, backend="torchdiffeq"), expected)


@pytest.mark.parametrize("method", ["dopri5", "bosh3"])
def test_unit_step_takes_adaptive_methods_at_default_tolerances(method):
    expected = odeint(waving, X0, times(0, 1, 2), method=method)[-1]
    assert torch.equal(integrate_unit(waving, X0, method=method), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(), (0,), (4,), (2, 3, 5)])
def test_unit_step_keeps_shape_and_memory_layout(shape, backend):
    x0 = torch.ones(shape[::-1], dtype=F64).permute(tuple(reversed(range(len(shape)))))
    x1 = integrate_unit(waving, x0, backend=backend)
    assert x1.shape == x0.shape
    assert x1.stride() == x0.stride()


@pytest.mark.parametrize("method", FIXED)
def test_unit_step_has_first_and_second_derivatives(method):
    x0 = X0.clone().requires_grad_()
    B = A.clone().requires_grad_()

    def step(x0, B):
        def field(t, x):
            return torch.tanh(x @ B) + torch.cos(3 * t + 1) * x

        return integrate_unit(field, x0, method=method, backend="torchdiffeq")

    assert torch.autograd.gradcheck(step, (x0, B))
    assert torch.autograd.gradgradcheck(step, (x0, B))


def _step_in_inference_mode(step) -> None:
    with torch.inference_mode():
        step(X0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "first_use",
    [
        _step_in_inference_mode,
        lambda step: torch.func.vmap(step)(X0),
        lambda step: torch.func.jacrev(step)(X0),
        lambda step: torch.compile(step, backend="eager", fullgraph=True)(X0),
    ],
    ids=["inference_mode", "vmap", "jacrev", "compile"],
)
def test_unit_step_is_differentiable_whatever_made_its_cached_times(first_use, backend):
    def step(x0):
        return integrate_unit(waving, x0, backend=backend)

    def gradient():
        x0 = X0.clone().requires_grad_()
        return torch.autograd.grad(step(x0).sum(), x0)[0]

    expected = gradient()
    _UNIT_TIMES.clear()
    first_use(step)
    assert torch.equal(gradient(), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_unit_step_is_the_same_under_no_grad_vmap_and_compile(backend):
    def step(x0):
        return integrate_unit(waving, x0, backend=backend)

    expected = step(X0)
    with torch.no_grad():
        assert torch.equal(step(X0), expected)
    assert torch.equal(torch.func.vmap(step)(X0), expected)
    assert torch.equal(torch.compile(step, backend="eager", fullgraph=True)(X0), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torchdiffeq"])
@pytest.mark.parametrize("method", FIXED)
def test_unit_step_on_cuda_equals_cpu(method, backend):
    x0 = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=F64)
    # Only the last bits of sin and cos differ between the devices.
    torch.testing.assert_close(
        integrate_unit(waving, x0.cuda(), method=method, backend=backend).cpu(),
        integrate_unit(waving, x0, method=method, backend=backend),
        rtol=1e-13,
        atol=1e-13,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "torchdiffeq"])
@pytest.mark.parametrize("method", [method for method in ORDERED if is_fixed_step(method)])
def test_unit_step_on_cuda_does_not_wait_for_the_device(method, backend):
    x0 = torch.ones(8, device="cuda", requires_grad=True)
    integrate_unit(waving, x0, method=method, backend=backend)
    with no_waiting():
        integrate_unit(waving, x0, method=method, backend=backend)


# Whole integrations


@pytest.mark.parametrize("end", [1.5, -1.5], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_agrees_with_the_matrix_exponential(method, end):
    h = 0.01
    t = times(0, end, 4)
    options = {"step_size": h} if is_fixed_step(method) else {"step_t": t} if method in ADAPTIVE else {}
    if method == "explicit_adams":
        options["max_order"] = 5  # the default, 12, is unstable at this step size
    solution = integrate(linear, X0, t, method=method, options=options)
    exact = torch.linalg.matrix_exp(t[:, None, None] * A)
    exact = torch.einsum("nij,bj->nbi", exact, X0)
    # Fixed steps: the global error is C h^order, with C of a few units here; explicit Adams has order 4 here.
    # The others: at most a few hundred steps whose errors, 1e-7 each, add up to one side.
    tolerance = 3 * h ** (nominal_order(method) or 4) if is_fixed_step(method) else 1e-4
    torch.testing.assert_close(solution.states, exact, rtol=0, atol=max(tolerance, 1e-9))
    assert solution.is_success
    assert solution.status == "success"


@pytest.mark.parametrize("end", [2.0, -1.4], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    ("method", "backend"),
    [*((name, "odeopt") for name in EXPLICIT_METHODS), *((name, "torchdiffeq") for name in METHODS)],
)
def test_every_method_follows_a_field_that_depends_on_time_in_both_directions(method, backend, end):
    h, t = 0.02, torch.tensor([0.3, 0.3 + (end - 0.3) * 0.4, end], dtype=F64)
    # The field of the test of the orders below, but neither even nor odd in time: a wrong sign of it shows.
    x0 = torch.tensor([0.5, -1.5], dtype=F64)
    growth = ((t + 0.8).sin() - (t[0] + 0.8).sin()).exp().unsqueeze(1)
    exact = 2 * torch.atan(torch.tan(x0 / 2) * growth)
    options = {"step_size": h} if is_fixed_step(method) else {"step_t": t} if method in ADAPTIVE else {}
    if method == "explicit_adams":
        options["max_order"] = 5
    solution = integrate(lambda t, x: torch.cos(t + 0.8) * torch.sin(x), x0, t, method=method, options=options,
                         rtol=1e-5, atol=1e-7, backend=backend)  # fmt: skip
    assert solution.is_success, solution.message
    # Fixed steps as with the matrix exponential above; the iterations of the implicit Adams method stop at rtol.
    tolerance = max(2 * h ** (nominal_order(method) or 4), 1e-5) if is_fixed_step(method) else 1e-3
    torch.testing.assert_close(solution.states, exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ORDERED)
def test_runge_kutta_methods_converge_at_their_order(method):
    # Nonlinear and explicit in time, so that every order condition counts; tan(x / 2) grows as exp(sin(t)).
    x0 = torch.tensor([0.5, -1.5], dtype=F64)
    exact = 2 * torch.atan(torch.tan(x0 / 2) * torch.tensor(2.0, dtype=F64).sin().exp())
    t = times(0, 2, 2)
    # Steps that are powers of two end on t = 2 exactly; high orders need large ones to stay above rounding.
    step_sizes = [2.0**-i for i in ((1, 2) if nominal_order(method) > 5 else (4, 5))]
    errors = []
    for h in step_sizes:
        fixed = {"first_step": h, "min_step": h, "max_step": h}
        options = {"step_size": h} if is_fixed_step(method) else fixed
        solution = integrate(lambda t, x: torch.cos(t) * torch.sin(x), x0, t, method=method, options=options)
        assert solution.n_steps == 2 / h
        errors.append((solution.states[-1] - exact).abs().max().log2())
    # The next term of the error moves the observed order by a few tenths at these steps.
    assert errors[0] - errors[1] == pytest.approx(nominal_order(method), abs=0.45)


@pytest.mark.parametrize("kind", [tuple, Pair._make], ids=["tuple", "named tuple"])
@pytest.mark.parametrize("method", METHODS)
def test_tuple_states_equal_concatenated_states(method, kind):
    t = times(0, 1, 11)

    def field(t, x):
        q, p = (x.q, x.p) if kind is not tuple else x
        return kind((p * torch.cos(t), -q.sum() * torch.ones_like(p) * 0.4))

    def concatenated(t, x):
        return torch.cat([x[2:] * torch.cos(t), -x[:2].sum() * torch.ones_like(x[2:]) * 0.4])

    x0 = kind((X0[0], X0[1]))
    # The adaptive methods weigh the parts of a tuple separately, so they agree within their errors only,
    # those of some hundred steps of 1e-6 each.
    tolerance = 0.0 if is_fixed_step(method) else 1e-4
    how = {
        "method": method,
        "options": {"step_t": t} if method in ADAPTIVE else None,
        "rtol": 1e-6,
        "atol": 1e-6,
    }
    states = integrate(field, x0, t, **how).states
    expected = integrate(concatenated, X0[:2].flatten(), t, **how).states
    assert type(states) is type(x0)
    torch.testing.assert_close(torch.cat(states, dim=1), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("x0", [X0.float(), X0, X0.to(torch.complex128)], ids=lambda x: str(x.dtype))
@pytest.mark.parametrize("method", ["rk4", "dopri5"])
def test_states_have_the_dtype_of_the_initial_state(method, x0):
    solution = integrate(waving, x0, [0, 1, 2], method=method, rtol=1e-4, atol=1e-4)
    assert solution.states.dtype == x0.dtype
    assert solution.states.shape == (3, *x0.shape)
    assert torch.equal(solution.states[0], x0)
    assert solution.seconds > 0


@pytest.mark.parametrize("method", METHODS)
def test_field_evaluations_and_steps_are_counted(method):
    calls, callbacks = [], []

    def field(t, x):
        calls.append(t)
        return waving(t, x)

    is_external = method == "scipy_solver"
    name = "callback_step" if is_fixed_step(method) else "callback_accept_step"
    if not is_external:
        setattr(field, name, lambda t0, x0, dt: callbacks.append(t0))
    # Small steps, so that the implicit Adams method converges; large tolerances, so few are rejected.
    solution = integrate(field, X0, times(0, -1, 31), method=method, rtol=1e-3, atol=1e-6)
    assert solution.n_field_evals == len(calls) > 0
    assert solution.n_steps == (None if is_external else len(callbacks))
    assert all(t0 <= 0 for t0 in callbacks)
    if is_fixed_step(method):
        assert solution.n_steps == 30


def test_named_output_times_make_dopri8_exact_there():
    t = times(0, 2, 6)
    exact = torch.exp(torch.sin(t))
    tight = {"method": "dopri8", "rtol": 1e-12, "atol": 1e-12}
    x0 = torch.ones((), dtype=F64)
    interpolated = integrate(lambda t, x: torch.cos(t) * x, x0, t, **tight).states
    stepped = integrate(lambda t, x: torch.cos(t) * x, x0, t, options={"step_t": t}, **tight).states
    assert (stepped - exact).abs().max() < 1e-11 < (interpolated - exact).abs().max()


# Gradients


@pytest.mark.parametrize("method", FIXED)
def test_gradients_pass_straight_through_fixed_steps(method):
    # Six steps: enough for the Adams methods to leave their Runge-Kutta start.
    t = times(0, 0.6, 7)
    x0 = X0[:2].clone().requires_grad_()
    B = A.clone().requires_grad_()

    def end(x0, B):
        return integrate(lambda t, x: torch.tanh(x @ B) + torch.cos(3 * t + 1) * x, x0, t, method=method).states[1:]

    assert torch.autograd.gradcheck(end, (x0, B))


@pytest.mark.parametrize("method", ["rk4", "explicit_adams"])
def test_second_derivatives_pass_straight_through_fixed_steps(method):
    x0 = X0[0].clone().requires_grad_()
    assert torch.autograd.gradgradcheck(
        lambda x: integrate(waving, x, times(0, 0.6, 7), method=method).states[-1], (x0,)
    )


def test_gradients_pass_through_the_adjoint_of_dopri5():
    field = Wave()
    x0 = X0[0].clone().requires_grad_()
    t = times(0, 1, 3).requires_grad_()

    def end(x0, t, B):
        tight = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}
        return integrate(field, x0, t, adjoint=True, **tight).states[1:]

    assert torch.autograd.gradcheck(end, (x0, t, field.A))


@pytest.mark.parametrize("method", ["dopri5", "scipy_solver"])
def test_adjoint_of_a_function_differentiates_the_tensors_named(method):
    def field(t, x):
        return torch.tanh(x @ B) + torch.cos(3 * t + 1) * x

    B = A.clone().requires_grad_()
    direct = integrate(field, X0, times(0, 1, 3), method="dopri5", rtol=1e-10, atol=1e-10)
    adjoint = integrate(
        field, X0, times(0, 1, 3), method=method, rtol=1e-10, atol=1e-10, adjoint=True, adjoint_params=[B]
    )
    n_field_evals = adjoint.n_field_evals
    gradients = [torch.autograd.grad(s.states[-1].square().sum(), B)[0] for s in (direct, adjoint)]
    # Both are good to about the tolerance, times the few hundred steps.
    torch.testing.assert_close(*gradients, rtol=1e-7, atol=1e-7)
    assert adjoint.n_field_evals == n_field_evals
