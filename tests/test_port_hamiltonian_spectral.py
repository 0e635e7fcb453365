"""The port-Hamiltonian rule on matrices: spectral and relativistic energies, their balance, scales and schedule."""

import copy
import itertools
import json
import math

import pytest
import torch
from rule_toys import draws, port_hamiltonian, run
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from odeopt.artifacts import load, save
from odeopt.ode import integrate
from odeopt.optimizer import LearnedOptimizer
from odeopt.physics import RelativisticEnergy, SpectralEnergy, frobenius_norm, newton_schulz
from odeopt.rules import PortHamiltonianUpdate
from odeopt.rules.port_hamiltonian import kinetic as energies

f32, f64 = torch.float32, torch.float64
TOLD = {"schedule": "power", "uses_progress": True, "memory": 2}
VARIANTS = {
    "spectral": {"kinetic": "spectral"},
    "with quadratic": {"kinetic": ("quadratic", "spectral"), "initial_lookahead": 1.7},
    "with relativistic": {"kinetic": ("spectral", "relativistic"), "speed_limit": 0.3, "initial_decay": 0.1},
    "all": {"kinetic": ("relativistic", "spectral", "quadratic"), "modes": 3, "matrix_scale": "muon", **TOLD},
    "constants": {"kinetic": ("spectral", "quadratic"), "friction": "constant", "port": "constant"},
    "efforts by coordinates": {"kinetic": "spectral", "matrix_normalization": "coordinate", **TOLD},
    "rows": {"kinetic": "spectral", "row_power": 0.5, "initial_coherence": 0.5},
    "rows beside relativistic": {"kinetic": ("relativistic", "spectral"), "row_power": 1.0, "speed_limit": 0.3},
    "output": {"output": "spectral", "initial_decay": 0.1, **TOLD},
    "short": {"kinetic": ("spectral", "quadratic"), "matrix_polynomial": "short"},
    "learned": {"kinetic": ("quadratic", "spectral"), "matrix_polynomial": "learned"},
}
WITH_ROWS, NO_EXTRAS = ["rows", "rows beside relativistic"], {"initial_decay": 0.0, "initial_coherence": 0.0}
WITH_ENERGY = [name for name in VARIANTS if name != "output"]
MATRICES = [(3, 5), (5, 3), (1, 4), (4, 1), (3, 2, 2, 1)]
OTHERS = [(7,), (1, 3, 4), (1, 1), ()]
GAIN, FRICTION = 0.35, 0.1  # of the first mode of the untrained rule
MOMENTUM = math.exp(-FRICTION)

over_variants = pytest.mark.parametrize("variant", VARIANTS)


def spectral(variant, **options):
    return port_hamiltonian(**(VARIANTS[variant] | options))


def n_of(shape):
    return math.prod(shape)


def some_state(rule, shape, *batch, seed=0):
    """State after a few gradients, its momenta of order one."""
    n = n_of(shape)
    _, state = run(rule, draws(3, *batch, n, seed=seed), shape=shape)
    return state._replace(p=draws(*state.p.shape, seed=seed + 1))


# -------------------- which tensors are matrices


@pytest.mark.parametrize("shape", MATRICES + OTHERS)
def test_matrices_are_stepped_whole_and_tables_never(shape):
    rule = spectral("with quadratic")
    assert rule.is_whole(shape) == (shape in MATRICES)
    assert not rule.for_tables().is_whole(shape)
    assert not port_hamiltonian().is_whole(shape)
    assert not rule.is_whole(None)


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (3, 9), (9, 3), (2, 3, 4), (4, 3, 1)])
def test_narrow_matrices_are_stepped_by_coordinates_and_count_in_the_depth(shape):
    """A gradient of the hundredth size in one column is made up for, as it is in a vector."""
    rule = PortHamiltonianUpdate(kinetic="spectral", narrow=3, friction="constant", port="constant")
    assert rule.is_matrix(shape)
    assert not rule.is_whole(shape)
    assert rule.is_whole((4, 5))
    assert rule.is_whole((4, 5, 1))
    grad = torch.ones(shape)
    grad[:, 0] = 0.01
    state = rule.init_state(torch.zeros(shape).flatten())
    for _ in range(2):
        update, state = rule(grad.flatten(), state, param=torch.zeros(grad.numel()), shape=shape)
    update = update.view(shape)
    torch.testing.assert_close(update[:, 0].mean(), update[:, -1].mean(), rtol=0.1, atol=0)


def test_rule_for_tables_shares_the_weights_and_steps_by_coordinates():
    rule = spectral("spectral")
    tables, grads = rule.for_tables(), draws(3, 12, seed=1)
    assert all(a is b for a, b in zip(rule.parameters(), tables.parameters(), strict=True))
    updates, state = run(tables, grads, shape=(4, 3))
    assert (updates - run(rule, grads, shape=(4, 3))[0]).abs().max() > 1e-4
    # by coordinates: what a row does depends on other rows through sums only, so rows can be exchanged
    order = torch.tensor([2, 0, 3, 1])
    swapped = grads.view(3, 4, 3)[:, order].flatten(1)
    torch.testing.assert_close(run(tables, swapped, shape=(4, 3))[0], updates.view(3, 4, 3)[:, order].flatten(1))
    assert state.second_moment.min() > 0


# -------------------- the step as its formula


