"""Integrations of port-Hamiltonian systems: backends, inputs, knots, what is refused."""

import copy
import itertools
import math
import sys
from contextlib import ExitStack

import pytest
import torch
from cuda_toys import no_waiting
from structure_toys import F64, drive, make_state, make_system
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from odeopt.ode import (
    EXPLICIT_METHODS,
    STRUCTURE_METHODS,
    FirstOrderHold,
    Status,
    ZeroOrderHold,
    available_methods,
    grid,
    implicit,
    integrate,
    is_fixed_step,
)
from odeopt.ode.grid import Times, subintervals
from odeopt.ode.structured import STRUCTURE_ORDER
from odeopt.physics import PhaseState, PortHamiltonianSystem

# a damped mass on a spring: x'' = -x - .2 x' + u
SPRING = PortHamiltonianSystem(1, potential=lambda q: 0.5 * q.square().sum(-1), dissipation=0.2).to(F64)
A = torch.tensor([[0.0, 1.0], [-1.0, -0.2]], dtype=F64)
X0 = PhaseState(torch.tensor([1.0], dtype=F64), torch.tensor([-0.4], dtype=F64))
FIRST_ORDER = {"euler", *(name for name, order in STRUCTURE_ORDER.items() if order == 1)}
KNOTS, SAMPLES = [0.0, 0.37, 0.9, 1.6], torch.tensor([[1.0], [-2.0], [0.5], [3.0]], dtype=F64)


def moved(x, u, h):
    """The spring under a constant input, exactly."""
    rest = torch.tensor([u, 0.0], dtype=F64)
    return torch.linalg.matrix_exp(A * h) @ (x - rest) + rest


def exact_under_hold(t):
    """Where the spring is under the held samples."""
    x, times = torch.cat(X0), [k for k in KNOTS if k < t] + [t]
    for (start, end), u in zip(itertools.pairwise(times), SAMPLES[:, 0].tolist(), strict=False):
        x = moved(x, u, end - start)
    return x


@pytest.mark.parametrize("method", available_methods())
def test_every_method_sees_the_jumps_of_a_held_input(method):
    if method == "scipy_solver":
        options = {"solver": "DOP853"}
    else:
        options = {"step_size": 0.004} if is_fixed_step(method) and method != "fixed_adams" else None
    t = [0.0, 0.5, 1.1, 2.0]
    rtol = 1e-4 if method == "adaptive_heun" else 1e-6  # of second order: three times as many steps for each digit
    solution = integrate(SPRING, X0, t, method=method, options=options, u=ZeroOrderHold(KNOTS, SAMPLES), rtol=rtol,
                         atol=1e-2 * rtol)  # fmt: skip
    found = torch.cat(solution.states, -1)
    expected = torch.stack([torch.cat(X0), *map(exact_under_hold, t[1:])])
    rough = {"euler": 2e-2, "fixed_adams": 1.0}  # adaptive ones are interpolated at the outputs, dopri8 roughly
    assert (found - expected).abs().max() < rough.get(method, 5e-4)


@pytest.mark.parametrize("end", [1.7, -1.1], ids=["forwards", "backwards"])
@pytest.mark.parametrize("method", [*available_methods(), *STRUCTURE_METHODS])
def test_every_method_follows_an_input_of_time_in_both_directions(method, end):
    # the input under which the spring moves as q = sin(2 t)
    t = torch.tensor([0.3, 0.3 + (end - 0.3) * 0.35, end], dtype=F64)
    x0 = PhaseState((2 * t[:1]).sin(), 2 * (2 * t[:1]).cos())
    is_fixed = method in STRUCTURE_METHODS or is_fixed_step(method)
    options = {"step_size": 0.02} if is_fixed else {}
    if method == "explicit_adams":
        options["max_order"] = 5
    solution = integrate(SPRING, x0, t, method=method, options=options, rtol=1e-4, atol=1e-5,
                         u=lambda t: (0.4 * torch.cos(2 * t) - 3 * torch.sin(2 * t)).reshape(1))  # fmt: skip
    assert solution.is_success, solution.message
    expected = torch.stack(((2 * t).sin(), 2 * (2 * t).cos()), -1)
    # Errors of first order are a few times the step; those of adaptive methods add up over some hundred steps. With an
    # input at times of the wrong sign the states are off by three.
    tolerance = 0.1 if method in FIRST_ORDER else 5e-3 if is_fixed else 0.03
    assert (torch.cat(solution.states, -1) - expected).abs().max() < tolerance


