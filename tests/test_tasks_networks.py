"""Networks other than perceptrons as tasks."""

import math

import pytest
import torch
from torch import nn

from odeopt.tasks import (
    Autoencoder,
    CoordinateNetwork,
    ImageNetwork,
    Mixture,
    ModuleTask,
    ScaledTask,
    SequencePrediction,
    TaskFamily,
    TextRecurrence,
    TextTransformer,
    VisionTransformer,
)
from odeopt.tasks.autoencoders import LIKELIHOODS
from odeopt.tasks.layers import CELLS, NORMS, AsPatches, Recurrence, Residual, SelfAttention
from odeopt.tasks.networks import ARCHITECTURES
from odeopt.tasks.random import normal
from odeopt.tasks.sequences import SEQUENCE_ARCHITECTURES

INDICES = torch.tensor([3, 0, 7])


def images(architecture, **options):
    return ImageNetwork("digits", architecture, **({"width": 6, "depth": 2, "batch_size": 5} | options))


TASKS = {
    **{name: lambda name=name: images(name) for name in ARCHITECTURES},
    **{f"sequence {name}": lambda name=name: SequencePrediction(name, width=6) for name in SEQUENCE_ARCHITECTURES},
    **{f"vit {name}": lambda name=name: vit(norm=name) for name in NORMS},
    **{f"text {name}": lambda name=name: text(norm=name) for name in NORMS},
    "text of small weights": lambda: text(init_std=0.1, depth=1, expansion=2),
    **{f"{name} vae": lambda name=name: autoencoder(likelihood=name) for name in LIKELIHOODS},
    "bottleneck": lambda: autoencoder(is_variational=False, likelihood="gaussian"),
    "waves": lambda: coordinates(n_channels=3),
    "waves at few points": lambda: coordinates(n_features=0, n_points=9),
    "picture": lambda: coordinates(dataset="digits"),
    "text masked": lambda: text(objective="masked"),
    **{f"text {name}": lambda name=name: TextRecurrence(cell=name, width=6, context=8, batch_size=5) for name in CELLS},
}


def vit(**options):
    return VisionTransformer("digits", **({"patch": 2, "width": 6, "depth": 2, "batch_size": 5} | options))


def autoencoder(**options):
    return Autoencoder("digits", **({"width": 6, "depth": 2, "n_latent": 2, "batch_size": 5} | options))


def coordinates(**options):
    return CoordinateNetwork(**({"width": 6, "n_features": 4, "batch_size": 20} | options))


def text(**options):
    return TextTransformer(**({"width": 6, "depth": 2, "context": 8, "batch_size": 5} | options))


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


def test_names_of_problems_are_all_there_is_to_them(task):
    for _ in range(2):
        first, second = (task.sample_batch(INDICES, 2, seed=5) for _ in range(2))
        assert all(map(torch.equal, first, second))
        assert torch.equal(losses(task, INDICES, step=1, seed=4), losses(task, INDICES, step=1, seed=4))
        torch.rand(1)  # the caller's random numbers are no matter


def test_adam_lowers_the_loss(task):
    params = {name: p.clone().requires_grad_() for name, p in task.init_params(INDICES, 0).items()}
    optimizer = torch.optim.Adam(params.values(), lr=5e-3)
    batch, values = task.sample_batch(INDICES, 0, 0), []  # one batch: no noise
    for _ in range(20):
        optimizer.zero_grad()
        values.append(task.loss(params, batch))
        values[-1].sum().backward()
        optimizer.step()
    assert (values[-1] < values[0]).all()


def test_splits_have_no_image_in_common():
    train, evaluation = (images("normalised", split=split) for split in ("meta-train", "evaluation"))
    assert len(train.members) + len(evaluation.members) == len(train.images)
    assert not set(train.members.tolist()) & set(evaluation.members.tolist())
    rows = {tuple(row) for row in train.images[train.members].tolist()}
    rows &= {tuple(row) for row in evaluation.images[evaluation.members].tolist()}
    # a few of the digits come twice in the data set itself
    assert len(rows) < 5
    assert not torch.equal(train.sample_batch(INDICES, 0, 0)[0], evaluation.sample_batch(INDICES, 0, 0)[0])


