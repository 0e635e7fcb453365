"""Structure-preserving steps: order, symplecticity, friction, power balance, derivatives."""

import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from structure_toys import F64, drive, error_at_end, make_state, make_system, observed_order, shared_system
from torch.autograd import forward_ad

from odeopt.ode import STRUCTURE_METHODS, STRUCTURE_ORDER, Newton, discrete_gradient, integrate, structure_step
from odeopt.ode.implicit import solve_implicit
from odeopt.physics import PhaseState, PortHamiltonianSystem, symplectic_matrix

SYSTEMS = [
    {"has_mass_network": mass, "friction": friction}
    for mass in (True, False)
    for friction in ("matrix", "diagonal", None)
]
SYMPLECTIC = ("symplectic_euler", "strang", "implicit_midpoint")


def joined(x):
    return torch.cat(x, -1)


def step_of(system, method, dt=0.3, **options):
    """The step as a function of one vector, (q, p)."""

    def step(y):
        x = PhaseState(y[..., :2], y[..., 2:])
        return joined(structure_step(system, dt, x, method, **options).x)

    return step


@pytest.mark.parametrize("u", [None, drive], ids=["free", "driven"])
@pytest.mark.parametrize("options", SYSTEMS, ids=str)
@pytest.mark.parametrize("method", STRUCTURE_METHODS)
def test_methods_have_their_order_also_where_the_input_depends_on_time(method, options, u):
    # .15: what is left of the next term of the error at these steps
    assert observed_order(shared_system(**options), method, u=u) == pytest.approx(STRUCTURE_ORDER[method], abs=0.15)


@pytest.mark.parametrize("has_mass_network", [True, False])
@pytest.mark.parametrize("method", SYMPLECTIC)
def test_maps_without_friction_are_symplectic(method, has_mass_network):
    system = make_system(has_mass_network=has_mass_network, friction=None)
    step, J = step_of(system, method, u=torch.tensor([0.7], dtype=F64)), symplectic_matrix(2, dtype=F64)
    for x in joined(make_state()):
        S = torch.func.jacrev(step)(x)
        torch.testing.assert_close(S.mT @ J @ S, J, rtol=0, atol=1e-10)  # the tolerance of the solve is 2e-12


def test_explicit_methods_are_not_symplectic_so_that_the_test_above_says_something():
    system, J = make_system(friction=None), symplectic_matrix(2, dtype=F64)

    def step(y):
        t = [0.0, 0.3]
        return joined(integrate(system, PhaseState(y[:2], y[2:]), t, method="midpoint").states)[-1]

    S = torch.func.jacrev(step)(joined(make_state())[0])
    assert (S.mT @ J @ S - J).abs().max() > 1e-3


def test_midpoint_and_discrete_gradient_keep_the_energy_of_an_oscillator():
    # quadratic: symplectic Euler and Strang keep another energy nearby instead
    oscillator = PortHamiltonianSystem(2, inverse_mass=2.0, potential=lambda q: 0.5 * (q * q).sum(-1)).to(F64)
    x0, t = make_state(), torch.linspace(0, 50, 51, dtype=F64)
    drifts = {}
    for method in STRUCTURE_METHODS:
        H = oscillator.energy(integrate(oscillator, x0, t, method=method, options={"step_size": 0.5}).states)
        drifts[method] = ((H - H[0]).abs() / H[0]).max().item()
    assert max(drifts["implicit_midpoint"], drifts["discrete_gradient"]) < 1e-11
    assert 1e-3 < drifts["strang"] < 0.2
    assert drifts["symplectic_euler"] < 1.0  # bounded for ever; Euler's energy grows without end


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 1000),
    dt=st.floats(0.01, 0.7),
    has_mass_network=st.booleans(),
    friction=st.sampled_from(["matrix", "diagonal", None]),
)
def test_discrete_gradient_balances_power_in_discrete_time(seed, dt, has_mass_network, friction):
    system = make_system(has_mass_network=has_mass_network, friction=friction, seed=seed)
    x0, u = make_state(seed=seed), torch.full((1,), 0.7, dtype=F64)
    with torch.no_grad():
        step = structure_step(system, dt, x0, "discrete_gradient", u=u)
        assert step.is_converged.all()
        e = discrete_gradient(system, x0, step.x)
        D = system.structure_matrices(PhaseState((x0.q + step.x.q) / 2, x0.p)).R[..., 2:, 2:]
        dissipated = (e.p * (D @ e.p.unsqueeze(-1)).squeeze(-1)).sum(-1)
        change = system.energy(step.x) - system.energy(x0)
        assert (dissipated >= 0).all()
        torch.testing.assert_close(change, dt * (u * e.p.sum(-1, keepdim=True)).sum(-1) - dt * dissipated,
                                   rtol=0, atol=1e-10)  # fmt: skip