def gains_of_rows(rule, p, shape):
    """Factor on the gain of each coordinate of a matrix in spectral modes, and one in others, ``(modes, n)``."""
    rows = p[rule.spectral_modes].unflatten(-1, (shape[0], -1)).transpose(0, 1).flatten(1).norm(dim=1)
    gains = (rows**2 / (rows**2).mean() + 1e-4) ** (-rule.row_power / 2)
    weight = rows**2 / (rows**2 + 1e-4 * (rows**2).mean())
    gains = gains / ((weight * gains**2).sum() / weight.sum()).sqrt()
    gains = gains[:, None].expand(shape[0], n_of(shape) // shape[0]).flatten()
    return torch.stack([gains if kinetic == "spectral" else torch.ones_like(gains) for kinetic in rule.kinetic])


def held(rule, grad, state, shape):
    """Friction, gain and step size of each mode, ``(modes, n)`` or broadcast, and the divisor of the gradient."""
    _, shared = rule._prepare(grad, state, None, shape, None)
    friction, gain = rule._matrix_modulation(rule.observe(grad, state, shared, True), state, shared)
    # one number per tensor: elementwise ones would leave the sign of the dissipated power open
    spectral_modes = rule.spectral_modes
    assert all(torch.equal(x, x[:, :1].expand_as(x)) for x in (friction[spectral_modes], gain[spectral_modes]))
    gain = gain * gains_of_rows(rule, state.p, shape)
    aspect = shape[0] * shape[0] / n_of(shape)
    scale = math.sqrt(aspect if rule.matrix_scale == "transfer" else max(1.0, aspect))
    kappas = [shared.matrix_kappa * scale / GAIN if k == "spectral" else shared.kappa for k in rule.kinetic]
    return friction, gain, torch.stack(kappas), shared.divisor, shared.lookahead


def factors_of(rule):
    """Coefficients of k'."""
    if rule.matrix_polynomial == "learned":
        return rule.spectral_energy.coefficients
    if rule.matrix_polynomial == "short":
        return [(6.4761, -15.6172, 9.5324), (3.8149, -3.6818, 0.9363), (2.5583, -2.2193, 0.5943)]
    return [(3.4445, -4.7750, 2.0315)] * 5


def velocity(rule, kinetic, p, shape, norm):
    if kinetic == "spectral":
        U, S, V = torch.linalg.svd(p.unflatten(-1, (shape[0], -1)), full_matrices=False)
        s = S / norm
        for a, b, c in factors_of(rule):
            s = a * s + b * s**3 + c * s**5
        return (U * s @ V).flatten()
    return p if kinetic == "quadratic" else 0.3 * p / (p.square() + 0.09).sqrt()


@pytest.mark.parametrize("shape", MATRICES)
@pytest.mark.parametrize("variant", [name for name in WITH_ENERGY if name != "efforts by coordinates"])
def test_step_of_a_matrix_is_the_closed_formula(variant, shape):
    options = {"speed_limit": 0.3} if "relativistic" in VARIANTS[variant]["kinetic"] else {}
    rule = spectral(variant, solver="exponential", **NO_EXTRAS, **options)
    grad, state = draws(n_of(shape), seed=4), some_state(rule, shape)
    update, after = rule(grad, state, shape=shape)
    friction, gain, kappas, divisor, lookahead = held(rule, grad, state, shape)
    limit, decay = -gain * grad / divisor / friction, torch.exp(-friction)
    p = limit + decay * (state.p - limit)
    torch.testing.assert_close(after.p, p)
    wanted = 0.0
    for k, kinetic in enumerate(rule.kinetic):
        integral = (limit + (state.p - limit) * (1 - decay) / friction)[k]
        ahead = state.p[k] + lookahead * (p[k] - state.p[k])
        norm = max(x.norm() for x in (state.p[k], p[k], ahead))
        at = ahead if kinetic == "spectral" else p[k]
        output = integral if kinetic == "quadratic" else velocity(rule, kinetic, at, shape, norm)
        wanted = wanted + kappas[k] * gain[k] * output
    # singular values by another algorithm: a few hundred float64 roundings, times slopes of up to 3.4^5
    torch.testing.assert_close(update, wanted, rtol=1e-9, atol=1e-11)


def test_learned_polynomials_begin_as_muons_are_trained_and_saved(tmp_path):
    options = VARIANTS["spectral"] | {"initial_lookahead": 1.3}
    learned, fixed = (PortHamiltonianUpdate(**options, matrix_polynomial=name) for name in ("learned", "muon"))
    fixed.load_state_dict(learned.state_dict(), strict=False)
    grads = draws(4, 15, seed=7).float()
    torch.testing.assert_close(*(run(rule, grads, shape=(3, 5))[0] for rule in (learned, fixed)))
    weights = learned.spectral_energy.raw
    assert learned.n_parameters() == fixed.n_parameters() + weights.numel()
    (update,) = torch.autograd.grad(run(learned, grads, shape=(3, 5))[0].square().sum(), weights)
    assert (update != 0).all()
    with torch.no_grad():
        weights.add_(update)
    moved = run(learned, grads, shape=(3, 5))[0]
    assert not torch.allclose(moved, run(fixed, grads, shape=(3, 5))[0], rtol=0.01)
    save(learned, tmp_path / "rule.safetensors", trained_for={"horizon": 4, "task": "none"})
    assert torch.equal(run(load(tmp_path / "rule.safetensors"), grads, shape=(3, 5))[0], moved)
    with pytest.raises(ValueError, match=r"`matrix_polynomial` should be 'muon' where no energy is spectral"):
        PortHamiltonianUpdate(matrix_polynomial="learned")


def test_gains_of_rows_fall_with_their_momenta_and_forget_those_at_rest():
    p = torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [5.0, 0.0]], dtype=f64).flatten()
    gains = energies.row_gains(p[None], (4, 2), 0.5).view(4, 2)
    assert torch.equal(gains[:, 0], gains[:, 1])
    moving = gains[[0, 1, 3], 0]
    torch.testing.assert_close(moving.square().mean(), torch.ones((), dtype=f64), rtol=0.01, atol=0)
    torch.testing.assert_close(moving[1] / moving[0], torch.tensor(10**0.5, dtype=f64), rtol=0.01, atol=0)
    assert gains[2, 0] <= 1e-4**-0.25  # bounded, however long a row has been at rest
    assert torch.equal(energies.row_gains(0 * p[None], (4, 2), 0.5), torch.ones(8, dtype=f64))


def test_spectral_output_is_the_orthogonalised_sum_of_the_modes():
    rule, plain = spectral("output", initial_decay=0.0, initial_kappa=1.0), (3, 5)
    grad, state = draws(15, seed=4), some_state(rule, plain)
    update, after = rule(grad, state, shape=plain)
    _, shared = rule._prepare(grad, state, None, plain, None)
    moved, by_coordinates = rule._advance(rule.observe(grad, state, shared, True), state, shared)
    assert torch.equal(after.p, by_coordinates.p)
    wanted = newton_schulz(moved.view(3, 5)) * shared.matrix_kappa * math.sqrt(3 / 5)
    torch.testing.assert_close(update.view(3, 5), wanted)


