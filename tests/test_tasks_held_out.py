"""Batches that a run does not train on."""

from dataclasses import replace

import pytest
import torch

from odeopt.tasks import (
    Autoencoder,
    ImageDataset,
    ImageNetwork,
    MLPClassification,
    NoisyQuadratic,
    RandomQuadratic,
    ScaledTask,
    SequencePrediction,
    TeacherStudent,
    TextRecurrence,
    TextTransformer,
    VisionTransformer,
)
from odeopt.tasks.examples import Examples

INDICES = torch.tensor([4, 0, 9])


def numbered_images():
    """Eighty images, of which all pixels are the number of the image; forty in each split."""
    images = torch.arange(80, dtype=torch.uint8).unsqueeze(1).expand(80, 16).contiguous()
    labels = torch.arange(80) % 10
    return ImageDataset("numbered", images, labels, images[:3], labels[:3], 10, (4, 4))


IMAGE_TASKS = {
    "network": lambda **options: ImageNetwork(numbered_images(), "normalised", **options),
    "autoencoder": lambda **options: ImageNetwork(numbered_images(), "autoencoder", **options),
    "vae": lambda **options: Autoencoder(numbered_images(), width=4, **options),
    "vit": lambda **options: VisionTransformer(numbered_images(), patch=2, width=4, **options),
    "perceptron": lambda **options: MLPClassification(
        numbered_images(), (3,), has_own_examples="n_examples" in options, **options
    ),
    "perceptron of common examples": lambda **options: MLPClassification(numbered_images(), (3,), **options),
}
TEXT_TASKS = {
    "next": lambda **options: TextTransformer(width=4, depth=1, **options),
    "recurrent": lambda **options: TextRecurrence(width=4, **options),
}


def numbers(batch):
    """Numbers of each problem's images."""
    return [set((255 * images[:, 0]).round().int().tolist()) for images in batch[0]]


def joined(task, draw, n_steps=12):
    """Numbers of the images that many steps draw, of each problem."""
    steps = [numbers(draw(task)(INDICES, step, 3)) for step in range(n_steps)]
    return [set().union(*(step[k] for step in steps)) for k in range(len(INDICES))]


def trained(task):
    return task.sample_batch


def held_out(task):
    return task.sample_held_out


@pytest.mark.parametrize("n_examples", [10, 0.25])
@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_held_out_images_are_all_others_of_the_split(name, n_examples):
    task = IMAGE_TASKS[name](n_examples=n_examples, batch_size=64)  # 768 draws of 30 images miss one once in 1e10
    split = IMAGE_TASKS[name](batch_size=64)
    for inner, outer, every in zip(joined(task, trained), joined(task, held_out), joined(split, trained), strict=True):
        assert len(inner) == 10
        assert not inner & outer
        assert inner | outer == every


@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_each_problem_has_examples_of_its_own(name):
    task = IMAGE_TASKS[name](n_examples=10, batch_size=64)
    sets = joined(task, trained)
    assert (sets[0] == sets[1] == sets[2]) == (name == "perceptron of common examples")
    assert sets == joined(task, trained)
    alone = [numbers(task.sample_held_out(INDICES[k : k + 1], 2, 3))[0] for k in range(3)]
    assert alone == numbers(task.sample_held_out(INDICES, 2, 3))


@pytest.mark.parametrize("name", IMAGE_TASKS)
def test_where_all_are_trained_on_held_out_batches_are_other_draws(name):
    task = IMAGE_TASKS[name](batch_size=64)
    assert joined(task, trained) == joined(task, held_out)
    assert not torch.equal(task.sample_batch(INDICES, 0, 3)[0], task.sample_held_out(INDICES, 0, 3)[0])


@pytest.mark.parametrize("name", TEXT_TASKS)
def test_held_out_text_is_all_that_no_window_reaches(name):
    task = TEXT_TASKS[name](n_characters=0.3, context=20, batch_size=2)
    assert task.examples.n_trained == int(0.3 * len(task.symbols))
    # a text of 200 characters, each by its place, which 2,000 windows cover
    task.symbols, task.batch_size = torch.arange(200), 500
    task.examples = replace(task.examples, n_all=200, n_trained=60)
    for k in range(len(INDICES)):
        inner, outer = (
            set(torch.cat([torch.cat(draw(task)(INDICES, step, 3), -1)[k] for step in range(4)]).flatten().tolist())
            for draw in (trained, held_out)
        )
        assert len(inner) == 60
        assert outer == set(range(200)) - inner


def test_arcs_go_round():
    examples = Examples(10, 4, "test")
    indices = torch.arange(200)
    inner, outer = (examples.draw(indices, 200, step=0, seed=0, held_out=x) for x in (False, True))
    arcs = {tuple(sorted(set(row.tolist()))) for row in inner}
    assert arcs == {tuple(sorted((k + j) % 10 for j in range(4))) for k in range(10)}
    assert all(set(a.tolist()) | set(b.tolist()) == set(range(10)) for a, b in zip(inner, outer, strict=True))


@pytest.mark.parametrize("task", [SequencePrediction(width=4), TeacherStudent(3, ()), NoisyQuadratic(3)], ids=repr)
def test_where_batches_never_repeat_held_out_ones_are_of_the_same_problem_and_other_steps(task):
    params = task.init_params(INDICES, 0)
    batches = [task.sample_batch(INDICES, step, 0) for step in range(5)]
    for other in (task.sample_held_out(INDICES, 0, 0), task.sample_held_out(INDICES, 1, 0)):
        assert all(not torch.equal(batch[-1], other[-1]) for batch in batches)
        assert all(a.shape == b.shape for a, b in zip(batches[0], other, strict=True))
        assert task.loss(params, other).isfinite().all()


def test_a_problem_without_noise_is_held_out_as_it_is():
    task = RandomQuadratic(3)
    assert all(map(torch.equal, task.sample_batch(INDICES, 2, 0), task.sample_held_out(INDICES, 5, 0)))


@pytest.mark.parametrize("units", [{"log_range": 0.5}, {"loss_scale": 3.0}, {"log_range": 0.5, "loss_scale": 3.0}])
def test_other_units_hold_out_the_same(units):
    task = IMAGE_TASKS["network"](n_examples=10)
    inner, outer = (ScaledTask(task, **units).sample_held_out(INDICES, 2, 1), task.sample_held_out(INDICES, 2, 1))
    assert all(map(torch.equal, inner[-2:], outer))
    wrapped = ScaledTask(task, **units)
    loss = wrapped.loss(wrapped.init_params(INDICES, 1), inner)
    scale = units.get("loss_scale", 1.0)
    torch.testing.assert_close(loss, scale * task.loss(task.init_params(INDICES, 1), outer))


def test_examples_of_ones_own_are_some():
    with pytest.raises(
        ValueError, match=r"`has_own_examples` should be False where `n_examples` is None. Found .*True"
    ):
        MLPClassification(numbered_images(), has_own_examples=True)
