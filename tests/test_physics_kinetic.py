"""Kinetic energies: their gradients, their power balance, and the optimizers that they are."""

import copy
import math

import pytest
import torch

from odeopt.ode import integrate
from odeopt.physics import (
    MUON_COEFFICIENTS,
    SHORT_COEFFICIENTS,
    PhaseState,
    PortHamiltonianSystem,
    QuadraticEnergy,
    RelativisticEnergy,
    SpectralEnergy,
    frobenius_norm,
    newton_schulz,
    spectral_power_balance,
)

# The slopes of Muon's polynomial reach 484, so it magnifies the rounding of some hundred float64 operations.
ROUNDING = 1e-10
SHAPES = [(4, 7), (7, 4), (5, 5), (1, 6), (6, 1), (1, 1), (2, 3, 5, 3)]
SPECTRAL = ["muon", "short", "cubic", "learned", "extreme"]


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spectral(kind, seed=0):
    """Muon's energy, one of other factors, and learned ones at random and at very large weights."""
    if kind == "muon":
        return SpectralEnergy()
    if kind == "short":
        return SpectralEnergy(SHORT_COEFFICIENTS)
    if kind == "cubic":
        return SpectralEnergy([(1.5, -0.5, 0.05), (2.0, 1.0, 0.5)])
    energy = SpectralEnergy(learned=True).double()
    energy.raw.data = normal(5, 2, seed=seed + 1) * (1.0 if kind == "learned" else 1e3)
    return energy


def slope(energy, s):
    """k' by the composition of its factors, which no code of the energy shares."""
    for a, b, c in energy.coefficients:
        s = a * s + b * s**3 + c * s**5
    return s


def gradient_of(function, *inputs):
    inputs = [x.detach().requires_grad_() for x in inputs]
    return torch.autograd.grad(function(*inputs).sum(), inputs)


# ---- gradients of energies ----


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize("ratio", [1.0, 1.7, 40.0])
def test_the_spectral_velocity_is_the_gradient_of_the_energy_of_singular_values(kind, shape, ratio):
    energy = spectral(kind)
    P = normal(*shape, seed=3)
    norm = ratio * frobenius_norm(P)
    (gradient,) = gradient_of(lambda P: energy.energy(P, norm), P)
    torch.testing.assert_close(gradient, energy.velocity(P, norm), rtol=ROUNDING, atol=ROUNDING)


def test_the_energy_of_the_factor_one_and_zero_is_the_quadratic_one():
    energy = SpectralEnergy([(1.0, 0.0, 1e-300)])
    P, norm = normal(3, 4, 6), torch.tensor([2.0, 5.0, 9.0], dtype=torch.float64)
    wanted = QuadraticEnergy().energy(P).sum((-2, -1)) / norm
    torch.testing.assert_close(energy.energy(P, norm), wanted, rtol=1e-12, atol=0)
    torch.testing.assert_close(energy.velocity(P, norm), P / norm[:, None, None], rtol=1e-12, atol=0)


def test_the_energy_has_the_value_of_its_polynomial():
    # k(s) = a s^2 / 2 + b s^4 / 4 + c s^6 / 6 at singular values 3 and 0.5 over the norm 4, by hand
    a, b, c = 2.0, -1.5, 0.75
    P, norm = torch.diag(torch.tensor([3.0, -0.5], dtype=torch.float64)), torch.tensor(4.0, dtype=torch.float64)
    wanted = 4 * sum(a * s**2 / 2 + b * s**4 / 4 + c * s**6 / 6 for s in (0.75, 0.125))
    assert SpectralEnergy([(a, b, c)]).energy(P, norm).item() == pytest.approx(wanted, rel=1e-13)


@pytest.mark.parametrize("energy", [QuadraticEnergy(), RelativisticEnergy(0.3), RelativisticEnergy(7.0, learned=True)])
def test_the_velocity_of_coordinates_is_the_gradient_of_their_energy(energy):
    p = torch.cat((normal(40) * 3, torch.tensor([0.0, 1e-9, -1e9], dtype=torch.float64)))
    (gradient,) = gradient_of(energy.energy, p)
    assert energy.energy(p).shape == p.shape
    torch.testing.assert_close(gradient, energy.velocity(p), rtol=1e-12, atol=0)


