"""Times of the solver room: kept in double precision, whatever the state is in, and differentiated."""

import functools
import math

import pytest
import torch
from structure_toys import F64
from torchdiffeq._impl.odeint import SOLVERS

from odeopt.ode import (
    STRUCTURE_METHODS,
    FirstOrderHold,
    ZeroOrderHold,
    energy_ledger,
    explicit_step,
    integrate,
    is_fixed_step,
)
from odeopt.ode.torchdiffeq import time_of_event
from odeopt.physics import PhaseState, PortHamiltonianSystem
from odeopt.solvers import comparable_methods

# a mass on a spring with friction, q'' = -q - .2 q' + u
SPRING = PortHamiltonianSystem(1, potential=lambda q: 0.5 * q.square().sum(-1), dissipation=0.2)
X0 = PhaseState(torch.tensor([1.0]), torch.tensor([-0.4]))
# where a year in seconds, a date in days and the epoch begin
CLOCKS = [0.0, 20_454.0, 3.15e7, -1.7e9]


def ramp(t, x):
    """Explicit in the time since the clock began."""
    return (t - t.new_tensor(ramp.start)).to(x.dtype) * torch.cos(x)


def assert_the_same_from_each_start(solve, *, is_adaptive):
    """Equal to rounding; adaptive steps, which follow roundings of the clock, to what their tolerances allow."""
    found = [solve(start) for start in CLOCKS]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=1e-4 if is_adaptive else 1e-5)


@pytest.mark.parametrize("kind", ["tensor", "numbers"])
@pytest.mark.parametrize("method", ["heun3", "explicit_adams", "bosh3", "scipy_solver"])
def test_solution_does_not_depend_on_where_the_clock_starts(method, kind):
    def solve(start):
        ramp.start = start
        t = start + torch.linspace(0, 2, 17, dtype=F64)
        solution = integrate(ramp, torch.tensor([0.2, -1.0]), t if kind == "tensor" else t.tolist(), method=method,
                             rtol=1e-6, atol=1e-7)  # fmt: skip
        assert solution.n_field_evals < 1000
        assert torch.equal(solution.t, t)
        assert solution.states.dtype == torch.float32
        return solution.states[-1]

    assert_the_same_from_each_start(solve, is_adaptive=not is_fixed_step(method))


@pytest.mark.parametrize("hold", [ZeroOrderHold, FirstOrderHold, None])
@pytest.mark.parametrize("method", ["midpoint", "symplectic_euler", "discrete_gradient", "adaptive_heun"])
def test_inputs_do_not_depend_on_where_the_clock_starts(method, hold):
    samples = torch.tensor([[0.0], [1.0], [-0.5]])

    def solve(start):
        def sine(t):
            return torch.sin(3 * (t - start)).reshape(1)

        u = sine if hold is None else hold([start, start + 0.5, start + 1.25], samples)
        t = start + torch.linspace(0, 1.5, 7, dtype=F64)
        options = {"step_size": 0.125} if method in (*STRUCTURE_METHODS, "midpoint") else None
        with torch.no_grad():
            solution = integrate(SPRING, X0, t, method=method, u=u, options=options, rtol=1e-4, atol=1e-5)
            assert solution.states.q.dtype == torch.float32
            ledger = energy_ledger(SPRING, solution, u=u) if method != "discrete_gradient" else None
        residual = [ledger.supplied.sum().reshape(1)] if ledger else []
        return torch.cat([solution.states.q[-1], solution.states.p[-1], *residual])

    assert_the_same_from_each_start(solve, is_adaptive=method == "adaptive_heun")


def test_field_sees_the_dtype_of_the_state_wherever_it_tells_steps_apart():
    seen = []

    def field(t, x):
        seen.append((t.dtype, t.item()))
        return -x

    for x0 in (torch.ones(2), torch.ones(2, dtype=torch.complex64)):
        for method in ("rk4", "dopri5"):
            integrate(field, x0, torch.linspace(1, 2, 5, dtype=F64), method=method, options=None, rtol=1e-4)
    assert {dtype for dtype, _ in seen} == {torch.float32}
    seen.clear()
    integrate(field, torch.ones(2), [1e6, 1e6 + 0.3], method="rk4", options={"step_size": 0.1})
    assert {dtype for dtype, _ in seen} == {F64}
    assert len({round(time - 1e6, 6) for _, time in seen}) == 10  # three steps of the 3/8 rule, which share their ends
    seen.clear()
    explicit_step(field, 1e6, 0.1, torch.ones(2), "midpoint")
    assert [time for _, time in seen] == [1e6, 1e6 + 0.05]


