"""Update rules: sizes, equality with what they claim to be, and the contract that all of them keep."""

import json
import math

import numpy as np
import pytest
import torch
from rule_toys import RULES, draws, over_rules, randomised, run
from torch import nn

from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import (
    AdamUpdate,
    HamiltonianUpdate,
    LSTMUpdate,
    PortHamiltonianUpdate,
    RMSpropUpdate,
    SGDUpdate,
    UpdateRule,
)
from odeopt.rules.base import state_dtype
from odeopt.rules.preprocessing import averaging_weight, coordinate_rms, log_sign, running_scale

f32, f64 = torch.float32, torch.float64
over_dtypes = pytest.mark.parametrize("dtype", [f32, f64], ids=str)


class Warmed(SGDUpdate):
    """A rule of which nobody said that it starts at zero, although its parent does."""

    def __init__(self) -> None:
        super().__init__(0.1, momentum=0.9)
        self.config = {}

    def init_state(self, param):
        state = super().init_state(param)
        return state._replace(momentum_buffer=state.momentum_buffer + 2 * param)


@over_rules
def test_rule_says_truly_whether_it_starts_at_zero(name):
    rule = RULES[name]()
    state = rule.init_state(draws(2, 3, 5, dtype=f32))
    assert rule.starts_at_zero == all(torch.equal(x, torch.zeros_like(x)) for x in state)


class Warming:
    """The same as a mixin, which is no rule itself."""

    def init_state(self, param):
        state = super().init_state(param)
        return state._replace(momentum_buffer=state.momentum_buffer + 2 * param)


class Mixed(Warming, SGDUpdate):
    """A rule whose ``init_state`` is that of a mixin."""


def test_rule_with_the_init_state_of_a_mixin_is_not_taken_to_start_at_zero():
    assert not Mixed.starts_at_zero
    param = nn.Parameter(torch.full((5,), 3.0))
    param.grad = torch.zeros(5)
    LearnedOptimizer([param], Mixed(0.1, momentum=0.9)).step()
    torch.testing.assert_close(param.detach(), torch.full((5,), 3.0 - 0.1 * 0.9 * 6.0))


def test_state_that_does_not_start_at_zero_arrives_in_the_optimizer():
    assert SGDUpdate.starts_at_zero
    assert not Warmed.starts_at_zero
    for shape in ((5,), (40, 1000)):
        param = nn.Parameter(torch.full(shape, 3.0))
        param.grad = torch.zeros(shape)
        LearnedOptimizer([param], Warmed()).step()
        torch.testing.assert_close(param.detach(), torch.full(shape, 3.0 - 0.1 * 0.9 * 6.0))


# -------------------- other options, the same weights


def test_rule_with_other_options_has_the_same_weights_and_is_another_object():
    rule = randomised(PortHamiltonianUpdate(modes=2, solver="rk4")).double()
    changed = rule.with_options(solver="euler")
    assert changed.config == rule.config | {"solver": "euler"}
    assert rule.config["solver"] == "rk4"
    for a, b in zip(rule.parameters(), changed.parameters(), strict=True):
        assert torch.equal(a, b)  # in double precision, to the last bit
        assert a.data_ptr() != b.data_ptr()
    grads = draws(3, 6, dtype=f64)
    assert not torch.equal(run(rule, grads)[0], run(changed, grads)[0])
    assert torch.equal(run(rule, grads)[0], run(changed.with_options(solver="rk4"), grads)[0])
    assert AdamUpdate(0.1).with_options(lr=0.2).config["lr"] == 0.2
    with pytest.raises(
        ValueError, match=r"Parameter `options` should be such that the weights stay as they are\. Found"
    ):
        rule.with_options(modes=3)


class Begins(SGDUpdate):
    """A rule whose one weight begins where an option says, and which has an option that counts at every step."""

    def __init__(self, *, start: float = 1.0, spread: float = 0.0, factor: float = 1.0) -> None:
        super().__init__(0.1)
        self.config, self.factor = {"start": start, "spread": spread, "factor": factor}, factor
        self.weight = nn.Parameter(start + spread * torch.randn(3))


