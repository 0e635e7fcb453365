"""Test problems of the comparison of solvers: their equations against closed forms, invariants and the literature."""

import math
import re
from dataclasses import replace

import pytest
import torch

from odeopt.ode import integrate
from odeopt.ode.checks import tensors_of
from odeopt.ode.recorder import map_state
from odeopt.physics import PhaseState, PortHamiltonianSystem
from odeopt.solvers import Problem, available_problems, select_problems
from odeopt.solvers.initial_value import flatten
from odeopt.solvers.reference import loss_of, reference, reference_gradient

F64 = torch.float64
PROBLEMS = {problem.name: problem for problem in select_problems()}
CLOSED = [name for name, problem in PROBLEMS.items() if problem.exact is not None]

# The last outputs (the last components where there are more) of ACM Algorithm 648 (Enright and Pryce 1987), of the
# Test Set for IVP Solvers (van der Pol, where time is scaled) and of Hairer and Wanner's Robertson.
PUBLISHED = {
    "A1": (2.061153353012535e-09,),
    "A2": (2.182178902359887e-01,),
    "A3": (2.491650271850414e00,),
    "A4": (1.773016648131483e01,),
    "A5": (-7.887826688964196e-01,),
    "B1": (6.761876008576667e-01, 1.860816099640036e-01),
    "B2": (1.000000001030576e00, 1.000000000000000e00, 9.999999989694235e-01),
    "B3": (2.061153488557776e-09, 5.257228022048349e-02, 9.474277177183630e-01),
    "B4": (9.826950928005993e-01, 2.198447081694832e00, 9.129452507276399e-01),
    "B5": (-9.396570798729192e-01, -3.421177754000779e-01, 7.414126596199957e-01),
    "C1": (5.234675866508716e-04, 1.308668966628220e-03, 9.979127409508656e-01),
    "C2": (2.061153548246532e-09, 2.061153543998189e-09, 9.999999814496180e-01),
    "C3": (7.489115195185912e-03, 5.322964130953349e-03, 2.762434379029886e-03),
    "C5": (*(-1.183032405136207e-01, -1.511986457359206e-01, -2.460068894318766e-01, -3.189687411323877e-02),),
    "D1": (2.198835352008397e-01, 9.427076846341813e-01, -9.787659841058176e-01, 3.287977990962036e-01),
    "D2": (-1.777027357140412e-01, 9.467784719905892e-01, -1.030294163192969e00, 1.211074890053952e-01),
    "D3": (-5.780432953035361e-01, 8.633840009194193e-01, -9.595083730380727e-01, -6.504915126712089e-02),
    "D4": (-9.538990293416394e-01, 6.907409024219432e-01, -8.212674270877433e-01, -1.539574259125825e-01),
    "D5": (-1.295266250987574e00, 4.003938963792321e-01, -6.775390924707566e-01, -1.270838154278686e-01),
    "E1": (1.456723600728308e-01, -9.883500195574063e-02),
    "E2": (2.008149762174948e00, -4.250887527320057e-02),
    "E3": (-1.004178858647128e-01, 2.411400132095954e-01),
    "E4": (3.395091444646555e01, 2.767822659672869e-01),
    "E5": (1.411797390542629e01, 2.400000000000002e00),
    "robertson": (0.7158270687193941, 9.185534764558135e-06, 0.2841637457458413),
}


@pytest.fixture(scope="module")
def solved():
    """References, each computed once."""
    kept = {}

    def states(name):
        if name not in kept:
            kept[name] = reference(PROBLEMS[name])
        return kept[name]

    return states


def test_detest_is_whole():
    groups = available_problems()
    assert [name for name, group in groups.items() if group.startswith("DETEST")] == [
        f"{letter}{i}" for letter in "ABCDE" for i in range(1, 6)
    ]
    assert {"kepler", "henon-heiles", "driven-pendulum", "quadratic", "softmax", "robertson"} < groups.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_references_end_where_the_literature_does(name, solved):
    wanted = torch.tensor(PUBLISHED[name], dtype=F64)
    found = flatten(solved(name))[-1, -len(wanted) :]
    # the published values carry up to 13 digits, those that have decayed fewer: they were solved at 1e-12
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=2e-12)


def test_heat_on_51_points_ends_where_the_literature_does(solved):
    wanted = torch.tensor([3.124111453721466e-03, 6.015416842150318e-03, 8.470021834842650e-03], dtype=F64)
    torch.testing.assert_close(solved("C4")[-1, :3], wanted, rtol=1e-11, atol=0.0)