@pytest.mark.parametrize("dt", [0.2, 1.0])
def test_energy_never_rises_without_input_by_discrete_gradients(dt):
    system, x0 = make_system(), make_state(n=8)
    with torch.no_grad():
        solution = integrate(system, x0, torch.arange(0, 21, dtype=F64) * dt, method="discrete_gradient")
    assert solution.is_success
    H = system.energy(solution.states)
    assert (H.diff(dim=0) <= 1e-11).all()
    assert (H[-1] < H[0]).all()


@pytest.mark.parametrize("friction", ["matrix", "diagonal"])
def test_friction_of_strang_takes_energy_whatever_the_step(friction):
    system = make_system(friction=friction, has_mass_network=True)
    heavy = PortHamiltonianSystem(2, inverse_mass=system.hamiltonian.inverse_mass, dissipation=system.dissipation)
    # no potential: q moves, and p with the mass; halves of the friction alone are seen at dt -> 0 and at large ones
    x0 = make_state()
    with torch.no_grad():
        from odeopt.ode.structured import _damped, _Problem

        for h in (0.1, 10.0, 1e4):
            problem = _Problem(heavy, h, lambda share: None, None, Newton())
            p = _damped(problem, x0.q, x0.p, h)
            assert (heavy.energy(PhaseState(x0.q, p)) <= heavy.energy(x0) + 1e-12).all()


@pytest.mark.parametrize("mass", [None, 0.5, torch.tensor([0.7, 1.4]), torch.tensor([[0.7, 0.2], [0.2, 1.4]])], ids=str)
@pytest.mark.parametrize("friction", [0.4, torch.tensor([2.0, 1.0]), torch.tensor([[2.0, 0.5], [0.5, 1.0]])], ids=str)
def test_friction_alone_is_solved_exactly_by_strang(friction, mass):
    system, x0 = PortHamiltonianSystem(2, inverse_mass=mass, dissipation=friction).to(F64), make_state()

    def full(value):
        value = torch.as_tensor(1.0 if value is None else value).to(F64)
        return value if value.dim() == 2 else value * torch.eye(2, dtype=F64)

    p = structure_step(system, 3.0, x0, "strang").x.p
    torch.testing.assert_close(p, x0.p @ torch.linalg.matrix_exp(-3 * full(friction) @ full(mass)).mT)


@pytest.mark.parametrize("method", STRUCTURE_METHODS)
def test_equilibrium_is_left_alone_and_has_derivatives(method):
    system = make_system()
    rest = joined(PhaseState(torch.zeros(1, 2, dtype=F64), torch.zeros(1, 2, dtype=F64))).requires_grad_()
    end = step_of(system, method)(rest)
    assert (end == 0).all()
    (grad,) = torch.autograd.grad(end.sum(), rest)
    assert grad.isfinite().all()


