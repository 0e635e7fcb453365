"""The LSTM rule in chunks: the numbers of two LSTM cells, every derivative of them, and few tensors kept."""

import pytest
import torch
from rule_toys import draws, randomised
from torch import nn
from torch.func import functional_call, grad, hessian, jacrev, vmap

from odeopt import LearnedOptimizer
from odeopt.rules import LSTMUpdate, lstm

f32, f64 = torch.float32, torch.float64
# torch's own forward mode compiles a few formulas with torch.jit.script, and warns of itself
forward_mode = pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated:DeprecationWarning")
over_preprocess = pytest.mark.parametrize("preprocess", [False, True])
over_normalize = pytest.mark.parametrize("normalize", [False, True])


@pytest.fixture
def chunked(monkeypatch):
    """Chunks of three coordinates, so that seven make three chunks, the last one short."""
    monkeypatch.setattr(lstm, "_CHUNK", 3)


def setup(*shape, preprocess=True, requires_grad=False, seed=0):
    rule = randomised(LSTMUpdate(hidden_size=4, preprocess=preprocess))
    g = draws(*shape, seed=seed).requires_grad_(requires_grad)
    state = [draws(*shape, 4, seed=seed + 1 + i).requires_grad_(requires_grad) for i in range(4)]
    return rule, g, lstm.LSTMState(*state)


def scalar(update, state):
    """A function of all outputs whose derivatives vanish nowhere."""
    return sum((x * (i + 1)).sin().sum() for i, x in enumerate((update, *state)))


def derivatives(rule, g, state):
    """First derivatives, and second ones of a function of the first."""
    inputs = [g, *state, *rule.parameters()]
    first = torch.autograd.grad(scalar(*rule(g, state)), inputs, create_graph=True)
    second = torch.autograd.grad(sum(d.sin().sum() for d in first), inputs)
    cheap = torch.autograd.grad(scalar(*rule(g, state)), inputs)  # no second derivatives wanted: in chunks
    return first, second, cheap


