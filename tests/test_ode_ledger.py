"""The account of energy adds up for any solver; damping of the solver is told from that of the system."""

import math

import pytest
import torch
from structure_toys import F64, drive, make_state, make_system

from odeopt.ode import (
    STRUCTURE_METHODS,
    ZeroOrderHold,
    diagnose_damping,
    energy_ledger,
    integrate,
)
from odeopt.physics import (
    MUON_COEFFICIENTS,
    MatrixEnergy,
    PhaseState,
    PortHamiltonianSystem,
    QuadraticEnergy,
    RelativisticEnergy,
    SpectralEnergy,
)

SPRING = PortHamiltonianSystem(1, potential=lambda q: 0.5 * q.square().sum(-1), dissipation=0.3).to(F64)
FREE = PortHamiltonianSystem(1, potential=lambda q: 0.5 * q.square().sum(-1)).to(F64)
X0 = PhaseState(torch.tensor([1.0], dtype=F64), torch.tensor([0.5], dtype=F64))


def run(system, method, *, n=41, end=4.0, u=None, x0=None, **options):
    t = torch.linspace(0, end, n, dtype=F64)
    x0 = make_state() if x0 is None else x0
    if method == "dopri5":  # whose outputs would be interpolated
        options = {"options": {"step_t": t}}
    with torch.no_grad():
        return integrate(system, x0, t, method=method, u=u, **options)


@pytest.mark.parametrize("u", [None, drive], ids=["free", "driven"])
@pytest.mark.parametrize("method", ["rk4", "dopri5", "euler", "heun3", *STRUCTURE_METHODS])
def test_account_adds_up_and_its_residual_falls_with_the_step(method, u):
    system, residuals = make_system(), []
    for n in (6, 11):
        solution = run(system, method, n=n, end=0.5, u=u)
        ledger = energy_ledger(system, solution, u=u)
        assert ledger.change.shape == ledger.residual.shape == (n - 1, 3)
        torch.testing.assert_close(ledger.energy[0] + ledger.change.sum(0), ledger.energy[-1])
        torch.testing.assert_close(ledger.residual, ledger.change + ledger.dissipated - ledger.supplied)
        assert (ledger.dissipated >= 0).all()
        assert (ledger.supplied == 0).all().item() is (u is None)
        residuals.append(ledger.residual.abs().sum(0).max().item())
    if method == "discrete_gradient":
        assert max(residuals) < 1e-9  # 20 tolerances of 2e-12, and what multiplies them
    else:
        orders = {"euler": 1, "symplectic_euler": 1, "heun3": 3, "rk4": 4, "dopri5": 4}
        assert math.log2(residuals[0] / residuals[1]) > orders.get(method, 2) - 0.5


KINETIC = {
    "relativistic": lambda: RelativisticEnergy(0.3, learned=True),
    "spectral": lambda: MatrixEnergy((2, 3), 20.0, SpectralEnergy(MUON_COEFFICIENTS[:2])),
    "learned spectral": lambda: MatrixEnergy((3, 2), 20.0, SpectralEnergy(MUON_COEFFICIENTS[:2], learned=True)),
}


def system_of(kinetic, **parts):
    """Six degrees of freedom in a potential, of weights that are drawn."""
    generator = torch.Generator().manual_seed(0)
    energy = KINETIC[kinetic]()
    with torch.no_grad():
        for weight in energy.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    parts = {"dissipation": 0.2, "port": torch.ones(6, 1)} | parts
    potential = lambda q: 0.5 * q.square().sum(-1) + q.cos().sum(-1)  # noqa: E731
    return PortHamiltonianSystem(6, potential=potential, kinetic=energy, **parts).to(F64)


@pytest.mark.parametrize("u", [None, drive], ids=["free", "driven"])
@pytest.mark.parametrize("method", ["rk4", "symplectic_euler", "implicit_midpoint", "discrete_gradient"])
@pytest.mark.parametrize("kinetic", KINETIC)
def test_account_adds_up_whatever_the_kinetic_energy(kinetic, method, u):
    system, residuals = system_of(kinetic), []
    x0 = PhaseState(*(torch.randn(2, 6, dtype=F64, generator=torch.Generator().manual_seed(k)) for k in (1, 2)))
    for n in (4, 7):
        ledger = energy_ledger(system, run(system, method, n=n, end=0.4, u=u, x0=x0), u=u)
        assert (ledger.dissipated > 0).all()
        assert u is not None or (ledger.change[:, 0] < 0).all()
        residuals.append(ledger.residual.abs().sum(0).max().item())
    if method == "discrete_gradient":
        assert max(residuals) < 1e-9
    else:
        assert math.log2(residuals[0] / residuals[1]) > {"symplectic_euler": 1, "rk4": 4}.get(method, 2) - 0.5