def test_van_der_pol_ends_where_the_literature_does():
    problem = PROBLEMS["van-der-pol"]
    options = {"solver": "LSODA"}
    found = integrate(
        problem.field, problem.x0, problem.t, method="scipy_solver", options=options, rtol=1e-8, atol=1e-10
    )
    wanted = torch.tensor([1.706167732170483, -0.8928097010247975e-3], dtype=F64)
    torch.testing.assert_close(found.states[-1], wanted, rtol=1e-5, atol=0.0)  # of the tolerance, over two jumps


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_start_at_the_start_and_satisfy_the_field(name):
    problem = PROBLEMS[name]
    torch.testing.assert_close(
        flatten(problem.exact(problem.t[:1]))[0], flatten(_row(problem.x0))[0], rtol=1e-14, atol=1e-14
    )
    generator = torch.Generator().manual_seed(1)
    span = problem.t[-1].item()
    t = 0.02 * span + 0.95 * span * torch.rand(20, generator=generator, dtype=F64)
    h = 2e-3
    at = {k: flatten(problem.exact(t + k * h)) for k in (-2, -1, 1, 2)}
    slopes = (8 * (at[1] - at[-1]) - (at[2] - at[-2])) / (12 * h)
    states = problem.exact(t)
    for i in range(len(t)):
        x = map_state(lambda part, i=i: part[i], states)
        with torch.no_grad():
            dx = flatten(_row(problem.field(t[i], x)))[0]
        # fourth-order differences are off by h^4 / 30 times the fifth derivative, 1e6 at D5's nearest point
        bound = {"D4": 1e-6, "D5": 1e-4}.get(name, 1e-7)
        torch.testing.assert_close(slopes[i], dx, rtol=bound, atol=bound * slopes.abs().max().item())


def _row(x):
    return map_state(lambda part: part[None], x)


def spiral(y, t):  # A5 is a logarithmic spiral
    return 0.5 * torch.log(y[:, 0] ** 2 + t**2) + torch.atan2(y[:, 0], t)


CONSERVED = {
    "A5": spiral,
    "B1": lambda y, t: PROBLEMS["B1"].energy(y),
    "B3": lambda y, t: y.sum(1),
    "B5": lambda y, t: y[:, 0] ** 2 + y[:, 1] ** 2,
    "C1": lambda y, t: y.sum(1),
    "C2": lambda y, t: y.sum(1),
    "D4": lambda y, t: PROBLEMS["D4"].energy(y),
    "D5": lambda y, t: y[:, 0] * y[:, 3] - y[:, 1] * y[:, 2],
    "kepler": lambda y, t: PROBLEMS["kepler"].energy(y),
    "henon-heiles": lambda y, t: PROBLEMS["henon-heiles"].energy(y),
    "robertson": lambda y, t: y.sum(1),
}


@pytest.mark.parametrize("name", CONSERVED)
def test_what_is_conserved_is_conserved(name, solved):
    with torch.no_grad():
        values = CONSERVED[name](solved(name), PROBLEMS[name].t)
    # of Kepler's energy, at the nearest point, cancellation takes a digit
    torch.testing.assert_close(values, values[0].expand_as(values), rtol=2e-11, atol=2e-12)


@pytest.mark.parametrize("name", ["pendulum", "quadratic", "softmax"])
def test_energy_falls_where_it_is_dissipated(name, solved):
    with torch.no_grad():
        energies = PROBLEMS[name].energy(solved(name))
    assert (energies.diff() < 0).all()


@pytest.mark.parametrize("name", ["quadratic", "softmax"])
def test_gradient_flows_follow_the_gradient_of_their_energy(name):
    problem = PROBLEMS[name]
    x = torch.randn(problem.x0.shape, generator=torch.Generator().manual_seed(3), dtype=F64).requires_grad_()
    (gradient,) = torch.autograd.grad(problem.energy(x), x)
    torch.testing.assert_close(problem.field(problem.t[0], x), -gradient, rtol=1e-12, atol=1e-14)


def test_the_driven_pendulum_is_the_written_equation():
    problem = PROBLEMS["driven-pendulum"]
    x, t = PhaseState(torch.tensor([0.7], dtype=F64), torch.tensor([-0.3], dtype=F64)), torch.tensor(1.2, dtype=F64)
    dq, dp = problem.field(t, x)
    assert dq.item() == pytest.approx(-0.3, rel=1e-15)
    assert dp.item() == pytest.approx(-math.sin(0.7) + 0.2 * 0.3 + 0.8 * math.cos(1.8), rel=1e-14)


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_say_whether_they_depend_on_the_time(name):
    problem = PROBLEMS[name]
    x = map_state(lambda part: part + 0.1, problem.x0)
    with torch.no_grad():
        first, later = (flatten(_row(problem.field(problem.t.new_tensor(s), x))) for s in (0.0, 0.37))
    assert torch.equal(first, later) == problem.is_autonomous