@pytest.mark.parametrize("end", [2.0, -0.5], ids=["forwards", "backwards"])
@pytest.mark.parametrize(
    ("method", "backend"),
    [*((name, "odeopt") for name in EXPLICIT_METHODS), *((name, "torchdiffeq") for name in available_methods())],
)
def test_field_evaluations_add_up_over_the_pieces_between_knots(method, backend, end):
    system, calls = copy.deepcopy(SPRING), []
    system.vector_field = lambda *arguments: calls.append(1) or SPRING.vector_field(*arguments)
    # knots between outputs and at one of them, none where the integration begins
    t, u = [0.7, 0.7 + (end - 0.7) * 0.3, end], ZeroOrderHold([0.1, 0.5, 0.9, 1.3, 1.6], 2 * SAMPLES[[0, 1, 2, 3, 1]])
    whole = integrate(system, X0, t, method=method, u=u, rtol=1e-4, atol=1e-5, backend=backend)
    assert whole.is_success, whole.message
    assert whole.n_field_evals == len(calls)
    # and each piece has its share, as if it were integrated alone
    x0, n_evals, n_steps = X0, [], []
    for piece in subintervals(Times(t, 0.0), None, u.knots):
        held = u((torch.tensor(piece.start, dtype=F64) + piece.end) / 2)
        part = integrate(system, x0, torch.tensor([piece.start, piece.end], dtype=F64), method=method, u=held,
                         rtol=1e-4, atol=1e-5, backend=backend)  # fmt: skip
        x0 = PhaseState(*(x[-1] for x in part.states))
        n_evals.append(part.n_field_evals)
        n_steps.append(part.n_steps)
    assert len(n_evals) >= 4
    assert whole.n_field_evals == sum(n_evals) > max(n_evals)
    assert whole.n_steps == (None if method == "scipy_solver" else sum(n_steps))


@pytest.mark.parametrize("method", STRUCTURE_METHODS)
def test_evaluations_and_iterations_of_structured_steps_add_up_over_pieces(method):
    system, x0, t = make_system(), make_state(n=2), [0.0, 0.3, 0.45, 0.8]
    u = ZeroOrderHold([0.0, 0.2, 0.5], SAMPLES[:3])
    whole = integrate(system, x0, t, method=method, u=u, options={"step_size": 0.2})
    parts = []
    for piece in subintervals(Times(t, 0.0), None, u.knots):
        parts.append(integrate(system, x0, [piece.start, piece.end], method=method,
                               u=u(torch.tensor(piece.start, dtype=F64)), options={"step_size": 0.2}))  # fmt: skip
        x0 = PhaseState(*(x[-1] for x in parts[-1].states))
    assert len(parts) == 5
    assert whole.n_field_evals == sum(part.n_field_evals for part in parts)
    assert whole.n_steps == sum(part.n_steps for part in parts) > len(parts)
    assert whole.n_iters == pytest.approx(sum(part.n_iters for part in parts))


def test_no_step_reaches_across_a_knot_so_that_the_order_stays():
    t, u = [0.0, 1.3], ZeroOrderHold(KNOTS, SAMPLES)
    errors = []
    for h in (0.2, 0.1):
        solution = integrate(SPRING, X0, t, method="rk4", options={"step_size": h}, backend="odeopt", u=u)
        errors.append((torch.cat(solution.states, -1)[-1] - exact_under_hold(1.3)).norm().item())
    assert errors[0] < 1e-4
    # steps differ in length from piece to piece: between order 3.5 and 5
    assert 3.5 < math.log2(errors[0] / errors[1]) < 5
    crossing = integrate(SPRING, X0, t, method="rk4", options={"step_size": 0.1}, backend="odeopt", u=lambda t: u(t))
    assert (torch.cat(crossing.states, -1)[-1] - exact_under_hold(1.3)).norm() > 1e3 * errors[1]


