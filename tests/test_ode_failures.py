"""Failures of the solver room are results; wrong parameters are errors that name the value found."""

import copy
import pickle
import warnings
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from odeopt.ode import (
    IntegrationError,
    Solution,
    Status,
    available_methods,
    integrate,
    integrate_unit,
    is_fixed_step,
    nominal_order,
)

METHODS = available_methods()
ORDERED = [method for method in METHODS if nominal_order(method) is not None]
ADAPTIVE = [method for method in ORDERED if not is_fixed_step(method)]
F64 = torch.float64
X0 = torch.tensor([[1.0, -0.5], [0.2, 0.7], [-1.3, 0.4]], dtype=F64)


class Pair(NamedTuple):
    q: Tensor
    p: Tensor


def waving(t: Tensor, x: Tensor) -> Tensor:
    return torch.cos(3 * t + 1) * torch.sin(x) - 0.4 * x


def nan_after_07(t: Tensor, x: Tensor) -> Tensor:
    return torch.where(t > 0.7, torch.nan, -x)


def times(start: float, end: float, n: int) -> Tensor:
    return torch.linspace(start, end, n, dtype=F64)


# Failures are results


def _assert_reached(solution: Solution, n_reached: int, like: Tensor) -> None:
    assert solution.states.shape == like.shape
    # Near a blow-up errors of the relative tolerance 1e-4 grow by the square of the solution.
    torch.testing.assert_close(solution.states[:n_reached], like[:n_reached], rtol=0.2, atol=0)
    assert solution.states[n_reached:].isnan().all()
    assert not solution.is_success
    assert "reached t = " in solution.message