@pytest.mark.parametrize("has_mass_network", [True, False])
@pytest.mark.parametrize("method", STRUCTURE_METHODS)
def test_first_and_second_derivatives_are_those_of_the_root(method, has_mass_network):
    system = make_system(has_mass_network=has_mass_network)
    weights = {name: p.detach().clone() for name, p in system.named_parameters() if "0.weight" in name}
    name = next(iter(weights))

    def step(y, w, u, dt):
        swapped = torch.nn.utils.stateless._reparametrize_module(system, {name: w})
        with swapped:
            return step_of(system, method, dt, u=u)(y)

    y = joined(make_state(n=1))
    arguments = [y, weights[name], torch.full((1,), 0.4, dtype=F64), torch.tensor(0.3, dtype=F64)]
    arguments = [value.requires_grad_() for value in arguments]
    assert torch.autograd.gradcheck(step, arguments)
    # along one direction: a wrong second derivative, as of one held step, is wrong by a tenth and more
    assert torch.autograd.gradgradcheck(step, arguments, fast_mode=True)


def test_iterations_are_not_differentiated():
    system = make_system()
    y = joined(make_state()).requires_grad_()
    sizes = []
    for guesses in (2, 20):
        end = step_of(system, "implicit_midpoint", newton=Newton(tol=1e-300, max_iters=guesses))(y)
        seen, stack = set(), [end.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in seen:
                seen.add(node)
                stack += [other for other, _ in node.next_functions]
        sizes.append(len(seen))
    assert sizes[0] == sizes[1]


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch's own, when it loads jvp
@pytest.mark.parametrize("method", STRUCTURE_METHODS)
def test_steps_can_be_mapped_and_differentiated_by_torch_func(method):
    system, y = make_system(), joined(make_state())
    step = step_of(system, method, u=torch.tensor([0.4], dtype=F64))
    expected = step(y)
    torch.testing.assert_close(torch.func.vmap(step)(y), expected, rtol=0, atol=1e-11)
    v, h = torch.ones_like(y), 1e-5
    tangent = torch.func.jvp(step, (y,), (v,))[1]
    torch.testing.assert_close(tangent, (step(y + h * v) - step(y - h * v)) / (2 * h), rtol=1e-7, atol=1e-8)
    grad = torch.func.grad(lambda y: step(y).square().sum())(y)
    y = y.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(step(y).square().sum(), y)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", STRUCTURE_METHODS)
def test_steps_compile_as_one_graph(method):
    system, y = make_system(), joined(make_state())
    # short, so that two of Newton's iterations, each of which is traced, are enough
    step = step_of(system, method, 1e-3, newton=Newton(max_iters=2))
    torch.compiler.reset()
    with torch.no_grad():
        compiled = torch.compile(step, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(y), step(y), rtol=0, atol=1e-11)


@pytest.mark.parametrize("method", ["euler", "rk4", *STRUCTURE_METHODS])
def test_energy_gradient_is_seen_by_every_transform(method):
    """The vector field of a system with networks of q, under explicit steps too, whole integrations included."""
    system, y, t = make_system(), joined(make_state()), [0.0, 0.2, 0.5]

    def run(y):
        return joined(integrate(system, PhaseState(y[..., :2], y[..., 2:]), t, method=method, u=drive).states)

    expected = run(y)
    torch.testing.assert_close(torch.func.vmap(run)(y), expected.transpose(0, 1), rtol=0, atol=1e-11)
    solution = torch.func.vmap(lambda y: joined(integrate(system, PhaseState(y[:2], y[2:]), t, method=method).states))
    assert solution(y).shape == (3, 3, 4)


# What is solved, and what is not


def test_separable_systems_without_friction_take_no_iteration():
    system = make_system(has_mass_network=False, friction=None)
    for method, is_explicit in (("symplectic_euler", True), ("strang", True), ("implicit_midpoint", False)):
        solution = integrate(system, make_state(), [0.0, 0.5, 1.0], method=method)
        assert (solution.n_iters == 0) is is_explicit
        assert solution.n_steps == 2
    damped = make_system(has_mass_network=False, friction="matrix")
    assert integrate(damped, make_state(), [0.0, 0.5], method="symplectic_euler").n_iters == 1  # linear in p
    assert integrate(damped, make_state(), [0.0, 0.5], method="strang").n_iters == 0


def test_newton_comes_back_from_where_its_whole_steps_run_away():
    starts = torch.tensor(
        [[0.5], [3.0], [-40.0]], dtype=F64
    )  # beyond 1.39 a whole step on the arc tangent leads further
    root = solve_implicit(torch.atan, starts)
    assert root.is_converged.all()
    assert root.x.abs().max() < 1e-11
    assert root.n_iters[0] < root.n_iters[2]
    # a step from here is onto values that are no numbers
    assert solve_implicit(lambda x: torch.log(x) + 3, torch.tensor([[1.0]], dtype=F64)).is_converged.all()
    jumps = solve_implicit(lambda x: x.sign() + 0.5 + 1e-3 * x, torch.tensor([[1.0]], dtype=F64))
    assert not jumps.is_converged.any()  # there is none
    flat = solve_implicit(lambda x: x**2 - 1, torch.zeros(1, 1, dtype=F64))  # whose first step is infinite
    assert not flat.is_converged.any()


def test_tolerance_is_the_callers():
    system = make_system()
    loose, tight = (
        integrate(system, make_state(), [0.0, 0.8], method="implicit_midpoint", options={"tol": tol}).n_iters
        for tol in (1e-2, 1e-12)
    )
    assert loose < tight


def test_step_that_does_not_converge_is_a_status():
    options = {"tol": 1e-14, "max_iters": 1}
    solution = integrate(make_system(), make_state(), [0.0, 1.0, 2.0], method="implicit_midpoint", options=options)
    assert solution.status == "implicit iteration did not converge"
    assert "in 2 of 2 steps, first in step 1. The states are complete but may be inaccurate" in solution.message
    assert not solution.is_success


def test_state_that_is_not_finite_after_a_step_that_did_not_converge_names_that_step():
    # two iterations are too few for the steps of this hill, and what they come to runs away
    hill = PortHamiltonianSystem(1, potential=lambda q: -torch.exp(q**2).sum(-1)).to(F64)
    x0 = PhaseState(torch.tensor([1.0], dtype=F64), torch.tensor([1.0], dtype=F64))
    options = {"max_iters": 2}
    solution = integrate(hill, x0, torch.arange(40.0), method="implicit_midpoint", options=options)
    assert solution.status == "non-finite state"
    assert re.search(r"NaN or inf, and the implicit iteration did not converge in \d+ of 39 steps, first in step 1\.",
                     solution.message)  # fmt: skip


def test_state_that_is_not_finite_is_a_status():
    # a wall of infinite energy, and nothing behind it
    bad = PortHamiltonianSystem(1, potential=lambda q: torch.sqrt(q - 1).sum(-1)).to(F64)
    x0 = PhaseState(torch.tensor([1.5], dtype=F64), torch.tensor([-2.0], dtype=F64))
    for method in STRUCTURE_METHODS:
        solution = integrate(bad, x0, [0.0, 0.1, 2.0, 3.0, 4.0], method=method)
        assert solution.status == "non-finite state", method
        assert "check the field" in solution.message
        assert solution.states.q[-1].isnan().all()
        assert solution.states.q[0] == 1.5


@pytest.mark.parametrize("method", STRUCTURE_METHODS)
def test_bare_fields_are_refused(method):
    with pytest.raises(ValueError, match=rf"`field` should be a `PortHamiltonianSystem` with method '{method}'"):
        integrate(lambda t, x: x, torch.ones(1), [0.0, 1.0], method=method)


def test_going_back_in_time_comes_back():
    system, x0 = make_system(friction=None), make_state()
    for method in ("strang", "implicit_midpoint", "discrete_gradient"):  # symmetric
        there = integrate(system, x0, [0.0, 0.7], method=method)
        back = integrate(system, PhaseState(*(x[-1] for x in there.states)), [0.7, 0.0], method=method)
        torch.testing.assert_close(joined(back.states)[-1], joined(x0), rtol=0, atol=1e-10)


def test_single_precision_converges_too():
    system = make_system().to(torch.float32)
    x0 = PhaseState(*(x.float() for x in make_state()))
    for method in STRUCTURE_METHODS:
        solution = integrate(system, x0, torch.linspace(0, 1, 11), method=method)
        assert solution.is_success, solution.message
        assert solution.states.q.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "strange"}, "`method` should be one of .*strang.*Did you mean `strang`"),
        ({"x": PhaseState(None, torch.ones(2))}, "`x.q` should be given"),
        ({"u": torch.ones(3)}, r"`u` should have shape \(1,\)"),
    ],
)
def test_wrong_arguments_of_a_step_are_named(change, match):
    arguments = {"x": PhaseState(torch.ones(2, dtype=F64), torch.ones(2, dtype=F64)), "method": "strang"} | change
    x, method = arguments.pop("x"), arguments.pop("method")
    with pytest.raises(ValueError, match=match):
        structure_step(make_system(), 0.1, x, method, **arguments)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tol": 0.0}, "`tol` should be a positive number or None. Found `tol = 0.0`"),
        ({"tol": math.nan}, "`tol` should be a positive number or None. Found `tol = nan`"),
        ({"max_iters": 0}, "`max_iters` should be a positive integer or None. Found `max_iters = 0`"),
        ({"interp": "cubic"}, r"`options` of method 'strang' should only hold max_iters, step_size, tol"),
        ({"step_size": -0.1}, r"`options\['step_size'\]` should be positive"),
    ],
)
def test_wrong_options_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        integrate(make_system(), make_state(), [0.0, 1.0], method="strang", options=options)