def test_an_autoencoder_is_judged_by_its_images():
    task = images("autoencoder")
    x, target = task.sample_batch(INDICES, 0, 0)
    assert torch.equal(x, target)
    params = {name: torch.zeros_like(p) for name, p in task.init_params(INDICES, 0).items()}
    torch.testing.assert_close(task.loss(params, (x, target)), x.square().sum(-1).mean(-1) / 2)


@pytest.mark.parametrize("depth", [1, 3])
def test_residual_convolutions_double_their_channels_and_do_not_see_the_scale_of_a_batch(depth):
    task = images("residual-convolutional", depth=depth, width=4)
    convolutions = [shape for shape in task.param_shapes.values() if shape[2:] == (3, 3)]
    assert [shape[0] for shape in convolutions] == [4, 4, 4, 8, 8, 16, 16][: 2 * depth + 1]
    params, (x, _) = task.init_params(INDICES[:1], 0), task.sample_batch(INDICES[:1], 0, 0)
    params = {name: p[0] for name, p in params.items()}
    outputs = [torch.func.functional_call(task.module, params, (scale * x[0],)) for scale in (10, 30)]
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-3)  # up to the eps of the norms
    # examples of a batch see each other
    first = torch.func.functional_call(task.module, params, (x[0, :4],))[0]
    assert not torch.allclose(first, torch.func.functional_call(task.module, params, (x[0],))[0], atol=1e-3)


def test_patches_are_squares_of_the_image():
    image = torch.arange(36.0).view(6, 6)
    patches = AsPatches(3)(image.flatten().unsqueeze(0))[0]
    for k, corner in enumerate(((0, 0), (0, 3), (3, 0), (3, 3))):
        assert torch.equal(patches[k].view(3, 3), image[corner[0] : corner[0] + 3, corner[1] : corner[1] + 3])


def test_norms_stand_where_they_are_named():
    torch.manual_seed(0)
    block, x = nn.Linear(4, 4), torch.randn(5, 4)
    normed = nn.functional.layer_norm(x, (4,))
    torch.testing.assert_close(Residual(4, block, "pre")(x), x + block(normed))
    torch.testing.assert_close(Residual(4, block, "post")(x), nn.functional.layer_norm(x + block(x), (4,)))
    torch.testing.assert_close(Residual(4, block, "none")(x), x + block(x))


@pytest.mark.parametrize(("cell", "theirs"), [("gru", nn.GRU), ("lstm", nn.LSTM)])
def test_gated_cells_are_what_torch_computes(cell, theirs):
    torch.manual_seed(0)
    ours, theirs = CELLS[cell](4, "tanh"), theirs(4, 4, batch_first=True)
    with torch.no_grad():
        theirs.weight_ih_l0.copy_(ours.inputs.weight)
        theirs.bias_ih_l0.copy_(ours.inputs.bias)
        theirs.weight_hh_l0.copy_(ours.hidden.weight)
        theirs.bias_hh_l0.copy_(ours.hidden.bias if ours.hidden.bias is not None else torch.zeros(16))
    x = torch.randn(3, 5, 4)
    torch.testing.assert_close(ours(x), theirs(x)[0])


def test_tables_are_those_of_the_optimizer():
    """Of embeddings and of positions, as an optimizer with the groups of a module has them."""
    assert text().tables == {"0.weight", "1.positions"}
    assert SequencePrediction("gru", width=4).tables == {"0.weight"}
    assert vit().tables == {"2.positions"}
    assert images("residual").tables == frozenset()
    task = text()
    assert ScaledTask(task).tables == ScaledTask(task, loss_scale=2.0).tables == task.tables


