"""What fields and states may be: without axes, of any precision, in memory of their own or not; what is refused."""

import math
import warnings
from contextlib import suppress

import pytest
import torch
from structure_toys import F64, make_state, make_system

from odeopt.ode import IntegrationError, Newton, Status, available_methods, integrate, is_fixed_step
from odeopt.ode.implicit import solve_implicit
from odeopt.physics import PhaseState, PortHamiltonianSystem

T = [0.0, 0.25, 0.5]
METHODS = ["heun2", "rk4", "explicit_adams", "bosh3", "scipy_solver"]
BACKENDS = [("heun3", "odeopt"), ("heun3", "torchdiffeq"), ("dopri8", "torchdiffeq"), ("scipy_solver", "torchdiffeq")]


@pytest.mark.parametrize("method", available_methods())
def test_states_without_axes_equal_those_with_one(method):
    x0 = torch.tensor(0.7)

    def field(t, x):
        return torch.cos(t) - x * x

    expected = integrate(field, x0.reshape(1), T, method=method)
    found = integrate(field, x0, T, method=method)
    assert found.states.shape == (3,)
    assert (found.n_steps, found.n_field_evals) == (expected.n_steps, expected.n_field_evals)
    assert torch.equal(found.states, expected.states[:, 0])

    def on_pair(t, x):
        assert (x[0].shape, x[1].shape) == ((), (2,))
        return field(t, x[0]), -x[1]

    single, pair = integrate(on_pair, (x0, torch.ones(2)), T, method=method, rtol=1e-6).states
    assert (single.shape, pair.shape) == ((3,), (3, 2))
    torch.testing.assert_close(single, expected.states[:, 0], rtol=0, atol=3e-4)  # adaptive steps are those of both