@pytest.mark.parametrize("shape", [(3, 5), (3, 2, 2, 1)])
@over_variants
def test_axes_of_a_batch_are_matrices_of_their_own(variant, shape):
    rule, grads = spectral(variant), draws(4, 3, 2, n_of(shape), seed=2)
    grads[:, 1, 0] *= 1e-6
    grads[:, 0, 1] = 0.0
    options = {"shape": shape, "progress": torch.tensor(0.3, dtype=f64)}
    updates, state = run(rule, grads, param=grads[0], **options)
    for index in ((0, 0), (1, 0), (0, 1), (2, 1)):
        alone, alone_state = run(rule, grads[(slice(None), *index)], param=grads[(0, *index)], **options)
        torch.testing.assert_close(updates[(slice(None), *index)], alone, rtol=1e-10, atol=1e-13)
        for a, b in zip(state, alone_state, strict=True):
            torch.testing.assert_close(a[index], b, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("variant", ["spectral", "all", "output"])
def test_first_and_second_derivatives_of_a_matrix_step(variant):
    rule, shape = spectral(variant, hidden=(3,)), (2, 3)
    state = some_state(rule, shape)
    weights = tuple(weight.detach().requires_grad_() for weight in rule.parameters())
    names, param = [name for name, _ in rule.named_parameters()], draws(6, seed=8)

    def step(grad, p, *weights):
        signals = {"param": param, "shape": shape}
        swapped = dict(zip(names, weights, strict=True))
        update, after = torch.func.functional_call(rule, swapped, (grad, state._replace(p=p)), signals)
        return update, after.p

    inputs = (draws(6, seed=3).requires_grad_(), state.p.clone().requires_grad_(), *weights)
    assert torch.autograd.gradcheck(step, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(step, inputs, fast_mode=True)


@over_variants
def test_zero_gradients_give_zero_steps_with_finite_derivatives(variant):
    rule = spectral(variant)
    grads = torch.zeros(2, 15, dtype=f64, requires_grad=True)
    updates, _ = run(rule, grads, shape=(3, 5), param=torch.zeros(15, dtype=f64))
    assert torch.equal(updates, torch.zeros_like(updates))
    (first,) = torch.autograd.grad(updates.sum(), grads, create_graph=True)
    second = torch.autograd.grad(first.square().sum(), [grads, *rule.parameters()], allow_unused=True)
    assert all(x.isfinite().all() for x in (first, *second) if x is not None)


@pytest.mark.parametrize("variant", ["with relativistic", "all"])
def test_every_weight_is_trained(variant):
    rule = spectral(variant, initial_decay=0.1, initial_coherence=0.5)
    progress = torch.tensor(0.5, dtype=f64)
    for shape in ((3, 5), (15,)):  # the slopes of spectral modes are those of vectors
        run(rule, draws(4, 15), shape=shape, progress=progress)[0].square().sum().backward()
    for name, weight in rule.named_parameters():
        assert (weight.grad != 0).any(dim=-1).all(), name  # each row: each number that the network emits


# -------------------- the optimizers that it is


def steady(n_steps, n, dtype=f64):
    """Gradients of mean magnitude one, which point about the same way, so that the norm of a momentum grows."""
    grads = draws(1, n, seed=5) + 0.3 * draws(n_steps, n, seed=6)
    return (grads / grads.abs().mean(-1, keepdim=True)).to(dtype)


def theirs(make, grads, shape):
    """Parameters after the steps of an optimizer of torch."""
    param = nn.Parameter(draws(*shape, seed=7).to(grads.dtype))
    optimizer = make([param])
    for grad in grads:
        param.grad = grad.view(shape).clone()
        optimizer.step()
    return param.detach()


def ours(rule, grads, shape, **options):
    return theirs(lambda params: LearnedOptimizer(params, rule, **options), grads, shape)


def muon(nesterov, lr=0.02, **options):
    lookahead = 1 + MOMENTUM if nesterov else 1.0
    fixed = {"friction": "constant", "port": "constant", "solver": "exponential", "matrix_scale": "muon"}
    return PortHamiltonianUpdate(
        modes=1, kinetic="spectral", initial_matrix_kappa=lr, initial_lookahead=lookahead, **fixed, **options
    )


def torch_muon(nesterov, decay=0.0, lr=0.02):
    options = {"lr": lr, "momentum": MOMENTUM, "nesterov": nesterov, "weight_decay": decay}
    return lambda params: torch.optim.Muon(params, **options)


requires_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch.optim.Muon came with torch 2.9")
over_muons = pytest.mark.parametrize("nesterov", [False, True])


@requires_muon
@over_muons
@pytest.mark.parametrize("decay", ["none", "the rule's", "the optimizer's"])
@pytest.mark.parametrize("shape", [(4, 6), (9, 2)])
def test_one_spectral_mode_is_muon(shape, decay, nesterov, monkeypatch):
    # Muon in float64; that its bfloat16 iterations are ours is tested beside them
    iterate = lambda grad, coefficients, n, eps: newton_schulz(grad, coefficients=(coefficients,) * n)  # noqa: E731
    monkeypatch.setattr("torch.optim._muon._zeropower_via_newtonschulz", iterate)
    grads = steady(7, n_of(shape))
    rule = muon(nesterov, initial_decay=0.3 if decay == "the rule's" else 0.0).double()
    found = ours(rule, grads, shape, weight_decay=0.02 * 0.04 if decay == "the optimizer's" else 0.0)
    theirs_decay = {"none": 0.0, "the rule's": 0.3, "the optimizer's": 0.04}[decay]
    wanted = theirs(torch_muon(nesterov, theirs_decay), grads, shape)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-12)


@requires_muon
@over_muons
def test_one_spectral_mode_in_float32_follows_muon_in_bfloat16(nesterov):
    shape, grads = (12, 8), steady(10, 96, f32)
    found, wanted = ours(muon(nesterov), grads, shape), theirs(torch_muon(nesterov), grads, shape)
    moved = wanted - draws(*shape, seed=7).float()
    # each of ten steps is off by the rounding of bfloat16, 2^-8, times the slope of the iterations, some tens at small
    # singular values; the difference of entries averages that over directions
    assert (found - wanted).norm() <= 0.03 * moved.norm()


def test_heavy_ball_is_a_quadratic_mode_and_the_limit_of_a_relativistic_one():
    fixed = {"modes": 1, "friction": "constant", "port": "constant", "normalization": "tensor", "initial_kappa": 0.2}
    grads, shape = steady(8, 11), (11,)
    # Euler's output is that of the momentum before the gradient: the update of a gradient comes a step later
    lr = 0.2 * GAIN**2
    late = torch.cat((torch.zeros_like(grads[:1]), grads[:-1]))
    wanted = theirs(lambda params: torch.optim.SGD(params, lr=lr, momentum=1 - FRICTION), late, shape)
    torch.testing.assert_close(
        ours(PortHamiltonianUpdate(solver="euler", **fixed).double(), grads, shape), wanted, rtol=1e-12, atol=1e-12
    )
    fixed |= {"kinetic": "relativistic", "solver": "exponential"}
    lr *= -math.expm1(-FRICTION) / FRICTION
    wanted = theirs(lambda params: torch.optim.SGD(params, lr=lr, momentum=MOMENTUM), grads, shape)
    found = ours(PortHamiltonianUpdate(speed_limit=1e7, **fixed).double(), grads, shape)
    torch.testing.assert_close(found, wanted, rtol=1e-11, atol=1e-11)  # (p / c)^2 / 2 = 1e-13 of a step


def test_sign_momentum_is_the_limit_of_a_relativistic_mode():
    grads, shape, lr = steady(8, 11), (11,), 0.03
    param, buffer = draws(11, seed=7), torch.zeros(11, dtype=f64)
    for grad in grads:
        buffer = MOMENTUM * buffer + grad
        param = param - lr * buffer.sign()
    errors = []
    for c in (1e-2, 1e-3, 1e-60):
        rule = PortHamiltonianUpdate(
            modes=1, kinetic="relativistic", friction="constant", port="constant", solver="exponential",
            normalization="tensor", speed_limit=c, initial_kappa=lr / (GAIN * c),
        )  # fmt: skip
        errors.append((ours(rule.double(), grads, shape) - param).abs().max().item())
    assert errors[0] > 10 * errors[1]  # of order c^2
    assert errors[2] <= 1e-13


# -------------------- energy


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (3, 2, 2, 1), (7,), (1, 3, 4)])
@pytest.mark.parametrize("seed", range(3))
@over_variants
def test_power_balance_closes_and_friction_dissipates_for_any_weights(variant, shape, seed):
    rule = spectral(variant, seed=seed, scale=0.6)
    n = n_of(shape)
    grad, state = draws(2, n, seed=seed + 3), some_state(rule, shape, 2, seed=seed)
    with torch.no_grad():
        rate, dissipated, supplied, residual = rule.power_balance(grad, state, param=draws(2, n), shape=shape)
        energy = rule.energy(state, shape=shape)
    is_whole = rule.is_whole(shape) and rule.output == "sum"
    assert rate.shape == energy.shape == ((2, 1) if is_whole else (2, n))
    magnitude = rate.abs() + dissipated.abs() + supplied.abs()
    # the rate is that of an energy of singular values, by autograd and quadrature: float64 roundings of sums over them
    assert (residual.abs() <= 1e-10 * (1 + magnitude)).all()
    assert dissipated.min() >= 0
    assert energy.min() >= 0
    assert energy.max() > 0


