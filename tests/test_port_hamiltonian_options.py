"""The port-Hamiltonian rule without modulation of friction or port, and with efforts that the tensor scales."""

import importlib
import inspect
import json
import math

import pytest
import torch
from port_hamiltonian_toys import WITHOUT, port_hamiltonian
from rule_toys import draws, random_state, run
from test_port_hamiltonian import held_over_a_step, three_eighths
from torch import nn

from odeopt import LearnedOptimizer
from odeopt.artifacts import load, save
from odeopt.meta import unroll
from odeopt.meta.layouts import Separate
from odeopt.rules import PortHamiltonianUpdate
from odeopt.tasks import MLPClassification

f32, f64 = torch.float32, torch.float64
over_without = pytest.mark.parametrize("variant", WITHOUT)


# -------------------- what the options mean


@pytest.mark.parametrize("part", ["friction", "gain"])
def test_constants_are_the_same_for_all_coordinates_and_follow_the_tensor(part):
    options = {{"friction": "friction", "gain": "port"}[part]: "constant"}
    rule, grad = port_hamiltonian(**options), draws(5)
    state = random_state(rule, 5)
    constant, other = held_over_a_step(rule, grad, state), held_over_a_step(rule, grad * 3, state)
    assert torch.equal(getattr(constant, part), getattr(constant, part)[:1].expand_as(getattr(constant, part)))
    assert (getattr(constant, part) - getattr(other, part)).abs().min() > 1e-6  # the network saw larger gradients
    modulated = ({"friction", "gain"} - {part}).pop()
    assert getattr(constant, modulated).std(0).min() > 1e-6


@pytest.mark.parametrize("coordinatewise", [False, True])
def test_a_constant_is_a_modulation_whose_slopes_are_zero(coordinatewise):
    options = {"modes": 2, "coordinatewise": coordinatewise}
    full, bare = (port_hamiltonian(**options, friction=kind, port=kind) for kind in ("modulated", "constant"))
    weights = full.state_dict()
    d = 2
    slopes = [*range(d, 2 * d), *range(3 * d, 6 * d)]  # of the gain, and of the friction
    kept = [row for row in range(6 * d + 1) if row not in slopes]
    for name in ("coefficient_network.2.weight", "coefficient_network.2.bias"):
        weights[name][slopes] = 0
    full.load_state_dict(weights)
    bare.load_state_dict({name: x[kept] if ".2." in name else x for name, x in weights.items()})
    assert full.n_parameters() - bare.n_parameters() == 4 * d * 7  # a row of six weights and a bias for each
    grads = draws(6, 5)
    # matrix products of another shape are rounded otherwise
    torch.testing.assert_close(run(bare, grads)[0], run(full, grads)[0], rtol=1e-12, atol=1e-14)


@over_without
def test_every_weight_is_trained(variant):
    """No row of the network is left that nothing reads."""
    rule = port_hamiltonian(variant, scale=0.2)
    updates, _ = run(rule, draws(5, 4), shape=(2, 2))
    updates.square().sum().backward()
    for name, weight in rule.named_parameters():
        per_row = weight.grad.abs().flatten(1).amax(1) if weight.dim() > 1 else weight.grad.abs()
        assert per_row.min() > 0, name


def test_step_without_squares_is_a_three_eighths_step_of_the_closed_formula():
    rule, grads = port_hamiltonian(normalization="tensor", scale=0.5), draws(6, 5)
    state, mean = rule.init_state(grads[0]), 0.0
    for t, grad in enumerate(grads, start=1):
        friction, gain = held_over_a_step(rule, grad, state)
        update, after = rule(grad, state)
        mean = rule.decay * mean + (1 - rule.decay) * grad.abs().mean()
        u = -grad / (mean / (1 - rule.decay**t))
        start = torch.cat((state.p.mT, torch.zeros(5, 1, dtype=f64)), dim=-1)

        def field(x, friction=friction, gain=gain, u=u):
            p, g = x[:, :-1], gain.squeeze(-1)
            return torch.cat((-friction * p + g * u.unsqueeze(-1), (g * p).sum(-1, keepdim=True)), dim=-1)

        expected = three_eighths(field, start)
        torch.testing.assert_close(after.p.mT, expected[:, :-1], rtol=1e-10, atol=1e-12)
        kappa = update / expected[:, -1]
        torch.testing.assert_close(kappa, kappa[:1].expand(5), rtol=1e-8, atol=0)
        assert kappa.min() > 0
        state = after


