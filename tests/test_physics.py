"""Structure, power balance and vector field of port-Hamiltonian systems, for any weights and any inputs."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from odeopt.physics import (
    GivenMatrix,
    NonNegativeDiagonal,
    PhaseState,
    PortHamiltonianSystem,
    PortMatrix,
    PositiveDefinite,
    PositiveSemidefinite,
    Potential,
    ScaledSigmoid,
    symplectic_matrix,
)

# Identities of a dozen float64 operations on numbers of order one to a hundred.
ROUNDING = 1e-12
N_SIGNALS = 3

properties = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**31 - 1)
sizes = st.integers(1, 4)
scales = st.sampled_from([1e-3, 1.0, 5.0])


def randomise(module, seed, scale=1.0):
    """Overwrite every parameter with normal numbers, in float64."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data = scale * noise
    return module


def normal(*shape, seed, scale=1.0):
    generator = torch.Generator().manual_seed(seed + 1)
    return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)


def cosine_mass(q):
    """A known q-dependent inverse mass: I + (1 + cos q_0) 1 1^T."""
    n = q.shape[-1]
    ones = q.new_ones(n, n)
    return torch.eye(n, dtype=q.dtype) + (1 + q[..., :1, None].cos()) * ones


def signal_port(q, z):
    """A known port that a signal modulates."""
    return z[..., :1, None] * (1 + q.square()).unsqueeze(-1)


def build(kind, dof, seed=0, scale=1.0):
    """One system of each kind of parts; the last entry of the name says what they are."""
    if kind == "networks":
        system = PortHamiltonianSystem(
            dof,
            n_inputs=2,
            inverse_mass=PositiveDefinite(dof, network=(5,)),
            potential=Potential(dof, network=(5,)),
            dissipation=PositiveSemidefinite(dof, network=(5,), n_signals=N_SIGNALS),
            port=PortMatrix(dof, 2, network=(5,), n_signals=N_SIGNALS),
        )
    elif kind == "diagonals":
        system = PortHamiltonianSystem(
            dof,
            inverse_mass=NonNegativeDiagonal(dof, network=(5,), eps=1e-3),
            potential=Potential(dof, network=(5,), activation=torch.square),
            dissipation=NonNegativeDiagonal(dof, network=(5,), activation=ScaledSigmoid(2.0)),
            port=PortMatrix(dof, 1, network=(5,)),
        )
    elif kind == "learnable constants":
        system = PortHamiltonianSystem(
            dof,
            n_inputs=dof,
            inverse_mass=PositiveDefinite(dof),
            dissipation=PositiveSemidefinite(dof),
            port=PortMatrix(dof, dof),
        )
    elif kind == "given constants":
        A = normal(dof, dof, seed=seed)
        system = PortHamiltonianSystem(
            dof,
            n_inputs=3,
            inverse_mass=A @ A.mT + torch.eye(dof),
            dissipation=torch.arange(dof),
            port=normal(dof, 3, seed=seed + 5),
        )
    elif kind == "functions":
        system = PortHamiltonianSystem(
            dof,
            inverse_mass=cosine_mass,
            potential=lambda q: (1 - q.cos()).sum(-1),
            dissipation=GivenMatrix(lambda q, z: z[..., 1:2].square() + q.square(), diagonal=True),
            port=signal_port,
        )
    else:
        system = PortHamiltonianSystem(dof, n_inputs=dof if kind == "identity port" else 1, dissipation=0.3)
    return randomise(system, seed, scale)


KINDS = [
    "networks",
    "diagonals",
    "learnable constants",
    "given constants",
    "functions",
    "unit",
    "identity port",
]


def draw(system, batch=(6,), seed=0, scale=1.0):
    """A state, an effort and a signal."""
    q = normal(*batch, system.dof, seed=seed, scale=scale)
    p = normal(*batch, system.dof, seed=seed + 1, scale=scale)
    u = normal(*batch, system.n_inputs, seed=seed + 2, scale=scale)
    return PhaseState(q, p), u, normal(*batch, N_SIGNALS, seed=seed + 3)


def autograd_gradient(system, x):
    """The gradient of H straight from its definition."""
    with torch.enable_grad():
        q, p = (part.detach().requires_grad_() for part in x)
        return torch.autograd.grad(system.energy(PhaseState(q, p)).sum(), (q, p), materialize_grads=True)


# ---------------------------------------------------------------- structure


@pytest.mark.parametrize("dof", [1, 2, 5])
def test_symplectic_matrix_is_skew_and_a_root_of_minus_one(dof):
    J = symplectic_matrix(dof, dtype=torch.float64)
    assert torch.equal(J, -J.mT)
    assert torch.equal(J @ J, -torch.eye(2 * dof, dtype=torch.float64))
    assert J[0, dof] == 1