def held_flow(rule, shape, seed):
    """W = loss + sum kappa_k / s K_k along the flow on a loss; what a step holds is held at the rule's values."""
    n, (rows, columns) = n_of(shape), (shape[0], n_of(shape) // shape[0])
    A, target = draws(4, rows, seed=seed), draws(4, columns, seed=seed + 1)

    def loss(theta):
        matrix = theta.unflatten(-1, (rows, columns))
        return (0.5 * (A @ matrix.tanh() - target).square()).sum((-2, -1)) + matrix.cos().mean((-2, -1))

    slope = torch.func.grad(loss)
    theta, state = draws(n, seed=seed + 2), some_state(rule, shape, seed=seed)
    friction, gain, kappas, divisor, _ = held(rule, slope(theta), state, shape)
    energies = {"relativistic": RelativisticEnergy(0.3), "spectral": rule.spectral_energy}
    # bounds that the driven momenta keep
    norms = 10 * frobenius_norm((state.p.abs() + (slope(theta) / divisor).abs()).unflatten(-1, (rows, columns)))

    def velocity_and_energy(k, p):
        kinetic = rule.kinetic[k]
        if kinetic == "spectral":
            p, norm = p.unflatten(-1, (rows, columns)), norms[k].expand(p.shape[:-1])
            return energies[kinetic].velocity(p, norm).flatten(-2), energies[kinetic].energy(p, norm)
        if kinetic == "quadratic":
            return p, 0.5 * p.square().sum(-1)
        return energies[kinetic].velocity(p), energies[kinetic].energy(p).sum(-1)

    def field(t, x):
        theta, p = x
        velocities = torch.stack([velocity_and_energy(k, p[k])[0] for k in range(rule.modes)])
        return (kappas * gain * velocities).sum(0), -friction * p - gain * slope(theta) / divisor

    with torch.no_grad():
        solution = integrate(field, (theta, state.p), torch.linspace(0, 1, 11, dtype=f64), options={"step_size": 0.02})
        thetas, momenta = solution.states
        stored = sum(kappas[k] * divisor * velocity_and_energy(k, momenta[:, k])[1] for k in range(rule.modes))
        return loss(thetas) + stored


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("variant", ["spectral", "with quadratic", "with relativistic", "all", "learned", *WITH_ROWS])
def test_loss_plus_stored_energy_never_rises_along_the_held_flow(variant, seed):
    options = {"speed_limit": 0.3} if "relativistic" in VARIANTS[variant]["kinetic"] else {}
    W = held_flow(spectral(variant, seed=seed, **options), (3, 5), 10 * seed)
    # rk4 at steps of .02 leaves errors of 1e-7 times the time scale of the flow, which falls by far more
    assert (W.diff() <= 0).all()
    assert W[0] - W[-1] > 1e-3


# -------------------- scales


@pytest.mark.parametrize("exponent", [-40, -3, 7, 50])
@pytest.mark.parametrize("shape", [(4, 6), (5,)])
@over_variants
def test_powers_of_two_change_no_bit_of_the_updates(variant, shape, exponent):
    rule, grads = spectral(variant, dtype=f32), draws(6, n_of(shape), seed=3, dtype=f32)
    options = {"shape": shape, "param": grads[0].clone(), "progress": torch.tensor(0.25)}
    assert torch.equal(run(rule, grads, **options)[0], run(rule, grads * 2.0**exponent, **options)[0])


def test_operator_norm_of_a_step_follows_the_shape():
    def norm(shape, scale):
        rule = PortHamiltonianUpdate(modes=1, kinetic="spectral", initial_matrix_kappa=0.05, matrix_scale=scale)
        (update,), _ = run(rule, draws(1, n_of(shape), dtype=f32), shape=shape)
        return torch.linalg.matrix_norm(update.view(shape[0], -1), 2).item()

    for shape, transfer, as_muon in (((32, 8), 2.0, 2.0), ((8, 32), 0.5, 1.0), ((6, 2, 3, 4), 0.5, 1.0)):
        # singular values end between .68 and 1.21 after the iterations
        assert 0.68 <= norm(shape, "transfer") / (0.05 * transfer) <= 1.21
        assert 0.68 <= norm(shape, "muon") / (0.05 * as_muon) <= 1.21


def changes_of_outputs(width, n_steps, *, has_small_head, **options):
    """Rms of what some steps change in the output of each layer of a perceptron: by its own step alone, and in all."""
    torch.manual_seed(0)
    layers = [nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 4)]
    model, x, y = nn.Sequential(*layers), draws(32, 16, dtype=f32), draws(32, 4, seed=1, dtype=f32)
    if has_small_head:
        nn.init.normal_(layers[4].weight, std=1 / width)
    begun = copy.deepcopy(layers)
    optimizer = LearnedOptimizer(model.parameters(), PortHamiltonianUpdate(**options))
    for _ in range(n_steps):
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    changes, before, after = [], x, x
    with torch.no_grad():
        for old, new in zip(begun, layers, strict=True):
            own, before, after = new(before), old(before), new(after)
            if isinstance(old, nn.Linear):
                changes.append(torch.stack([(z - before).square().mean().sqrt() for z in (own, after)]))
    return torch.stack(changes)


def growth(n_steps, **options):
    """Largest and smallest change at widths 128 and 512, over that at width 32."""
    changes = torch.stack([changes_of_outputs(width, n_steps, **options) for width in (32, 128, 512)])
    ratio = changes[1:] / changes[0]
    return ratio.max(), 1 / ratio.min()


@pytest.mark.parametrize("n_steps", [1, 10])
@pytest.mark.parametrize("options", [{"kinetic": "spectral"}, {"output": "spectral"}], ids=str)
def test_changes_of_a_layers_output_do_not_depend_on_the_width(options, n_steps):
    """Coordinate check, of a head that begins with the operator norm sqrt(out / in) of its steps."""
    assert max(growth(n_steps, has_small_head=True, **options)) <= 1.3


def test_changes_under_steps_by_coordinates_grow_with_the_width():
    assert growth(1, has_small_head=True)[0] > 3


def test_a_layers_own_step_changes_its_output_alike_at_any_width_under_the_default_start():
    # what comes out of the head in all does grow: torch begins it with the operator norm one, so that it passes on what
    # the layers before change along its rows, whatever the steps are
    options = {"has_small_head": False, "kinetic": "spectral"}
    narrow, wide = (changes_of_outputs(width, 1, **options) for width in (32, 900))
    own, total = (wide / narrow).unbind(1)
    assert ((own < 1.3) & (own > 1 / 1.3)).all()
    assert ((total[:2] < 1.3) & (total[:2] > 1 / 1.3)).all()


# -------------------- schedule


def at(rule, progress, shape, **options):
    state = some_state(rule, shape)
    progress = None if progress is None else torch.tensor(progress, dtype=f64)
    return rule(draws(n_of(shape), seed=9), state, shape=shape, progress=progress, **options)[0]