def test_errors_fall_with_the_step_for_a_batch_of_systems_at_rest_and_in_motion():
    system = make_system()
    x0 = PhaseState(*(torch.cat([x, torch.zeros(1, 2, dtype=F64)]) for x in make_state()))
    errors = [error_at_end(system, "discrete_gradient", n, x0=x0) for n in (8, 16, 32)]
    assert all(a > 3.5 * b for a, b in itertools.pairwise(errors))


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 1e-4), (F64, 1e-10), (torch.float32, 1e-12)], ids=str)
@pytest.mark.parametrize("method", ["discrete_gradient", "implicit_midpoint"])
def test_small_states_are_solved_as_exactly_as_large_ones(method, dtype, size):
    spring = PortHamiltonianSystem(1, potential=lambda q: 0.5 * q.square().sum(-1))
    bent = PortHamiltonianSystem(1, potential=lambda q: size**2 * ((q / size).cosh() - 1).sum(-1))
    x0 = PhaseState(torch.tensor([size], dtype=dtype), torch.zeros(1, dtype=dtype))
    for system in (spring, bent):
        with torch.no_grad():
            solution = integrate(system, x0, torch.linspace(0, 20, 201, dtype=F64), method=method)
        solution.raise_for_status()
        energy = system.energy(PhaseState(*(x.double() for x in solution.states)))
        # the midpoint keeps quadratic energies alone; others come back once a period
        drift = (energy / energy[0] - 1).abs()
        exact = 400 * torch.finfo(dtype).eps
        assert drift.max() < (exact if system is spring or method == "discrete_gradient" else 2e-3)