@pytest.mark.parametrize("kinetic", KINETIC)
def test_power_balance_is_that_of_the_energy_along_the_field(kinetic):
    """Of a spectral energy the derivative is taken through its singular values, and the powers by matrix products."""
    system, generator = system_of(kinetic), torch.Generator().manual_seed(3)
    x, u = PhaseState(*torch.randn(2, 5, 6, dtype=F64, generator=generator)), torch.randn(5, 1, dtype=F64)
    slopes = torch.func.grad(lambda q, p: system.energy(PhaseState(q, p)).sum(), argnums=(0, 1))(*x)
    rate = sum((slope * dx).sum(-1) for slope, dx in zip(slopes, system.vector_field(x, u), strict=True))
    balance = system.power_balance(x, u)
    torch.testing.assert_close(rate, balance.supplied - balance.dissipated)
    torch.testing.assert_close(balance.residual, torch.zeros(5, dtype=F64))


def test_a_quadratic_kinetic_energy_is_that_of_unit_mass():
    plain, given = FREE, PortHamiltonianSystem(1, potential=FREE.hamiltonian.potential, kinetic=QuadraticEnergy())
    assert torch.equal(plain.energy(X0), given.energy(X0))
    assert all(torch.equal(a, b) for a, b in zip(plain.vector_field(X0), given.vector_field(X0), strict=True))


def test_wrong_kinetic_energies_are_refused():
    with pytest.raises(ValueError, match=r"`inverse_mass` should be None where `kinetic` is given"):
        PortHamiltonianSystem(1, inverse_mass=2.0, kinetic=QuadraticEnergy())
    with pytest.raises(TypeError, match=r"such as a `RelativisticEnergy` or a `MatrixEnergy`. Found `SpectralEnergy`"):
        PortHamiltonianSystem(6, kinetic=SpectralEnergy())
    with pytest.raises(ValueError, match=r"of 5 entries, the degrees of freedom. Found `kinetic.shape = \(2, 3\)`"):
        PortHamiltonianSystem(5, kinetic=MatrixEnergy((2, 3), 1.0))
    for shape, norm, name in (((2,), 1.0, "shape"), ((2, 0), 1.0, "shape"), ((2, 3), 0.0, "norm")):
        with pytest.raises(ValueError, match=f"Parameter `{name}` should be"):
            MatrixEnergy(shape, norm)
    system = system_of("relativistic")
    x0 = PhaseState(*torch.zeros(2, 6, dtype=F64))
    with pytest.raises(ValueError, match=r"`method` should be another one with friction under a kinetic energy of its"):
        run(system, "strang", x0=x0)
    run(system_of("relativistic", dissipation=None), "strang", n=2, x0=x0)


def test_damping_of_a_spring_is_accounted_for_as_it_is():
    t = torch.linspace(0, 4, 41, dtype=F64)
    solution = integrate(SPRING, X0, t, method="dopri8", options={"step_t": t}, rtol=1e-12, atol=1e-12)
    ledger = energy_ledger(SPRING, solution)
    lost = SPRING.energy(X0) - SPRING.energy(PhaseState(*(x[-1] for x in solution.states)))  # nothing else takes it
    torch.testing.assert_close(ledger.dissipated.sum(), lost, rtol=1e-6, atol=0)


def test_jumps_of_the_input_lie_on_outputs():
    hold = ZeroOrderHold([0.0, 2.0], torch.tensor([[1.0], [-1.0]], dtype=F64))
    solution = run(SPRING, "rk4", u=hold, x0=X0)
    ledger = energy_ledger(SPRING, solution, u=hold)
    assert ledger.residual.abs().max() < 1e-6
    work = hold.values[0, 0] * (solution.states.q[20] - solution.states.q[0])  # force times way
    torch.testing.assert_close(ledger.supplied[:20].sum(), work.squeeze(), rtol=1e-5, atol=0)
    crossed = run(SPRING, "rk4", n=4, u=hold, x0=X0)
    with pytest.raises(ValueError, match=r"`solution.t` should be such that each knot of `u` is one of them.*\[2.0\]"):
        energy_ledger(SPRING, crossed, u=hold)


def test_account_is_drawn(tmp_path):
    path = energy_ledger(SPRING, run(SPRING, "strang", x0=X0)).plot(tmp_path / "ledger.png", title="A spring")
    assert path.stat().st_size > 10_000


def test_wrong_arguments_of_the_account_are_named():
    solution = run(SPRING, "rk4", x0=X0)
    with pytest.raises(ValueError, match="`system` should be a `PortHamiltonianSystem`"):
        energy_ledger(None, solution)
    with pytest.raises(ValueError, match=r"`solution\.states` should be a `PhaseState`"):
        energy_ledger(SPRING, integrate(lambda t, x: -x, torch.ones(1), [0.0, 1.0]))
    coarse = run(SPRING, "discrete_gradient", x0=X0, n=3, options={"step_size": 0.5})
    with pytest.raises(ValueError, match=r"one for each output .* 'discrete_gradient'\. Found `solution.n_steps = 8`"):
        energy_ledger(SPRING, coarse)