@pytest.mark.parametrize("shape", [(3, 5), (6,)])
@pytest.mark.parametrize("variant", ["all", "output", "efforts by coordinates"])
def test_step_size_is_a_power_of_what_remains_of_the_run(variant, shape):
    untrained = PortHamiltonianUpdate(**VARIANTS[variant]).double()
    start = at(untrained, 0.0, shape)
    for progress in (0.25, 0.5, 0.99):
        torch.testing.assert_close(at(untrained, progress, shape), (1 - progress) * start)
    torch.testing.assert_close(at(untrained, None, shape), start)  # not told, it does not fall
    n_before = (untrained.n_numbers * untrained.modes) + 1 + untrained.memory
    with torch.no_grad():
        untrained.coefficient_network[-1].bias[n_before] = math.log(1.7)
    for progress in (0.25, 0.5, 0.99):
        torch.testing.assert_close(at(untrained, progress, shape), (1 - progress) ** 1.7 * start)


@pytest.mark.parametrize("shape", [(3, 5), (6,)])
def test_step_sizes_fall_with_the_length_of_the_run(shape):
    options = {**VARIANTS["all"], "schedule": "power"}
    plain, rule = (PortHamiltonianUpdate(**options, horizon_power=power).double() for power in (0.0, 0.4))

    def ratio(step, progress):
        state = some_state(plain, shape)
        state = state._replace(step=torch.full_like(state.step, step - 1.0))
        progress = None if progress is None else torch.tensor(progress, dtype=f64)
        updates = [r(draws(n_of(shape), seed=9), state, shape=shape, progress=progress)[0] for r in (rule, plain)]
        quotient = updates[0] / updates[1]
        torch.testing.assert_close(quotient, quotient[:1].expand_as(quotient))
        return quotient[0].item()

    for step, length in [(2, 100), (51, 100), (2, 500), (400, 500), (3001, 10_000)]:
        assert ratio(step, (step - 1) / length) == pytest.approx((length / 500) ** -0.4)
    assert ratio(1, 0.0) == 1.0  # nothing tells the length yet
    assert ratio(2, 0.5) == pytest.approx((30 / 500) ** -0.4)  # a late start: bounded
    # not told, a run counts as long as it has been
    for step in (1, 50, 100):
        assert ratio(step, None) == pytest.approx(0.5 * 0.2**-0.4)
    assert ratio(4000, None) == pytest.approx(0.5 * 8**-0.4)


@pytest.mark.parametrize("options", [{"kinetic": "spectral"}, {"output": "spectral"}], ids=["spectral", "output"])
@pytest.mark.parametrize("progress", [None, torch.tensor(0.3)], ids=["not told", "told"])
@pytest.mark.parametrize(("bound", "onset"), [(16.0, 1.0), (4.0, 1.2), (60.0, 8.0)])
def test_decay_grows_as_gradients_vanish_up_to_its_bound(options, bound, onset, progress):
    growing = {"initial_decay": 0.1, "decay_growth": bound, "decay_onset": onset}
    none, plain, rule = (
        PortHamiltonianUpdate(**options, **decay).double() for decay in ({}, {"initial_decay": 0.1}, growing)
    )

    def wanted(ratio):
        begins = 1.0 if progress is None else onset
        held = 1.5 if ratio < begins else 1.5 * (ratio / begins) ** 2
        return min(max(min(ratio, held), 1.0), bound)

    shape, param = (3, 5), draws(15, seed=3)

    def moves(size, slow_scale):
        grad = size * draws(15, seed=1)
        state = plain.init_state(param)
        state = state._replace(
            scale=grad.abs().mean(-1, keepdim=True),
            slow_scale=torch.full_like(state.scale, slow_scale),
            step=torch.full_like(state.step, 1e6),
        )
        updates, (*_, after) = zip(
            *(r(grad, state, param=param, shape=shape, progress=progress) for r in (none, plain, rule)), strict=True
        )
        assert all(update.isfinite().all() for update in updates)
        return *((update - updates[0]) for update in updates[1:]), (after.slow_scale / after.scale).item()

    for unit in (1.0, 1e-30, 1e30):
        ratios = []
        for times in (0.2, 0.99, 3.0, 10.0, 40.0, 1e5):
            decay, grown, ratio = moves(unit, times * unit * 0.8)
            torch.testing.assert_close(grown, wanted(ratio) * decay)
            ratios.append(ratio)
        assert ratios[0] < 1 < ratios[2] < 8 < ratios[3] < 64 * 8 < ratios[-1]
    decay, grown, _ = moves(0.0, 0.0)  # no gradient yet
    assert torch.equal(grown, decay)
    assert decay.abs().min() > 0
    decay, grown, _ = moves(0.0, 1.0)  # none any more
    torch.testing.assert_close(grown, wanted(math.inf) * decay)


@pytest.mark.parametrize("options", [{"kinetic": "spectral"}, {"output": "spectral"}], ids=["spectral", "output"])
def test_decay_falls_with_the_length_of_runs_beyond_its_horizon(options):
    options = {**options, "schedule": "power", "horizon_power": 0.4}
    none, plain, rule = (
        PortHamiltonianUpdate(**options, **decay).double()
        for decay in ({}, {"initial_decay": 0.1}, {"initial_decay": 0.1, "decay_horizon": 1000.0})
    )
    shape, param, grad = (3, 5), draws(15, seed=3), draws(15, seed=1)

    def ratio(step, progress):
        state = plain.init_state(param)
        state = state._replace(step=torch.full_like(state.step, step - 1.0))
        progress = None if progress is None else torch.tensor(progress, dtype=f64)
        start, *moved = (r(grad, state, param=param, shape=shape, progress=progress)[0] for r in (none, plain, rule))
        decay, fallen = (update - start for update in moved)
        assert decay.abs().min() > 0
        torch.testing.assert_close(fallen * decay.mean(), decay * fallen.mean())
        return (fallen.mean() / decay.mean()).item()

    for step, length in [(2, 100), (2, 1000), (700, 1000), (2, 3000), (1501, 3000), (2, 6000)]:
        assert ratio(step, (step - 1) / length) == pytest.approx(max(max(length / 1000, 1) ** -0.4, 0.7))
    assert ratio(1, 0.0) == pytest.approx(1)  # nothing tells the length yet
    for step in (1, 1000, 2000, 9000):  # not told, a run counts as long as it has been
        assert ratio(step, None) == pytest.approx(max(max(step / 1000, 1) ** -0.4, 0.7))


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("options", [{"kinetic": "spectral"}, {"output": "spectral"}], ids=["spectral", "output"])
def test_decay_bounds_a_matrix_however_large_steps_have_grown(options, implementation):
    grad, norms = draws(4, 6, seed=1).float(), []
    for step_size in (0.1, 1e4):  # of which decay takes a twentieth of the matrix, or all of it
        rule = PortHamiltonianUpdate(**options, initial_decay=0.5, initial_matrix_kappa=step_size)
        param = nn.Parameter(torch.zeros(4, 6))
        optimizer = LearnedOptimizer([param], rule, implementation=implementation)
        for _ in range(400):
            param.grad = grad.clone()
            optimizer.step()
        norms.append(torch.linalg.matrix_norm(param, 2).item())
    assert norms[1] == pytest.approx(norms[0], rel=1e-3)


@pytest.mark.filterwarnings("ignore:.*total_steps:UserWarning")
@pytest.mark.parametrize("variant", ["all", "output"])
def test_a_run_that_is_over_stands_still(variant):
    param = nn.Parameter(draws(3, 5))
    optimizer = LearnedOptimizer([param], PortHamiltonianUpdate(**VARIANTS[variant]).double(), total_steps=4)
    moves = []
    for step in range(7):
        before, param.grad = param.detach().clone(), draws(3, 5, seed=step % 2)
        optimizer.step()
        moves.append((param - before).norm().item())
    assert min(moves[:4]) > 1e-3
    assert max(moves[4:]) <= 1e-5 * max(moves)