@pytest.mark.parametrize("end", [1.6, -1.6], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", [*ADAPTIVE, "scipy_solver"])
def test_blow_up_is_an_underflow_of_the_step_size(method, end):
    # dx/dt = s x^2 blows up at t = s.
    sign = 1 if end > 0 else -1
    t = times(0, end, 8)
    solution = integrate(lambda t, x: sign * x**2, torch.ones(2, dtype=F64), t, method=method, rtol=1e-4)
    assert solution.status == Status.STEP_SIZE_UNDERFLOW
    _assert_reached(solution, 5, (1 / (1 - t.abs()))[:, None].expand(8, 2))
    assert "float64" in solution.message


@pytest.mark.parametrize("solver", ["RK45", "BDF"])
def test_early_stop_of_scipy_is_a_status(solver):
    t = times(0, 2, 6)
    x0 = torch.ones(2, dtype=F64)
    options = {"solver": solver}
    solution = integrate(lambda t, x: x**2, x0, t, method="scipy_solver", options=options, rtol=1e-6)
    assert solution.status == Status.STOPPED_EARLY
    _assert_reached(solution, 3, (1 / (1 - t))[:, None].expand(6, 2))


def test_early_stop_of_scipy_on_a_tuple_is_a_status_too():
    def field(t, x):
        q, p = x
        return q**2, -p

    x0 = torch.ones(2, dtype=F64), torch.ones(1, dtype=F64)
    options = {"solver": "BDF"}
    solution = integrate(field, x0, times(0, 2, 6), method="scipy_solver", options=options, rtol=1e-6)
    assert solution.status == Status.STOPPED_EARLY
    q, p = solution.states
    assert [x.isfinite().flatten(1).all(1).tolist() for x in (q, p)] == [[True] * 3 + [False] * 3] * 2
    torch.testing.assert_close(p[:3, 0], torch.exp(-times(0, 2, 6)[:3]), rtol=1e-4, atol=0)


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_field_is_a_status(method):
    t = times(0, 2, 41)
    options = {"max_step": 0.2} if method in ADAPTIVE else None
    x0 = X0[0].clone().requires_grad_(method != "scipy_solver")
    solution = integrate(nan_after_07, x0, t, method=method, options=options, rtol=1e-4, atol=1e-6)
    n_reached = int((~solution.states.isnan().all(1)).sum())
    # A fixed step sees the NaN one step early at most; an adaptive one stops where its stages meet it.
    assert t[n_reached - 1] <= 0.75
    assert t[n_reached - 1] >= 0.45
    assert solution.status == Status.NON_FINITE_STATE
    exact = x0.detach() * torch.exp(-t[:n_reached, None])
    torch.testing.assert_close(solution.states[:n_reached].detach(), exact, rtol=0.03, atol=0)  # Euler: h t / 2
    assert solution.states[n_reached:].isnan().all()
    assert solution.states.requires_grad == x0.requires_grad


def test_output_at_which_the_solver_stops_is_reached():
    t = times(0, 1, 5)
    solution = integrate(
        lambda t, x: torch.where(t > 0.5, torch.nan, -x), X0, t, method="dopri5", options={"step_t": t}
    )
    _assert_reached(solution, 3, X0 * torch.exp(-t[:, None, None]))


@pytest.mark.parametrize("solver", ["LSODA", "RK45", "BDF"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_field_that_is_never_finite_does_not_hang_scipy(solver, value):
    solution = integrate(
        lambda t, x: x * value, X0[0], times(0, 1, 3), method="scipy_solver", options={"solver": solver}
    )
    assert solution.status == Status.NON_FINITE_STATE
    _assert_reached(solution, 1, X0[0].expand(3, 2))


@pytest.mark.parametrize("adjoint", [False, True])
def test_too_few_steps_is_a_status(adjoint):
    # Fast only after t = 1, so that the first outputs are within reach of 20 steps each.
    def field(t, x):
        return torch.where(t > 1, 300.0, 1.0) * torch.cos(100 * t) * x

    t = times(0, 2, 5)
    how = {"method": "dopri5", "rtol": 1e-4, "adjoint": adjoint, "adjoint_params": () if adjoint else None}
    limited = integrate(field, X0[0], t, options={"max_num_steps": 60}, **how)
    free = integrate(field, X0[0], t, **how)
    assert free.is_success
    assert limited.status == Status.MAX_STEPS_REACHED
    assert "max_num_steps" in limited.message
    n_reached = int((~limited.states.isnan().all(1)).sum())
    assert 1 < n_reached < 5
    assert torch.equal(limited.states[:n_reached], free.states[:n_reached])
    assert limited.n_steps < free.n_steps


def test_failure_of_a_named_tuple_keeps_its_structure():
    solution = integrate(lambda t, x: Pair(x.q**2, x.p), Pair(X0[0].abs(), X0[1]), [0.0, 0.5, 5.0], method="dopri5")
    assert solution.status == Status.STEP_SIZE_UNDERFLOW
    assert isinstance(solution.states, Pair)
    assert solution.states.p[:2].isfinite().all()
    assert solution.states.p[2].isnan().all()


def test_iteration_that_does_not_converge_is_a_status():
    # The functional iteration contracts for steps under about 3 / 4; these are of one.
    solution = integrate(lambda t, x: -4 * x, X0[0], times(0, 6, 7), method="implicit_adams")
    assert solution.status == Status.NOT_CONVERGED
    assert "max_iters" in solution.message
    assert solution.states.isfinite().all()


# Errors


@pytest.mark.parametrize("text", ["underflow in dt", "my own check"])
@pytest.mark.parametrize("how", [{}, {"adjoint": True, "adjoint_params": ()}], ids=["direct", "adjoint"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "scipy_solver"])
def test_errors_of_the_field_pass_through(method, how, text):
    def field(t, x):
        assert t < 0.5, text
        return -x

    with pytest.raises(AssertionError, match=text):
        integrate(field, X0, times(0, 1, 5), method=method, **how)


def test_errors_of_a_callback_pass_through():
    def callback_step(t0, x0, dt):
        assert t0 < 0.5, "max_num_steps exceeded"

    def field(t, x):
        return -x

    field.callback_step = callback_step
    with pytest.raises(AssertionError, match="max_num_steps exceeded"):
        integrate(field, X0, times(0, 1, 5), method="rk4")


@pytest.mark.parametrize("method", ["rk4", "implicit_adams", "scipy_solver"])
def test_warnings_of_the_field_pass_through(method):
    def field(t, x):
        if t > 0.5:
            warnings.warn("field left its range", RuntimeWarning, stacklevel=1)
        return -x

    with pytest.warns(RuntimeWarning, match="field left its range"):
        integrate(field, X0, times(0, 1, 31), method=method, rtol=1e-4)


GOOD = {"x0": X0, "t": times(0, 1, 3), "field": waving}
BAD = [
    (
        {"method": "rk5"},
        r"Parameter `method` should be one of .*dopri5.*Found `method = 'rk5'`. Did you mean `rk4`\?",
    ),
    ({"method": None}, "Parameter `method` should be one of .*Found `method = None`"),
    ({"options": {"stepsize": 0.1}}, r"`options\['stepsize'\] = 0.1`. Did you mean `step_size`\?"),
    (
        {"options": {"first_step": 0.1}},
        r"`options` of method 'rk4' should only hold .*`options\['first_step'\] = 0.1`",
    ),
    ({"method": "dopri5", "options": {"step_size": 0.1}}, r"`options` of method 'dopri5'.*step_size"),
    ({"method": "explicit_adams", "options": {"implicit": True}}, r"Found `options\['implicit'\] = True`"),
    (
        {"options": {"step_size": -0.1}},
        r"`options\['step_size'\]` should be positive. Found `options\['step_size'\] = -0.1`",
    ),
    ({"options": {"grid_constructor": lambda f, x, t: t + 1}}, "`options` should suit method 'rk4'"),
    (
        {"method": "implicit_adams", "options": {"max_order": 99}},
        "`options` should suit .*max_order must be at most",
    ),
    ({"t": torch.tensor([0.0, 1.0, 0.5])}, r"`t` should be .*increasing.*`t\[1\] = 1` before `t\[2\] = 0.5`"),
    ({"t": torch.tensor([0.0, 0.0])}, r"Found `t\[0\] = 0` before `t\[1\] = 0`"),
    ({"t": [0.0, torch.nan, 1.0]}, r"Found `t\[0\] = 0` before `t\[1\] = nan`"),
    ({"t": [0.0, torch.inf]}, r"Found `t\[0\] = 0` before `t\[1\] = inf`"),
    ({"t": torch.tensor([0.0])}, r"`t.shape` should be .*at least two times. Found `t.shape = \(1,\)`"),
    ({"t": torch.zeros(2, 2)}, r"Found `t.shape = \(2, 2\)`"),
    ({"t": torch.tensor([0, 1])}, "`t.dtype` should be floating point. Found `t.dtype = torch.int64`"),
    ({"x0": torch.tensor([1, 2])}, "`x0.dtype` should be floating point. Found `x0.dtype = torch.int64`"),
    (
        {"x0": torch.tensor([1.0, torch.nan])},
        r"`x0` should be finite. Found `nan` in a tensor of shape \(2,\)",
    ),
    ({"x0": (X0, X0 / 0)}, r"`x0` should be finite. Found `-?inf`"),
    (
        {"x0": (X0, X0.float())},
        r"one dtype on one device. Found `x0 = \['torch.float64 on cpu', 'torch.float32 on cpu'\]",
    ),
    ({"x0": [X0, X0]}, "`x0` should be a tensor or a tuple of tensors"),
    ({"x0": ()}, "`x0` should be a tensor or a tuple of tensors"),
    ({"x0": 1.0}, r"`x0` should be a tensor or a tuple of tensors. Found `x0 = 1.0`"),
    ({"rtol": -1e-3}, "`rtol` should not be negative. Found `rtol = -0.001`"),
    ({"atol": torch.nan}, "`atol` should not be negative. Found `atol = nan`"),
    ({"adjoint": True, "adjoint_rtol": -1.0}, "`adjoint_rtol` should not be negative"),
    ({"adjoint": True}, "`adjoint_params` should be the tensors that `field` depends on"),
    ({"adjoint_rtol": 1e-3}, "`adjoint_rtol` should be None with `adjoint = False`. Found `adjoint_rtol = 0.001`"),
    ({"adjoint_params": ()}, "`adjoint_params` should be None with `adjoint = False`"),
    ({"adjoint": True, "adjoint_method": "rk"}, "`adjoint_method` should be one of"),
    ({"adjoint": True, "adjoint_options": {"stp": 1}}, r"`adjoint_options` of method 'rk4'.*\['stp'\] = 1"),
    (
        {"adjoint": True, "options": {"step_size": 0.1}, "adjoint_method": "dopri5"},
        "`adjoint_options` should be given when .*`adjoint_method = 'dopri5'`.*Found `adjoint_options = None`",
    ),
    (
        {"method": "scipy_solver", "x0": X0.clone().requires_grad_()},
        "`x0.requires_grad` should be False .*'scipy_solver'",
    ),
    (
        {"field": lambda t, x: x[0]},
        r"`field` should return a tensor .*\[\(3, 2\)\]. Found a Tensor with \[\(2,\)\]",
    ),
    ({"field": lambda t, x: (x, x)}, "`field` should return a tensor .* Found a tuple"),
    ({"field": lambda t, x: x[0], "x0": (X0, X0)}, "`field` should return a tuple .* Found a Tensor"),
    (
        {"field": lambda t, x: x[::-1], "x0": (X0, X0[0])},
        r"\[\(3, 2\), \(2,\)\]. Found a tuple with \[\(2,\), \(3, 2\)\]",
    ),
    ({"field": lambda t, x: x[0], "x0": (X0,)}, "`field` should return a tuple .* Found a Tensor"),
    ({"field": lambda t, x: None}, r"Found a NoneType with \['NoneType'\]"),
]


@pytest.mark.parametrize(("bad", "message"), BAD)
def test_wrong_parameters_are_named_with_the_value_found(bad, message):
    arguments = GOOD | bad
    field, x0, t = (arguments.pop(name) for name in ("field", "x0", "t"))
    with pytest.raises(ValueError, match=message):
        integrate(field, x0, t, **arguments)


def test_unknown_method_of_the_unit_step_is_named():
    with pytest.raises(ValueError, match=r"Found `method = 'heun'`. Did you mean `heun\d`\?"):
        integrate_unit(waving, X0, method="heun")


def test_unknown_method_has_no_step_kind():
    with pytest.raises(ValueError, match="method"):
        is_fixed_step("no such method")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"options": "abc"}, r"`options` should be a dictionary or None. Found `options = 'abc'`"),
        (
            {"options": {"step_size": "a"}},
            r"`options\['step_size'\]` should be positive. Found `options\['step_size'\] = 'a'`",
        ),
        ({"t": None}, r"`t` should be a tensor or a sequence of numbers. Found `t = None`"),
        ({"field": None}, r"`field` should be a function of time and state. Found `field = None`"),
    ],
)
def test_arguments_of_another_kind_are_refused(change, match):
    arguments = {"field": lambda t, x: -x, "x0": torch.ones(2), "t": [0.0, 1.0]} | change
    with pytest.raises(ValueError, match=match):
        integrate(**arguments)


def test_errors_of_integrations_are_passed_between_processes():
    with pytest.raises(IntegrationError) as caught:
        integrate(nan_after_07, X0, times(0, 1, 11), method="rk4", throw=True)
    for copied in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert str(copied) == str(caught.value)
        torch.testing.assert_close(copied.solution.states, caught.value.solution.states, equal_nan=True)


def test_failures_are_told_in_forward_mode_too():
    with forward_ad.dual_level():
        assert integrate(waving, X0, times(0, 1, 3), method="rk4", throw=True).is_success
        assert integrate(nan_after_07, X0, times(0, 1, 11), method="rk4").status is Status.NON_FINITE_STATE
        with pytest.raises(ValueError, match="`x0` should be finite"):
            integrate(waving, X0 * torch.nan, times(0, 1, 3), method="rk4")