@properties
@given(seed=seeds, dof=sizes, scale=scales)
@pytest.mark.parametrize("is_network", [True, False])
def test_inverse_mass_is_definite(is_network, seed, dof, scale):
    part = randomise(PositiveDefinite(dof, network=(4,) if is_network else None, eps=1e-3), seed, scale)
    matrix = part(normal(7, dof, seed=seed))
    assert torch.equal(matrix, matrix.mT)
    lowest = torch.linalg.eigvalsh(matrix)[..., 0]
    # eps bounds the eigenvalues; eigvalsh is off by roundings of the largest one.
    assert (lowest >= 1e-3 - ROUNDING * matrix.abs().amax((-2, -1))).all()


@properties
@given(seed=seeds, dof=sizes, scale=scales)
@pytest.mark.parametrize("is_network", [True, False])
def test_dissipation_is_semidefinite(is_network, seed, dof, scale):
    network, n_signals = ((4,), N_SIGNALS) if is_network else (None, 0)
    part = PositiveSemidefinite(dof, network=network, n_signals=n_signals)
    matrix = randomise(part, seed, scale)(normal(7, dof, seed=seed), normal(7, N_SIGNALS, seed=seed))
    assert torch.equal(matrix, matrix.mT)
    lowest = torch.linalg.eigvalsh(matrix)[..., 0]
    assert (lowest >= -ROUNDING * matrix.abs().amax((-2, -1))).all()


@properties
@given(seed=seeds, dof=sizes, scale=st.sampled_from([1.0, 100.0]))
def test_diagonal_stays_within_its_bounds(seed, dof, scale):
    q = normal(7, dof, seed=seed)
    assert (randomise(NonNegativeDiagonal(dof, network=(4,)), seed, scale)(q) >= 0).all()
    assert (randomise(NonNegativeDiagonal(dof, eps=1e-3), seed, scale)(q) >= 1e-3).all()
    bounded = randomise(NonNegativeDiagonal(dof, network=(4,), activation=ScaledSigmoid(2.0)), seed, scale)(q)
    assert (bounded >= 0).all()
    assert (bounded <= 2).all()


@properties
@given(seed=seeds, dof=sizes, scale=scales)
@pytest.mark.parametrize("activation", [nn.functional.softplus, torch.square])
@pytest.mark.parametrize("mass", [PositiveDefinite, None])
def test_energy_is_bounded_below_by_zero(mass, activation, seed, dof, scale):
    system = PortHamiltonianSystem(
        dof,
        inverse_mass=mass and mass(dof, network=(4,)),
        potential=Potential(dof, network=(4,), activation=activation),
    )
    x, _, _ = draw(randomise(system, seed, scale), (50,), seed, scale=100.0)
    assert (system.energy(x) >= 0).all()


def test_constants_start_where_they_say():
    torch.testing.assert_close(PositiveDefinite(3, start=2.0, eps=0.5)(None), 2.5 * torch.eye(3))
    torch.testing.assert_close(PositiveSemidefinite(3, start=0.2)(None), 0.2 * torch.eye(3))
    torch.testing.assert_close(NonNegativeDiagonal(3)(None), torch.full((3,), math.log(2)))
    assert torch.equal(PortMatrix(3, 2)(None), torch.eye(3, 2))


def test_lower_triangle_is_filled_by_rows():
    part = PositiveDefinite(2, start=0.0, eps=1e-6).double()
    part.numbers.data = torch.tensor([2.0, 3.0, 4.0], dtype=torch.float64)
    L = torch.tensor([[2.0, 0.0], [3.0, 4.0]], dtype=torch.float64)
    torch.testing.assert_close(part(None), L @ L.mT + 1e-6 * torch.eye(2, dtype=torch.float64))


# ------------------------------------------------------------------ balance


@properties
@given(seed=seeds, dof=sizes, scale=scales)
@pytest.mark.parametrize("kind", KINDS)
def test_power_balance_closes_and_the_system_is_passive(kind, seed, dof, scale):
    system = build(kind, dof, seed, scale)
    x, u, z = draw(system, seed=seed, scale=2.0)
    balance = system.power_balance(x, u, z)
    dH_dq, v = system.energy_gradient(x)
    dx = system.vector_field(x, u, z)
    # The powers cancel term by term: roundings are relative to the terms, not to their sum.
    terms = (dH_dq * dx.q).abs().sum(-1) + (v * dx.p).abs().sum(-1) + balance.dissipated
    slack = ROUNDING * (1 + terms + (u * system.output(x, z)).abs().sum(-1))
    assert (balance.residual.abs() <= slack).all()
    assert (balance.dissipated >= -slack).all()
    assert (balance.energy_rate <= balance.supplied + slack).all()
    torch.testing.assert_close(balance.supplied, (u * system.output(x, z)).sum(-1))
    assert balance.energy_rate.shape == (6,)