def test_under_a_schedule_the_network_sees_the_length_of_the_run_and_not_its_place():
    rule, seen = spectral("efforts by coordinates"), []
    rule.coefficient_network.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][..., 3:5]))
    for total in (7, 100, 5000):
        state = rule.init_state(draws(15))
        for step in range(4):
            progress = torch.tensor(step / total, dtype=f64)
            _, state = rule(draws(15, seed=step), state, shape=(3, 5), progress=progress)
        length = math.tanh(math.log(total / 100) / 4)
        wanted = torch.tensor([[1.0, 0.0], *[[1.0, length]] * 3], dtype=f64)
        torch.testing.assert_close(torch.stack(seen), wanted)
        seen.clear()
    rule(draws(15), state, shape=(3, 5))
    assert torch.equal(seen[0], torch.zeros(2, dtype=f64))


# -------------------- options


@over_variants
def test_artefact_keeps_the_options(variant, tmp_path):
    rule = spectral(variant, dtype=f32)
    save(rule, tmp_path / "rule.safetensors", trained_for={"horizon": 5, "task": "none"})
    loaded = load(tmp_path / "rule.safetensors")
    assert loaded.config == rule.config == json.loads(json.dumps(rule.config))
    grads = draws(4, 15, dtype=f32)
    assert torch.equal(run(rule, grads, shape=(3, 5))[0], run(loaded, grads, shape=(3, 5))[0])
    other = loaded.with_options(matrix_scale="muon")
    ratio = 1.0 if rule.matrix_scale == "muon" or variant != "spectral" else math.sqrt(5 / 3)
    if variant == "spectral":
        scaled = ratio * run(rule, grads[:1], shape=(3, 5))[0]
        torch.testing.assert_close(run(other, grads[:1], shape=(3, 5))[0], scaled)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinetic": "cubic"}, "`kinetic` should be one of quadratic, relativistic, spectral.* = 'cubic'`"),
        ({"kinetic": ("spectral",)}, r"one of them for each of 2 modes. Found `kinetic = \('spectral',\)`"),
        ({"kinetic": None}, "`kinetic` should be one of quadratic.* Found `kinetic = None`"),
        ({"kinetic": "spectral", "mass": "network"}, "`kinetic` should be 'quadratic' where the momenta"),
        ({"kinetic": "relativistic", "solver": "dopri5"}, "`kinetic` should be 'quadratic' where the momenta"),
        ({"kinetic": "spectral", "backend": "torchdiffeq"}, "`kinetic` should be 'quadratic' where the momenta"),
        ({"kinetic": "spectral", "output": "spectral"}, "`kinetic` should be 'quadratic' where `output = 'spectral'`"),
        ({"kinetic": "spectral", "coordinatewise": True}, "without spectral energies where `coordinatewise = True`"),
        ({"output": "product"}, "`output` should be 'sum' or 'spectral'. Found `output = 'product'`"),
        ({"schedule": "cosine"}, "`schedule` should be 'none' or 'power'. Found `schedule = 'cosine'`"),
        ({"kinetic": "spectral", "matrix_scale": 1.0}, "`matrix_scale` should be 'transfer' or 'muon'. .* = 1.0`"),
        ({"kinetic": "spectral", "matrix_normalization": "row"}, "`matrix_normalization` should be 'coordinate' or"),
        ({"kinetic": "spectral", "matrix_normalization": "coordinate", "normalization": "tensor"},
         "`matrix_normalization` should be 'tensor' where `normalization = 'tensor'`, which keeps no squares"),
        ({"kinetic": "spectral", "initial_matrix_kappa": 0.0}, "`initial_matrix_kappa` should be a positive number"),
        ({"kinetic": "spectral", "initial_lookahead": -1}, "`initial_lookahead` should be a positive number. .* = -1`"),
        ({"kinetic": "spectral", "initial_decay": math.nan}, "`initial_decay` should be a non-negative number"),
        ({"kinetic": "relativistic", "speed_limit": 0}, "`speed_limit` should be a positive number. Found .* = 0`"),
        # options without effect
        ({"kinetic": "spectral", "speed_limit": 2.0}, "`speed_limit` should be 1.0 where no mode is relativistic"),
        ({"horizon_power": 0.4}, "`horizon_power` should be 0.0 where `schedule = 'none'`. Found .* = 0.4`"),
        ({"schedule": "power", "horizon_power": -1}, "`horizon_power` should be a non-negative number"),
        ({"kinetic": "spectral", "initial_decay": 0.1, "decay_growth": 0.5}, "`decay_growth` should be a number"),
        ({"kinetic": "spectral", "decay_growth": 4.0}, "`decay_growth` should be 1.0 where `initial_decay = 0`. Found"),
        ({"kinetic": "spectral", "initial_decay": 0.1, "decay_onset": 4.0}, "1.0 where `decay_growth = 1`. Found"),
        ({"output": "spectral", "schedule": "power", "horizon_power": 0.4, "decay_horizon": 9.0},
         "`decay_horizon` should be 0.0 where `initial_decay = 0`. Found `decay_horizon = 9.0`"),
        ({"kinetic": "spectral", "initial_decay": 0.1, "decay_horizon": 9.0}, "0.0 where `horizon_power = 0`. Found"),
        ({"decay_horizon": -1}, "`decay_horizon` should be a non-negative number. Found `decay_horizon = -1`"),
        ({"depth_power": 1.0}, "`depth_power` should be 0.0 where no energy is spectral. Found `depth_power = 1.0`"),
        ({"narrow": 3}, "`narrow` should be 0 where no energy is spectral. Found `narrow = 3`"),
        ({"kinetic": "spectral", "narrow": 1.5}, "`narrow` should be a non-negative integer. Found `narrow = 1.5`"),
        ({"trust_ratio": 0.1}, "`trust_ratio` should be 0.0 where no energy is spectral. Found `trust_ratio = 0.1`"),
        ({"kinetic": "spectral", "trust_ratio": -1}, "`trust_ratio` should be a non-negative number. Found .* = -1`"),
        ({"matrix_products": "full"}, "`matrix_products` should be 'auto' where no energy is spectral. Found"),
        ({"kinetic": "spectral", "matrix_products": "half"}, "`matrix_products` should be 'auto', 'full' or 'bfloat16"),
        ({"matrix_interval": 2}, "`matrix_interval` should be 1 where no energy is spectral. Found .* = 2`"),
        ({"kinetic": "spectral", "matrix_interval": 0}, "`matrix_interval` should be an integer between 1 and .* = 0`"),
        ({"kinetic": "spectral", "matrix_interval": 2.0}, "`matrix_interval` should be an integer .* = 2.0`"),
        ({"row_power": 0.5}, "`row_power` should be 0.0 where no energy is spectral. Found `row_power = 0.5`"),
        ({"output": "spectral", "row_power": 0.5}, "`row_power` should be 0.0 where `output = 'spectral'`. Found"),
        ({"kinetic": "spectral", "row_power": 1.5}, r"`row_power` should be a number in \[0, 1\]. Found .* = 1.5`"),
        ({"alignment_rate": math.nan}, "`alignment_rate` should be a non-negative number. Found .* = nan`"),
        ({"coordinatewise": True, "alignment_rate": 1.0}, "`alignment_rate` should be 0 where `coordinatewise = True`"),
        ({"alignment_horizon": 9.0}, "`alignment_horizon` should be 0.0 where `alignment_rate = 0`. Found"),
        ({"alignment_rate": 1.0, "alignment_horizon": -1}, "`alignment_horizon` should be a non-negative number"),
        ({"initial_decay": 0.1}, "`initial_decay` should be 0.0 where no energy is spectral. Found .* = 0.1`"),
        ({"matrix_scale": "muon"}, "`matrix_scale` should be 'transfer' where no energy is spectral"),
        ({"output": "spectral", "initial_lookahead": 2.0}, "`initial_lookahead` should be 1.0 where `output = "),
    ],
)  # fmt: skip
def test_unfit_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PortHamiltonianUpdate(**options)