class Joined(torch.nn.Module):
    """A network of time and state joined, as in continuous normalising flows; it takes one dtype."""

    def __init__(self, n_outputs=2, n_states=2):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.n = torch.nn.Linear(1 + n_states, n_outputs), 0

    def forward(self, t, x=None):
        self.n += 1
        state = t.new_zeros(0) if x is None else x
        return torch.tanh(self.linear(torch.cat((torch.cos(t).reshape(1), state))))


@pytest.mark.parametrize("method", ["heun2", "fixed_adams", "fehlberg2", "scipy_solver"])
def test_network_of_time_and_state_joined_takes_times_of_any_clock(method):
    field, t = Joined(), [123_456.0, 123_456.5, 123_458.0]
    options = {"step_size": 0.25} if is_fixed_step(method) else None
    how = {"method": method, "options": options, "rtol": 1e-4, "atol": 1e-5, "adjoint": method == "scipy_solver"}
    found = integrate(field, torch.tensor([0.2, -1.0]), t, **how)
    assert found.is_success
    assert found.states.dtype == torch.float32
    assert field.n == found.n_field_evals + 1
    precise = integrate(field.double(), torch.tensor([0.2, -1.0], dtype=F64), t, **how)
    torch.testing.assert_close(found.states.double(), precise.states, rtol=0, atol=0.02)  # times round to 1/128


@pytest.mark.parametrize("method", ["midpoint", "strang", "discrete_gradient", "bosh3"])
def test_input_that_is_a_network_of_time_takes_times_of_any_clock(method):
    u, t = Joined(1, 0), torch.tensor([5e4, 5e4 + 0.5], dtype=F64)
    options = {"step_size": 0.25} if method != "bosh3" else None
    with torch.no_grad():
        solution = integrate(SPRING, X0, t, method=method, options=options, u=u, rtol=1e-4, atol=1e-5)
        held = integrate(SPRING, X0, t, method=method, options=options, u=u(torch.tensor(5e4 + 0.25)), rtol=1e-4)
        ledger = energy_ledger(SPRING, solution, u=u) if method == "midpoint" else None
    assert solution.is_success
    torch.testing.assert_close(solution.states.q, held.states.q, rtol=0, atol=0.05)
    assert ledger is None or ledger.residual.isfinite().all()


def test_single_steps_and_events_with_a_network_of_time_and_state_take_times_of_any_clock():
    field, x = Joined(), torch.tensor([0.2, -1.0])
    step = explicit_step(field, 1e6, 0.125, x, "heun3")
    torch.testing.assert_close(step, explicit_step(field, torch.tensor(1e6), 0.125, x, "heun3"), rtol=0, atol=1e-2)
    end = 1e6 + time_of_event(field, x, 1e6, 1e6 + 9, lambda t, x: 0.5 - field(t, x)[0], method="dopri5") - 1e6
    assert 1e6 <= end < 1e6 + 9


def test_error_of_a_field_is_its_own_whatever_the_clock():
    def wrong(t, x):
        return x @ torch.ones(3, 3)

    for method in ("midpoint", "dopri5"):
        with pytest.raises(RuntimeError, match=r"size mismatch|shapes cannot be multiplied"):
            integrate(wrong, torch.ones(1, 2), [1e8, 1e8 + 1], method=method)


def test_long_span_does_not_stall_an_adaptive_method():
    # in single precision times round to .001 at the end, where the field begins to swing
    late = integrate(lambda t, x: torch.where(t > 9_990, torch.cos(3 * t), 0.0) * torch.ones_like(x), torch.zeros(1),
                     [0.0, 9_995.0], method="dopri5", rtol=1e-5, atol=1e-5, options={"max_step": 5.0})  # fmt: skip
    exact = (math.sin(3 * 9_995) - math.sin(3 * 9_990)) / 3
    assert late.states[-1].item() == pytest.approx(exact, abs=1e-3)
    assert late.n_field_evals < 60_000