@pytest.mark.parametrize("method", ["rk4", "strang", "implicit_midpoint"])
def test_real_damping_is_called_real(method):
    other = "discrete_gradient"
    report = diagnose_damping(SPRING, X0, torch.linspace(0, 2, 21), method=method, other=other)
    assert report.is_real
    assert abs(report.artefact) < 0.01
    assert str(report).startswith("The damping is real: energy lost trained ")


def test_energy_that_a_solver_adds_or_takes_is_its_artefact():
    # Euler's method adds energy: at this friction, trained on motions that keep theirs, the field has to lose some
    anti = diagnose_damping(SPRING, X0, torch.linspace(0, 8, 41), method="euler", step_size=0.2)
    assert not anti.is_real
    assert anti.artefact < -0.3
    assert "an artefact of the solver" in str(anti)
    # heun3 damps oscillations that are barely resolved
    fast = diagnose_damping(FREE, X0, torch.linspace(0, 12, 11), method="heun3", step_size=1.2)
    assert not fast.is_real
    assert fast.artefact == pytest.approx(1.0, abs=0.01)


def test_integrations_that_fail_leave_no_verdict():
    explosive = PortHamiltonianSystem(1, potential=lambda q: -q.pow(4).sum(-1)).to(F64)
    report = diagnose_damping(explosive, X0, torch.linspace(0, 9, 10), method="euler")
    assert not report.is_real
    assert str(report).startswith("Nothing can be said of the damping (trained: ")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"refinement": 1}, "`refinement` should be an integer of at least 2. Found `refinement = 1`"),
        ({"tolerance": 0.0}, "`tolerance` should be a positive number. Found `tolerance = 0.0`"),
        ({"other": "rk4"}, "`other` should be another method than 'rk4'. Found `other = 'rk4'`"),
    ],
)
def test_wrong_arguments_of_the_diagnosis_are_named(change, match):
    with pytest.raises(ValueError, match=match):
        diagnose_damping(SPRING, X0, torch.linspace(0, 1, 3), **({"method": "rk4"} | change))


def test_knots_that_are_outputs_to_rounding_are_outputs():
    t = torch.linspace(0, 1, 11)
    u = ZeroOrderHold([0.0, 0.3, 0.6], torch.tensor([[1.0], [-1.0], [0.5]]))
    x0 = PhaseState(torch.ones(1), torch.zeros(1))
    system = PortHamiltonianSystem(1, potential=lambda q: 0.5 * q.square().sum(-1), dissipation=0.3)
    ledger = energy_ledger(system, integrate(system, x0, t, method="rk4", u=u), u=u)
    assert ledger.residual.abs().max() < 1e-6


def test_momenta_beyond_the_norm_of_a_matrix_energy_end_an_integration_with_a_status():
    system = PortHamiltonianSystem(6, kinetic=MatrixEnergy((2, 3), 1.0)).float()
    x0 = PhaseState(torch.zeros(6), 3 * torch.eye(2, 3).flatten())
    with torch.no_grad():
        solution = integrate(system, x0, torch.linspace(0, 1, 3), method="rk4")
    assert solution.status == "non-finite state"


def test_the_account_is_nan_where_momenta_are_not_finite():
    system = PortHamiltonianSystem(6, kinetic=MatrixEnergy((2, 3), 1.0), potential=lambda q: 0.5 * q.square().sum(-1))
    system, x0 = system.to(F64), PhaseState(torch.zeros(6, dtype=F64), 3 * torch.eye(2, 3, dtype=F64).flatten())
    for method in ("rk4", "discrete_gradient"):
        solution = run(system, method, n=4, x0=x0)
        assert solution.status != "success"
        assert energy_ledger(system, solution).change[-1].isnan()


@pytest.mark.parametrize("step_size", [None, 0.2])
def test_steps_of_the_diagnosis_are_those_of_the_times_whatever_their_dtype(step_size):
    options = {"method": "symplectic_euler", "step_size": step_size, "refinement": 2, "other": "strang"}
    t = torch.linspace(0, 10, 51)
    found = diagnose_damping(FREE, X0, t, **options)
    wanted = diagnose_damping(FREE, X0, t.double(), **options | {"step_size": None})
    assert found.lost == pytest.approx(wanted.lost, rel=1e-3)


def test_as_trained_is_one_step_per_output_also_where_these_are_uneven():
    t = torch.tensor([0.0, 0.1, 1.0, 1.5, 2.5], dtype=F64)
    report = diagnose_damping(SPRING, X0, t, method="symplectic_euler", refinement=2)
    energy = SPRING.energy(PhaseState(*run_at(t, "symplectic_euler").states))
    assert report.lost["trained"] == pytest.approx((energy[0] - energy[-1]).item())
    halves = torch.tensor([0.0, 0.05, 0.1, 0.55, 1.0, 1.25, 1.5, 2.0, 2.5], dtype=F64)
    energy = SPRING.energy(PhaseState(*run_at(halves, "symplectic_euler").states))
    assert report.lost["finer"] == pytest.approx((energy[0] - energy[-1]).item())


def run_at(t, method):
    with torch.no_grad():
        return integrate(SPRING, X0, t, method=method)
