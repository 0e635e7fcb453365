"""The port-Hamiltonian rule: derivatives, scale, signals across coordinates, memory and dtypes."""

import functools

import pytest
import torch
from port_hamiltonian_toys import COORDINATEWISE, NEEDS_Q, VARIANTS, WITHOUT, over_variants, port_hamiltonian
from rule_toys import draws, random_state, randomised, run
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call

from odeopt.meta import unroll
from odeopt.rules import PortHamiltonianUpdate
from odeopt.tasks import (
    DatasetCorrupt,
    DatasetUnavailable,
    MLPClassification,
    RandomQuadratic,
    Task,
    load_dataset,
)

f32, f64 = torch.float32, torch.float64


# -------------------- derivatives


def one_step(rule, state):
    """Return the step as a function of gradient, momenta, positions and a shift of all weights."""
    names = [name for name, _ in rule.named_parameters()]
    weights = [weight.detach() for weight in rule.parameters()]
    directions = [draws(*weight.shape, seed=i) for i, weight in enumerate(weights)]

    def step(grad, p, q, shift):
        moved = {name: w + shift * d for name, w, d in zip(names, weights, directions, strict=True)}
        before = state._replace(p=p, q=q)
        update, after = functional_call(rule, moved, (grad, before), {"param": grad, "shape": (2, 1)})
        return update, after.p, after.q, after.second_moment

    return step, (draws(2, seed=7), state.p, state.q, torch.zeros((), dtype=f64))


@over_variants
def test_first_and_second_derivatives_of_a_step(variant):
    rule = port_hamiltonian(variant, hidden=(3,))
    step, inputs = one_step(rule, random_state(rule, 2))
    inputs = tuple(x.detach().requires_grad_(x.numel() > 0) for x in inputs)
    if rule.stores_q:
        assert gradcheck(step, inputs)
        # along random directions, for networks of q make many numbers
        assert gradgradcheck(step, inputs, fast_mode=True)
    else:
        step = functools.partial(_without_empty, step)
        assert gradcheck(step, inputs)
        assert gradgradcheck(step, inputs)


def _without_empty(step, *inputs):
    return tuple(output for output in step(*inputs) if output.numel() > 0)


@pytest.mark.parametrize("zeros", ["all", "some", "after others", "long after"])
@over_variants
def test_zero_gradients_give_finite_updates_and_derivatives(variant, zeros):
    rule = port_hamiltonian(variant, dtype=f32)
    grads = draws(4, 3, dtype=f32)
    state = rule.init_state(grads[0])
    where = {"some": (slice(None), 0), "after others": slice(1, None)}.get(zeros, slice(None))
    grads[where] = 0
    grads.requires_grad_()
    if zeros == "long after":  # so long that the running magnitudes have become subnormal
        state = random_state(rule, 3)
        tiny = torch.full_like(state.scale, 1e-44)
        second = 0 * state.second_moment + (1e-44 if rule.coordinatewise else 1.0)
        state = state._replace(scale=tiny, slow_scale=tiny, second_moment=second, step=0 * tiny + 2000)
    updates, state = run(rule, grads, state=state, shape=(3, 1))
    assert updates.isfinite().all()
    assert all(s.isfinite().all() for s in state)
    # beside a subnormal magnitude the derivative by the gradient, one over it, is larger than float32 holds
    wanted = [*([] if zeros == "long after" else [grads]), *rule.parameters()]
    first = torch.autograd.grad(updates.square().sum(), wanted, create_graph=True, allow_unused=True)
    first = [d for d in first if d is not None]
    assert all(d.isfinite().all() for d in first)
    total = sum(d.square().sum() for d in first)
    if total.requires_grad:
        second = torch.autograd.grad(total, wanted, allow_unused=True)
        assert all(d.isfinite().all() for d in second if d is not None)


@pytest.mark.parametrize("variant", NEEDS_Q)
def test_every_weight_is_trained(variant):
    rule = port_hamiltonian(variant, scale=0.2, uses_progress=True)
    losses = unroll(rule, RandomQuadratic(4, dtype=f64), indices=torch.arange(2), n_steps=5, total_steps=5).losses
    losses[-1].sum().backward()
    for name, weight in rule.named_parameters():
        assert weight.grad.isfinite().all()
        assert weight.grad.abs().max() > 0, name


@pytest.mark.parametrize("part", ["potential", "friction", "port"])
def test_networks_of_q_leave_the_untrained_rule_as_it_is(part):
    grads = draws(5, 4)
    plain, with_network = (PortHamiltonianUpdate(**options).to(f64) for options in ({}, {part: "network"}))
    # the energies differ: a flat potential is a positive constant
    torch.testing.assert_close(run(plain, grads)[0], run(with_network, grads)[0], rtol=1e-12, atol=0)