def test_without_squares_efforts_keep_the_ratios_of_the_gradients():
    rule = PortHamiltonianUpdate(normalization="tensor", friction="constant", port="constant").to(f64)
    grads = draws(4, 1) * torch.tensor([1.0, 10.0, -100.0], dtype=f64)
    updates, _ = run(rule, grads)
    torch.testing.assert_close(updates / updates[:, :1], torch.tensor([[1.0, 10.0, -100.0]], dtype=f64).expand(4, 3))


# -------------------- coordinates that see small gradients


def updates_at(rule, magnitudes):
    """Updates after thirty steps with gradients of constant magnitudes."""
    state, grad = rule.init_state(magnitudes), magnitudes
    for _ in range(30):
        update, state = rule(grad, state)
    return update


def learned_gains(**options):
    rule = PortHamiltonianUpdate(**options).double()
    slopes = rule.coefficient_network[-1].bias[rule.modes : 2 * rule.modes]
    with torch.no_grad():
        slopes.fill_(-1.0)  # small gradients, large gains: what meta-training makes of them
    return rule


def test_coordinates_below_the_floor_count_as_those_on_it():
    # rms of the tensor 0.67: the three last are below 0.15 times that
    magnitudes = torch.tensor([1.0, 1.0, 1.0, 0.3, 0.09, 0.03, 0.01], dtype=f64)
    free, bounded = (updates_at(learned_gains(ratio_floor=floor), magnitudes) for floor in (0.0, 0.15))
    assert torch.equal(free[:4], bounded[:4])
    assert (free[4:].abs() > bounded[4:].abs()).all()
    torch.testing.assert_close(bounded[4], bounded[5], rtol=1e-3, atol=0)  # efforts are alike, but for their floor
    assert free[5].abs() > 5 * free[4].abs()


def test_a_unit_that_wakes_up_does_not_leap():
    grads = draws(60, 50)
    grads[:50, :10] = 0.0  # ten of fifty coordinates see nothing for fifty steps, and little afterwards
    grads[50:, :10] *= 0.05
    free, bounded = (
        run(learned_gains(ratio_floor=floor), grads)[0][50:, :10].abs().max().item() for floor in (0.0, 0.5)
    )
    assert free > 100 * bounded


# -------------------- every path takes the same step


def trajectory(rule, shapes, *, n_steps=4, dtype=f64, **options):
    """Parameters that an optimizer leaves, and those that the rule leaves called tensor by tensor."""
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(s, generator=generator, dtype=f64).to(dtype)) for s in shapes]
    wanted = [param.detach().clone() for param in params]
    states = [rule.init_state(theta.flatten()) for theta in wanted]
    optimizer = LearnedOptimizer(params, rule, **options)
    for _ in range(n_steps):
        for i, param in enumerate(params):
            param.grad = torch.randn(param.shape, generator=generator, dtype=f64).to(dtype)
            flat, theta = param.grad.flatten(), wanted[i]
            update, states[i] = rule(flat, states[i], param=theta.flatten(), shape=theta.shape)
            wanted[i] = theta + update.detach().view_as(theta)
        optimizer.step()
    return [param.detach() for param in params], wanted, optimizer, params