@over_preprocess
@pytest.mark.parametrize("dtype", [f32, f64], ids=str)
def test_update_is_that_of_two_lstm_cells(preprocess, dtype):
    n = lstm._CHUNK + 5
    rule = LSTMUpdate(preprocess=preprocess, output_scale=0.5).to(dtype)
    g, state = draws(n, dtype=dtype), lstm.LSTMState(*(draws(n, 20, seed=i, dtype=dtype) for i in range(4)))
    x = lstm.log_sign(g) if preprocess else g.unsqueeze(1)
    h1, c1 = rule.cell1(x, (state.h1, state.c1))
    h2, c2 = rule.cell2(h1, (state.h2, state.c2))
    expected = 0.5 * rule.output(h2).squeeze(1), (h1, c1, h2, c2)
    update, new = rule(g, state)
    # sums of up to 40 products of numbers of size one, a few functions of them: about ten roundings
    tolerance = {"rtol": 0, "atol": 50 * torch.finfo(dtype).eps}
    torch.testing.assert_close(update, expected[0], **tolerance)
    for ours, theirs in zip(new, expected[1], strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@over_preprocess
def test_chunks_change_no_value_and_no_derivative(preprocess, chunked, monkeypatch):
    rule, g, state = setup(7, preprocess=preprocess, requires_grad=True)
    in_chunks = rule(g, state), *derivatives(rule, g, state)
    monkeypatch.setattr(lstm, "_CHUNK", 7)
    whole = rule(g, state), *derivatives(rule, g, state)
    # equal up to the order of sums; log_sign's second derivatives reach 1e3
    torch.testing.assert_close(in_chunks, whole, rtol=1e-9, atol=1e-9)
    for first, cheap in zip(in_chunks[1], in_chunks[3], strict=True):
        torch.testing.assert_close(first, cheap, rtol=1e-12, atol=1e-12)
        assert cheap.abs().max() > 1e-6


def test_derivatives_are_those_of_finite_differences(chunked):
    rule, _, state = setup(4, requires_grad=True)
    x, weights = draws(4, 2).requires_grad_(), (*rule._stacked(rule.cell1), *rule._stacked(rule.cell2))
    inputs = (x, *state, *(w.detach().requires_grad_() for w in weights))
    assert torch.autograd.gradcheck(lstm._Cells.apply, inputs)
    assert torch.autograd.gradgradcheck(lstm._Cells.apply, inputs)


@forward_mode
def test_tangents_of_gradient_state_and_weights_are_those_of_finite_differences(chunked):
    rule, g, state = setup(4, preprocess=False, requires_grad=True)
    weights = dict(rule.named_parameters())

    def step(g, *inputs):
        of_rule = dict(zip(weights, inputs[4:], strict=True))
        update, new = functional_call(rule, of_rule, (g, lstm.LSTMState(*inputs[:4])))
        return update, *new

    assert torch.autograd.gradcheck(step, (g, *state, *weights.values()), check_forward_ad=True)


@forward_mode
def test_forward_mode_agrees_with_reverse_mode(chunked):
    rule, g, state = setup(5)
    # tanh keeps the gradient away from log_sign's kink, and the second derivatives of a sum are not zero
    function = lambda g: rule(g.tanh(), state)[0].sin().sum()  # noqa: E731
    torch.testing.assert_close(hessian(function)(g), jacrev(jacrev(function))(g))


@pytest.mark.parametrize("in_dims", [(0, 0), (0, None), (None, 0)])
@pytest.mark.parametrize("is_grad_enabled", [True, False])
def test_vmap_gives_every_task_its_own_step(in_dims, is_grad_enabled, chunked):
    rule, g, state = setup(2, 5)
    arguments = [
        g if in_dims[0] == 0 else g[0],
        state if in_dims[1] == 0 else lstm.LSTMState(*(s[0] for s in state)),
    ]
    with torch.set_grad_enabled(is_grad_enabled):
        batched = vmap(rule, in_dims=in_dims)(*arguments)
        for k in range(2):
            single = rule(g[k] if in_dims[0] == 0 else g[0], lstm.LSTMState(*(s[k * (in_dims[1] == 0)] for s in state)))
            for ours, theirs in zip((batched[0], *batched[1]), (single[0], *single[1]), strict=True):
                torch.testing.assert_close(ours[k], theirs)


def test_vmap_of_meta_gradients(chunked):
    rule, g, state = setup(2, 5)
    weights = {name: torch.stack((w, 2 * w)).detach() for name, w in rule.named_parameters()}
    meta_gradient = grad(lambda weights, g, state: scalar(*functional_call(rule, weights, (g, state))))
    batched = vmap(meta_gradient)(weights, g, state)
    for k in range(2):
        single = meta_gradient({n: w[k] for n, w in weights.items()}, g[k], lstm.LSTMState(*(s[k] for s in state)))
        for name in single:
            torch.testing.assert_close(batched[name][k], single[name])


def test_long_tensors_keep_their_inputs_only():
    n, kept = 2 * lstm._CHUNK, {}

    def remember(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    rule = LSTMUpdate()
    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        g = torch.randn(n)
        update, _ = rule(g, rule.init_state(g))
        # the gradient, one zero state that four names share, the new h2 for the output, and weights
        assert sum(kept.values()) < 4 * (n * (1 + 20 + 20) + 4 * rule.n_parameters())
        update.sum().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in rule.parameters())


def test_weights_have_the_names_of_the_cells():
    names = [f"cell{k}.{kind}_{where}" for k in (1, 2) for kind in ("weight", "bias") for where in ("ih", "hh")]
    assert sorted(LSTMUpdate().state_dict()) == sorted([*names, "output.weight", "output.bias"])


DTYPES = [torch.bfloat16, torch.float16, f32, f64]


@pytest.mark.parametrize("kept", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, f32, f64], ids=str)
@pytest.mark.parametrize("weights", DTYPES, ids=str)
@over_normalize
def test_every_dtype_of_weights_parameters_and_state_goes_together(weights, dtype, kept, normalize):
    param = nn.Parameter(torch.ones(3, dtype=dtype))
    torch.manual_seed(0)
    optimizer = LearnedOptimizer([param], LSTMUpdate(normalize=normalize).to(weights), state_dtype=kept)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    reference = nn.Parameter(torch.ones(3, dtype=f64))
    torch.manual_seed(0)
    wanted = LearnedOptimizer([reference], LSTMUpdate(normalize=normalize).to(f64))
    for _ in range(2):
        reference.grad = torch.ones_like(reference)
        wanted.step()
    change, expected = (1 - x.detach().double() for x in (param, reference))
    coarsest = max(torch.finfo(x).eps for x in (weights, dtype, kept or dtype))
    torch.testing.assert_close(change, expected, rtol=0, atol=4 * coarsest)