# -------------------- step sizes that follow what they do


def logs_of_step_sizes(rule, sign_of, n_steps=40):
    """Growth of the log step size of a matrix whose gradient is a fixed one times ``sign_of`` the step."""
    state, grad = rule.init_state(torch.zeros(12, dtype=f64)), torch.linspace(1, 2, 12, dtype=f64)
    logs = []
    for step in range(n_steps):
        _, state = rule(sign_of(step) * grad, state, shape=(3, 4))
        logs.append(state.memory[-1].item())
    return logs


@pytest.mark.parametrize("kinetic", ["quadratic", "spectral"])
def test_step_sizes_grow_while_gradients_point_along_the_momenta(kinetic):
    rule = PortHamiltonianUpdate(kinetic=kinetic, alignment_rate=2.0, memory=1).double()
    growing = logs_of_step_sizes(rule, lambda step: 1)
    assert growing[0] == 0.0  # no momentum yet
    assert all(b > a for a, b in itertools.pairwise(growing))
    # in logarithmic time once ten steps are done: 2 * (1 - .2) * (8 / 10 + log(40 / 10))
    assert growing[-1] == pytest.approx(1.6 * (0.9 + math.log(4)), rel=0.05)


def test_step_sizes_fall_where_each_step_overshoots_and_rest_where_noise_prevails():
    rule = PortHamiltonianUpdate(kinetic="spectral", alignment_rate=2.0, friction="constant").double()
    with torch.no_grad():  # momenta of one step: what alternates then points back at each of them
        rule.start[-2:] = 30.0
    falling = logs_of_step_sizes(rule, lambda step: (-1) ** step)
    assert falling[-1] < -1
    state, steps = rule.init_state(torch.zeros(4000, dtype=f64)), []
    for step in range(40):
        grad = torch.randn(4000, dtype=f64, generator=torch.Generator().manual_seed(step))
        _, state = rule(grad, state, shape=(40, 100))
        steps.append(state.memory.item())
    assert steps[1:] == [steps[0]] * 39


def test_growth_is_lost_as_the_inverse_of_the_steps_where_noise_prevails_late_in_a_run_and_nowhere_else():
    options = {"kinetic": "spectral", "alignment_rate": 2.0}
    rules = [PortHamiltonianUpdate(**options, alignment_horizon=x).double() for x in (0, 50)]
    growing, lost = (logs_of_step_sizes(rule, lambda step: 1, n_steps=80) for rule in rules)
    assert growing == lost
    logs = []
    for rule in rules:
        state, found = rule.init_state(torch.zeros(4000, dtype=f64)), []
        for step in range(200):
            noise = torch.randn(4000, dtype=f64, generator=torch.Generator().manual_seed(step))
            _, state = rule(torch.ones_like(noise) if step < 20 else noise, state, shape=(40, 100))
            found.append(state.memory.item())
        logs.append(found)
    assert logs[0][:50] == logs[1][:50]
    assert logs[0][199] == logs[0][49] > 1
    assert logs[1][199] == pytest.approx(logs[1][49] * 50 / 200, rel=1e-6)


def test_growth_counts_in_the_steps_of_matrices_and_vectors_alike():
    plain, grown = (PortHamiltonianUpdate(kinetic="spectral", alignment_rate=rate).double() for rate in (0.0, 2.0))
    for shape in ((3, 4), (12,)):
        grad = torch.linspace(1, 2, 12, dtype=f64)
        states = [rule.init_state(torch.zeros(12, dtype=f64)) for rule in (plain, grown)]
        for _ in range(5):
            moves = [rule(grad, state, shape=shape) for rule, state in zip((plain, grown), states, strict=True)]
            states = [state for _, state in moves]
        torch.testing.assert_close(moves[1][0], moves[0][0] * states[1].memory.exp())
        assert states[1].memory.item() > 0.3