def test_a_table_is_known_by_whatever_name_it_has():
    class Tied(nn.Module):
        def __init__(self, is_trained):
            super().__init__()
            self.head, self.table, self.other = nn.Linear(3, 5, bias=False), nn.Embedding(5, 3), nn.Embedding(5, 3)
            self.table.weight = self.head.weight
            nn.init.ones_(self.other.weight).requires_grad_(is_trained)

        def forward(self, x):
            return self.head(self.table(x) + self.other(x))

    symbols = torch.arange(5)
    for is_trained, tables in ((True, {"head.weight", "other.weight"}), (False, {"head.weight"})):
        task = ModuleTask(lambda t=is_trained: Tied(t), (symbols, symbols), loss_fn=nn.functional.cross_entropy)
        assert task.tables == tables


def test_the_loss_of_a_vae_is_its_bound_and_its_noise_comes_with_the_batch():
    task = autoencoder(likelihood="bernoulli")
    params = task.init_params(INDICES, 0)
    x, images = task.sample_batch(INDICES, 0, 0)
    assert torch.equal(x[..., :64], images)
    noise = torch.cat([task.sample_batch(torch.arange(50), step, 0)[0][..., 64:].flatten() for step in range(20)])
    assert abs(noise.mean()) < 5 / len(noise) ** 0.5  # five sigma each
    assert abs(noise.var() - 1) < 5 * (2 / len(noise)) ** 0.5
    for k in range(len(INDICES)):
        own = {name: p[k] for name, p in params.items()}
        logits, mean, log_variance = torch.func.functional_call(task.module, own, (x[k],))
        q = torch.distributions.Normal(mean, (log_variance / 2).exp())
        divergence = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum(-1)
        z = mean + q.scale * x[k, :, 64:]
        torch.testing.assert_close(logits, part(task, "decoder", own, z))
        nats = -(images[k] * logits.sigmoid().log() + (1 - images[k]) * (-logits).sigmoid().log()).sum(-1)
        torch.testing.assert_close(task.loss(params, (x, images))[k], (nats + divergence).mean())


def part(task, name, params, x):
    """Apply a submodule of the task's module."""
    own = {key.removeprefix(f"{name}."): p for key, p in params.items() if key.startswith(f"{name}.")}
    return torch.func.functional_call(getattr(task.module, name), own, (x,))


def test_a_plain_autoencoder_passes_through_its_bottleneck():
    task = autoencoder(is_variational=False, likelihood="gaussian", n_latent=1)
    x, images = task.sample_batch(INDICES, 0, 0)
    assert torch.equal(x, images)
    params = task.init_params(INDICES, 0)
    own = {name: p[0] for name, p in params.items()}
    code = part(task, "encoder", own, x[0])
    assert code.shape == (5, 1)
    expected = (part(task, "decoder", own, code) - x[0]).square().sum(-1).mean() / 2
    torch.testing.assert_close(task.loss(params, (x, images))[0], expected)


def test_waves_have_mean_square_one_and_the_detail_asked_for():
    indices = torch.arange(300)
    x = torch.rand(300, 50, 2, generator=torch.Generator().manual_seed(0))
    squares = {}
    for detail in (0.5, 2.0):
        task = coordinates(detail=detail, n_channels=2)
        y, near = (task.picture(points, indices, 0) for points in (x, x + torch.tensor([1e-3, 0.0])))
        # 300 pictures of 24 waves: a mean square of one each, give or take five sigma
        assert y.square().mean() == pytest.approx(1, abs=5 * (2 / 24 / 300) ** 0.5)
        squares[detail] = ((near - y) / 1e-3).square().mean().sqrt()
        assert squares[detail] == pytest.approx(2 * math.pi * detail, rel=0.1)
    assert not torch.equal(y[0], y[1])


def test_pictures_have_the_pixels_of_their_image_where_those_lie():
    task = coordinates(dataset="digits")
    rows, columns = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    x = torch.stack((columns, rows), -1).flatten(0, 1) / 7  # the first coordinate runs along a row
    values = task.picture(x.expand(3, -1, -1), INDICES, 0)
    images = task.images[task.members].flatten(1)
    for k in range(3):
        assert (images == (255 * values[k, :, 0]).round()).all(1).any()
    assert not torch.equal(values[0], values[1])
    between = task.picture((x[:1] + x[1:2]).expand(3, -1, -1) / 2, INDICES, 0)
    torch.testing.assert_close(between[:, 0], values[:, :2].mean(1))