@pytest.mark.parametrize("name", PROBLEMS)
def test_problems_move_to_float32_as_a_whole(name):
    problem = PROBLEMS[name]
    moved = problem.to(torch.float32)
    with torch.no_grad():
        dx = moved.field(moved.t[1], moved.x0)
        energy = None if moved.energy is None else moved.energy(moved.x0)
    assert all(part.dtype == torch.float32 for part in (*tensors_of(dx), *tensors_of(moved.x0), moved.t))
    assert energy is None or energy.dtype == torch.float32
    assert torch.equal(moved.t.double(), problem.t)  # exact in float32, so that runs end at the same times
    with torch.no_grad():
        there = flatten(_row(problem.field(problem.t[1], problem.x0)))
    torch.testing.assert_close(flatten(_row(dx)), there, rtol=1e-5, atol=1e-6)
    assert tensors_of(problem.x0)[0].dtype == F64


def test_reference_gradients_are_those_of_the_closed_form():
    # x(t) = x0 exp(sin t): the gradient of the mean of x^2 / 2 over the outputs
    problem = PROBLEMS["A3"]
    wanted = torch.exp(2 * torch.sin(problem.t[1:])).mean()
    assert reference_gradient(problem).item() == pytest.approx(wanted.item(), rel=1e-12)
    assert loss_of(reference(problem)).item() == pytest.approx(0.5 * wanted.item(), rel=1e-14)
    with torch.no_grad():
        assert reference_gradient(problem).item() == pytest.approx(wanted.item(), rel=1e-12)
    assert reference_gradient(PROBLEMS["robertson"]) is None


@pytest.mark.parametrize("name", ["B4", "kepler", "E5"])
def test_the_tight_solver_agrees_with_closed_forms(name, solved):
    """So the references without a closed form can be trusted."""
    problem = PROBLEMS[name]
    without = replace(problem, exact=None, **({"field": None} if problem.system is not None else {}))
    found, wanted = flatten(reference(without)), flatten(solved(name))
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=3e-12)


class Spring(torch.nn.Module):
    """A stiffness, under which a state oscillates."""

    def __init__(self):
        super().__init__()
        self.register_buffer("stiffness", torch.tensor([2.0], dtype=torch.float64))

    def forward(self, t, x):
        return torch.stack((x[..., 1], -self.stiffness[0] * x[..., 0]), -1)

    def energy(self, x):
        return 0.5 * x[..., 1].square() + 0.5 * (self.stiffness * x[..., :1].square()).sum(-1)


def test_an_energy_that_is_a_method_of_the_field_moves_with_it():
    spring, x0 = Spring(), torch.tensor([1.0, 0.5], dtype=torch.float64)
    problem = Problem("spring", "mine", x0, torch.linspace(0, 1, 3, dtype=x0.dtype), field=spring, energy=spring.energy)
    moved = problem.to(torch.float32)
    assert moved.energy.__self__ is moved.field
    assert moved.field is not spring
    assert moved.energy(moved.x0).dtype == torch.float32
    assert moved.energy(moved.x0).item() == problem.energy(x0).item() == 1.125
    assert spring.stiffness.dtype == torch.float64


class Shaking(torch.nn.Module):
    """An effort with a number of its own."""

    def __init__(self):
        super().__init__()
        self.register_buffer("size", torch.tensor([0.5], dtype=F64))

    def forward(self, t):
        return self.size * torch.cos(t)


def test_an_effort_that_is_a_module_moves_with_its_problem():
    problem = replace(PROBLEMS["driven-pendulum"], field=None, effort=Shaking())
    moved = problem.to(torch.float32)
    assert moved.effort is moved.field.effort is not problem.effort
    assert (moved.effort.size.dtype, problem.effort.size.dtype) == (torch.float32, F64)
    assert problem.to().effort is not problem.effort


def test_a_stiff_problem_may_have_a_state_of_several_tensors():
    rates = (3.0, 0.5)
    problem = Problem(
        "two", "mine", (torch.ones(2, dtype=F64), torch.ones(1, 1, dtype=F64)), torch.linspace(0, 0.2, 3, dtype=F64),
        field=lambda t, x: tuple(-rate * part for rate, part in zip(rates, x, strict=True)), is_stiff=True,
    )  # fmt: skip
    found = reference(problem)
    assert [tuple(x.shape) for x in found] == [(3, 2), (3, 1, 1)]
    for x, rate in zip(found, rates, strict=True):
        assert (x - torch.exp(-rate * problem.t).view(-1, *[1] * (x.dim() - 1))).abs().max() < 1e-11
    of_a_system = replace(PROBLEMS["pendulum"], field=None, is_stiff=True, t=torch.tensor([0.0, 0.1], dtype=F64))
    assert isinstance(reference(of_a_system), PhaseState)