def test_options_that_decide_new_weights_alone_are_refused_and_draws_do_not_count():
    rule = Begins(spread=0.5)
    state = torch.get_rng_state()
    changed = rule.with_options(factor=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert changed.factor == 2.0
    assert torch.equal(changed.weight, rule.weight)
    for options in ({"start": 2.0}, {"spread": 0.1, "factor": 3.0}):
        with pytest.raises(ValueError, match="`options` should be without any that decides the weights of a new rule"):
            rule.with_options(**options)


def test_other_options_leave_the_precision_of_buffers_alone():
    rule = PortHamiltonianUpdate()
    # decays are in float64 for parameters in float64; masks hold no numbers
    assert {x.dtype for x in rule.buffers() if x.is_floating_point()} == {f32, f64}
    for before, after in zip(rule.buffers(), rule.with_options(solver="euler").buffers(), strict=True):
        assert before.dtype == after.dtype
        assert torch.equal(before, after)


# -------------------- sizes


@pytest.mark.parametrize(
    ("rule", "n_parameters"),
    [
        (LSTMUpdate(), 5221),
        (LSTMUpdate(preprocess=True), 5301),
        (LSTMUpdate(normalize=True), 5301),
        (HamiltonianUpdate(), 19),
        (HamiltonianUpdate(normalize=True), 19),
        (HamiltonianUpdate(preprocess=True), 55),
        (SGDUpdate(), 0),
        (AdamUpdate(), 0),
    ],
    ids=repr,
)
def test_number_of_learned_parameters(rule, n_parameters):
    assert rule.n_parameters() == n_parameters
    rule.requires_grad_(False)
    assert rule.n_parameters() == 0


# -------------------- hand-designed rules are torch.optim's

TWINS = {
    "sgd": (SGDUpdate(0.05), torch.optim.SGD, {"lr": 0.05}),
    "momentum": (SGDUpdate(0.05, momentum=0.9), torch.optim.SGD, {"lr": 0.05, "momentum": 0.9}),
    "nesterov": (
        SGDUpdate(0.05, momentum=0.8, nesterov=True),
        torch.optim.SGD,
        {"lr": 0.05, "momentum": 0.8, "nesterov": True},
    ),
    "rmsprop": (RMSpropUpdate(0.01), torch.optim.RMSprop, {"lr": 0.01}),
    "rmsprop, large eps": (
        RMSpropUpdate(0.01, alpha=0.7, eps=0.5),
        torch.optim.RMSprop,
        {"lr": 0.01, "alpha": 0.7, "eps": 0.5},
    ),
    "adam": (AdamUpdate(0.02), torch.optim.Adam, {"lr": 0.02}),
    "adam, large eps": (
        AdamUpdate(0.02, betas=(0.5, 0.7), eps=0.5),
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.5, 0.7), "eps": 0.5},
    ),
    "adam without averages": (
        AdamUpdate(0.02, betas=(0.0, 0.0)),
        torch.optim.Adam,
        {"lr": 0.02, "betas": (0.0, 0.0)},
    ),
}


@over_dtypes
@pytest.mark.parametrize("name", TWINS)
def test_hand_designed_rule_equals_torch_optim(name, dtype):
    rule, optimizer_class, options = TWINS[name]
    A, start = draws(6, 6, dtype=dtype), draws(6, seed=1, dtype=dtype)
    A[:, -1] = 0  # a coordinate whose gradient is exactly zero
    theirs = nn.Parameter(start.clone())
    optimizer = optimizer_class([theirs], **options, foreach=False)
    ours, state = start.clone(), rule.init_state(start)
    for _ in range(50):
        optimizer.zero_grad()
        (A @ theirs - 1).square().mean().backward()
        optimizer.step()
        grad = 2 / 6 * A.T @ (A @ ours - 1)
        update, state = rule(grad, state)
        ours = ours + update
    # two roundings per operation, a dozen operations per step, 50 steps: under 2,000 units of rounding
    tolerance = 2000 * torch.finfo(dtype).eps
    torch.testing.assert_close(ours, theirs.detach(), rtol=tolerance, atol=tolerance)
    assert (ours - start)[:-1].abs().min() > 0.01