@over_without
def test_optimizer_takes_the_rules_step_in_rows_and_chunks(variant, monkeypatch):
    rule = port_hamiltonian(variant)
    monkeypatch.setattr(type(rule), "chunk_size", 1500)  # so that rows and columns are cut
    found, wanted, optimizer, params = trajectory(rule, [(3, 2), (5,), (1030,), (40, 50)])
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)  # sums in another order
    kept = {name: tuple(x.shape) for name, x in optimizer.state[params[0]].items()}
    assert kept["second_moment"] == ((0,) if rule.normalization == "tensor" else (3, 2))


@over_without
def test_side_by_side_is_the_run_of_each_parameter_by_itself(variant, monkeypatch):
    rule, task = port_hamiltonian(variant), MLPClassification("digits", (9,), batch_size=8, dtype=f64)
    runs = []
    for separate in (False, True):
        if separate:
            # `odeopt.meta.unroll` is the function by that name
            module = importlib.import_module("odeopt.meta.unroll")
            monkeypatch.setattr(module, "layout_for", lambda rule, shapes, like, tables: Separate(shapes))
        rule.zero_grad()
        losses = unroll(rule, task, indices=torch.arange(2), n_steps=5, total_steps=5).losses
        losses[-1].sum().backward()
        runs.append((losses, *[weight.grad.clone() for weight in rule.parameters()]))
    for a, b in zip(*runs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)  # sums in another order, over five steps


@over_without
def test_state_continues_from_a_checkpoint(variant):
    rule, shapes = port_hamiltonian(variant), [(3, 2), (5,)]
    *_, optimizer, params = trajectory(rule, shapes)
    twins = [nn.Parameter(param.detach().clone()) for param in params]
    other = LearnedOptimizer(twins, rule)
    other.load_state_dict(optimizer.state_dict())
    for param, twin in zip(params, twins, strict=True):
        param.grad = twin.grad = draws(*param.shape, seed=5)
    optimizer.step()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(params, twins, strict=True))


# -------------------- configuration and artefacts


@over_without
def test_artefact_keeps_the_options(variant, tmp_path):
    rule = port_hamiltonian(variant, dtype=f32)
    save(rule, tmp_path / "rule.safetensors", trained_for={"horizon": 5, "task": "none"})
    loaded = load(tmp_path / "rule.safetensors")
    assert loaded.config == rule.config == json.loads(json.dumps(rule.config))
    assert WITHOUT[variant].items() <= loaded.config.items()
    grads = draws(4, 6, dtype=f32)
    assert torch.equal(run(rule, grads)[0], run(loaded, grads)[0])


@pytest.mark.parametrize("options", [{}, {"kinetic": ("relativistic", "quadratic"), "speed_limit": 0.5}], ids=str)
def test_configuration_holds_every_option(options):
    config = PortHamiltonianUpdate(**options).config
    defaults = {name: p.default for name, p in inspect.signature(PortHamiltonianUpdate).parameters.items()}
    assert config == json.loads(json.dumps(defaults | options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"normalization": "row"},
            r"should be 'coordinate' or 'tensor'. Found `normalization = 'row'`",
        ),
        ({"normalization": None}, "`normalization` should be 'coordinate' or 'tensor'"),
        (
            {"normalization": "tensor", "coordinatewise": True},
            r"`normalization` should be 'coordinate' where `coordinatewise = True`.*Found `normalization = 'tensor'`",
        ),
        ({"friction": "off"}, r"`friction` should be 'modulated', 'network' or 'constant'. Found `friction = 'off'`"),
        (
            {"ratio_floor": 0.3, "coordinatewise": True},
            r"`ratio_floor` should be 0 where `coordinatewise = True`.*Found `ratio_floor = 0.3`",
        ),
        *(
            ({"ratio_floor": value}, rf"`ratio_floor` should be a number in \[0, 1\]. Found `ratio_floor = {value}`")
            for value in (-0.1, 1.5, None, math.nan)
        ),
        ({"port": False}, r"`port` should be 'modulated', 'network' or 'constant'. Found `port = False`"),
    ],
)
def test_unknown_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        PortHamiltonianUpdate(**options)
