"""The port-Hamiltonian rule: structure and passivity for any weights, and the step as its formula."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from port_hamiltonian_toys import VARIANTS, over_variants, port_hamiltonian
from rule_toys import draws, random_state

from odeopt.ode import available_methods, integrate, is_fixed_step, nominal_order
from odeopt.physics import PhaseState

f32, f64 = torch.float32, torch.float64
FIXED = [method for method in available_methods() if is_fixed_step(method)]
any_weights = given(
    variant=st.sampled_from(sorted(VARIANTS)),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 0.5, 2.0]),
    size=st.sampled_from([0.1, 1.0, 5.0]),
)
few_examples = settings(max_examples=25, deadline=None)


def held_over_a_step(rule, grad, state):
    """Modulating signal that the rule hands to friction and port."""
    seen = []
    hook = rule.system.dissipation.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    rule.power_balance(grad, state)
    hook.remove()
    return seen[0]


def effort(grad, after):
    """Effort of a tensor variant, from the moments after the step."""
    return -grad / (after.second_moment.sqrt() * after.scale)


# -------------------- structure, for any weights


@few_examples
@any_weights
def test_friction_is_between_zero_and_two(variant, seed, scale, size):
    rule = port_hamiltonian(variant, seed=seed, scale=scale)
    grad = size * draws(4, seed=seed + 2)
    friction = held_over_a_step(rule, grad, random_state(rule, 4, seed=seed, size=size)).friction
    assert friction.shape == (4, rule.modes)
    assert friction.min() >= 0
    assert friction.max() <= 2


@pytest.mark.parametrize("modes", [1, 2, 3])
@over_variants
def test_momenta_decay_inside_the_stability_region_of_rk4_for_any_weights(variant, modes):
    rule, grad = port_hamiltonian(variant, modes=modes, scale=1.0), draws(4)
    for name, weight in rule.named_parameters():  # the worst ones: every bounded output at its largest
        if name.endswith("bias"):
            torch.nn.init.constant_(weight, 100.0)
    state = random_state(rule, 4)
    z, q = held_over_a_step(rule, grad, state), state.q.mT
    z = z._replace(friction=torch.full_like(z.friction, 2.0))
    D, mass = rule.system.dissipation(q, z), rule.system.hamiltonian.inverse_mass
    inverse_mass = torch.eye(rule.modes, dtype=f64) if mass is None else mass(q)
    # D M^-1 has the eigenvalues of D^(1/2) M^-1 D^(1/2): the rates at which momenta decay
    rates = torch.linalg.eigvalsh(D.sqrt().unsqueeze(-1) * inverse_mass * D.sqrt().unsqueeze(-2))
    assert rates.min() > 0
    assert rates.max() < 2.785


@few_examples
@any_weights
def test_power_balance_closes_and_the_energy_is_bounded_below(variant, seed, scale, size):
    rule = port_hamiltonian(variant, seed=seed, scale=scale)
    grad, state = size * draws(4, seed=seed + 2), random_state(rule, 4, seed=seed, size=size)
    energy_rate, dissipated, supplied, residual = rule.power_balance(grad, state, param=draws(4), shape=(2, 2))
    magnitude = energy_rate.abs() + dissipated.abs() + supplied.abs()
    # some twenty float64 roundings of terms that may be larger than their sum
    assert (residual.abs() <= 1e-12 * (1 + magnitude)).all()
    assert energy_rate.shape == (4,)
    assert dissipated.min() >= 0
    assert (energy_rate <= supplied + 1e-12 * (1 + magnitude)).all()
    assert rule.energy(state).shape == (4,)
    assert rule.energy(state).min() >= 0


def test_power_balance_is_the_rate_of_the_energy_over_a_short_step():
    rule, grad = port_hamiltonian("everything"), draws(4, seed=3)
    state = random_state(rule, 4)
    balance, z = rule.power_balance(grad, state), held_over_a_step(rule, grad, state)
    u = effort(grad, rule(grad, state)[1])
    dx = rule.system.vector_field(PhaseState(state.q.mT, state.p.mT), u.unsqueeze(-1), z)

    def energy_after(h):
        return rule.energy(state._replace(p=state.p + h * dx.p.mT, q=state.q + h * dx.q.mT))

    difference = (energy_after(1e-4) - energy_after(-1e-4)) / 2e-4
    # error of the central difference: h^2 times a third derivative of order one
    torch.testing.assert_close(balance.energy_rate, difference, rtol=1e-6, atol=1e-6)


# -------------------- passivity of the closed loop


class ClosedLoop:
    r"""``theta`` and every coordinate's system as one flow on a quadratic, with s, z and kappa held."""

    def __init__(self, variant, seed, scale, n=3):
        self.rule = port_hamiltonian(variant, seed=seed, scale=scale)
        self.A, self.y = draws(n, n, seed=seed), draws(n, seed=seed + 1)
        self.s = 0.2 + 3 * torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=f64)
        self.kappa = 0.3
        state = random_state(self.rule, n, seed=seed)
        self.z = held_over_a_step(self.rule, draws(n, seed=seed + 2), state)
        # positions are there for every variant: what ignores them is carried along
        self.start = (
            draws(n, seed=seed + 3),
            draws(n, self.rule.modes, seed=seed + 4),
            state.p.mT.contiguous(),
        )

    def loss(self, theta):
        return (self.A @ theta - self.y).square().sum(-1)

    def field(self, t, x):
        theta, q, p = x
        u = -self.s * (2 * self.A.mT @ (self.A @ theta - self.y))
        dx, y = self.rule.system.vector_field_and_output(PhaseState(q, p), u.unsqueeze(-1), self.z)
        return self.kappa * y.squeeze(-1), dx.q, dx.p

    def stored(self, x):
        """W: loss plus what the systems store, each in units of the loss."""
        theta, q, p = x
        energies = self.rule.system.energy(PhaseState(q, p))
        return self.loss(theta) + (self.kappa / self.s * energies).sum(-1)