# -------------------- log-sign preprocessing


def test_log_sign_is_appendix_a():
    threshold = math.exp(-10)
    x = torch.tensor([1.0, -1.0, math.e, -1e-3, 0.5 * threshold, -0.1 * threshold, 0.0], dtype=f64)
    expected = [
        (0.0, 1.0),
        (0.0, -1.0),
        (0.1, 1.0),
        (-0.3 * math.log(10), -1.0),
        (-1.0, 0.5),
        (-1.0, -0.1),
        (-1.0, 0.0),
    ]
    torch.testing.assert_close(log_sign(x), torch.tensor(expected, dtype=f64))
    torch.testing.assert_close(log_sign(x[2:3], factor=5.0)[0, 0], 2 * log_sign(x[2:3])[0, 0])


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_log_sign_is_continuous_where_its_branches_meet(sign):
    threshold = sign * math.exp(-10)
    below, above = (log_sign(torch.tensor([threshold * (1 + offset)], dtype=f64)) for offset in (-1e-9, 1e-9))
    # both channels have slope one in units of the threshold, or a tenth of that
    torch.testing.assert_close(below, above, rtol=0, atol=3e-9)
    assert not torch.equal(below, above)


@over_dtypes
def test_log_sign_has_finite_derivatives_at_zero(dtype):
    x = torch.zeros(1, dtype=dtype, requires_grad=True)
    logarithm, sign = log_sign(x).unbind(-1)
    (d_log,) = torch.autograd.grad(logarithm, x, create_graph=True)
    (d_sign,) = torch.autograd.grad(sign, x, create_graph=True)
    assert d_log.item() == 0
    assert d_sign.item() == pytest.approx(math.exp(10))
    second = torch.autograd.grad(d_log + d_sign, x, allow_unused=True)[0]
    assert second is None or second.isfinite().all()


# -------------------- running moments


@pytest.mark.parametrize("decay", [0.0, 0.95, 0.999])
def test_averaging_weight_gives_the_bias_corrected_average(decay):
    values, average = draws(40), torch.zeros(1, dtype=f64)
    for step in range(1, 41):
        weight = averaging_weight(torch.tensor(float(step), dtype=f64), decay)
        average = (1 - weight) * average + weight * values[step - 1]
    powers = decay ** torch.arange(39, -1, -1, dtype=f64)
    torch.testing.assert_close(average[0], (powers * values).sum() / powers.sum())


def relative_moments(grad, mean_abs, scale, square, weight):
    """One step of the moments as rules take it: gradient and running square in units of the running scale."""
    scale, divisor, carried = running_scale(mean_abs, scale, weight)
    relative = grad / divisor
    return relative, scale, carried * square + weight * relative.square()


@pytest.mark.parametrize("decay", [0.5, 0.95])
def test_relative_moments_are_the_plain_ones_in_units_of_the_scale(decay):
    grads = draws(30, 5) * 10.0 ** draws(30, 1, seed=1)  # magnitudes over several decades
    scale, square = torch.zeros(1, dtype=f64), torch.zeros(5, dtype=f64)
    plain_scale, plain_square = torch.zeros(1, dtype=f64), torch.zeros(5, dtype=f64)
    for step, grad in enumerate(grads, start=1):
        weight = averaging_weight(torch.tensor([float(step)], dtype=f64), decay)
        relative, scale, square = relative_moments(grad, grad.abs().mean(-1, keepdim=True), scale, square, weight)
        plain_scale = (1 - weight) * plain_scale + weight * grad.abs().mean()
        plain_square = (1 - weight) * plain_square + weight * grad.square()
        torch.testing.assert_close(scale, plain_scale)
        torch.testing.assert_close(relative * scale, grad)
        torch.testing.assert_close(square * scale.square(), plain_square)