@pytest.mark.parametrize("kind", KINDS)
def test_energy_rate_is_the_derivative_along_the_flow(kind):
    system = build(kind, 2, seed=3)
    x, u, z = draw(system, seed=4)
    dx = system.vector_field(x, u, z)
    h = 1e-5

    def energy(t):
        return system.energy(PhaseState(x.q + t * dx.q, x.p + t * dx.p))

    # Central differences: truncation h^2 = 1e-10 and cancellation 1e-16 / h = 1e-11, times H of order ten.
    observed = (energy(h) - energy(-h)) / (2 * h)
    torch.testing.assert_close(system.power_balance(x, u, z).energy_rate, observed, rtol=1e-7, atol=1e-7)


def test_no_effort_supplies_nothing_and_no_friction_dissipates_nothing():
    system = build("functions", 2)
    x, _, z = draw(system)
    balance = system.power_balance(x, None, z)
    assert (balance.supplied == 0).all()
    assert (balance.energy_rate < 0).all()
    frictionless = PortHamiltonianSystem(2, inverse_mass=cosine_mass)
    balance = frictionless.power_balance(x, torch.ones(6, 1))
    assert (balance.dissipated == 0).all()
    torch.testing.assert_close(balance.energy_rate, balance.supplied)


# ------------------------------------------------------------- vector field


@properties
@given(seed=seeds, dof=sizes)
@pytest.mark.parametrize("kind", KINDS)
def test_vector_field_equals_dense_matrices_and_autograd(kind, seed, dof):
    system = build(kind, dof, seed)
    x, u, z = draw(system, seed=seed)
    J, R, B = system.structure_matrices(x, z)
    assert torch.equal(J, symplectic_matrix(dof, dtype=torch.float64))
    gradient = torch.cat(autograd_gradient(system, x), dim=-1)
    expected = torch.einsum("...ij,...j->...i", J - R, gradient) + torch.einsum("...ij,...j->...i", B, u)
    dx = system.vector_field(x, u, z)
    torch.testing.assert_close(torch.cat(dx, dim=-1), expected)
    torch.testing.assert_close(system.output(x, z), torch.einsum("...ji,...j->...i", B, gradient))
    torch.testing.assert_close(torch.cat(system.energy_gradient(x), dim=-1), gradient)
    both, y = system.vector_field_and_output(x, u, z)
    torch.testing.assert_close(both, dx, rtol=0, atol=0)
    torch.testing.assert_close(y, system.output(x, z), rtol=0, atol=0)


def test_dense_matrices_hold_the_parts():
    D, g = torch.tensor([[2.0, 1.0], [1.0, 3.0]]), torch.tensor([[1.0], [0.5]])
    x = PhaseState(torch.zeros(2), torch.zeros(2))
    _, R, B = PortHamiltonianSystem(2, dissipation=D, port=g).structure_matrices(x)
    assert torch.equal(R, torch.block_diag(torch.zeros(2, 2), D))
    assert torch.equal(B, torch.tensor([[0.0], [0.0], [1.0], [0.5]]))
    _, R, B = PortHamiltonianSystem(2, dissipation=torch.tensor([4.0, 5.0])).structure_matrices(x)
    assert torch.equal(R, torch.diag(torch.tensor([0.0, 0.0, 4.0, 5.0])))
    assert torch.equal(B, torch.tensor([[0.0], [0.0], [1.0], [1.0]]))


@pytest.mark.parametrize("mass", ["matrix", "diagonal", "function"])
def test_mass_gradient_equals_finite_differences_of_the_energy(mass):
    parts = {
        "matrix": PositiveDefinite(3, network=(6,)),
        "diagonal": NonNegativeDiagonal(3, network=(6,), eps=1e-2),
        "function": cosine_mass,
    }
    system = randomise(PortHamiltonianSystem(3, inverse_mass=parts[mass]), seed=1)
    x, _, _ = draw(system, (4,), seed=2)
    h, observed = 1e-5, []
    for step in h * torch.eye(3, dtype=torch.float64):
        ahead, behind = (system.energy(PhaseState(x.q + sign * step, x.p)) for sign in (1, -1))
        observed.append((ahead - behind) / (2 * h))
    dp = system.vector_field(x).p
    assert dp.abs().max() > 0.1
    # As above: truncation and cancellation are both near 1e-10.
    torch.testing.assert_close(-dp, torch.stack(observed, -1), rtol=1e-7, atol=1e-8)


def test_position_gradient_is_taken_at_fixed_momentum():
    # A solver's stage may hand in a p that was computed from the same q.
    system = build("functions", 2)
    q = normal(4, 2, seed=0).requires_grad_()
    attached = system.energy_gradient(PhaseState(q, q.square()))
    detached = system.energy_gradient(PhaseState(q.detach(), q.detach().square()))
    torch.testing.assert_close(attached, detached, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["networks", "diagonals", "learnable constants"])