def test_events_do_not_depend_on_where_the_clock_starts():
    for start in CLOCKS:
        found = time_of_event(
            lambda t, x: -x, torch.ones(1), start, start + 5, lambda t, x: x[0] - 0.5, method="dopri5"
        )
        assert found - start == pytest.approx(math.log(2), abs=1e-5)
    none = time_of_event(lambda t, x: -x, torch.ones(1), 1e8, 1e8 + 0.5, lambda t, x: x[0] - 0.5, method="dopri5")
    assert none is None


# Gradients


def gradient_of_times(field, x0, method, **options):
    """Gradient of the sum of what is reached at t[1] and of twice that at t[2]."""
    t = torch.tensor([0.3, 0.7, 1.2], dtype=F64, requires_grad=True)
    states = integrate(field, x0, t, method=method, **options).states
    states = states if isinstance(states, torch.Tensor) else torch.cat(states, -1)
    return torch.autograd.grad(states[1].sum() + 2 * states[2].sum(), t)[0], states


def wavy(t, x):
    return torch.cos(2 * t) * torch.sin(x) - 0.3 * x


def by_differences(total, h=1e-5):
    """Gradient of a function of the times that :func:`gradient_of_times` takes."""
    t = torch.tensor([0.3, 0.7, 1.2], dtype=F64)
    return torch.stack([(total(t + h * e) - total(t - h * e)) / (2 * h) for e in torch.eye(3, dtype=F64)])


@functools.cache
def wavy_by_differences(method, step_size):
    """The last output moves with the field there; the others carry what follows along."""
    x0, n_steps = torch.tensor([0.4, 1.1], dtype=F64), {0.1: [4, 5]}.get(step_size, [1, 1])

    def total(t):
        if not is_fixed_step(method):
            ends = integrate(wavy, x0, t, method=method, rtol=1e-11, atol=1e-11, options={"step_t": t}).states
            return ends[1].sum() + 2 * ends[2].sum()
        x, sums = x0, []
        for a, b, n in zip(t[:-1].tolist(), t[1:].tolist(), n_steps, strict=True):
            x = integrate(wavy, x, [a, b], method=method, backend="torchdiffeq", options={"step_size": (b - a) / n}
                          ).states[-1]  # fmt: skip
            sums.append(x.sum())
        return sums[0] + 2 * sums[1]

    return by_differences(total)


@pytest.mark.parametrize("step_size", [None, 0.1])
@pytest.mark.parametrize("backend", ["auto", "torchdiffeq"])
@pytest.mark.parametrize("method", ["euler", "heun2", "fixed_adams", "dopri8", "bosh3"])
def test_gradients_of_times_are_those_of_the_solution(method, backend, step_size):
    x0, options = torch.tensor([0.4, 1.1], dtype=F64), None
    is_theirs = backend == "torchdiffeq" or method == "fixed_adams"
    if step_size is not None:
        if not is_fixed_step(method):
            return
        options = {"step_size": step_size}
        if is_theirs:
            with pytest.raises(ValueError, match=r"`t.requires_grad` should be False where 'step_size' decide"):
                gradient_of_times(wavy, x0, method, backend=backend, options=options)
            return
    found, _ = gradient_of_times(wavy, x0, method, backend=backend, options=options)
    # adaptive methods solve one equation, which that of the highest order solves soonest
    expected = wavy_by_differences(method if is_fixed_step(method) else "dopri8", step_size)
    # those of adaptive methods at their default tolerances; bosh3 has an order of three
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7 if is_fixed_step(method) else 1e-6)


QUARTIC = PortHamiltonianSystem(1, potential=lambda q: q.pow(4).sum(-1), dissipation=0.2).to(F64)
START = PhaseState(torch.tensor([0.8], dtype=F64), torch.tensor([0.1], dtype=F64))
TENT = FirstOrderHold([0.0, 0.5, 1.0], torch.tensor([[0.0], [1.0], [0.0]], dtype=F64))


@functools.cache
def quartic_by_differences(method, step_size=None):
    options = None if step_size is None else {"step_size": step_size}

    def total(t):
        states = torch.cat(integrate(QUARTIC, START, t, u=TENT, method=method, options=options).states, -1)
        return states[1].sum() + 2 * states[2].sum()

    return by_differences(total)