def test_states_without_axes_have_gradients_and_callbacks():
    class Field(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shapes = set()

        def forward(self, t, x):
            return -x * x

        def callback_step(self, t, x, dt):
            self.shapes.add(tuple(x.shape))

    for method in ("midpoint", "adaptive_heun"):
        x0, field = torch.tensor(0.7, dtype=F64, requires_grad=True), Field()
        solution = integrate(field, x0, T, method=method, rtol=1e-6)
        assert solution.states.dtype == F64
        (gradient,) = torch.autograd.grad(solution.states[-1], x0)
        assert gradient.item() == pytest.approx(1 / (1 + 0.5 * 0.7) ** 2, abs=0.02)
        assert field.shapes == {()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_dtype_of_the_state_is_that_of_the_solution(method, is_tuple, dtype):
    seen, scale = set(), torch.tensor([0.5, 1.5], dtype=F64)

    def field(t, x):
        seen.add((x[0] if is_tuple else x).dtype)
        return (-scale * x[0],) if is_tuple else -scale * x

    x0 = torch.ones(2, dtype=dtype)
    states = integrate(field, (x0,) if is_tuple else x0, T, method=method, rtol=1e-3, atol=1e-3).states
    states = states[0] if is_tuple else states
    assert states.dtype == dtype
    assert seen == {dtype}
    torch.testing.assert_close(states[-1].double(), torch.exp(-0.5 * scale), rtol=0, atol=0.03)


def test_inputs_do_not_change_the_dtype_of_a_system():
    system = PortHamiltonianSystem(1, potential=lambda q: q.square().sum(-1))
    x0 = PhaseState(torch.ones(1), torch.zeros(1))
    for method in ("rk4", "strang", "implicit_midpoint", "dopri5"):
        for u in (torch.ones(1, dtype=F64), lambda t: torch.ones(1, dtype=F64)):
            assert integrate(system, x0, T, method=method, u=u).states.p.dtype == torch.float32


def test_complex_derivatives_of_a_real_state_are_refused():
    with pytest.raises(ValueError, match=r"`field` should return real derivatives .* Found `torch.complex64`"):
        integrate(lambda t, x: 1j * x, torch.ones(2), T)


@pytest.mark.parametrize("is_tuple", [False, True])
@pytest.mark.parametrize(("method", "backend"), BACKENDS)
def test_field_that_writes_to_its_argument_is_refused_and_writes_to_nothing_of_the_caller(method, backend, is_tuple):
    x0 = torch.tensor([1.0, -2.0])

    def field(t, x):
        return ((x[0] if is_tuple else x).neg_(),) if is_tuple else x.neg_()

    def solve():
        return integrate(field, (x0,) if is_tuple else x0, T, method=method, backend=backend)

    with torch.no_grad(), pytest.raises(ValueError, match="`field` should not write to the state"):
        solve()
    with torch.inference_mode():  # where not all tensors tell; then it writes to a copy
        if is_tuple:
            torch.testing.assert_close(solve().states[0][-1], x0 * torch.tensor(-0.5).exp(), rtol=0, atol=1e-3)
        else:
            with suppress(ValueError):
                torch.testing.assert_close(solve().states[-1], x0 * torch.tensor(-0.5).exp(), rtol=0, atol=1e-3)
    assert x0.tolist() == [1.0, -2.0]


def test_field_that_writes_later_is_refused_too():
    def field(t, x):
        return -(x.clamp_(min=0.5) if t > 0.3 else x)

    for backend in ("odeopt", "torchdiffeq"):
        with pytest.raises(ValueError, match="`field` should not write to the state"):
            integrate(field, torch.ones(2), T, method="midpoint", backend=backend, options={"step_size": 0.05})


@pytest.mark.parametrize("n_buffers", [1, 2])
@pytest.mark.parametrize("is_view", [False, True])
@pytest.mark.parametrize(("method", "backend"), BACKENDS)
def test_fields_may_fill_the_same_memory_again(method, backend, is_view, n_buffers):
    x0, buffers, n = torch.tensor([1.0, -2.0]), [torch.zeros(2) for _ in range(n_buffers)], [0]

    def field(t, x):
        n[0] += 1
        buffer = buffers[n[0] % n_buffers]
        torch.mul(x, -1, out=buffer)
        return buffer.view(2) if is_view else buffer

    with torch.no_grad():
        found = integrate(field, x0, T, method=method, backend=backend, rtol=1e-5)
        expected = integrate(lambda t, x: -x, x0, T, method=method, backend=backend, rtol=1e-5)
    torch.testing.assert_close(found.states, expected.states, rtol=0, atol=0)


def test_constant_derivative_may_be_the_same_tensor():
    gravity = torch.tensor([0.0, -9.8])
    states = integrate(lambda t, x: gravity, torch.zeros(2), T, method="rk4").states
    torch.testing.assert_close(states[-1], 0.5 * gravity)
    assert gravity.tolist() == pytest.approx([0.0, -9.8])


# Tolerances


def turning(t, x):
    return torch.stack((x[..., 1], -x[..., 0]), -1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [m for m in available_methods() if not is_fixed_step(m)])
def test_half_precision_is_solved_to_what_it_holds(method, dtype):
    x0 = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=dtype)
    with pytest.warns(UserWarning, match=r"`rtol` and `atol` are raised to what torch\..*float16 resolves"):
        solution = integrate(turning, x0, [0.0, 1.0], method=method)
    assert solution.is_success
    c, s = torch.tensor(1.0).cos(), torch.tensor(1.0).sin()
    exact = torch.stack((torch.stack((c, -s)), 2 * torch.stack((s, c))))
    # fehlberg2 at its tolerance is off by nine roundings in single precision, too
    torch.testing.assert_close(solution.states[-1].float(), exact, rtol=0, atol=16 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize("method", ["bosh3", "scipy_solver"])
def test_no_tolerance_at_all_is_raised_and_blames_nobody(method, dtype):
    x0 = torch.tensor([1.0, 0.0], dtype=dtype)
    with pytest.warns(UserWarning, match=r"Found `rtol = 0.001`, `atol = 0`"):
        solution = integrate(turning, x0, [0.0, 1.0], method=method, rtol=1e-3, atol=0)
    assert solution.is_success
    expected = [math.cos(1), -math.sin(1)]
    assert solution.states[-1].tolist() == pytest.approx(expected, abs=2e-2)


def test_tolerances_of_a_tuple_and_of_the_adjoint_are_raised_by_name():
    rate = torch.tensor(1.0, requires_grad=True)
    x0 = torch.ones(2), torch.ones(1)
    with pytest.warns(UserWarning, match=r"Found `rtol = 0.0`, `atol = \(1e-06, 0.0\)`"):
        assert integrate(lambda t, x: (-x[0], -x[1]), x0, T, method="bosh3", rtol=0.0, atol=(1e-6, 0.0)).is_success
    with pytest.warns(UserWarning, match="`adjoint_rtol` and `adjoint_atol` are raised"):
        end = integrate(lambda t, x: -rate * x, torch.ones(2), T, method="dopri5", rtol=1e-4, atol=1e-6, adjoint=True,
                        adjoint_params=[rate], adjoint_atol=0.0).states[-1]  # fmt: skip
    (gradient,) = torch.autograd.grad(end.sum(), rate)
    assert gradient.item() == pytest.approx(-2 * 0.5 * torch.exp(torch.tensor(-0.5)).item(), abs=1e-3)


def test_tolerances_that_a_dtype_resolves_are_left_alone():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype, rtol, atol in ((torch.float32, 1e-7, 1e-9), (torch.float32, 0.0, 1e-5), (F64, 1e-13, 0.0),
                                  (torch.bfloat16, 0.01, 1e-4)):  # fmt: skip
            assert integrate(lambda t, x: -x, torch.ones(2, dtype=dtype), T, method="dopri5", rtol=rtol, atol=atol
                             ).is_success  # fmt: skip


# What is reported


def test_failures_are_raised_where_that_is_asked_for():
    def blow_up(t, x):
        return x**3

    x0, t = torch.tensor([20.0]), torch.linspace(0, 3, 9)
    for method in ("euler", "dopri5", "rk4"):
        failed = integrate(blow_up, x0, t, method=method)
        with pytest.raises(IntegrationError, match="reached t = ") as caught:
            failed.raise_for_status()
        assert caught.value.solution is failed
        with pytest.raises(IntegrationError) as caught:
            integrate(blow_up, x0, t, method=method, throw=True)
        assert str(caught.value) == failed.message
    good = integrate(lambda t, x: -x, x0, t, throw=True)
    assert good.raise_for_status() is None
    options = {"tol": 1e-14, "max_iters": 1}
    with pytest.raises(IntegrationError, match="did not converge"):
        integrate(make_system(), make_state(), [0.0, 1.0], method="strang", options=options, throw=True)


def test_events_are_named_with_what_to_use():
    with pytest.raises(ValueError, match=r"`event_fn` should be None.*odeint_event.*gradient_flow.*Found `event_fn"):
        integrate(lambda t, x: -x, torch.ones(1), T, event_fn=lambda t, x: x - 0.5)


class Called(torch.nn.Module):
    """A field with callbacks."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def forward(self, t, x):
        return -x

    def callback_step(self, t, x, dt):
        self.n += 1

    def callback_accept_step(self, t, x, dt):
        raise NotImplementedError


@pytest.mark.parametrize("backend", ["odeopt", "torchdiffeq"])
def test_callbacks_that_are_ignored_are_warned_of(backend):
    field = Called()
    with pytest.warns(UserWarning, match=r"Solver 'heun2' does not support callbacks \{'callback_accept_step'\}"):
        integrate(field, torch.ones(1), T, method="heun2", backend=backend)
    assert field.n == 2


@pytest.mark.parametrize("method", ["rk4", "strang", "dopri5"])
def test_callbacks_of_a_system_are_called(method):
    system, seen = PortHamiltonianSystem(1), []
    system.callback_step = lambda t, x, dt: seen.append((t.item(), x.q.shape))
    integrate(system, PhaseState(torch.ones(1), torch.ones(1)), T, method=method)
    assert {0.0, 0.25} <= {t for t, _ in seen}
    assert {shape for _, shape in seen} == {(1,)}
    system.callback_reject_step = lambda t, x, dt: None
    if method != "dopri5":
        with pytest.warns(UserWarning, match=f"Solver '{method}' does not support callbacks"):
            integrate(system, PhaseState(torch.ones(1), torch.ones(1)), T, method=method)


# Equations of a step


def test_whole_steps_are_not_halved_where_they_solve():
    """A curved valley: the residual rises on the way of two whole steps to its end."""

    def valley(x):
        a, b = x.unbind(-1)
        return torch.stack((1 - a, 10 * (b - a * a)), -1)

    root = solve_implicit(valley, torch.tensor([[-1.2, 1.0], [3.0, -5.0]], dtype=F64))
    assert root.is_converged.all()
    torch.testing.assert_close(root.x, torch.ones(2, 2, dtype=F64))
    assert root.n_iters.max() <= 3


def test_sample_that_whole_steps_lose_is_tried_again_and_the_others_stand():
    starts = torch.tensor([[0.4], [25.0], [-300.0]], dtype=F64)
    root = solve_implicit(torch.atan, starts)
    assert root.is_converged.all()
    assert root.n_iters[0] <= 5 < root.n_iters[1]
    alone = solve_implicit(torch.atan, starts[:1])
    assert torch.equal(alone.x, root.x[:1])
    limited = solve_implicit(torch.atan, starts, Newton(max_iters=2))
    assert not limited.is_converged[1:].any()


def test_equations_after_the_state_is_lost_are_not_counted():
    # a wall behind which there is nothing: one step fails, those that follow begin at NaN
    wall = PortHamiltonianSystem(1, potential=lambda q: torch.sqrt(q - 1).sum(-1)).to(F64)
    x0 = PhaseState(torch.tensor([1.5], dtype=F64), torch.tensor([-2.0], dtype=F64))
    solution = integrate(wall, x0, torch.arange(6.0) / 2, method="implicit_midpoint", options={"step_size": 0.1})
    assert solution.status is Status.NON_FINITE_STATE
    assert "did not converge in 1 of 25 steps" in solution.message


@pytest.mark.parametrize("backend", ["odeopt", "torchdiffeq"])
@pytest.mark.parametrize("is_system", [False, True])
def test_callbacks_get_tensors_from_both_backends(backend, is_system):
    seen = []

    class Decay(torch.nn.Module):
        def forward(self, t, x):
            return -x

    field = PortHamiltonianSystem(1, dissipation=0.1) if is_system else Decay()
    field.callback_step = lambda t, x, dt: seen.append((t.item(), dt.item()))
    x0 = PhaseState(torch.zeros(1), torch.ones(1)) if is_system else torch.ones(2)
    integrate(field, x0, [0.0, 0.5, 1.0], method="rk4", backend=backend)
    assert seen == [(0.0, 0.5), (0.5, 0.5)]