def test_few_points_are_the_same_at_every_step_and_held_out_ones_are_others():
    task = coordinates(n_features=0, n_points=9, batch_size=200)
    inner = [{tuple(x) for x in task.sample_batch(INDICES[:1], step, 0)[0][0].tolist()} for step in range(3)]
    assert [len(points) for points in inner] == [9, 9, 9]
    assert inner[0] == inner[1] == inner[2]
    outer = [{tuple(x) for x in task.sample_held_out(INDICES[:1], step, 0)[0][0].tolist()} for step in range(3)]
    assert not inner[0] & (outer[0] | outer[1])
    assert not outer[0] & outer[1]
    anew = coordinates(n_features=0, batch_size=200)
    drawn = [draw(INDICES[:1], 0, 0)[0][0, 0] for draw in (anew.sample_batch, anew.sample_held_out)]
    assert not torch.equal(*drawn)


def test_features_are_of_the_frequencies_asked_for_and_their_own_for_each_problem():
    task = coordinates(n_features=500, bandwidth=3.0)
    features, _ = task.sample_batch(INDICES, 0, 0)
    torch.testing.assert_close(features[..., :500].square() + features[..., 500:].square(), torch.ones(3, 20, 500))
    x = torch.tensor([[[0.0, 0.0], [1e-3, 0.0]]]).expand(3, -1, -1)
    near = task._features(x, INDICES, {"seed": 0, "dtype": torch.float32})
    frequencies = (near[:, 1, 500:] / near[:, 1, :500]).atan() / (2e-3 * math.pi)
    assert frequencies.std() == pytest.approx(3.0, rel=0.1)
    assert not torch.equal(frequencies[0], frequencies[1])


def test_causal_attention_does_not_look_ahead():
    torch.manual_seed(0)
    x = torch.randn(2, 5, 8)
    changed = x.clone()
    changed[:, 3:] += 1
    for is_causal in (True, False):
        attention = SelfAttention(8, 2, is_causal=is_causal)
        is_same = torch.allclose(attention(x)[:, :3], attention(changed)[:, :3], atol=1e-6)
        assert is_same == is_causal