@pytest.mark.parametrize("method", ["midpoint", *STRUCTURE_METHODS, "adaptive_heun", "dopri8"])
def test_gradients_of_times_reach_systems_across_knots(method):
    # at the default tolerances a method of second order takes ten seconds
    tolerances = {"rtol": 3e-7, "atol": 3e-9} if method == "adaptive_heun" else {}
    found, _ = gradient_of_times(QUARTIC, START, method, u=TENT, **tolerances)
    # a difference quotient would see the steps of an adaptive method jump
    is_adaptive = method in ("adaptive_heun", "dopri8")
    expected = quartic_by_differences("rk4", 0.01) if is_adaptive else quartic_by_differences(method)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_steps_that_end_at_outputs_go_with_the_steps_and_jumps_that_are_asked_for():
    x0, t = torch.tensor([0.4, 1.1], dtype=F64), torch.tensor([0.3, 0.7, 1.2], dtype=F64)
    expected, _ = gradient_of_times(wavy, x0, "dopri8", rtol=1e-11, atol=1e-11)
    for options in (
        {"step_t": t},
        {"jump_t": t[:2]},
        {"step_t": t[1:], "jump_t": torch.tensor([0.5])},
        {"step_t": None},
    ):
        found, _ = gradient_of_times(wavy, x0, "bosh3", options=options)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    by_adjoint, _ = gradient_of_times(wavy, x0, "bosh3", adjoint=True, adjoint_params=(), options={"jump_t": t[:2]})
    torch.testing.assert_close(by_adjoint, expected, rtol=0, atol=1e-5)


def test_adjoint_of_a_system_takes_the_options_that_are_given():
    system = PortHamiltonianSystem(1, potential=lambda q: q.pow(4).sum(-1), dissipation=0.2)
    x0 = PhaseState(torch.tensor([0.8], requires_grad=True), torch.tensor([0.1]))
    u = FirstOrderHold([0.0, 0.5, 1.0], torch.tensor([[0.0], [1.0], [0.0]]))
    how = {"method": "bosh3", "rtol": 1e-5, "atol": 1e-6, "u": u}
    other = {"adjoint": True, "adjoint_method": "rk4"}
    found = []
    for kind in ({}, {"adjoint": True}, other | {"adjoint_options": {"step_size": 0.05}}, other):
        end = integrate(system, x0, [0.2, 0.7, 1.2], **how, **kind).states.q[-1].sum()
        found.append(torch.autograd.grad(end, x0.q)[0])
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0, atol=0.05 if other is found[3] else 1e-3)


def test_gradients_of_times_in_a_list_and_of_torch_func_arrive():
    def end(T, t):
        return integrate(wavy, torch.tensor([0.4], dtype=F64), t(T), method="rk4").states[-1].sum()

    T = torch.tensor(1.2, dtype=F64)
    forms = [lambda T: [0.3, T], lambda T: torch.stack((T / 4, T)), lambda T: T * torch.tensor([0.25, 1.0], dtype=F64)]
    for form in forms:
        h, leaf = 1e-6, T.clone().requires_grad_()
        expected = (end(T + h, form) - end(T - h, form)) / (2 * h)
        (found,) = torch.autograd.grad(end(leaf, form), leaf)
        by_function = torch.func.grad(lambda T, form=form: end(T, form))(T)
        for gradient in (found, by_function):
            torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradgradcheck(lambda T: end(T, forms[2]), (T.clone().requires_grad_(),))
    with pytest.raises(ValueError, match=r"`t` should be the same for all that `torch.func.vmap` maps over"):
        torch.func.vmap(lambda T: end(T, forms[2]))(torch.tensor([1.0, 2.0], dtype=F64))