def test_first_and_second_derivatives_through_the_vector_field(kind):
    system = build(kind, 2, seed=7, scale=0.5)
    weights = dict(system.named_parameters())

    class Rates(nn.Module):
        def __init__(self):
            super().__init__()
            self.system = system

        def forward(self, q, p, u, z):
            dx, y = self.system.vector_field_and_output(PhaseState(q, p), u, z)
            return torch.cat((dx.q, dx.p, y), -1)

    rates = Rates()

    def function(q, p, u, z, *values):
        named = {f"system.{name}": value for name, value in zip(weights, values, strict=True)}
        return torch.func.functional_call(rates, named, (q, p, u, z))

    x, u, z = draw(system, (2,), seed=8)
    inputs = [t.clone().requires_grad_() for t in (*x, u, z)]
    inputs += [weight.detach().clone().requires_grad_() for weight in weights.values()]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_third_derivatives_of_a_rollout_exist():
    system = build("networks", 2, scale=0.5)
    (q, p), u, z = draw(system, (3,))
    q = q.requires_grad_()
    dx = system.vector_field(PhaseState(q, p), u, z)
    value = system.vector_field(PhaseState(q + dx.q, p + dx.p), u, z).p.square().sum()
    for _ in range(3):
        (gradient,) = torch.autograd.grad(value, q, create_graph=True)
        assert torch.isfinite(gradient).all()
        assert (gradient != 0).any()
        value = gradient.square().sum()


# ------------------------------------------------------ batches and contexts


@pytest.mark.parametrize("batch", [(), (1,), (2, 3), (0,)])
@pytest.mark.parametrize("kind", KINDS)
def test_any_batch_shape_gives_what_single_states_give(kind, batch):
    system = build(kind, 2, seed=5)
    x, u, z = draw(system, batch, seed=6)
    dx, y = system.vector_field_and_output(x, u, z)
    assert dx.q.shape == dx.p.shape == (*batch, 2)
    assert y.shape == (*batch, system.n_inputs)
    assert system.energy(x).shape == batch
    assert all(power.shape == batch for power in system.power_balance(x, u, z))
    for index in torch.ones(batch).nonzero().tolist():
        at = tuple(index)
        single = system.vector_field(PhaseState(x.q[at], x.p[at]), u[at], z[at])
        torch.testing.assert_close(single, PhaseState(dx.q[at], dx.p[at]))


@pytest.mark.parametrize("kind", KINDS)
def test_one_effort_is_shared_by_a_batch(kind):
    system = build(kind, 2)
    x, u, z = draw(system, (4, 3))
    for shared in (u[0, 0], u[:, :1]):
        expected = system.vector_field(x, shared.expand(u.shape), z)
        torch.testing.assert_close(system.vector_field(x, shared, z), expected)
    bare = PortHamiltonianSystem(2, port=torch.ones(2, 1, dtype=torch.float64))
    assert torch.equal(bare.vector_field(x, u[0, 0, :1]).p, u[0, 0, :1].expand(4, 3, 2))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("kind", KINDS)
def test_works_where_gradients_are_disabled(kind, context):
    system = build(kind, 2)
    expected = system.vector_field(*draw(system))
    with context():
        dx = system.vector_field(*draw(system))
    assert not dx.q.requires_grad
    assert not dx.p.requires_grad
    torch.testing.assert_close(dx, PhaseState(*(part.detach() for part in expected)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_dtype_is_kept(kind, dtype):
    system = build(kind, 2).to(dtype)
    x, u, z = draw(system)
    x, u, z = PhaseState(x.q.to(dtype), x.p.to(dtype)), u.to(dtype), z.to(dtype)
    balance = system.power_balance(x, u, z)
    dx = system.vector_field(x, u, z)
    assert {dx.q.dtype, dx.p.dtype, balance.residual.dtype} == {dtype}
    # A few dozen roundings of terms of order one to a hundred.
    assert balance.residual.abs().max() <= 1e3 * torch.finfo(dtype).eps * (1 + dx.p.square().max())


def test_copies_and_state_dicts_carry_the_system():
    system = build("networks", 2)
    other = build("networks", 2, seed=9)
    other.load_state_dict(system.state_dict())
    expected = system.vector_field(*draw(system))
    for twin in (other, copy.deepcopy(system)):
        torch.testing.assert_close(twin.vector_field(*draw(system)), expected, rtol=0, atol=0)
    given_constants = build("given constants", 2)
    assert set(given_constants.state_dict()) == {
        "hamiltonian.inverse_mass.value",
        "dissipation.value",
        "port.value",
    }