@few_examples
@given(variant=st.sampled_from(sorted(VARIANTS)), seed=st.integers(0, 10_000), scale=st.sampled_from([0.3, 1.0]))
def test_loss_plus_stored_energy_falls_at_the_rate_that_friction_takes(variant, seed, scale):
    loop = ClosedLoop(variant, seed, scale)
    x = tuple(part.requires_grad_() for part in loop.start)
    gradient = torch.autograd.grad(loop.stored(x), x, allow_unused=True)
    rate = sum((g * dx).sum() for g, dx in zip(gradient, loop.field(0, x), strict=True) if g is not None)
    _, q, p = x
    v = loop.rule.system.energy_gradient(PhaseState(q, p)).p
    friction = loop.rule.system.dissipation(q, loop.z)
    taken = (loop.kappa / loop.s * (v.square() * friction).sum(-1)).sum()
    size = sum((g * dx).abs().sum() for g, dx in zip(gradient, loop.field(0, x), strict=True) if g is not None)
    assert taken >= 0
    # the powers of loss and port cancel to rounding
    assert (rate + taken).abs() <= 1e-12 * (1 + size)


@pytest.mark.parametrize("seed", [0, 1])
@over_variants
def test_loss_plus_stored_energy_never_rises_along_the_flow(variant, seed):
    loop = ClosedLoop(variant, seed, scale=0.5)
    t = torch.linspace(0, 2, 21, dtype=f64)
    with torch.no_grad():
        solution = integrate(loop.field, loop.start, t, method="dopri5", rtol=1e-8, atol=1e-8, options={"step_t": t})
        W = torch.stack([loop.stored(x) for x in zip(*solution.states, strict=True)])
        losses = torch.stack([loop.loss(theta) for theta in solution.states[0]])
    assert solution.is_success
    # 1e-6 is a hundred times what the tolerances let each output be off
    assert W.diff().max() <= 1e-6 * W[0]
    assert W[-1] < W[0]
    # the loss alone does rise somewhere, or does not fall as W does: energy is exchanged
    assert (losses.diff() - W.diff()).abs().max() > 1e-3


# -------------------- one step is the formula