class Trained(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.rate = torch.nn.Parameter(torch.tensor([0.5, 1.5], dtype=F64))
        self.other = torch.tensor(0.2, dtype=F64)

    def forward(self, t, x):
        return -self.rate * x + self.other


def test_solver_outside_torch_refuses_to_drop_gradients():
    x0, t = torch.ones(2, dtype=F64), torch.tensor([0.0, 1.0], dtype=F64)
    how = {"method": "scipy_solver"}
    with pytest.raises(ValueError, match=r"`field` should not depend on what requires grad with method 'scipy_solver'"):
        integrate(Trained(), x0, t, **how)
    with pytest.raises(ValueError, match=r"`t.requires_grad` should be False with method 'scipy_solver'"):
        integrate(wavy, x0, t.requires_grad_(), **how)
    with torch.no_grad():
        assert integrate(Trained(), x0, t, **how).is_success
    assert integrate(Trained().requires_grad_(False), x0, t.detach(), **how).is_success
    # leaves that a field makes for itself ask for nothing
    assert integrate(SPRING, X0, [0.0, 1.0], **how).is_success
    assert integrate(Trained(), x0, t.detach(), adjoint=True, **how).states.requires_grad


@pytest.mark.parametrize("method", ["midpoint", "dopri5"])
def test_adjoint_differentiates_inputs_and_refuses_what_it_would_leave_out(method):
    u = torch.tensor([0.3], requires_grad=True)
    values = torch.tensor([[0.3], [0.7]], requires_grad=True)
    for given, leaf in ((u, u), (ZeroOrderHold([0.0, 0.5], values), values)):
        grads = []
        for adjoint in (False, True):
            states = integrate(SPRING, X0, [0.0, 0.5, 1.0], method=method, u=given, adjoint=adjoint, rtol=1e-5,
                               atol=1e-6, backend="torchdiffeq").states  # fmt: skip
            grads.append(torch.autograd.grad(states.q[-1].sum(), leaf)[0])
        # adjoints of fixed steps are those of the equation, not of the steps
        torch.testing.assert_close(*grads, rtol=0, atol=0.2 if method == "midpoint" else 1e-3)
        assert grads[1].abs().min() > 0.05
    with pytest.raises(ValueError, match=r"`adjoint_params` should name all tensors .* Found 1 more .*\(1,\)"):
        integrate(SPRING, X0, [0.0, 0.5, 1.0], method=method, u=lambda t: u * t, adjoint=True)
    field = Trained()
    field.other = torch.tensor([0.2, 0.1], dtype=F64, requires_grad=True)
    x0, t = torch.ones(2, dtype=F64), [0.0, 0.5, 1.0]
    with pytest.raises(ValueError, match=r"Found 1 more that require grad, of shapes \[\(2,\)\]"):
        integrate(field, x0, t, method=method, adjoint=True)
    assert integrate(field, x0, t, method=method, adjoint=True, adjoint_params=[field.rate]).is_success


def test_knots_and_step_sizes_do_not_take_gradients():
    with pytest.raises(ValueError, match=r"`t.requires_grad` should be False, as no gradient is passed on to knots"):
        ZeroOrderHold(torch.tensor([0.0, 1.0], requires_grad=True), torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"`options\['step_size'\]` should be without gradient"):
        integrate(wavy, torch.ones(1), [0.0, 1.0], options={"step_size": torch.tensor(0.5, requires_grad=True)})


def test_name_that_torchdiffeq_has_too_means_ours_for_systems_and_theirs_for_fields(monkeypatch):
    class Theirs(SOLVERS["euler"]):
        """Stands for a method of a later torchdiffeq."""

    monkeypatch.setitem(SOLVERS, "implicit_midpoint", Theirs)
    t = [0.0, 0.5, 1.0]
    field = integrate(wavy, torch.ones(1), t, method="implicit_midpoint")
    assert torch.equal(field.states, integrate(wavy, torch.ones(1), t, method="euler", backend="torchdiffeq").states)
    ours, theirs = (integrate(SPRING, X0, t, method="implicit_midpoint", backend=b) for b in ("auto", "torchdiffeq"))
    assert ours.n_iters > 0
    assert theirs.n_iters is None
    euler = integrate(SPRING, X0, t, method="euler")
    torch.testing.assert_close(theirs.states.q, euler.states.q)
    known = comparable_methods()
    assert (known["implicit_midpoint"].kind, known["torchdiffeq-implicit_midpoint"].kind) == ("structure", "fixed")
    monkeypatch.undo()
    with pytest.raises(ValueError, match="`field` should be a `PortHamiltonianSystem`"):
        integrate(wavy, torch.ones(1), t, method="implicit_midpoint")