def test_coordinate_rms_is_the_root_of_the_bias_corrected_average():
    grads = draws(30, 5) * 10.0 ** draws(30, 1, seed=1)
    rms, square = torch.zeros(5, dtype=f64), torch.zeros(5, dtype=f64)
    for step, grad in enumerate(grads, start=1):
        weight = averaging_weight(torch.tensor([float(step)], dtype=f64), 0.9)
        rms = coordinate_rms(grad, rms, weight)
        square = (1 - weight) * square + weight * grad.square()
        torch.testing.assert_close(rms, square.sqrt())


@pytest.mark.parametrize("exponent", [-100, -20, 20, 60])
def test_moments_are_exact_under_powers_of_two(exponent):
    factor = 2.0**exponent  # 2^-100 squared is zero in float32, 2^60 to the power of four infinite
    scale = square = small_scale = small_square = rms = small_rms = torch.zeros(1)
    for step, grad in enumerate(draws(20, 4, dtype=f32), start=1):
        weight = averaging_weight(torch.tensor([float(step)]), 0.95)
        mean = grad.abs().mean(-1, keepdim=True)
        relative, scale, square = relative_moments(grad, mean, scale, square, weight)
        small, small_scale, small_square = relative_moments(
            factor * grad, factor * mean, small_scale, small_square, weight
        )
        assert torch.equal(relative, small)
        assert torch.equal(square, small_square)
        rms, small_rms = coordinate_rms(grad, rms, weight), coordinate_rms(factor * grad, small_rms, weight)
        assert torch.equal(factor * rms, small_rms)


# -------------------- the seed's Hamiltonian rule