def test_the_relativistic_energy_keeps_its_digits_at_small_momenta():
    p = torch.tensor([1e-5, 1e-12], dtype=torch.float64)
    torch.testing.assert_close(RelativisticEnergy(2.0).energy(p), p**2 / 2, rtol=1e-10, atol=0)


def test_a_learned_speed_limit_starts_at_the_given_one_and_stays_positive():
    energy = RelativisticEnergy(0.4, learned=True)
    assert energy.c.item() == pytest.approx(0.4)
    for raw in (-1e6, -3.0, 3.0, 1e6):
        energy.raw.data.fill_(raw)
        assert 0 < energy.c.item() < math.inf
    (gradient,) = torch.autograd.grad(energy.energy(torch.ones(3)).sum(), energy.raw)
    assert gradient.isfinite()


# ---- passivity ----


@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize("seed", range(4))
def test_the_slope_of_the_energy_is_never_negative(kind, seed):
    energy = spectral(kind, seed)
    s = torch.linspace(0, 1, 20_001, dtype=torch.float64)
    assert (slope(energy, s)[1:] > 0).all()
    for a, b, c in energy.coefficients:
        assert a > 0
        assert c > 0
        assert b * b <= 4 * a * c


def test_the_short_polynomial_brings_its_range_into_a_band_and_leaves_smaller_singular_values_smaller():
    short = slope(spectral("short"), torch.linspace(0.0111, 1.1, 200_001, dtype=torch.float64))
    assert short.min() > 0.65
    assert short.max() < 1.131
    small = torch.tensor([1e-6, 1e-5, 1e-4], dtype=torch.float64)
    torch.testing.assert_close(slope(spectral("short"), small), 6.4761 * 3.8149 * 2.5583 * small, rtol=1e-3, atol=0)


@pytest.mark.parametrize("entry", [1.0, 1 / 3, 0.7])
@pytest.mark.parametrize("shape", [(1, 9), (30, 300), (256, 256), (300, 4608)])
def test_the_short_polynomial_bears_the_roundings_of_bfloat16_where_one_singular_value_is_the_norm(shape, entry):
    found = newton_schulz(torch.full(shape, entry), coefficients=SHORT_COEFFICIENTS, dtype=torch.bfloat16)
    assert 0.6 < torch.linalg.matrix_norm(found, 2) < 1.2


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("scale", [0.3, 3.0, 1e6])
def test_the_slope_of_a_learned_energy_has_the_bound_of_the_given_one_in_float32(seed, scale):
    energy = SpectralEnergy(learned=True)
    energy.raw.data = scale * normal(5, 2, seed=seed, dtype=torch.float32)
    values = slope(energy, torch.linspace(0, 1, 20_001))
    assert values.min() >= 0
    assert 0.5 < values.max() < 1.2025


@pytest.mark.parametrize("given", [MUON_COEFFICIENTS[:3], ((3.0, -0.9, 0.1), (8.28, -23.5, 17.3), (2.0, 1.0, 0.5))])
@pytest.mark.parametrize("seed", range(3))
def test_every_factor_keeps_its_maximum_on_the_range_of_its_input(given, seed):
    energy = SpectralEnergy(given, learned=True).double()
    energy.raw.data = 2 * normal(3, 2, seed=seed)
    domain = 1.0
    for (a, b, c), (a0, b0, c0) in zip(energy.coefficients.tolist(), given, strict=True):
        s = torch.linspace(0, domain, 100_001, dtype=torch.float64)
        maximum = (a0 * s + b0 * s**3 + c0 * s**5).max().item()
        # the weights are held in float32
        assert (a * s + b * s**3 + c * s**5).max().item() == pytest.approx(maximum, rel=1e-5)
        domain = maximum