def test_lines_between_samples_equal_the_function_they_sample():
    def line(t):
        return (1.5 - 0.8 * t).reshape(1)

    hold = FirstOrderHold([0.0, 0.7, 2.0], torch.tensor([[1.5], [0.94], [-0.1]], dtype=F64))
    t = torch.linspace(0, 2, 9, dtype=F64)
    for method in ("rk4", "strang", "dopri5"):
        a, b = (integrate(SPRING, X0, t, method=method, u=u).states.q for u in (line, hold))
        tolerance = 2e-3 if method == "strang" else 1e-5  # the knot at .7 adds a step
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


def test_holds_are_continued_beyond_their_knots():
    held, joined = ZeroOrderHold(KNOTS, SAMPLES), FirstOrderHold(KNOTS, SAMPLES)
    for t, expected in ((-1.0, 1.0), (0.0, 1.0), (0.36, 1.0), (0.37, -2.0), (5.0, 3.0)):
        assert held(torch.tensor(t, dtype=F64)).item() == expected
    for t, expected in ((-1.0, 1.0), (0.0, 1.0), (0.185, -0.5), (0.37, -2.0), (1.25, 1.75), (5.0, 3.0)):
        assert joined(torch.tensor(t, dtype=F64)).item() == pytest.approx(expected)
        middle = torch.tensor(t, dtype=F64)
        piece = joined.piece(t - 1e-3, t + 1e-3) if t not in KNOTS else joined.piece(t, t + 1e-3)
        assert piece(middle).item() == pytest.approx(expected)