def written_out(weights, grad, velocity, *, preprocess, normalize):
    """The formula of the rule, coordinate by coordinate, in NumPy; nothing shared with the library."""

    def channels(x):
        if not preprocess:
            return np.array([x])
        if abs(x) >= np.exp(-10):
            return np.array([np.log(abs(x)) / 10, np.sign(x)])
        return np.array([-1.0, np.exp(10) * x])

    def two_layers(name, x):
        first = weights[f"{name}.0.weight"] @ x + weights[f"{name}.0.bias"]
        return weights[f"{name}.2.weight"] @ np.maximum(first, 0) + weights[f"{name}.2.bias"]

    updates, velocities = [], []
    for grad_i, velocity_i in zip(grad, velocity, strict=True):
        q, w = channels(grad_i), channels(velocity_i)
        n = len(q)
        v, g = two_layers("v", q), two_layers("g", q)
        D = weights["D.weight"] @ np.concatenate([v, w])
        M = weights["L.weight"] @ weights["L.weight"].T
        h = np.concatenate([w - D[:n], (-v - D[n:] + g) @ M])
        updates.append(weights["update_map.weight"][0] @ np.concatenate([h[:n], q]))
        velocities.append(weights["velocity_map.weight"][0] @ h + weights["velocity_map.bias"][0])
    norm = np.linalg.norm(velocities) if normalize else 1.0
    return np.array(updates), np.array(velocities) / (norm or 1.0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("preprocess", [False, True])
def test_hamiltonian_rule_is_the_written_formula(preprocess, normalize):
    rule = HamiltonianUpdate(preprocess=preprocess, normalize=normalize, output_scale=0.5)
    randomised(rule, seed=3, scale=1.0)
    weights = {name: value.numpy() for name, value in rule.state_dict().items()}
    grads = draws(4, 6)
    grads[:, 0], grads[1] = 0.0, 1e-6 * grads[1]  # the other branch of the log-sign map
    state, velocity = rule.init_state(grads[0]), np.zeros(6)
    for grad in grads:
        update, state = rule(grad, state)
        expected, velocity = written_out(weights, grad.numpy(), velocity, preprocess=preprocess, normalize=normalize)
        torch.testing.assert_close(update, torch.from_numpy(0.5 * expected))
        torch.testing.assert_close(state.velocity, torch.from_numpy(velocity))


def test_normalised_velocity_has_unit_norm_over_each_tensor():
    rule = randomised(HamiltonianUpdate(normalize=True))
    _, state = run(rule, draws(3, 4, 7))
    torch.testing.assert_close(state.velocity.norm(dim=-1), torch.ones(4, dtype=f64))


def test_zero_velocity_is_divided_by_one():
    rule = randomised(HamiltonianUpdate(normalize=True))
    nn.init.zeros_(rule.velocity_map.weight)
    nn.init.zeros_(rule.velocity_map.bias)
    grad = draws(5).requires_grad_()
    _, state = rule(grad, rule.init_state(grad))
    assert torch.equal(state.velocity, torch.zeros(5, dtype=f64))
    derivatives = torch.autograd.grad(state.velocity.sum(), [grad, rule.velocity_map.weight])
    assert all(d.isfinite().all() for d in derivatives)


def test_unused_bias_of_the_mass_has_no_effect():
    rule, grads = randomised(HamiltonianUpdate()), draws(3, 5)
    before, _ = run(rule, grads)
    nn.init.constant_(rule.L.bias, 7.0)
    assert torch.equal(before, run(rule, grads)[0])


# -------------------- the LSTM rule


def inputs_of_lstm(grads, options):
    """What the cells see of gradients (n_steps, n)."""
    if options.get("preprocess"):
        return log_sign(grads)
    if not options.get("normalize"):
        return grads.unsqueeze(-1)
    powers = 0.95 ** torch.arange(len(grads), dtype=f64)
    mean, square = (
        torch.stack([powers[: t + 1].flip(0) @ x[: t + 1] / powers[: t + 1].sum() for t in range(len(x))])
        for x in (grads, grads.square())
    )
    return torch.stack((grads, mean), -1) / square.sqrt().unsqueeze(-1)


@pytest.mark.parametrize("options", [{}, {"preprocess": True}, {"normalize": True}])
def test_lstm_rule_is_a_two_layer_lstm_with_a_linear_output(options):
    rule = randomised(LSTMUpdate(**options, output_scale=0.5), scale=0.5)
    reference = nn.LSTM(2 if options else 1, 20, num_layers=2).to(f64)
    for layer, cell in enumerate((rule.cell1, rule.cell2)):
        for name, value in cell.state_dict().items():
            getattr(reference, f"{name}_l{layer}").data.copy_(value)
    grads = draws(5, 7)
    hidden, (h, c) = reference(inputs_of_lstm(grads, options))
    updates, state = run(rule, grads)
    torch.testing.assert_close(updates, 0.5 * rule.output(hidden).squeeze(-1))
    torch.testing.assert_close(torch.stack([state.h1, state.h2]), h)
    torch.testing.assert_close(torch.stack([state.c1, state.c2]), c)


@pytest.mark.parametrize("exponent", [-100, -20, 20, 60])
def test_normalized_lstm_rule_is_exact_under_powers_of_two(exponent):
    rule, grads = randomised(LSTMUpdate(normalize=True), dtype=f32), draws(6, 7, dtype=f32)
    grads[:3, 0] = 0.0  # a gradient that is zero at first
    assert torch.equal(run(rule, grads)[0], run(rule, 2.0**exponent * grads)[0])


def test_normalized_lstm_rule_forgets_a_gradient_however_long_ago_it_was():
    rule = randomised(LSTMUpdate(normalize=True), dtype=f32)
    state = rule.init_state(torch.zeros(1))
    start = state._replace(mean=torch.tensor([4e-45]), rms=torch.tensor([8e-45]), step=torch.tensor([5000.0]))
    assert torch.equal(rule(torch.zeros(1), start)[0], rule(torch.zeros(1), state)[0])


def test_normalized_lstm_rule_has_finite_derivatives_where_gradients_are_zero():
    rule, grads = randomised(LSTMUpdate(normalize=True)), torch.zeros(3, 4, dtype=f64, requires_grad=True)
    first = torch.autograd.grad(run(rule, grads)[0].square().sum(), [grads, *rule.parameters()], create_graph=True)
    second = torch.autograd.grad(sum(x.square().sum() for x in first), list(rule.parameters()))
    assert all(x.isfinite().all() for x in (*first, *second))


# -------------------- the contract of every rule


@over_rules
def test_rule_is_pure(name):
    rule, param = RULES[name](), draws(2, 5, seed=9)
    _, state = run(rule, draws(3, 2, 5), param=param)
    inputs = [draws(2, 5, seed=8), param, *state]
    copies = [x.clone() for x in inputs]
    weights = {key: value.clone() for key, value in rule.state_dict().items()}
    generator = torch.get_rng_state()
    results = [rule(inputs[0], state, param=param, shape=(5,)) for _ in range(2)]
    (first, first_state), (second, second_state) = results
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(first_state, second_state, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))
    assert all(torch.equal(weights[key], value) for key, value in rule.state_dict().items())
    assert torch.equal(generator, torch.get_rng_state())