def test_a_system_at_rest_under_large_forces_is_solved():
    system = PortHamiltonianSystem(1, potential=lambda q: (1e4 * (q + 0.1).cosh() - 1e4 * math.sinh(0.1) * q).sum(-1))
    rest = PhaseState(torch.zeros(1), torch.zeros(1))
    solution = integrate(system, rest, [0.0, 1e-3, 2e-3], method="discrete_gradient")
    solution.raise_for_status()
    assert max(x.abs().max() for x in solution.states) < 1e-3


# torch's own forward mode compiles a few formulas with torch.jit.script, and warns of itself
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
@pytest.mark.parametrize("method", ["rk4", *STRUCTURE_METHODS])
@pytest.mark.parametrize("enabled", [True, False])
def test_forward_mode_gives_the_derivative_of_reverse_mode(method, enabled):
    system = PortHamiltonianSystem(1, potential=lambda q: 1 - q[..., 0].cos(), dissipation=0.02)
    q, p = torch.tensor([1.0], dtype=F64), torch.zeros(1, dtype=F64)

    def end(q):
        return integrate(system, PhaseState(q, p), [0.0, 0.1, 0.2], method=method).states.q[-1, 0]

    (wanted,) = torch.autograd.grad(end(leaf := q.clone().requires_grad_()), leaf)
    with torch.set_grad_enabled(enabled), forward_ad.dual_level():
        found = forward_ad.unpack_dual(end(forward_ad.make_dual(q, torch.ones(1, dtype=F64)))).tangent
    torch.testing.assert_close(found, wanted[0])