def test_attention_is_what_torch_computes():
    torch.manual_seed(0)
    ours, theirs = SelfAttention(8, 2, is_causal=False), nn.MultiheadAttention(8, 2, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(ours.inputs.weight)
        theirs.in_proj_bias.copy_(ours.inputs.bias)
        theirs.out_proj.load_state_dict(ours.outputs.state_dict())
    x = torch.randn(3, 5, 8)
    torch.testing.assert_close(ours(x), theirs(x, x, x, need_weights=False)[0])


def test_the_recurrence_is_what_torch_computes():
    torch.manual_seed(0)
    ours, theirs = Recurrence(4, "tanh"), nn.RNN(4, 4, batch_first=True)
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
    mixture = Mixture([TaskFamily(ImageNetwork, {"dataset": "digits"}, {"architecture": ["residual"], "width": [4]})])
    draw = mixture.draw(0, seed=0)
    assert draw.task.describe()["architecture"] == "residual"
    assert losses(draw.task, draw.indices).shape == draw.indices.shape


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: images("pyramid"), r"`architecture` should be one of normalised, .*Found `architecture = 'pyramid'`"),
        (lambda: images("attention", width=5), r"`width` should be even for two heads. Found `width = 5`"),
        (lambda: images("residual", width=0), r"`width` should be a positive integer. Found `width = 0`"),
        (lambda: images("residual", depth=0), r"`depth` should be a positive integer. Found `depth = 0`"),
        (
            lambda: images("residual", activation="swish"),
            r"`activation` should be .* Found `activation = 'swish'`",
        ),
        (lambda: images("residual", split="test"), r"`split` should be one of .* Found `split = 'test'`"),
        (lambda: vit(patch=3), r"`patch` should be a divisor of \(8, 8\). Found `patch = 3`"),
        (lambda: vit(patch=0), r"`patch` should be a positive integer. Found `patch = 0`"),
        (lambda: vit(n_heads=4), r"`width` should be a multiple of `n_heads = 4`. Found `width = 6`"),
        (lambda: vit(norm="batch"), r"`norm` should be one of pre, post, none. Found `norm = 'batch'`"),
        (lambda: vit(init_std=0), r"`init_std` should be a positive number or None. Found `init_std = 0`"),
        (lambda: vit(n_examples=0), r"`n_examples` should be between 1 and 71\d. Found `n_examples = 0`"),
        (lambda: vit(n_examples=1.5), r"`n_examples` should be .* a fraction .* Found `n_examples = 1.5`"),
        (lambda: autoencoder(n_latent=0), r"`n_latent` should be a positive integer. Found `n_latent = 0`"),
        (lambda: autoencoder(likelihood="cauchy"), r"`likelihood` should be one of .* Found `likelihood = 'cauchy'`"),
        (lambda: autoencoder(is_variational=1), r"`is_variational` should be True or False. Found .* = 1`"),
        (lambda: coordinates(n_features=-1), r"`n_features` should be .* at least 0. Found `n_features = -1`"),
        (lambda: coordinates(bandwidth=0), r"`bandwidth` should be a positive number. Found `bandwidth = 0`"),
        (lambda: coordinates(detail=-1.0), r"`detail` should be a positive number, .* Found `detail = -1.0`"),
        (lambda: coordinates(dataset="digits", detail=1.0), r"`detail` should be .* None where there is a dataset"),
        (lambda: coordinates(dataset="digits", n_channels=3), r"`n_channels` should be 1 where there is a dataset"),
        (lambda: coordinates(n_points=-3), r"`n_points` should be a positive integer or None. Found `n_points = -3`"),
        (lambda: coordinates(n_points=0), r"`n_points` should be a positive integer or None. Found `n_points = 0`"),
        (lambda: coordinates(split="test"), r"`split` should be one of meta-train, .* Found `split = 'test'`"),
        (lambda: text(expansion=0), r"`expansion` should be a positive integer. Found `expansion = 0`"),
        (lambda: text(context=0), r"`context` should be a positive integer. Found `context = 0`"),
        (lambda: text(objective="all"), r"`objective` should be one of next, masked. Found `objective = 'all'`"),
        (lambda: text(split="test"), r"`split` should be one of meta-train, .* Found `split = 'test'`"),
        (lambda: text(n_characters=8), r"`n_characters` should be between 9 and .* Found `n_characters = 8`"),
        (lambda: text(n_characters=0.99999), r"`n_characters` should be between 9 and .* `n_characters = 0.99999`"),
        (lambda: TextRecurrence(cell="rnn"), r"`cell` should be one of plain, gru, lstm. Found `cell = 'rnn'`"),
        (lambda: images("residual", batch_size=0), r"`batch_size` should be a positive integer. Found .* = 0`"),
        (lambda: SequencePrediction("residual"), r"`architecture` should be one of attention, recurrent"),
        (lambda: SequencePrediction(n_symbols=1), r"`n_symbols` should be at least 2. Found `n_symbols = 1`"),
        (lambda: SequencePrediction(length=1), r"`length` should be at least 2. Found `length = 1`"),
        (lambda: SequencePrediction(batch_size=0), r"`batch_size` should be a positive integer. Found .* = 0`"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("make", [lambda: SequencePrediction("gru", width=4), lambda: TASKS["sequence recurrent"]()])
def test_problems_are_the_same_whatever_the_default_dtype_is_now(make):
    task, indices = make(), torch.arange(2)
    wanted = task.init_params(indices, 3)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        found = task.init_params(indices, 3)
        assert torch.get_default_dtype() is torch.float64
    finally:
        torch.set_default_dtype(before)
    for name, value in wanted.items():
        assert found[name].dtype == value.dtype == task.dtype
        assert torch.equal(found[name], value)