@over_rules
def test_batch_axes_are_independent_tasks(name):
    rule, grads, param = RULES[name](), draws(4, 2, 3, 6), draws(2, 3, 6, seed=1)
    together, state = run(rule, grads, param=param, shape=(2, 3))
    for i in range(2):
        for j in range(3):
            alone, alone_state = run(rule, grads[:, i, j], param=param[i, j], shape=(2, 3))
            # batched and single matrix products may round differently: a few units of float64
            torch.testing.assert_close(together[:, i, j], alone, rtol=1e-11, atol=1e-13)
            for a, b in zip(state, alone_state, strict=True):
                torch.testing.assert_close(a[i, j], b, rtol=1e-11, atol=1e-13)


@over_dtypes
@pytest.mark.parametrize("shape", [(), (3,), (2, 3), (0,), (3, 0)], ids=str)
@over_rules
def test_update_has_shape_and_dtype_of_the_gradient_and_state_is_float32_or_better(name, shape, dtype):
    rule, grad = RULES[name](), draws(*shape, 4, dtype=dtype)
    update, state = rule(grad, rule.init_state(grad), shape=(4,))
    assert update.shape == grad.shape
    assert update.dtype == dtype
    assert all(torch.promote_types(s.dtype, f32) == s.dtype for s in state)
    assert all(s.shape[: len(shape)] == shape for s in state)


@over_rules
def test_empty_parameters_are_taken(name):
    rule, grad = RULES[name](), torch.zeros(3, 0, dtype=f64)
    update, state = rule(grad, rule.init_state(grad), param=grad, shape=(0,))
    assert update.shape == grad.shape
    assert all(s.isfinite().all() for s in state)


@pytest.mark.parametrize("coordinate", [0, 3])
@over_rules
def test_rule_says_truly_whether_it_crosses_coordinates(name, coordinate):
    rule, grads, param = RULES[name](), draws(3, 6), draws(6, seed=1)
    perturbed = grads.clone()
    perturbed[0, coordinate] *= -2.5
    (updates, _), (other, _) = (run(rule, g, param=param) for g in (grads, perturbed))
    is_same = (updates == other).all(0)
    assert not is_same[coordinate]
    others = torch.arange(6) != coordinate
    # bit for bit: the same operations on the same numbers
    assert (not is_same[others].any()) if rule.crosses_coordinates else is_same[others].all()


@over_rules
def test_rule_is_rebuilt_from_its_configuration_and_weights(name):
    rule, grads = RULES[name](), draws(3, 5)
    rebuilt = type(rule)(**json.loads(json.dumps(rule.config))).to(f64)
    rebuilt.load_state_dict(rule.state_dict())
    assert rebuilt.config == rule.config
    assert rebuilt.crosses_coordinates == rule.crosses_coordinates
    assert torch.equal(run(rule, grads)[0], run(rebuilt, grads)[0])
    assert UpdateRule.registry[type(rule).__name__] is type(rule)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, f32, f64], ids=str)