def three_eighths(field, x):
    """One step of unit length of the classical 3/8 rule (torchdiffeq's rk4), tableau of Kutta (1901)."""
    k1 = field(x)
    k2 = field(x + k1 / 3)
    k3 = field(x - k1 / 3 + k2)
    k4 = field(x + k1 - k2 + k3)
    return x + (k1 + 3 * k2 + 3 * k3 + k4) / 8


@pytest.mark.parametrize("variant", ["default", "coordinatewise"])
def test_step_is_a_three_eighths_step_of_the_closed_formula(variant):
    rule, grads = port_hamiltonian(variant, scale=0.5), draws(6, 5)
    state, square = rule.init_state(grads[0]), torch.zeros(5, dtype=f64)
    for t, grad in enumerate(grads, start=1):
        friction, gain = held_over_a_step(rule, grad, state)
        update, after = rule(grad, state)
        square = rule.decay * square + (1 - rule.decay) * grad.square()
        u = -grad / (square / (1 - rule.decay**t)).sqrt()
        p_and_delta = torch.cat((state.p.mT, torch.zeros(5, 1, dtype=f64)), dim=-1)

        def field(x, friction=friction, gain=gain, u=u):
            p, g = x[:, :-1], gain.squeeze(-1)
            return torch.cat((-friction * p + g * u.unsqueeze(-1), (g * p).sum(-1, keepdim=True)), dim=-1)

        expected = three_eighths(field, p_and_delta)
        # the guard inside the root, 1e-10 of the tensor's scale squared, moves u by less than 1e-7 here
        torch.testing.assert_close(after.p.mT, expected[:, :-1], rtol=1e-6, atol=1e-7)
        kappa = update / expected[:, -1]
        assert kappa.min() > 0
        torch.testing.assert_close(kappa, kappa[:1].expand(5), rtol=1e-5, atol=0)
        state = after


def test_positions_follow_the_momenta():
    rule, grad = port_hamiltonian("potential"), draws(4)
    state = random_state(rule, 4)
    z, (update, after) = held_over_a_step(rule, grad, state), rule(grad, state)
    u = effort(grad, after)

    def field(x):
        q, p = x[..., :2], x[..., 2:]
        dx = rule.system.vector_field(PhaseState(q, p), u.unsqueeze(-1), z)
        return torch.cat((dx.q, dx.p), dim=-1)

    expected = three_eighths(field, torch.cat((state.q.mT, state.p.mT), dim=-1))
    torch.testing.assert_close(torch.cat((after.q, after.p), dim=-2).mT, expected, rtol=1e-6, atol=1e-7)
    assert update.abs().min() > 0


@pytest.mark.parametrize("variant", ["default", "mass", "everything"])
def test_fixed_step_solvers_agree_as_their_order_grows(variant):
    grad = draws(5, seed=4)
    updates = {}
    for method in [*FIXED, "dopri5", "dopri8"]:
        # all of them by torchdiffeq: our own agree to rounding, and the Adams methods' first step to the bit
        rule = port_hamiltonian(variant, solver=method, scale=0.2, backend="torchdiffeq")
        updates[method] = rule(grad, random_state(rule, 5))[0].detach()
    exact = updates.pop("dopri8")
    errors = {method: (update - exact).norm() / exact.norm() for method, update in updates.items()}
    assert errors.pop("dopri5") < 1e-5  # both adaptive methods interpolate their output
    by_order = [
        max(errors[method] for method in FIXED if nominal_order(method) == order)
        for order in sorted({nominal_order(method) for method in FIXED} - {None})
    ]
    assert len(by_order) >= 3
    assert all(higher < lower for lower, higher in itertools.pairwise(by_order))
    # the Adams methods begin with a Runge-Kutta step of order four
    assert all(error <= by_order[-1] for method, error in errors.items() if nominal_order(method) is None)


def test_adaptive_solver_couples_the_coordinates_and_the_rule_says_so():
    rule = port_hamiltonian(coordinatewise=True, solver="dopri5")
    state, grad = random_state(rule, 4), draws(4)
    other = grad * torch.tensor([1.0, 1.0, 1.0, -30.0], dtype=f64)
    assert not torch.equal(rule(grad, state)[0][:3], rule(other, state)[0][:3])
    assert rule.crosses_coordinates