def test_untrained_rule_does_not_depend_on_the_seed_and_descends():
    grads = draws(5, 4)
    updates = []
    for seed in range(2):
        torch.manual_seed(seed)
        updates.append(run(PortHamiltonianUpdate().to(f64), grads)[0])
    assert torch.equal(*updates)
    assert (updates[0][0] * grads[0] < 0).all()


# -------------------- scale


class Scaled(Task):
    """A task whose losses are multiplied by a constant."""

    def __init__(self, task, factor):
        super().__init__()
        self.task, self.factor = task, factor

    def init_params(self, indices, seed):
        return self.task.init_params(indices, seed)

    def sample_batch(self, indices, step, seed):
        return self.task.sample_batch(indices, step, seed)

    def loss(self, params, batch):
        return self.factor * self.task.loss(params, batch)


@functools.cache
def image_task():
    """Real MNIST where it lies in the data folder, handwritten digits elsewhere."""
    try:
        dataset = load_dataset("mnist", download=False)
    except (DatasetUnavailable, DatasetCorrupt):
        dataset = load_dataset("digits")
    return MLPClassification(dataset, batch_size=64)


@functools.cache
def trajectory_on_images(variant, factor):
    rule = port_hamiltonian(variant, scale=0.1, dtype=f32)
    n_tasks, n_steps = (2, 50) if variant == "default" else (1, 10)  # the other costs ten times as much
    with torch.no_grad():
        return unroll(rule, Scaled(image_task(), factor), indices=torch.arange(n_tasks), n_steps=n_steps)


# The coordinatewise variants divide by gradients as small as 1e-34, which a factor makes subnormal numbers.
over_scaled = pytest.mark.parametrize("variant", ["default", "everything"])


@over_scaled
@pytest.mark.parametrize("exponent", [20, -20])
def test_powers_of_two_change_no_bit_of_the_trajectory_on_images(variant, exponent):
    plain, scaled = (trajectory_on_images(variant, factor) for factor in (1.0, 2.0**exponent))
    assert plain.losses[-1].max() < 0.9 * plain.losses[0].min()  # it does learn
    for name, value in plain.params.items():
        assert torch.equal(value, scaled.params[name])
        assert torch.equal(plain.states[name].p, scaled.states[name].p)
    assert torch.equal(plain.losses * 2.0**exponent, scaled.losses)