def test_state_dtype_is_float32_or_better(dtype):
    assert state_dtype(dtype) == (f64 if dtype == f64 else f32)


# -------------------- errors

BAD = [
    (SGDUpdate, {"lr": -0.1}, r"`lr` should be a non-negative number. Found `lr = -0.1`"),
    (SGDUpdate, {"momentum": 1.0}, r"`momentum` should be in \[0, 1\). Found `momentum = 1.0`"),
    (SGDUpdate, {"nesterov": True}, r"`momentum` should be positive where `nesterov` is set"),
    (SGDUpdate, {"momentum": 0.9, "nesterov": "no"}, r"`nesterov` should be True or False. Found `nesterov = 'no'`"),
    (LSTMUpdate, {"preprocess": "no"}, r"`preprocess` should be True or False. Found `preprocess = 'no'`"),
    (LSTMUpdate, {"normalize": 1}, r"`normalize` should be True or False. Found `normalize = 1`"),
    (LSTMUpdate, {"preprocess": True, "normalize": True}, r"`preprocess` should be False where `normalize` is set"),
    (HamiltonianUpdate, {"preprocess": 0.9}, r"`preprocess` should be True or False. Found `preprocess = 0.9`"),
    (HamiltonianUpdate, {"normalize": 1}, r"`normalize` should be True or False. Found `normalize = 1`"),
    (RMSpropUpdate, {"lr": float("nan")}, r"`lr` should be a non-negative number. Found `lr = nan`"),
    (RMSpropUpdate, {"alpha": 1.5}, r"`alpha` should be in \[0, 1\). Found `alpha = 1.5`"),
    (RMSpropUpdate, {"eps": -1.0}, r"`eps` should be a non-negative number. Found `eps = -1.0`"),
    (AdamUpdate, {"lr": -1}, r"`lr` should be a non-negative number. Found `lr = -1`"),
    (AdamUpdate, {"betas": (0.9, 1.0)}, r"`betas` should be two numbers in \[0, 1\). Found `betas = \(0.9"),
    (AdamUpdate, {"betas": (0.9,)}, r"`betas` should be two numbers"),
    (AdamUpdate, {"eps": -1e-8}, r"`eps` should be a non-negative number. Found `eps = -1e-08`"),
    (LSTMUpdate, {"hidden_size": 0}, r"`hidden_size` should be a positive integer. Found `hidden_size = 0`"),
    (LSTMUpdate, {"output_scale": 0.0}, r"`output_scale` should be a positive number. Found `output_scale = 0.0`"),
    (
        HamiltonianUpdate,
        {"output_scale": -1},
        r"`output_scale` should be a positive number. Found `output_scale = -1`",
    ),
    (PortHamiltonianUpdate, {"modes": 0}, r"`modes` should be an integer of at least 1. Found `modes = 0`"),
    (PortHamiltonianUpdate, {"modes": "two"}, r"`modes` should be an integer of at least 1. Found `modes = 'two'`"),
    (PortHamiltonianUpdate, {"coordinatewise": 1}, r"`coordinatewise` should be True or False. Found"),
    (AdamUpdate, {"lr": "fast"}, r"`lr` should be a non-negative number. Found `lr = 'fast'`"),
    (PortHamiltonianUpdate, {"solver": "rk5"}, r"`solver` should be one of .*rk4.*. Found `solver = 'rk5'`"),
    (PortHamiltonianUpdate, {"decay": 1.0}, r"`decay` should be in \[0, 1\). Found `decay = 1.0`"),
    (
        PortHamiltonianUpdate,
        {"hidden": (8, 0)},
        r"`hidden` should be a list of positive widths. Found `hidden = \(8, 0\)`",
    ),
    (
        PortHamiltonianUpdate,
        {"time_scales": ()},
        r"`time_scales` should be a list of positive numbers. Found `time_scales = \(\)`",
    ),
    (PortHamiltonianUpdate, {"time_scales": (1, -1)}, r"`time_scales` should be a list of positive numbers"),
    (
        PortHamiltonianUpdate,
        {"initial_kappa": 0},
        r"`initial_kappa` should be a positive number. Found `initial_kappa = 0`",
    ),
    (
        PortHamiltonianUpdate,
        {"mass": "heavy"},
        r"`mass` should be 'unit' or 'network'. Found `mass = 'heavy'`",
    ),
    (
        PortHamiltonianUpdate,
        {"potential": None},
        r"`potential` should be 'none' or 'network'. Found `potential = N",
    ),
    (PortHamiltonianUpdate, {"hidden": 16}, r"`hidden` should be a list of positive widths. Found `hidden = 16`"),
    (PortHamiltonianUpdate, {"time_scales": 3.0}, r"`time_scales` should be a list of .* Found `time_scales = 3.0`"),
    (
        PortHamiltonianUpdate,
        {"solver": ["rk4"]},
        r"`solver` should be the name of a method. Found `solver = \['rk4'\]`",
    ),
    (AdamUpdate, {"betas": 0.9}, r"`betas` should be two numbers in \[0, 1\). Found `betas = 0.9`"),
    (PortHamiltonianUpdate, {"friction": "none"}, r"`friction` should be 'modulated', 'network' or 'constant'"),
    (PortHamiltonianUpdate, {"port": 1}, r"`port` should be 'modulated', 'network' or 'constant'. Found `port = 1`"),
]