def test_a_learned_energy_starts_at_the_given_coefficients_and_changes_with_its_weights():
    given = ((3.0, -4.0, 2.0), (1.9, -1.3, 0.4))
    energy = SpectralEnergy(given, learned=True)
    torch.testing.assert_close(energy.coefficients, torch.tensor(given), rtol=1e-5, atol=0)
    P = normal(4, 6, dtype=torch.float32)
    norm = frobenius_norm(P)
    for output in (energy.energy(P, norm), energy.velocity(P, norm).square().sum()):
        (gradient,) = torch.autograd.grad(output, energy.raw)
        assert (gradient != 0).all()


@pytest.mark.parametrize("kind", SPECTRAL)
def test_energies_of_matrices_are_least_at_zero(kind):
    energy = spectral(kind)
    P = normal(200, 3, 5) * torch.logspace(-3, 0, 200, dtype=torch.float64)[:, None, None]
    norm = torch.full((200,), 15.0, dtype=torch.float64)
    assert (energy.energy(P, norm) > 0).all()
    assert (energy.energy(torch.zeros_like(P), norm) == 0).all()
    assert (energy.velocity(torch.zeros_like(P), norm) == 0).all()


@pytest.mark.parametrize("energy", [QuadraticEnergy(), RelativisticEnergy(0.3)])
def test_energies_of_coordinates_are_least_at_zero(energy):
    p = normal(200) * torch.logspace(-6, 6, 200, dtype=torch.float64)
    assert (energy.energy(p) > 0).all()
    assert (energy.velocity(p) * p > 0).all()
    zero = torch.zeros(2)
    assert (energy.energy(zero) == 0).all()
    assert (energy.velocity(zero) == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", SPECTRAL)
def test_the_power_balance_of_a_spectral_mode_closes(kind, shape):
    energy = spectral(kind)
    P, u = normal(*shape, seed=5), normal(*shape, seed=6)
    batch = shape[:-2]
    friction, gain = normal(*batch, seed=7).abs(), normal(*batch, seed=8)
    balance = spectral_power_balance(P, u, friction, gain, energy, 1.3 * frobenius_norm(P))
    assert all(power.shape == batch for power in balance)
    size = balance.dissipated.abs() + balance.supplied.abs() + balance.energy_rate.abs()
    assert (balance.residual.abs() <= ROUNDING * size).all()
    assert (balance.dissipated >= 0).all()


def test_the_power_balance_is_mapped_and_evaluated_without_gradients():
    energy = spectral("learned")
    P, u, norm = normal(3, 4, 5, seed=5), normal(3, 4, 5, seed=6), torch.full((3,), 9.0, dtype=torch.float64)
    with torch.no_grad():
        wanted = spectral_power_balance(P, u, 0.2, -1.5, energy, norm)
        mapped = torch.vmap(lambda P, u, norm: spectral_power_balance(P, u, 0.2, -1.5, energy, norm))(P, u, norm)
    for found, power in zip(mapped, wanted, strict=True):
        torch.testing.assert_close(found, power, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("kind", [*SPECTRAL, "quadratic", "relativistic"])
def test_the_energy_never_rises_without_input(kind):
    # dP/dt = -phi P has the exact solution exp(-phi t) P(0)
    decay = torch.exp(-0.2 * torch.arange(60, dtype=torch.float64))[:, None, None]
    path = decay * normal(4, 6)
    if kind in SPECTRAL:
        norm = frobenius_norm(path[0]).expand(60)
        energies = spectral(kind).energy(path, norm)
    else:
        energies = (QuadraticEnergy() if kind == "quadratic" else RelativisticEnergy(0.1)).energy(path)
    assert (energies.diff(dim=0) < 0).all()


def quadratic(theta):
    return 0.5 * (normal(4, 3, seed=11) @ theta - normal(4, 5, seed=12)).square().sum((-2, -1))


def nonlinear(theta):
    return (normal(4, 3, seed=11) @ theta.tanh() - normal(4, 5, seed=12)).cosh().log().sum((-2, -1)) + theta.cos().mean(
        (-2, -1)
    )


def descent(energy, loss, *, has_gain_in_output):
    """Rises of W = loss + (kappa / s) K along held flows, s and kappa one number per tensor; the largest per system."""
    n = 12
    theta, P = normal(n, 3, 5, seed=1), 0.3 * normal(n, 3, 5, seed=2)
    phi, s, kappa, g = (normal(n, 1, 1, seed=seed).abs() + 0.2 for seed in (3, 4, 5, 6))
    g = g * torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 2)[:, None, None]
    gradient = torch.func.grad(lambda theta: loss(theta).sum())
    norm = 3 * s * g.abs() * frobenius_norm(gradient(theta))[:, None, None] / phi + 10
    kappa = 0.1 * kappa

    def field(t, x):
        theta, P = x
        v = energy.velocity(P, norm)
        return kappa * (g if has_gain_in_output else 1.0) * v, -phi * P - g * s * gradient(theta)

    with torch.no_grad():
        solution = integrate(field, (theta, P), torch.linspace(0, 2, 41), options={"step_size": 0.01})
    W = [
        loss(theta) + (kappa / s).flatten() * energy.energy(P, norm) for theta, P in zip(*solution.states, strict=True)
    ]
    return torch.stack(W).diff(dim=0).amax(0)


@pytest.mark.parametrize("loss", [quadratic, nonlinear])
@pytest.mark.parametrize("kind", ["muon", "learned"])
def test_loss_plus_scaled_energy_never_rises_along_the_held_flow(kind, loss):
    rises = descent(spectral(kind), loss, has_gain_in_output=True)
    # rk4 at steps of .01 leaves no rise beyond rounding: W falls everywhere
    assert (rises <= 0).all()


@pytest.mark.parametrize("loss", [quadratic, nonlinear])
def test_the_descent_needs_the_gain_in_the_output(loss):
    rises = descent(spectral("muon"), loss, has_gain_in_output=False)
    assert (rises > 1e-3).sum() >= 4


@pytest.mark.parametrize("loss", [quadratic, nonlinear])
@pytest.mark.parametrize("kind", ["quadratic", "relativistic"])
def test_with_decoupled_decay_the_sum_with_the_conjugate_never_rises_and_the_one_without_does(kind, loss):
    """docs/theory.md, weight decay: convex energies K with their conjugates K*, in closed form."""
    c, decay, s = 0.8, 0.4, 2.0
    energy = QuadraticEnergy() if kind == "quadratic" else RelativisticEnergy(c)
    conjugates = {
        "quadratic": lambda Z: 0.5 * Z.square().sum((-2, -1)),
        "relativistic": lambda Z: c * (c - (c**2 - Z.square()).sqrt()).sum((-2, -1)),
    }
    phi, kappa, g = (normal(12, 1, 1, seed=seed).abs() + 0.5 for seed in (3, 4, 5))
    theta, P = 0.5 * normal(12, 3, 5, seed=1).tanh(), 0.3 * normal(12, 3, 5, seed=2)
    gradient = torch.func.grad(lambda theta: loss(theta).sum())

    def field(t, x):
        theta, P = x
        return kappa * (g * energy.velocity(P) - decay * theta), -phi * P - g / s * gradient(theta)

    with torch.no_grad():
        solution = integrate(field, (theta, P), torch.linspace(0, 4, 81), options={"step_size": 0.01})
    thetas, momenta = solution.states
    Z, stored = decay * thetas / g, energy.energy(momenta).sum((-2, -1))
    gap = stored - (momenta * Z).sum((-2, -1)) + conjugates[kind](Z)
    phi, kappa = phi.flatten(), kappa.flatten()
    with_conjugate = loss(thetas) + s * phi / decay * conjugates[kind](Z) + kappa * s * gap
    # rk4 at steps of .01 leaves a relative error far below the rounding of float32
    assert (with_conjugate.diff(dim=0) <= 1e-9).all()
    assert (with_conjugate[0] - with_conjugate[-1] > 1e-2).all()
    assert ((loss(thetas) + kappa * s * stored).diff(dim=0) > 1e-4).any()


# ---- the optimizers that they are ----


def test_a_system_of_unit_mass_has_the_quadratic_energy():
    p = normal(5, 3)
    system, energy = PortHamiltonianSystem(3), QuadraticEnergy()
    torch.testing.assert_close(system.energy(PhaseState(None, p)), energy.energy(p).sum(-1))
    assert torch.equal(system.energy_gradient(PhaseState(None, p)).p, energy.velocity(p))


def trained(optimizer_of, shape=(4, 6), n_steps=8, dtype=torch.float64):
    """Parameters after some steps on a fixed loss, ``optimizer_of(parameter)`` being a torch optimizer or a rule."""
    theta = normal(*shape, seed=1, dtype=dtype).requires_grad_()
    target, step = normal(*shape, seed=2, dtype=dtype), optimizer_of(theta)
    for _ in range(n_steps):
        loss = (theta - target).square().sum() + theta.sin().sum()
        (theta.grad,) = torch.autograd.grad(loss, theta)
        with torch.no_grad():
            step()
    return theta.detach()


def momentum_rule(velocity, phi, gain, kappa):
    """Step of a mode with the effort held: the momentum's equation solved exactly, the output at the end point."""

    def rule(theta):
        P = torch.zeros_like(theta)

        def step():
            P.mul_(math.exp(-phi)).add_(theta.grad, alpha=gain * math.expm1(-phi) / phi)
            theta.add_(velocity(P), alpha=kappa * gain)

        return step

    return rule


def test_the_quadratic_energy_is_heavy_ball():
    phi, gain, kappa = 0.2, 0.7, 0.05
    lr = kappa * gain**2 * -math.expm1(-phi) / phi
    wanted = trained(lambda theta: torch.optim.SGD([theta], lr=lr, momentum=math.exp(-phi)).step)
    found = trained(momentum_rule(QuadraticEnergy().velocity, phi, gain, kappa))
    torch.testing.assert_close(found, wanted, rtol=1e-13, atol=1e-13)


def sign_momentum(lr, momentum):
    def rule(theta):
        buffer = torch.zeros_like(theta)

        def step():
            buffer.mul_(momentum).add_(theta.grad)
            theta.sub_(buffer.sign(), alpha=lr)

        return step

    return rule


def test_the_relativistic_energy_has_sign_momentum_as_its_limit():
    phi, gain, lr = 0.2, 0.7, 0.03
    wanted = trained(sign_momentum(lr, math.exp(-phi)))
    errors = []
    for c in (1e-1, 1e-2, 1e-3, 1e-100):
        found = trained(momentum_rule(RelativisticEnergy(c).velocity, phi, gain, lr / (gain * c)))
        errors.append((found - wanted).abs().max().item())
    # the distance to sign momentum is of order c^2 where no momentum is near zero
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[3] <= 1e-13


def test_the_velocity_of_a_relativistic_energy_is_bounded_by_its_speed_limit():
    p = normal(50) * torch.logspace(-200, 200, 50, dtype=torch.float64)
    velocity = RelativisticEnergy(0.25).velocity(p)
    assert (velocity.abs() <= 0.25).all()
    assert (velocity.abs() > 0).all()
    small = p.abs() < 1e-9
    torch.testing.assert_close(velocity[small], p[small], rtol=1e-14, atol=0)


requires_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")


@requires_muon
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (64, 64), (33, 120), (120, 33), (1, 8)])
@pytest.mark.parametrize("scale", [1.0, 3e-5, 7e4])
def test_newton_schulz_is_the_orthogonalisation_of_muon_in_bfloat16(shape, scale):
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = scale * normal(*shape, dtype=torch.float32)
    wanted = _zeropower_via_newtonschulz(x, MUON_COEFFICIENTS[0], len(MUON_COEFFICIENTS), 1e-30)
    x = x.bfloat16()
    assert torch.equal(newton_schulz(x), wanted)
    assert torch.equal(SpectralEnergy().velocity(x, frobenius_norm(x)), wanted)


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (2, 3, 8, 4)])
def test_products_of_newton_schulz_are_of_the_type_that_is_asked_for(shape, given):
    x = normal(*shape, dtype=torch.float32)
    norm = frobenius_norm(x)
    found = newton_schulz(x, norm if given else None, dtype=torch.bfloat16)
    unit = (x / norm[..., None, None]).bfloat16()
    wanted = newton_schulz(unit, torch.ones(shape[:-2]))
    assert wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted.float(), rtol=0, atol=0 if given else 0.05)
    assert 0 < (found - newton_schulz(x)).norm() < 0.05 * found.norm()
    assert torch.equal(newton_schulz(x, dtype=torch.float32), newton_schulz(x))