@pytest.mark.parametrize("scale", ["transfer", "muon"])
@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (6, 3, 2, 2)])
def test_trust_bounds_steps_of_matrices_by_their_size_and_lets_zeros_grow(shape, scale):
    options = {"kinetic": "spectral", "matrix_scale": scale, "initial_matrix_kappa": 1.0}
    plain, bounded = (PortHamiltonianUpdate(**options, trust_ratio=ratio).double() for ratio in (0.0, 0.25))
    n = math.prod(shape)
    grad = torch.randn(n, dtype=f64, generator=torch.Generator().manual_seed(1))
    for size, factor in ((1e-3, 0.1), (0.0, 0.1), (1e3, 1.0), (None, 1.0)):
        param = None if size is None else torch.full((n,), size, dtype=f64)
        free, held = (rule(grad, rule.init_state(grad), param=param, shape=shape)[0] for rule in (plain, bounded))
        torch.testing.assert_close(held, factor * free)
    # between the bounds the step size is such that a step of equal singular values has a quarter of the matrix's rms
    rms = energies.step_rms(shape, scale)
    held = bounded(grad, bounded.init_state(grad), param=torch.full((n,), 2 * rms, dtype=f64), shape=shape)[0]
    free = plain(grad, plain.init_state(grad), shape=shape)[0]
    torch.testing.assert_close(held, 0.5 * free)
    orthogonal, _ = torch.linalg.qr(torch.randn(shape[0], n // shape[0], dtype=f64).T if shape[0] < n // shape[0]
                                    else torch.randn(shape[0], n // shape[0], dtype=f64))  # fmt: skip
    expected = energies.operator_scale(shape, scale) * orthogonal.square().mean().sqrt().item()
    assert rms == pytest.approx(expected)


# -------------------- products in bfloat16


class ProductTypes(TorchDispatchMode):
    """Types of the matrices that are multiplied."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            self.seen.add(args[-1].dtype)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(
    ("products", "device", "dtype", "wanted"),
    [
        *(("auto", "cpu", dtype, dtype) for dtype in (f32, f64)),
        *(("auto", "cuda", dtype, wanted) for dtype, wanted in ((f32, torch.bfloat16), (f64, f64))),
        *(("full", device, f32, f32) for device in ("cpu", "cuda")),
        *(("bfloat16", device, f32, torch.bfloat16) for device in ("cpu", "cuda")),
    ],
)
def test_products_have_the_precision_that_is_asked_for(products, device, dtype, wanted, given):
    with FakeTensorMode(), ProductTypes() as types:  # no GPU is needed to see what it would be asked for
        x = torch.empty(2, 15, dtype=dtype, device=device)
        found = energies.spectral_velocity(SpectralEnergy(), x, (3, 5), *((x, x) if given else ()), products=products)
    assert types.seen == {wanted}
    assert found.dtype == dtype


@over_variants
def test_step_with_products_in_bfloat16_is_that_of_muon(variant):
    shape = (12, 20)
    full, narrow = (run(spectral(variant, matrix_products=products), draws(4, 240, seed=2), shape=shape)[0]
                    for products in ("auto", "bfloat16"))  # fmt: skip
    # the rounding of bfloat16, 2^-8, times the slope of the iterations
    assert all(0 < (a - b).norm() < 0.03 * a.norm() for a, b in zip(full, narrow, strict=True))


# -------------------- moves at every k-th step


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (3, 2, 2, 1)])
@over_variants
def test_matrix_moves_by_k_times_its_step_at_every_kth_one_and_its_state_at_each(variant, shape):
    plain, rule = spectral(variant, initial_decay=0.0), spectral(variant, initial_decay=0.0, matrix_interval=3)
    states = [rule.init_state(draws(n_of(shape))) for _ in range(2)]
    for number, grad in enumerate(draws(7, n_of(shape), seed=2)):
        signals = {"param": draws(n_of(shape), seed=9), "shape": shape, "progress": torch.tensor(number / 7, dtype=f64)}
        steps = [each(grad, state, **signals) for each, state in zip((plain, rule), states, strict=True)]
        states = [state for _, state in steps]
        assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))
        assert steps[0][0].norm() > 1e-3
        torch.testing.assert_close(steps[1][0], (3.0 if number in (2, 5) else 0.0) * steps[0][0])


@pytest.mark.parametrize("options", [{"kinetic": "spectral"}, {"output": "spectral"}], ids=["spectral", "output"])
def test_vectors_tables_and_narrow_matrices_move_at_every_step(options):
    plain, rule = (port_hamiltonian(**options, narrow=2, matrix_interval=k) for k in (1, 4))
    grads = draws(5, 12, seed=2)
    assert torch.equal(run(plain, grads, shape=(12,))[0], run(rule, grads, shape=(12,))[0])
    assert torch.equal(run(plain, grads, shape=(6, 2))[0], run(rule, grads, shape=(6, 2))[0])
    assert torch.equal(run(plain.for_tables(), grads, shape=(3, 4))[0], run(rule.for_tables(), grads, shape=(3, 4))[0])


def last_update(interval, param, n_steps=4, **options):
    rule = PortHamiltonianUpdate(kinetic="spectral", matrix_interval=interval, **options).double()
    return run(rule, draws(n_steps, 15, seed=2), shape=(3, 5), param=param)[0][-1]


@pytest.mark.parametrize("decay", [0.1, 4.0, 40.0])
def test_decay_of_a_kfold_step_is_kfold_up_to_where_it_takes_all(decay):
    param, kappa = draws(15, seed=9), 0.1
    velocity = last_update(1, param, initial_matrix_kappa=kappa)
    for interval in (1, 2, 4):
        rate = interval * kappa * decay  # from .01 to 16
        found = last_update(interval, param, initial_matrix_kappa=kappa, initial_decay=decay)
        torch.testing.assert_close(found, (interval * velocity - rate * param) / max(1.0, rate))


def test_trust_bounds_the_kfold_step():
    options, param = {"initial_matrix_kappa": 0.1, "trust_ratio": 0.2}, 0.25 * draws(15, seed=9)
    free = last_update(1, param, initial_matrix_kappa=0.1)
    # of a step of equal singular values: the bound is above one such step, and below two
    rms, bound = 0.1 * energies.step_rms((3, 5)), 0.2 * param.square().mean().sqrt().item()
    assert rms < bound < 2 * rms
    torch.testing.assert_close(last_update(1, param, **options), free)
    for interval in (2, 4):
        torch.testing.assert_close(last_update(interval, param, **options), bound / rms * free)


@pytest.mark.parametrize("options", [{"kinetic": "spectral"}, {"output": "spectral"}], ids=["spectral", "output"])
def test_nothing_is_orthogonalised_between_moves(options, monkeypatch):
    calls, iterate = [], energies.newton_schulz
    monkeypatch.setattr(energies, "newton_schulz", lambda x, *a, **k: calls.append(x.shape) or iterate(x, *a, **k))
    rule = port_hamiltonian(**options, matrix_interval=3)
    params = [nn.Parameter(draws(*shape, seed=7)) for shape in ((3, 5), (3, 5), (6, 4))]
    optimizer, seen = LearnedOptimizer(params, rule, implementation="eager"), []
    for number in range(7):
        for k, param in enumerate(params):
            # the second one begins a step later
            param.grad = None if number == 0 and k == 1 else draws(*param.shape, seed=10 * number + k)
        before = [param.detach().clone() for param in params]
        optimizer.step()
        seen.append({shape[-2:] for shape in calls})
        calls.clear()
        moved = [not torch.equal(param, old) for param, old in zip(params, before, strict=True)]
        assert moved == [number in (2, 5), number in (3, 6), number in (2, 5)]
    pair, alone = (3, 5), (6, 4)
    assert seen == [set(), set(), {pair, alone}, {pair}, set(), {pair, alone}, {pair}]


@pytest.mark.parametrize("variant", ["all", "with relativistic", "output"])
def test_tasks_of_a_batch_move_each_at_its_own_time_with_its_own_derivatives(variant):
    rule, shape = spectral(variant, matrix_interval=2), (3, 5)
    state = run(rule, draws(3, 4, 15), shape=shape)[1]
    state = type(state)(*(x.detach() for x in state))
    state = state._replace(step=torch.tensor([[2.0], [3.0], [7.0], [6.0]], dtype=f64))
    grad, param = draws(4, 15, seed=3), draws(4, 15, seed=8)
    weights = list(rule.parameters())

    def step(grad, param, *state):
        return rule(grad, type_of_state(*state), param=param, shape=shape)[0]

    type_of_state = type(state)
    update = step(grad, param, *state)
    alone = torch.stack([step(grad[k], param[k], *(x[k] for x in state)) for k in range(4)])
    assert [row.norm().item() > 0 for row in update] == [False, True, True, False]
    torch.testing.assert_close(update, alone)
    torch.testing.assert_close(torch.func.vmap(step)(grad, param, *state), alone)
    gradients = [torch.autograd.grad(x.square().sum(), weights) for x in (update, alone)]
    assert sum(x.norm() for x in gradients[0]) > 0
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("variant", WITH_ENERGY)
def test_account_is_that_of_every_step_but_for_the_step_size_between_moves(variant):
    plain, rule, shape = spectral(variant), spectral(variant, matrix_interval=2), (3, 5)
    state = some_state(rule, shape)  # after three steps
    for n_taken, factor in ((3.0, 2.0), (4.0, 0.0)):
        state = state._replace(step=torch.full_like(state.step, n_taken))
        one, other = (each.account(draws(15, seed=3), state, shape=shape) for each in (plain, rule))
        torch.testing.assert_close(other, one | {"step_size": factor * one["step_size"]})
        assert (other["energy_rate"] - other["supplied"] + other["dissipated"]).abs() < 1e-10