def test_inputs_may_differ_in_a_batch_and_pass_gradients():
    system, x0 = make_system(), make_state(n=3)
    values = torch.randn(2, 3, 1, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()

    def end(values):
        hold = ZeroOrderHold([0.0, 0.2], values)
        return torch.cat(integrate(system, x0, [0.0, 0.4], method="rk4", u=hold).states, -1)[-1]

    assert torch.autograd.gradcheck(end, (values,))
    single = integrate(system, PhaseState(*(x[1] for x in x0)), [0.0, 0.4], method="rk4",
                       u=ZeroOrderHold([0.0, 0.2], values[:, 1].detach()))  # fmt: skip
    torch.testing.assert_close(end(values)[1], torch.cat(single.states, -1)[-1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", EXPLICIT_METHODS)
def test_backends_agree(method):
    def field(t, x):
        return torch.sin(3 * t) - x * x

    x0, t = torch.tensor([0.3, 1.0], dtype=F64), torch.linspace(0, 1, 6, dtype=F64)
    for options in (None, {"step_size": 0.05}):
        runs = {b: integrate(field, x0, t, method=method, options=options, backend=b)
                for b in ("auto", "odeopt", "torchdiffeq")}  # fmt: skip
        assert torch.equal(runs["auto"].states, runs["odeopt"].states)
        torch.testing.assert_close(runs["odeopt"].states, runs["torchdiffeq"].states, rtol=0, atol=1e-14)
        assert len({(run.n_steps, run.n_field_evals, run.method) for run in runs.values()}) == 1
    # where the grids differ, the meaning of the options does not change behind one's back
    rough = {"step_size": 0.07}
    auto, theirs = (integrate(field, x0, t, method=method, options=rough, backend=b) for b in ("auto", "torchdiffeq"))
    assert torch.equal(auto.states, theirs.states)
    ours = integrate(field, x0, t, method=method, options=rough, backend="odeopt")
    assert ours.n_steps == 15  # each fifth in three steps
    with_nothing = integrate(SPRING, X0, [0.0, 1.0], method=method, backend="torchdiffeq")
    torch.testing.assert_close(with_nothing.states.p, integrate(SPRING, X0, [0.0, 1.0], method=method).states.p)


def test_pieces_cover_the_time_axis():
    pieces = subintervals(Times([0.0, 1.0, 1.5], 0.0), 0.3, (0.0, 0.4, 1.0, 1.2, 7.0))
    assert [(p.start, p.end, p.n_steps) for p in pieces] == [(0.0, 0.4, 2), (0.4, 1.0, 2), (1.0, 1.2, 1), (1.2, 1.5, 1)]
    assert [p.ends_at_output for p in pieces] == [False, True, False, True]
    back = subintervals(Times([1.5, 0.0], 0.0), None, (0.4, 1.2))
    assert [(p.start, p.end) for p in back] == [(1.5, 1.2), (1.2, 0.4), (0.4, 0.0)]


@pytest.mark.parametrize("dtype", [torch.float32, F64, None], ids=["single", "double", "numbers"])
def test_rounded_output_times_take_no_steps_more(dtype):
    n, dt = 100, 0.05
    t = [dt * i for i in range(n + 1)]
    x0 = PhaseState(*(x.float() for x in X0))
    for given in (t, [-time for time in t]):
        given = given if dtype is None else torch.tensor(given, dtype=dtype)
        system = integrate(copy.deepcopy(SPRING).float(), x0, given, method="strang", options={"step_size": dt})
        assert system.n_steps == n
        field = integrate(lambda t, x: -x, x0.q, given, method="rk4", options={"step_size": dt})
        assert (field.n_steps, field.n_field_evals) == (n, 4 * n)
        # a longer interval is not a rounded one
        assert integrate(lambda t, x: -x, x0.q, given, backend="odeopt", options={"step_size": 0.99 * dt}).n_steps > n


@pytest.mark.parametrize("method", ["strang", "rk4", "dopri5"])
@pytest.mark.parametrize("dtype", [torch.float32, None], ids=["single", "numbers"])
def test_knots_at_rounded_output_times_are_no_knots_more(method, dtype):
    spring, x0 = copy.deepcopy(SPRING).float(), PhaseState(*(x.float() for x in X0))
    t, u = [0.0, 0.3, 0.5], ZeroOrderHold([0.0, 0.3], SAMPLES[:2].float())
    given = t if dtype is None else torch.tensor(t, dtype=dtype)  # 0.3 is rounded up
    solution = integrate(spring, x0, given, method=method, u=u)
    if method != "dopri5":
        assert solution.n_steps == 2
    expected = integrate(SPRING, X0, t, method=method, u=ZeroOrderHold([0.0, 0.3], SAMPLES[:2]))
    torch.testing.assert_close(torch.cat(solution.states), torch.cat(expected.states).float(), rtol=1e-5, atol=1e-5)


def test_numbers_keep_their_digits_whatever_the_state_is_in():
    t = [0.0, 0.1, 0.2, 0.3]
    solution = integrate(SPRING, X0, t, method="strang", options={"step_size": 0.1})
    single = integrate(SPRING, X0, torch.tensor(t), method="strang", options={"step_size": 0.1})
    seen = [x.states.p[-1].item() for x in (solution, single)]
    assert seen[0] != seen[1]  # 0.3 in single precision is another time


class NothingFromTheHost(TorchFunctionMode):
    """Fail where numbers or tensors of the host come in; a tensor without values fails by itself where it is read."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor), function
        found = function(*args, **(kwargs or {}))
        for x in tree_leaves(found):
            assert not isinstance(x, torch.Tensor) or x.is_meta, function
        return found


@pytest.mark.parametrize("method", ["rk4", *STRUCTURE_METHODS])
def test_steps_that_are_captured_read_no_value_and_copy_none_from_the_host(method, monkeypatch):
    # what a CUDA graph asks for, seen on a device without values
    for module in (grid, implicit, sys.modules["odeopt.ode.integrate"]):
        monkeypatch.setattr(module, "must_not_synchronise", lambda x: True)
    system = make_system(has_mass_network=method != "strang").to("meta")
    x0 = PhaseState(*(x.to("meta") for x in make_state()))
    u = torch.full((1,), 0.7, dtype=F64, device="meta")
    # without values no iteration ends before the last
    options = {"step_size": 0.1} if method == "rk4" else {"step_size": 0.1, "max_iters": 3}
    with NothingFromTheHost(), torch.no_grad():
        solution = integrate(system, x0, [0.0, 0.3, 0.5], method=method, options=options, u=u)
        with pytest.raises(RuntimeError, match="meta"):
            solution.states.q.sum().item()
    assert solution.status is Status.NOT_CHECKED
    assert solution.states.q.shape[0] == 3


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["rk4", *STRUCTURE_METHODS])
def test_steps_are_captured_in_a_cuda_graph(method):
    system = make_system(has_mass_network=method != "strang").cuda()
    x0 = PhaseState(*(x.cuda() for x in make_state()))
    t, u = [0.0, 0.3, 0.5], torch.full((1,), 0.7, dtype=F64, device="cuda")

    def run():
        with torch.no_grad():
            return integrate(system, x0, t, method=method, options={"step_size": 0.1}, u=u)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a wait for the device fails here
        captured = run()
    assert captured.status is Status.NOT_CHECKED
    for seed in (1, 2):
        for x, new in zip(x0, make_state(seed=seed), strict=True):
            x.copy_(new)
        graph.replay()
        expected = run()
        assert expected.is_success, expected.message
        for found, exact in zip(captured.states, expected.states, strict=True):
            torch.testing.assert_close(found, exact, rtol=0, atol=1e-10)


@pytest.mark.gpu
def test_explicit_steps_do_not_wait_for_the_device_before_the_end(monkeypatch):
    x0 = torch.ones(8, 2, device="cuda")
    pieces, account, waiting = grid.subintervals, grid._outcome, ExitStack()

    def begin(*arguments):
        waiting.enter_context(no_waiting())
        return pieces(*arguments)

    def end(*arguments):
        waiting.close()
        return account(*arguments)

    monkeypatch.setattr(grid, "subintervals", begin)
    monkeypatch.setattr(grid, "_outcome", end)
    with waiting:
        solution = integrate(lambda t, x: -x * t, x0, [0.0, 0.5, 1.0], backend="odeopt", options={"step_size": 0.1})
    assert (solution.status, solution.n_steps) == (Status.SUCCESS, 10)


def test_whole_integrations_are_mapped_and_compiled():
    def run(x):
        return integrate(lambda t, x: torch.sin(3 * t) - x * x, x, [0.0, 0.5, 1.0], method="rk4").states

    x = torch.tensor([0.3, 1.0], dtype=F64)
    torch.testing.assert_close(torch.func.vmap(run)(x), run(x).mT, rtol=0, atol=1e-15)
    torch.testing.assert_close(torch.func.jacrev(run)(x).diagonal(dim1=-2, dim2=-1)[0], torch.ones(2, dtype=F64))
    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), run(x), rtol=0, atol=1e-15)
    mapped = []

    def status_of(x):
        mapped.append(integrate(lambda t, x: -x, x, [0.0, 1.0]))
        return mapped[-1].states

    torch.func.vmap(status_of)(x)
    assert mapped[-1].status == "not checked"
    assert not mapped[-1].is_success
    assert "mapped, compiled or captured" in mapped[-1].message


def test_our_steps_report_failures_and_honour_callbacks():
    solution = integrate(lambda t, x: x**3, torch.tensor([2.0]), torch.linspace(0, 3, 4), backend="odeopt")
    assert solution.status == "non-finite state"
    assert solution.states.isnan().any()
    assert solution.states[0] == 2.0

    class Watched(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.seen = []

        def forward(self, t, x):
            return -x

        def callback_step(self, t0, x, dt):
            self.seen.append((t0.item(), x.item(), float(dt)))

    field = Watched()
    integrate(field, torch.ones(1, dtype=F64), [0.0, 1.0], options={"step_size": 0.5}, method="euler", backend="odeopt")
    assert field.seen == [(0.0, 1.0, 0.5), (0.5, 0.5, 0.5)]


@pytest.mark.parametrize("method", ["rk4", "dopri5", "strang"])
def test_matrix_network_that_is_not_finite_is_a_status(method):
    friction = PortHamiltonianSystem(1, potential=lambda q: q.square().sum(-1),
                                     dissipation=lambda q: ((q - q) / (q - q)).unsqueeze(-1)).to(F64)  # fmt: skip
    solution = integrate(friction, X0, [0.0, 1.0, 2.0], method=method)
    assert solution.status == "non-finite state"
    assert solution.states.q[1:].isnan().all()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"x0": torch.ones(2)}, "`x0` should be a `PhaseState` of tensors q and p"),
        ({"u": 0.7}, "`u` should be None, a tensor .* a `ZeroOrderHold`.*Found `u = 0.7`"),
        ({"u": torch.ones(2, dtype=F64)}, r"`u` should have shape \(1,\).*Found `u.shape = \(2,\)`"),
        ({"t": [0.0, 1.0, 0.5]}, r"`t` should be finite and strictly increasing.*`t\[1\] = 1` before `t\[2\] = 0.5`"),
        ({"backend": "ours"}, "`backend` should be one of auto, odeopt, torchdiffeq. Found `backend = 'ours'`"),
        ({"backend": "torchdiffeq", "method": "strang"}, "one of torchdiffeq's with `backend = 'torchdiffeq'`"),
        ({"method": "discrete_gradient", "adjoint": True}, "one of torchdiffeq's with `adjoint = True`"),
        ({"backend": "odeopt", "method": "dopri5"}, "`method` should be one of euler"),
        ({"backend": "odeopt", "adjoint": True}, "`adjoint` should be False with `backend = 'odeopt'`"),
        ({"backend": "odeopt", "options": {"interp": "cubic"}}, "`options` of method 'rk4' should only hold step_size"),
    ],
)
def test_wrong_arguments_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        integrate(SPRING, **({"x0": X0, "t": [0.0, 1.0]} | arguments))


@pytest.mark.parametrize("name", ["u", "z"])
def test_bare_fields_have_no_inputs(name):
    with pytest.raises(ValueError, match=f"`{name}` should be None unless `field` is a `PortHamiltonianSystem`"):
        integrate(lambda t, x: -x, torch.ones(1), [0.0, 1.0], **{name: torch.ones(1)})


@pytest.mark.parametrize("hold", [ZeroOrderHold, FirstOrderHold])
@pytest.mark.parametrize(
    ("t", "values", "match"),
    [
        ([0.0, 0.0], torch.ones(2, 1), r"`t` should be finite, one-dimensional and strictly increasing.*\[0.0, 0.0\]"),
        ([0.0, math.nan], torch.ones(2, 1), "`t` should be finite"),
        ([0.0, 1.0], torch.ones(3, 1), r"`values.shape` should be \(2, \*batch, n_inputs\).*\(3, 1\)"),
        ([0.0, 1.0], torch.ones(2), r"`values.shape` should be .*\(2,\)"),
        ([0.0, 1.0], torch.tensor([[1.0], [math.inf]]), r"`values` should be finite. Found `values\[1\] = \[inf\]`"),
    ],
)
def test_wrong_samples_are_named(hold, t, values, match):
    with pytest.raises(ValueError, match=match):
        hold(t, values)


def test_adjoint_of_a_system_finds_its_weights():
    system, x0 = make_system(), make_state(n=2)
    grads = []
    for adjoint in (True, False):
        system.zero_grad()
        solution = integrate(system, x0, [0.0, 0.5], method="dopri5", u=drive, adjoint=adjoint, rtol=1e-9, atol=1e-11)
        torch.cat(solution.states, -1)[-1].square().sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in system.parameters() if p.grad is not None]))
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "strang"])
@pytest.mark.parametrize("sizes", [(1, 3), (3, 1), (2, 1), (4, 4)])
def test_positions_and_momenta_of_wrong_sizes_are_refused(method, sizes):
    system = PortHamiltonianSystem(2, potential=lambda q: q.square().sum(-1) / 2)
    with pytest.raises(ValueError, match=r"Parameter `x\.[qp]` should have"):
        integrate(system, PhaseState(*map(torch.ones, sizes)), [0.0, 1.0], method=method)


@pytest.mark.parametrize("method", ["rk4", "dopri5", "strang"])
def test_an_effort_that_is_no_tensor_is_refused(method):
    with pytest.raises(ValueError, match=r"`u` should be a tensor, or a function that gives one.* Found `u = 0.5`"):
        integrate(SPRING, X0, [0.0, 1.0], method=method, u=lambda t: 0.5)


@pytest.mark.parametrize(
    ("t", "match"),
    [
        (torch.arange(3), "`t` should be a tensor or a sequence of at least two floating-point numbers"),
        ([0.0], "`t` should be a tensor or a sequence of at least two"),
        ([0.0, 0.0, 1.0], "`t` should be finite and strictly increasing or decreasing"),
        ([0.0, 1.0, 0.5], "`t` should be finite and strictly increasing or decreasing"),
        ([0.0, math.nan], "`t` should be finite and strictly increasing or decreasing"),
    ],
    ids=str,
)
def test_wrong_times_are_refused_under_vmap_too(t, match):
    with pytest.raises(ValueError, match=match):
        torch.func.vmap(lambda x: integrate(lambda t, x: -x, x, t, method="rk4").states)(torch.ones(2, 3))


def test_integers_are_refused_under_vmap_too():
    with pytest.raises(ValueError, match=r"`x0.dtype` should be floating point"):
        torch.func.vmap(lambda x: integrate(lambda t, x: -x, x, [0.0, 1.0], method="rk4").states)(torch.arange(2))


PENDULUM = PortHamiltonianSystem(1, potential=lambda q: 1 - q[..., 0].cos(), dissipation=0.1).to(F64)
AT_REST = PhaseState(torch.ones(1, dtype=F64), torch.zeros(1, dtype=F64))


@pytest.mark.parametrize("hold", [ZeroOrderHold, FirstOrderHold])
def test_samples_of_an_input_can_be_mapped_over(hold):
    def end(values):
        u = hold([0.0, 1.0], values)
        return integrate(PENDULUM, AT_REST, [0.0, 0.5, 2.0], method="rk4", u=u).states.p[-1]

    values = torch.randn(3, 2, 1, dtype=F64)
    torch.testing.assert_close(torch.func.vmap(end)(values), torch.stack([end(x) for x in values]))


@pytest.mark.parametrize("held", [True, False])
def test_adjoint_passes_gradients_on_to_what_an_input_was_computed_from(held):
    weight = torch.tensor([[0.3]], dtype=F64, requires_grad=True)
    values = torch.tensor([[1.0], [2.0], [-1.0]], dtype=F64) @ weight
    u = ZeroOrderHold([0.0, 1.0, 2.0], values) if held else values[1]
    gradients = []
    for adjoint in (True, False):
        options = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9, "adjoint": adjoint}
        end = integrate(PENDULUM, AT_REST, [0.0, 1.5, 3.0], u=u, **options).states.p[-1].sum()
        gradients += torch.autograd.grad(end, weight, retain_graph=True)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=0)


def test_adjoint_begins_at_the_outputs_and_not_at_what_lies_between_steps():
    field = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).to(F64)
    system = PortHamiltonianSystem(1, potential=lambda q: field(torch.cat((q, q.square()), -1))[..., 0]).to(F64)
    errors = []
    for options in (None, {}):
        gradients = []
        for tight in (False, True):
            tolerances = {"rtol": 1e-12, "atol": 1e-13} if tight else {}
            own = {} if tight else {"adjoint_options": options}
            solution = integrate(system, AT_REST, [0.0, 1.0, 3.0], method="dopri8", adjoint=True,
                                 adjoint_params=tuple(field.parameters()), **tolerances, **own)  # fmt: skip
            end = solution.states.q.square().sum()
            gradients.append(torch.cat([x.flatten() for x in torch.autograd.grad(end, field.parameters())[:3]]))
        errors.append((gradients[0] - gradients[1]).norm())
    assert errors[0] < 0.5 * errors[1]


def test_own_methods_do_not_ask_for_torchdiffeq(monkeypatch):
    def imported():
        raise ImportError("as in compiled code")

    monkeypatch.setattr("odeopt.ode.torchdiffeq._solvers", imported)
    for method in (*EXPLICIT_METHODS, *STRUCTURE_METHODS):
        assert integrate(PENDULUM, AT_REST, [0.0, 0.1], method=method).status is Status.SUCCESS
    with pytest.raises(ImportError):
        integrate(PENDULUM, AT_REST, [0.0, 0.1], method="dopri5")