@requires_muon
@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_the_spectral_energy_at_the_end_point_is_muon(shape):
    lr, momentum, energy = 0.02, 0.9, SpectralEnergy()

    def rule(theta):
        P = torch.zeros_like(theta)

        def step():
            P.lerp_(-theta.grad, 1 - momentum)
            half = P.bfloat16()
            theta.add_(energy.velocity(half, frobenius_norm(half)), alpha=lr * max(1, shape[0] / shape[1]) ** 0.5)

        return step

    wanted = trained(
        lambda theta: torch.optim.Muon([theta], lr=lr, weight_decay=0.0, momentum=momentum, nesterov=False).step,
        shape,
        dtype=torch.float32,
    )
    assert torch.equal(trained(rule, shape, dtype=torch.float32), wanted)


# ---- Newton-Schulz iterations ----


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_acts_on_singular_values(shape):
    x = normal(*shape)
    U, sigma, Vh = torch.linalg.svd(x, full_matrices=False)
    for norm in (None, 3.0 * frobenius_norm(x)):
        s = sigma / (x.norm(dim=(-2, -1)) if norm is None else norm).unsqueeze(-1)
        wanted = U @ torch.diag_embed(slope(SpectralEnergy(), s)) @ Vh
        torch.testing.assert_close(newton_schulz(x, norm), wanted, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("coefficients", [MUON_COEFFICIENTS, torch.tensor(MUON_COEFFICIENTS, dtype=torch.float64)])
def test_a_batch_is_a_loop_is_a_map(shape, coefficients):
    x = normal(2, 3, *shape) * torch.logspace(-8, 8, 6, dtype=torch.float64).view(2, 3, *[1] * len(shape))
    norm = 1.5 * frobenius_norm(x)
    for norms in (None, norm, norm[..., None, None]):
        found = newton_schulz(x, norms, coefficients)
        assert found.shape == x.shape
        for i in range(2):
            for j in range(3):
                one = newton_schulz(x[i, j], None if norms is None else norms[i, j], coefficients)
                torch.testing.assert_close(found[i, j], one, rtol=ROUNDING, atol=ROUNDING)
    mapped = torch.vmap(torch.vmap(lambda x, norm: newton_schulz(x, norm, coefficients)))(x, norm)
    torch.testing.assert_close(mapped, newton_schulz(x, norm, coefficients), rtol=ROUNDING, atol=ROUNDING)
    mapped = torch.vmap(lambda x: newton_schulz(x, None, coefficients))(x)
    torch.testing.assert_close(mapped, newton_schulz(x, None, coefficients), rtol=ROUNDING, atol=ROUNDING)


def test_newton_schulz_leaves_no_products_too_small_to_be_normal():
    x = torch.randn(6, 9)
    x[2] *= 1e-17
    seen = newton_schulz(x.requires_grad_())  # where a gradient is recorded, every entry counts
    assert 0 < seen[2].abs().max() < 1e-13
    with torch.no_grad():
        found = newton_schulz(x)
    assert found[2].count_nonzero() == 0
    torch.testing.assert_close(found, seen.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("shape", SHAPES)
def test_newton_schulz_commutes_with_transposition(shape):
    x = normal(*shape)
    torch.testing.assert_close(newton_schulz(x.mT), newton_schulz(x).mT, rtol=ROUNDING, atol=ROUNDING)


@pytest.mark.parametrize(
    ("dtype", "exponents"),
    [
        (torch.float64, (-1000, -500, 3, 900)),
        (torch.float32, (-120, -70, 3, 120)),
        (torch.bfloat16, (-120, -70, 3, 120)),
        (torch.float16, (-10, 3, 12)),
    ],
)
@pytest.mark.parametrize("shape", SHAPES)
def test_powers_of_two_change_nothing_to_the_bit(dtype, exponents, shape):
    # Entries of at least .25, so that none becomes subnormal.
    x = normal(*shape)
    x = (x + 0.25 * x.sign()).to(dtype)
    wanted = newton_schulz(x)
    assert wanted.dtype == dtype
    assert wanted.isfinite().all()
    for exponent in exponents:
        scaled = x * 2.0**exponent
        assert torch.equal(newton_schulz(scaled), wanted)
        exact = frobenius_norm(x).double() * 2.0**exponent
        if exact.max() < torch.finfo(dtype).max:
            assert torch.equal(frobenius_norm(scaled).double(), exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("learned", [False, True])
def test_the_type_of_the_matrix_is_kept_beside_norms_and_weights_of_another(dtype, learned):
    energy = SpectralEnergy(learned=learned)
    x, norm = normal(2, 3, 4, dtype=dtype), torch.tensor([4.0, 5.0])
    velocity = energy.velocity(x, norm)
    assert velocity.dtype == dtype
    assert energy.energy(x, norm).dtype == dtype
    exact = SpectralEnergy().velocity(x.double(), norm)
    # five factors of bfloat16 magnify its rounding of .004 by the slope of the composition
    tolerance = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(velocity.double(), exact, rtol=0, atol=tolerance)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("given", [False, True])
def test_zero_matrices_give_zeros_with_finite_derivatives_beside_others(shape, given):
    x = torch.stack((torch.zeros(shape, dtype=torch.float64), normal(*shape))).requires_grad_()
    norm = frobenius_norm(x)
    assert (norm[0] == 0).all()
    velocity = newton_schulz(x, norm if given else None)
    assert (velocity[0] == 0).all()
    assert (velocity[1] != 0).any()
    (first,) = torch.autograd.grad(velocity.sum() + velocity.square().sum() + norm.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum() + first.square().sum(), x)
    for derivative in (first, second):
        assert derivative.isfinite().all()
        assert (derivative[0] == 0).all()
    if given:
        energy = SpectralEnergy().energy(x, frobenius_norm(x))
        (first,) = torch.autograd.grad(energy.sum(), x)
        assert (energy[0] == 0).all()
        assert first.isfinite().all()
        assert (first[0] == 0).all()


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (2, 0, 3), (0, 2, 3), (2, 0, 2, 3)])
def test_empty_tensors_stay_empty(shape):
    x = torch.empty(shape)
    assert newton_schulz(x).shape == x.shape
    assert newton_schulz(x, frobenius_norm(x)).shape == x.shape
    assert SpectralEnergy().energy(x, frobenius_norm(x)).shape == shape[:-2]


@pytest.mark.parametrize("shape", [(2, 3), (3, 2), (2, 2, 3)])
def test_first_and_second_derivatives(shape):
    # Two factors: the second derivatives of five are too large for finite differences.
    coefficients = torch.tensor(MUON_COEFFICIENTS[:2], dtype=torch.float64)
    x, norm = normal(*shape), 1.2 * frobenius_norm(normal(*shape))
    inputs = [tensor.detach().requires_grad_() for tensor in (x, norm, coefficients)]
    fixed = MUON_COEFFICIENTS[:2]
    for function, arguments in (
        (newton_schulz, inputs),
        (lambda x: newton_schulz(x, None, fixed), inputs[:1]),
        (lambda x, norm: newton_schulz(x, norm, fixed), inputs[:2]),
        (frobenius_norm, inputs[:1]),
    ):
        assert torch.autograd.gradcheck(function, arguments)
        assert torch.autograd.gradgradcheck(function, arguments)


def test_derivatives_of_a_learned_energy_with_respect_to_its_weights():
    energy = SpectralEnergy(MUON_COEFFICIENTS[:2], learned=True).double()
    P = normal(3, 4)
    norm = frobenius_norm(P)

    def both(raw):
        return torch.func.functional_call(_Both(energy), {"energy.raw": raw}, (P, norm))

    raw = normal(2, 2, seed=4).requires_grad_()
    assert torch.autograd.gradcheck(both, (raw,))
    assert torch.autograd.gradgradcheck(both, (raw,))


class _Both(torch.nn.Module):
    def __init__(self, energy):
        super().__init__()
        self.energy = energy

    def forward(self, P, norm):
        return self.energy.energy(P, norm), self.energy.velocity(P, norm)


# ---- bad input ----

MATRIX, NUMBER = torch.ones(2, 3, 4), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: newton_schulz(torch.ones(3)), r"`x` should be a floating-point tensor .* Found shape \(3,\)"),
        (lambda: newton_schulz(torch.ones(3, 3, dtype=torch.long)), "Found shape .* of type torch.int64"),
        (lambda: newton_schulz(MATRIX, torch.ones(3)), r"`norm` should have shape \(2,\) or \(2, 1, 1\)"),
        (lambda: newton_schulz(MATRIX, torch.ones(())), r"Found `norm.shape = \(\)`"),
        (lambda: newton_schulz(MATRIX, NUMBER, ()), r"`coefficients` should be triples .* Found `coefficients = \(\)`"),
        (lambda: newton_schulz(MATRIX, NUMBER, [(1.0, 2.0)]), "`coefficients` should be triples"),
        (lambda: newton_schulz(MATRIX, NUMBER, (1.0, 2.0, 3.0)), "`coefficients` should be triples"),
        (lambda: newton_schulz(MATRIX, NUMBER, torch.ones(3)), "`coefficients` should be triples"),
        (lambda: newton_schulz(MATRIX, dtype=torch.int32), "`dtype` should be a floating-point type, or None. Found"),
        (lambda: newton_schulz(MATRIX, dtype="bfloat16"), "`dtype` should be a floating-point type, or None. Found"),
        (lambda: frobenius_norm(torch.ones(3)), "`x` should be a floating-point tensor"),
        (lambda: SpectralEnergy().energy(torch.ones(3), torch.ones(())), "`p` should be a floating-point tensor"),
        (lambda: SpectralEnergy().energy(MATRIX, torch.ones(2, 1)), r"Found `norm.shape = \(2, 1\)`"),
        (lambda: SpectralEnergy([(1.5, -0.5, 0.0)]), r"a, c > 0 and b\^2 <= 4 a c. Found .*\(1.5, -0.5, 0.0\)"),
        (lambda: SpectralEnergy([(-1.0, 0.0, 1.0)]), "a, c > 0"),
        (lambda: SpectralEnergy([(1.0, 2.1, 1.0)]), r"b\^2 <= 4 a c"),
        (
            lambda: SpectralEnergy([(1.0, -2.0, 1.0)], learned=True),
            r"b\^2 <= 3.992 a c. Found `coefficients = \(1.0, -2.0, 1.0\)`",
        ),
        (lambda: RelativisticEnergy(0.0), "`c` should be a positive number. Found `c = 0.0`"),
        (lambda: RelativisticEnergy(math.inf), "`c` should be a positive number"),
        (
            lambda: spectral_power_balance(MATRIX, MATRIX[0], 1.0, 1.0, SpectralEnergy(), NUMBER),
            "`u.shape` should be that of",
        ),
        (
            lambda: spectral_power_balance(MATRIX, MATRIX, MATRIX, 1.0, SpectralEnergy(), NUMBER),
            "`friction.shape` should be",
        ),
        (
            lambda: spectral_power_balance(MATRIX, MATRIX, 1.0, MATRIX, SpectralEnergy(), NUMBER),
            "`gain.shape` should be",
        ),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_fixed_energy_may_touch_zero():
    assert SpectralEnergy([(1.0, -2.0, 1.0)]).velocity(torch.ones(1, 1), torch.ones(())).item() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_learned_factors_are_passive_for_any_weights_in_any_type(dtype):
    energy = SpectralEnergy(learned=True)
    for seed in range(100):
        with torch.no_grad():
            energy.raw.copy_(10 * torch.randn(energy.raw.shape, generator=torch.Generator().manual_seed(seed)))
        a, b, c = copy.deepcopy(energy).to(dtype).coefficients.double().unbind(-1)
        assert (b.square() < 4 * a * c).all()
    moved = copy.deepcopy(energy).to(dtype).double()  # nothing of the start is lost on the way
    assert torch.equal(moved._start, copy.deepcopy(energy).double()._start)