@pytest.mark.parametrize(("rule_class", "options", "match"), BAD)
def test_options_out_of_range_are_refused_by_name_and_value(rule_class, options, match):
    with pytest.raises(ValueError, match=match):
        rule_class(**options)


@pytest.mark.parametrize("rule_class", [AdamUpdate, LSTMUpdate, HamiltonianUpdate, PortHamiltonianUpdate])
def test_unknown_options_are_refused(rule_class):
    with pytest.raises(TypeError, match="unexpected keyword argument 'learning_rate'"):
        rule_class(learning_rate=0.1)


@pytest.mark.parametrize("calls", [lambda self: None, nn.Module.__init__], ids=["nothing", "that of Module"])
def test_rule_that_does_not_initialise_its_base_is_refused_by_its_name(monkeypatch, calls):
    monkeypatch.setattr(UpdateRule, "registry", dict(UpdateRule.registry))

    class Forgetful(SGDUpdate):
        def __init__(self):
            calls(self)
            self.rate = 0.1

    with pytest.raises(TypeError, match=r"`Forgetful\.__init__` should begin with `super\(\)\.__init__\(\.\.\.\)`"):
        Forgetful()


@pytest.mark.parametrize("given", [{"gain": 0.5}, {"gain": 0.5, "lr": 0.1}], ids=["alone", "beside another"])
def test_options_that_a_rule_does_not_hand_on_are_refused_by_their_name(monkeypatch, given):
    monkeypatch.setattr(UpdateRule, "registry", dict(UpdateRule.registry))

    class Gain(SGDUpdate):
        def __init__(self, gain=1.0, **options):
            super().__init__(**options)
            self.gain = gain

    assert "gain" not in Gain(lr=0.1).config  # what is not given may be left to the class
    with pytest.raises(TypeError, match=r"Gain\.__init__` should hand `gain` on to `super\(\)\.__init__`"):
        Gain(**given)


def test_options_may_be_passed_on_by_place(monkeypatch):
    monkeypatch.setattr(UpdateRule, "registry", dict(UpdateRule.registry))

    class Logged(SGDUpdate):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)

    assert Logged(0.1, momentum=0.5).config == SGDUpdate(0.1, momentum=0.5).config