@over_scaled
@pytest.mark.parametrize("factor", [1e6, 1e-6])
def test_any_factor_changes_the_losses_on_images_by_rounding_only(variant, factor):
    plain, scaled = (trajectory_on_images(variant, f) for f in (1.0, factor))
    # of the loss: roundings of float32 grow over the steps
    torch.testing.assert_close(scaled.losses / factor, plain.losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("exponent", [20, -20])
@over_variants
def test_powers_of_two_change_no_bit_of_the_updates(variant, exponent):
    rule, grads = port_hamiltonian(variant, dtype=f32), draws(8, 2, 5, dtype=f32)
    grads[:, 0, 0] = 0
    (plain, _), (scaled, _) = (run(rule, f * grads, param=grads[0]) for f in (1.0, 2.0**exponent))
    assert torch.equal(plain, scaled)


@pytest.mark.parametrize("magnitude", [1e-30, 1e30])
@over_variants
def test_extreme_gradients_move_a_parameter_as_ordinary_ones_do(variant, magnitude):
    rule, grads = port_hamiltonian(variant, dtype=f32), draws(5, 4, dtype=f32)
    ordinary, extreme = (run(rule, grads * m, param=grads[0])[0] for m in (1.0, magnitude))
    torch.testing.assert_close(extreme, ordinary, rtol=1e-4, atol=1e-6)  # roundings of float32


@pytest.mark.parametrize("n", [3, 1000])
def test_largest_finite_gradients_do_not_overflow(n):
    rule = port_hamiltonian(dtype=f32)
    grads = draws(4, n, dtype=f32).sign()
    ordinary, largest = (run(rule, grads * m, param=grads[0])[0] for m in (1.0, 2.0**127))
    assert torch.equal(largest, ordinary)  # a power of two


def test_rule_leaves_the_origin():
    rule, grad = port_hamiltonian(), draws(4)
    update, _ = rule(grad, rule.init_state(grad), param=torch.zeros_like(grad))
    assert update.abs().min() > 1e-4


# -------------------- which signals cross coordinates


@pytest.mark.parametrize("variant", COORDINATEWISE)
def test_coordinatewise_variant_runs_each_coordinate_alone(variant):
    rule, grads = port_hamiltonian(variant), draws(6, 5)
    together, _ = run(rule, grads, shape=(5,))
    alone = torch.cat([run(rule, grads[:, i : i + 1], shape=(1,))[0] for i in range(5)], dim=-1)
    # vectorised and single exponentials differ in their last bit
    torch.testing.assert_close(together, alone, rtol=1e-11, atol=1e-13)


def test_tensor_variant_looks_at_the_whole_tensor_its_shape_and_its_values():
    rule, grads = port_hamiltonian(), draws(6, 6)
    together, _ = run(rule, grads)
    alone = torch.cat([run(rule, grads[:, i : i + 1], param=grads[0, i : i + 1])[0] for i in range(6)], dim=-1)
    assert (together - alone).abs().min() > 1e-6
    for shape in ((6, 1), (1, 6), (2, 3)):
        assert not torch.allclose(together, run(rule, grads, shape=shape)[0], rtol=1e-4)
    assert not torch.allclose(together, run(rule, grads, param=5 * grads[0])[0], rtol=1e-4)


def rows(state, index=None):
    """State with a leading axis of one, or without it."""
    return type(state)(*(x[None] if index is None else x[index] for x in state))


@pytest.mark.parametrize("variant", ["default", "everything", "coordinatewise", *WITHOUT])
def test_pieces_of_a_tensor_give_the_step_of_the_whole(variant):
    rule, grad, param = port_hamiltonian(variant), draws(6), draws(6, seed=1)
    state = random_state(rule, 6)
    update, after = rule(grad, state, param=param, shape=(2, 3))
    pieces = [slice(0, 2), slice(2, 6)]
    states = [state._replace(p=state.p[:, i], q=state.q[:, i], second_moment=state.second_moment[i]) for i in pieces]
    features, shared = torch.tensor([rule.features((2, 3))], dtype=f64), None
    for stage in range(rule.n_stages):
        sums = sum(
            rule.statistics(stage, grad[i][None], rows(s), features, shared, param[i][None])
            for i, s in zip(pieces, states, strict=True)
        )
        shared = rule.coefficients(stage, sums, rows(states[0]), features, shared, None)
    steps = [rule.advance(grad[i][None], rows(s), shared) for i, s in zip(pieces, states, strict=True)]
    steps = [(step[0][0], rows(step[1], 0)) for step in steps]
    # sums in another order: rounding
    torch.testing.assert_close(torch.cat([step[0] for step in steps]), update)
    torch.testing.assert_close(torch.cat([step[1].p for step in steps], dim=-1), after.p)


def test_progress_is_seen_where_it_is_asked_for_and_only_there():
    grads = draws(3, 4)
    for uses_progress in (True, False):
        rule = port_hamiltonian(uses_progress=uses_progress)
        unknown, start, end = (
            run(rule, grads, progress=p)[0] for p in (None, torch.zeros((), dtype=f64), torch.ones((), dtype=f64))
        )
        assert torch.equal(start, end) != uses_progress
        assert torch.equal(unknown, start) != uses_progress


# -------------------- memory and dtypes


@pytest.mark.parametrize(
    ("variant", "n_bytes"), [("default", 12), ("coordinatewise", 12), ("potential", 20), ("tensor normalization", 8)]
)
def test_two_modes_take_twelve_bytes_a_parameter_positions_eight_and_squares_are_four_of_them(variant, n_bytes):
    rule = PortHamiltonianUpdate(**VARIANTS[variant])

    def size(n):
        return sum(s.nbytes for s in run(rule, draws(2, n, dtype=f32))[1])

    assert size(2000) - size(1000) == 1000 * n_bytes
    assert size(1000) - 1000 * n_bytes <= 64  # what a tensor holds once


@over_variants
def test_float32_follows_float64(variant):
    grads = draws(5, 4)
    double = port_hamiltonian(variant)
    single = port_hamiltonian(variant, dtype=f32)
    expected, _ = run(double, grads)
    updates, state = run(single, grads.float())
    assert updates.dtype == f32
    assert all(s.dtype == f32 for s in state)
    torch.testing.assert_close(updates.double(), expected, rtol=1e-4, atol=1e-6)  # float32 over five steps
    # weights in float32 serve float64 parameters, whose state stays float64
    updates, state = run(single, grads)
    assert updates.dtype == f64
    assert all(s.dtype == f64 for s in state)
    torch.testing.assert_close(updates, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
@over_variants
def test_step_on_cuda_equals_the_cpus(variant, dtype):
    rule, grads = port_hamiltonian(variant, dtype=dtype), draws(6, 2, 5, dtype=dtype)
    expected, state = run(rule, grads, shape=(5,))
    updates, cuda_state = run(rule.to("cuda"), grads.cuda(), shape=(5,))
    assert updates.is_cuda
    # exponentials and sums round differently on the device, grown over six steps
    tolerance = 1e-4 if dtype == f32 else 1e-10
    torch.testing.assert_close(updates.cpu(), expected, rtol=tolerance, atol=tolerance / 100)
    for ours, theirs in zip(cuda_state, state, strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=tolerance, atol=tolerance / 100)


def test_any_number_of_modes_and_layers():
    for modes in (1, 2, 4):
        for hidden in ((), (5,), (4, 3, 2)):
            rule = randomised(PortHamiltonianUpdate(modes=modes, hidden=hidden))
            updates, state = run(rule, draws(3, 4))
            assert updates.isfinite().all()
            assert state.p.shape == (modes, 4)