@pytest.mark.parametrize("dissipation", [0.5, torch.tensor([0.5])], ids=["number", "tensor"])
def test_friction_is_exact_in_the_dtype_of_the_state(dissipation):
    free = PortHamiltonianSystem(1, dissipation=dissipation)
    x = structure_step(free, 1.0, PhaseState(torch.zeros(1, dtype=F64), torch.ones(1, dtype=F64)), "strang").x
    assert x.p.item() == pytest.approx(math.exp(-0.5), rel=1e-15)


@pytest.mark.parametrize("method", STRUCTURE_METHODS)
@pytest.mark.parametrize("part", ["dissipation", "inverse_mass", "port", "potential", "matrices"])
def test_states_keep_their_dtype_whatever_the_parts_have(method, part):
    one = torch.ones(1, dtype=F64)
    parts = {
        "dissipation": {"dissipation": one},
        "inverse_mass": {"inverse_mass": one},
        "port": {"port": one.unsqueeze(-1)},
        "potential": {"potential": lambda q: q.double().square().sum(-1)},
        "matrices": {"dissipation": torch.eye(2, dtype=F64), "inverse_mass": torch.eye(2, dtype=F64)},
    }[part]
    dof = 2 if part == "matrices" else 1
    x0 = PhaseState(torch.ones(dof), torch.zeros(dof))
    states = integrate(PortHamiltonianSystem(dof, **parts), x0, [0.0, 0.1, 0.2], method=method, u=torch.ones(1))
    assert {x.dtype for x in states.states} == {torch.float32}


@pytest.mark.parametrize("method", ["implicit_midpoint", "discrete_gradient"])
@pytest.mark.parametrize(("stiffness", "dtype"), [(1e4, F64), (1e6, torch.float32), (1e8, torch.float32), (1e8, F64)])
def test_stiff_springs_are_solved_to_rounding_and_say_so(method, stiffness, dtype):
    spring = PortHamiltonianSystem(1, potential=lambda q: stiffness / 2 * q.square().sum(-1))
    x0, h = PhaseState(torch.ones(1, dtype=dtype), torch.zeros(1, dtype=dtype)), 0.1
    solution = integrate(spring, x0, [h * k for k in range(6)], method=method, throw=True)
    c = stiffness * h * h / 4
    exact = torch.tensor([[1 - c, h], [-stiffness * h, 1 - c]], dtype=F64) / (1 + c)
    q, p = torch.linalg.matrix_power(exact, 5) @ torch.tensor([1.0, 0.0], dtype=F64)
    rounding = 10 * torch.finfo(dtype).eps
    assert solution.states.q[-1].item() == pytest.approx(q.item(), abs=rounding)
    assert solution.states.p[-1].item() / stiffness**0.5 == pytest.approx(p.item() / stiffness**0.5, abs=rounding)
    assert solution.n_iters < 60
