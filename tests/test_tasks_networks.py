"""Networks other than perceptrons as tasks."""

import math

import pytest
import torch
from torch import nn

from odeopt.tasks import Family, ImageNetwork, Mixture, SequencePrediction
from odeopt.tasks.networks import ARCHITECTURES, SEQUENCE_ARCHITECTURES, _Recurrence, _SelfAttention
from odeopt.tasks.random import normal

INDICES = torch.tensor([3, 0, 7])


def images(architecture, **options):
    return ImageNetwork("digits", architecture, **({"width": 6, "depth": 2, "batch_size": 5} | options))


TASKS = {
    **{name: lambda name=name: images(name) for name in ARCHITECTURES},
    **{f"sequence {name}": lambda name=name: SequencePrediction(name, width=6) for name in SEQUENCE_ARCHITECTURES},
}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]()


def losses(task, indices, *, step=0, seed=0, params_seed=0):
    return task.loss(task.init_params(indices, params_seed), task.sample_batch(indices, step, seed))


def test_problems_depend_on_their_index_alone(task):
    together = losses(task, INDICES)
    alone = torch.cat([losses(task, INDICES[k : k + 1]) for k in range(3)])
    # batched matrix products sum in another order
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)
    assert together.unique().numel() == 3


def test_batches_change_with_step_and_seed(task):
    batches = [task.sample_batch(INDICES, step, seed)[0] for step, seed in ((0, 0), (1, 0), (0, 1))]
    assert not torch.equal(batches[0], batches[1])
    assert not torch.equal(batches[0], batches[2])


def test_second_derivatives_reach_every_parameter(task):
    params = {name: p.requires_grad_() for name, p in task.init_params(INDICES, 0).items()}
    loss = task.loss(params, task.sample_batch(INDICES, 0, 0)).sum()
    grads = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    seconds = torch.autograd.grad(sum(g.square().sum() for g in grads), list(params.values()))
    for name, grad, second in zip(params, grads, seconds, strict=True):
        assert second.isfinite().all(), name
        assert grad.abs().max() > 0, name


def test_gradient_descent_lowers_the_loss(task):
    params = task.init_params(INDICES, 0)
    first = last = None
    for _ in range(25):
        params = {name: p.detach().requires_grad_() for name, p in params.items()}
        loss = task.loss(params, task.sample_batch(INDICES, 0, 0))  # one batch: no noise
        first, last = (loss, loss) if first is None else (first, loss)
        grads = torch.autograd.grad(loss.sum(), list(params.values()))
        params = {name: p - 0.03 * g for (name, p), g in zip(params.items(), grads, strict=True)}
    assert (last < first).all()


def test_splits_have_no_image_in_common():
    train, evaluation = (images("normalised", split=split) for split in ("meta-train", "evaluation"))
    assert len(train.images) + len(evaluation.images) > 1000
    rows = {tuple(row) for row in train.images.tolist()} & {tuple(row) for row in evaluation.images.tolist()}
    # a few of the digits come twice in the data set itself
    assert len(rows) < 5
    assert not torch.equal(train.sample_batch(INDICES, 0, 0)[0], evaluation.sample_batch(INDICES, 0, 0)[0])


def test_an_autoencoder_is_judged_by_its_images():
    task = images("autoencoder")
    x, target = task.sample_batch(INDICES, 0, 0)
    assert torch.equal(x, target)
    params = {name: torch.zeros_like(p) for name, p in task.init_params(INDICES, 0).items()}
    torch.testing.assert_close(task.loss(params, (x, target)), x.square().sum(-1).mean(-1) / 2)


def test_causal_attention_does_not_look_ahead():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    changed = x.clone()
    changed[:, 3:] += 1
    for is_causal in (True, False):
        attention = _SelfAttention(8, 2, is_causal=is_causal)
        is_same = torch.allclose(attention(x)[:, :3], attention(changed)[:, :3], atol=1e-6)
        assert is_same == is_causal


def test_attention_is_what_torch_computes():
    torch.manual_seed(0)
    ours, theirs = _SelfAttention(8, 2, is_causal=False), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.inputs.weight)
        theirs.in_proj_bias.copy_(ours.inputs.bias)
        theirs.out_proj.load_state_dict(ours.outputs.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_the_recurrence_is_what_torch_computes():
    torch.manual_seed(0)
    ours, theirs = _Recurrence(4, "tanh"), nn.RNN(4, 4, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.inputs.weight)
        theirs.bias_ih_l0.copy_(ours.inputs.bias)
        theirs.weight_hh_l0.copy_(ours.hidden.weight)
        theirs.bias_hh_l0.zero_()
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x)[0])


def test_sequences_follow_their_chain():
    task = SequencePrediction("recurrent", n_symbols=3, length=200, batch_size=200)
    symbols, following = task.sample_batch(INDICES, 0, 0)
    assert torch.equal(symbols[..., 1:], following[..., :-1])
    before, last, nxt = symbols[0, :, :-1].flatten(), symbols[0, :, 1:].flatten(), following[0, :, 1:].flatten()
    counts = torch.zeros(3, 3, 3).index_put_((before, last, nxt), torch.ones(()), accumulate=True)
    frequencies = counts / counts.sum(-1, keepdim=True)
    by_last, by_before = 2 * normal(INDICES, (2, 3, 3), seed=0, stream="sequence/chain")[0]
    expected = (by_before.unsqueeze(1) + by_last).softmax(-1)
    n = counts.sum(-1, keepdim=True)
    # five sigma of a frequency among n, and one count
    assert ((frequencies - expected).abs() < 5 * (expected * (1 - expected) / n).sqrt() + 1 / n).all()
    assert not torch.equal(symbols[0], symbols[1])


def test_the_first_loss_is_near_that_of_guessing():
    task = SequencePrediction("recurrent", n_symbols=8)
    assert losses(task, torch.arange(20)).mean() == pytest.approx(math.log(8), rel=0.2)


def test_they_come_in_mixtures():
    mixture = Mixture([Family(ImageNetwork, {"dataset": "digits"}, {"architecture": ["residual"], "width": [4]})])
    draw = mixture.draw(0, seed=0)
    assert draw.task.describe()["architecture"] == "residual"
    assert losses(draw.task, draw.indices).shape == draw.indices.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: images("pyramid"), r"`architecture` should be one of normalised, .*Found `architecture = 'pyramid'`"),
        (lambda: images("attention", width=5), r"`width` should be even for two heads. Found `width = 5`"),
        (lambda: images("residual", width=0), r"`width` should be positive. Found `width = 0`"),
        (lambda: images("residual", depth=0), r"`depth` should be positive. Found `depth = 0`"),
        (
            lambda: images("residual", activation="swish"),
            r"`activation` should be .* Found `activation = 'swish'`",
        ),
        (lambda: images("residual", split="test"), r"`split` should be one of .* Found `split = 'test'`"),
        (lambda: images("residual", batch_size=0), r"`batch_size` should be positive. Found `batch_size = 0`"),
        (lambda: SequencePrediction("residual"), r"`architecture` should be one of attention, recurrent"),
        (lambda: SequencePrediction(n_symbols=1), r"`n_symbols` should be at least 2. Found `n_symbols = 1`"),
        (lambda: SequencePrediction(length=1), r"`length` should be at least 2. Found `length = 1`"),
        (lambda: SequencePrediction(batch_size=0), r"`batch_size` should be positive. Found `batch_size = 0`"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