class Uncopied:
    """An energy that holds what cannot be copied, as an open file or a graph of autograd."""

    def __call__(self, x):
        return x.p.square().sum(-1)

    def __deepcopy__(self, memo):
        raise RuntimeError("not to be copied")


@pytest.mark.parametrize("energy", [lambda x: x.p.square().sum(-1), Uncopied()], ids=["function", "object"])
def test_an_energy_of_ones_own_is_kept_when_a_problem_moves(energy):
    problem = replace(PROBLEMS["pendulum"], field=None, energy=energy)
    assert problem.to(torch.float32).energy is problem.energy
    own = PROBLEMS["pendulum"].to(torch.float32)
    assert own.energy == own.system.energy != PROBLEMS["pendulum"].energy


X0, T = torch.ones(2, dtype=F64), torch.linspace(0.0, 1.0, 3, dtype=F64)
SYSTEM = PortHamiltonianSystem(2, potential=lambda q: q.square().sum(-1))
PHASE = PhaseState(X0, X0)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            {"t": torch.tensor([0.0, 1.0, 3.0], dtype=F64)},
            "Parameter `t` should be evenly spaced. Found `t = [0.0, 1.0",
        ),
        ({"field": None}, "Parameter `field` should be given unless a system is. Found `field = None`"),
        ({"effort": torch.cos}, "Parameter `effort` should be None where there is no system"),
        ({"x0": [1.0]}, "Parameter `x0` should be a tensor or a tuple of tensors"),
        ({"system": SYSTEM, "field": None}, "Parameter `x0` should be a PhaseState where there is a system"),
        ({"system": SYSTEM, "x0": PHASE}, "Parameter `field` should be None where a system is given"),
    ],
)
def test_bad_problems_are_refused(parts, message):
    good = {"name": "mine", "group": "mine", "x0": X0, "t": T, "field": lambda t, x: -x}
    Problem(**good)
    with pytest.raises(ValueError, match=re.escape(message)):
        Problem(**good | parts)


def test_problems_are_found_by_name_and_by_group_once():
    assert [problem.name for problem in select_problems(["stiff", "A2", "robertson"])] == [
        "van-der-pol",
        "robertson",
        "A2",
    ]
    with pytest.raises(
        ValueError, match=r"Parameter `problems` should be one of .*Found `problems = 'keplr'`. Did you mean `kepler`"
    ):
        select_problems(["keplr"])


def test_a_problem_that_cannot_be_solved_has_no_reference():
    blow_up = Problem("blow-up", "mine", torch.ones(1, dtype=F64), 2 * T, lambda t, x: x * x)
    with pytest.raises(ValueError, match=r"Problem blow-up has no reference: .*reached t = 1 of 2"):
        reference(blow_up)


def test_times_in_single_precision_are_even_in_double_too():
    problem = Problem("decay", "mine", torch.ones(1, dtype=F64), torch.linspace(0, 3, 31), field=lambda t, x: -x)
    t = problem.to().t
    assert (t.dtype, t[0], t[-1]) == (F64, 0, 3)
    torch.testing.assert_close(t, torch.linspace(0, 3, 31, dtype=F64))


def test_complex_states_are_refused():
    with pytest.raises(ValueError, match=r"Parameter `x0.dtype` should be real: a complex number is two states"):
        Problem("turn", "mine", torch.ones(1, dtype=torch.complex128), torch.linspace(0, 3, 31, dtype=F64),
                field=lambda t, x: 1j * x)  # fmt: skip


def decay(**options):
    return Problem("decay", "mine", torch.ones(2, dtype=F64), T, lambda t, x: -x, **options)


@pytest.mark.parametrize(
    ("exact", "match"),
    [
        (lambda t: torch.exp(-t), r"states of shape \(\d+, 2\) \(decay\). Found `exact = \(\d+,\)`"),
        (lambda t: torch.exp(-t).unsqueeze(-1), r"states of shape \(\d+, 2\) \(decay\). Found `exact = \(\d+, 1\)`"),
        (lambda t: 3 * torch.exp(-t).unsqueeze(-1).expand(-1, 2), r"begins at `x0 = \[1.0, 1.0\]` \(decay\). Found"),
    ],
)
def test_a_closed_form_of_another_shape_or_start_is_refused(exact, match):
    with pytest.raises(ValueError, match=match):
        reference(decay(exact=exact))
    right = decay(exact=lambda t: torch.exp(-t).unsqueeze(-1).expand(-1, 2))
    assert torch.equal(reference(right), right.exact(right.t))


def test_a_reference_does_not_take_steps_without_end(monkeypatch):
    monkeypatch.setattr("odeopt.solvers.reference._MAX_STEPS", 2)
    with pytest.raises(ValueError, match=r"Problem decay has no reference: .*max_num_steps"):
        reference(decay())
