"""Tasks: problems named by index and seed; their losses, starts, splits and derivatives."""

import json
import math

import pytest
import torch
from scipy import stats
from torch import nn

from odeopt.tasks import (
    HighDimSaddle,
    ImageDataset,
    Mixture,
    MLPClassification,
    ModuleTask,
    MonkeySaddle,
    NoisyQuadratic,
    RandomQuadratic,
    Rosenbrock,
    ScaledTask,
    TaskFamily,
    TeacherStudent,
    load_dataset,
)
from odeopt.tasks import random as rnd

f64 = torch.float64
ACTIVATIONS = {"sigmoid": nn.Sigmoid, "tanh": nn.Tanh, "relu": nn.ReLU, "gelu": nn.GELU}


def tiny_images(n_train=64, n_test=1100, n_pixels=6):
    """Images of random bytes whose first two pixels are zero in every one."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(1, 256, (n_train + n_test, n_pixels), generator=generator, dtype=torch.uint8)
    images[:, :2] = 0
    labels = torch.randint(0, 3, (n_train + n_test,), generator=generator)
    return ImageDataset("tiny", images[:n_train], labels[:n_train], images[n_train:], labels[n_train:], 3, (2, 3))


def module_task():
    x = torch.linspace(-1, 1, 50, dtype=f64).unsqueeze(1)
    make_module = lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).to(f64)  # noqa: E731
    return ModuleTask(make_module, (x, x.sin()), loss_fn=nn.functional.mse_loss, batch_size=8)


TASKS = {
    "quadratic": lambda: RandomQuadratic(4, dtype=f64),
    "classification": lambda: MLPClassification(tiny_images(), (5, 4), batch_size=7, dtype=f64),
    "module": module_task,
    "noisy": lambda: NoisyQuadratic(4, condition=10.0, noise=0.2, dtype=f64),
    "teacher": lambda: TeacherStudent(5, (4,), 2, spread=0.5, batch_size=6, dtype=f64),
    "rescaled": lambda: ScaledTask(MLPClassification(tiny_images(), (5,), batch_size=7, dtype=f64), log_range=1.0),
    "rosenbrock": lambda: Rosenbrock(dtype=f64),
    "monkey": lambda: MonkeySaddle(dtype=f64, offset=0.5),
    "high-dim": lambda: HighDimSaddle(5, dtype=f64, offset=0.5),
    "high-dim rotated": lambda: HighDimSaddle(5, rotated=True, dtype=f64, offset=0.5),
}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]()


FIVE_SIGMA = 5.0  # of a statistic of fixed numbers, which a right law passes but for one in two million


# Every task


def draw_problems(task, indices, step=0, seed=0):
    return task.init_params(indices, seed), task.sample_batch(indices, step, seed)


def test_problem_is_named_by_index_and_seed(task):
    """Drawn among others or alone, in any order: the same problem."""
    many = torch.tensor([5, 3, 900, 12])
    params, batch = draw_problems(task, many, step=4, seed=1)
    losses = task.loss(params, batch)
    for position, index in enumerate(many):
        params_1, batch_1 = draw_problems(task, index[None], step=4, seed=1)
        for name, value in params_1.items():
            assert torch.equal(value[0], params[name][position])
        for part_1, part in zip(batch_1, batch, strict=True):
            assert torch.equal(part_1[0], part[position])
        # Batched products may add up in another order.
        torch.testing.assert_close(task.loss(params_1, batch_1)[0], losses[position], rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", TASKS)
def test_resumed_run_draws_the_same_batches(name):
    indices, continued, resumed = torch.arange(3), TASKS[name](), TASKS[name]()
    for step in range(4):
        batch = continued.sample_batch(indices, step, 2)
    for part, again in zip(batch, resumed.sample_batch(indices, 3, 2), strict=True):
        assert torch.equal(part, again)


def test_other_seeds_and_indices_name_other_problems(task):
    losses = [
        task.loss(*draw_problems(task, torch.tensor([index]), seed=seed)).item()
        for index, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert len(set(losses)) == 3


@pytest.mark.parametrize("name", ["classification", "module"])
def test_every_step_has_its_own_minibatch(name):
    task = TASKS[name]()
    first, second = (task.sample_batch(torch.arange(2), step, 0) for step in (0, 1))
    assert not torch.equal(first[0], second[0])
    assert not torch.equal(first[0][0], first[0][1])


def test_gradient_of_the_summed_loss_is_every_problems_own(task):
    params, batch = draw_problems(task, torch.arange(4))
    params = {name: value.requires_grad_() for name, value in params.items()}
    together = torch.autograd.grad(task.loss(params, batch).sum(), list(params.values()))
    for i in range(4):
        alone = torch.autograd.grad(task.loss(params, batch)[i], list(params.values()))
        for whole, own in zip(together, alone, strict=True):
            assert torch.equal(own[torch.arange(4) != i], torch.zeros_like(own[1:]))
            torch.testing.assert_close(whole[i], own[i], rtol=1e-12, atol=1e-14)  # rounding of float64


def test_first_and_second_derivatives(task):
    params, batch = draw_problems(task, torch.arange(2))
    names = list(params)
    values = [value.detach().requires_grad_() for value in params.values()]

    def loss(*values):
        return task.loss(dict(zip(names, values, strict=True)), batch)

    # Default tolerances; fast mode compares projections of the Jacobians.
    assert torch.autograd.gradcheck(loss, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(loss, values, fast_mode=True)


def test_description_is_json_and_shapes_are_those_of_the_parameters(task):
    described = json.loads(json.dumps(task.describe()))
    assert described.pop("task") == type(task).__name__
    assert described == task.config
    assert repr(task).startswith(f"{type(task).__name__}(")
    params = task.init_params(torch.arange(3), 0)
    assert {name: (3, *shape) for name, shape in task.param_shapes.items()} == {
        name: tuple(value.shape) for name, value in params.items()
    }


def test_moving_a_task_changes_no_number(task):
    before = task.loss(*draw_problems(task, torch.arange(2)))
    assert task.to("cpu") is task
    assert torch.equal(task.loss(*draw_problems(task, torch.arange(2))), before)


@pytest.mark.gpu
def test_losses_are_the_same_on_cuda(task):
    indices = torch.arange(3)
    on_cpu = task.loss(*draw_problems(task, indices))
    on_cuda = task.to("cuda").loss(*draw_problems(task, indices))
    assert on_cuda.is_cuda
    torch.testing.assert_close(on_cuda.cpu(), on_cpu, rtol=1e-10, atol=0)  # float64, other summation orders


# Quadratics


def test_quadratic_is_the_squared_residual():
    task, indices = RandomQuadratic(6, dtype=f64), torch.arange(3)
    params, (W, y) = draw_problems(task, indices)
    assert torch.equal(params["theta"], torch.zeros(3, 6, dtype=f64))
    theta = rnd.normal(indices, (6,), seed=1, stream="theta", dtype=f64)
    expected = torch.stack([(W[i] @ theta[i] - y[i]).norm() ** 2 for i in range(3)])
    torch.testing.assert_close(task.loss({"theta": theta}, (W, y)), expected, rtol=1e-13, atol=0)  # rounding


def test_quadratic_data_are_standard_normal():
    W, y = RandomQuadratic(10).sample_batch(torch.arange(400), 0, 0)
    for part in (W, y):
        assert stats.kstest(part.flatten().numpy(), "norm").pvalue > 1e-4
    assert abs(torch.corrcoef(torch.stack((W[:, :, 0].flatten(), y.flatten())))[0, 1]) < FIVE_SIGMA / 4000**0.5


def test_quadratic_data_are_drawn_once_per_run():
    task, indices = RandomQuadratic(), torch.arange(4)
    first = task.sample_batch(indices, 0, 0)
    assert task.sample_batch(indices.clone(), 1, 0) is first
    assert not torch.equal(task.sample_batch(indices, 1, 1)[0], first[0])
    indices += 4  # the caller's tensor, written into: other problems
    assert not torch.equal(task.sample_batch(indices, 2, 1)[0], task.sample_batch(indices - 4, 2, 1)[0])
    assert torch.equal(task.sample_batch(indices - 4, 0, 0)[0], first[0])


# Classification


def as_module(task, params, i):
    """The network of problem i as a user would write it."""
    layers = []
    for fan_in, fan_out in zip(task.sizes[:-1], task.sizes[1:], strict=True):
        layers += [nn.Linear(fan_in, fan_out, dtype=task.dtype), ACTIVATIONS[task.config["activation"]]()]
    module = nn.Sequential(*layers[:-1])
    module.load_state_dict({name: value[i] for name, value in params.items()})
    return module


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("widths", [(), (5,), (8, 3)])
def test_classification_is_a_sequential_under_cross_entropy(activation, widths):
    task = MLPClassification(tiny_images(), widths, activation=activation, batch_size=9, dtype=f64)
    params, (images, labels) = draw_problems(task, torch.arange(3))
    params = {name: value.requires_grad_() for name, value in params.items()}
    losses = task.loss(params, (images, labels))
    grads = torch.autograd.grad(losses.sum(), list(params.values()))
    for i in range(3):
        module = as_module(task, params, i)
        loss = nn.functional.cross_entropy(module(images[i]), labels[i])
        loss.backward()
        torch.testing.assert_close(losses[i], loss, rtol=1e-12, atol=0)  # rounding of float64
        for batched, parameter in zip(grads, module.parameters(), strict=True):
            torch.testing.assert_close(batched[i], parameter.grad, rtol=1e-10, atol=1e-15)


def test_classification_starts_as_linear_layers_do():
    task = MLPClassification(load_dataset("digits"), (20,))
    params = task.init_params(torch.arange(200), 0)
    reference = nn.Sequential(nn.Linear(64, 20), nn.Sigmoid(), nn.Linear(20, 10))
    assert {n: tuple(p.shape[1:]) for n, p in params.items()} == {
        n: tuple(p.shape) for n, p in reference.named_parameters()
    }
    for name, value in params.items():
        bound = 1 / math.sqrt(64 if name.startswith("0") else 20)
        # The law that nn.Linear documents, and that its own draw in `reference` passes with the same bound.
        assert stats.kstest(value.flatten().numpy(), stats.uniform(-bound, 2 * bound).cdf).pvalue > 1e-4
        assert dict(reference.named_parameters())[name].abs().max() <= bound
        assert value.abs().max() <= bound


def test_layers_start_independently():
    params = MLPClassification(tiny_images(), (6, 6)).init_params(torch.arange(2), 0)
    first, second, third = (params[f"{layer}.bias"][:, :3] for layer in (0, 2, 4))  # all with fan-in 6
    for a, b in ((first, second), (second, third), (first, params["0.weight"][:, 0, :3])):
        assert (a != b).all()


def test_splits_share_no_image_and_leave_none_out():
    data = tiny_images(n_train=101)
    members = [MLPClassification(data, split=split).members for split in ("meta-train", "evaluation")]
    assert [len(part) for part in members] == [51, 50]
    assert torch.equal(torch.cat(members).sort().values, torch.arange(101))
    assert torch.equal(MLPClassification(data, split="meta-train").members, members[0])  # a fixed shuffle


@pytest.mark.parametrize("split", ["meta-train", "evaluation"])
def test_minibatches_come_from_their_split_with_their_labels(split):
    data = tiny_images(n_train=64)
    data.train_labels.copy_(torch.arange(64))  # labels that name the image
    task = MLPClassification(data, split=split, batch_size=200)
    images, labels = task.sample_batch(torch.arange(3), 5, 0)
    assert set(labels.flatten().tolist()) == set(task.members.tolist())  # 600 draws miss one of 32 once in 5e6
    assert torch.equal(images, data.train_images[labels].float() / 255)
    assert images.min() == 0
    assert images.max() <= 1


def test_a_part_of_a_split_is_its_first_images_and_nothing_else_changes():
    data = tiny_images()
    whole, part = (MLPClassification(data, batch_size=200, n_examples=n) for n in (None, 5))
    assert torch.equal(part.members, whole.members[:5])
    images, _ = part.sample_batch(torch.arange(3), 5, 0)
    drawn = {tuple(image.tolist()) for image in images.flatten(0, 1)}
    assert drawn == {tuple((image / 255).tolist()) for image in data.train_images[part.members].float()}
    for name, value in whole.init_params(torch.arange(2), 0).items():
        assert torch.equal(value, part.init_params(torch.arange(2), 0)[name])
    # descriptions of whole splits stay what they were in files
    assert "n_examples" not in whole.describe()
    assert part.describe() == whole.describe() | {"n_examples": 5}


def test_splits_start_from_different_networks():
    first, second = (
        MLPClassification(tiny_images(), split=split).init_params(torch.arange(2), 0)
        for split in ("meta-train", "evaluation")
    )
    assert not torch.equal(first["0.weight"], second["0.weight"])


def test_common_networks_and_minibatches_for_every_activation():
    draws = [
        draw_problems(MLPClassification(tiny_images(), activation=activation), torch.arange(2))
        for activation in ("sigmoid", "relu")
    ]
    assert torch.equal(draws[0][0]["0.weight"], draws[1][0]["0.weight"])
    assert torch.equal(draws[0][1][1], draws[1][1][1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_are_finite_where_pixels_are_always_zero(activation):
    task = MLPClassification(tiny_images(), (5,), activation=activation)
    params, batch = draw_problems(task, torch.arange(3))
    params = {name: value.requires_grad_() for name, value in params.items()}
    grads = torch.autograd.grad(task.loss(params, batch).sum(), list(params.values()), create_graph=True)
    assert torch.equal(grads[0][:, :, :2], torch.zeros(3, 5, 2))
    assert grads[0][:, :, 2:].abs().sum() > 0
    second = torch.autograd.grad(sum(g.square().sum() for g in grads), list(params.values()))
    assert all(torch.isfinite(s).all() for s in second)
    assert all(s.abs().sum() > 0 for s in second)


def test_accuracy_counts_held_out_images():
    data = tiny_images(n_test=1100)  # more than one chunk
    task = MLPClassification(data, (5,), dtype=f64)
    params = task.init_params(torch.arange(3), 0)
    params["0.weight"].mul_(20).requires_grad_()  # away from a constant guess
    for n in (1100, 10):
        accuracy = task.accuracy(params, None if n == 1100 else n)
        for i in range(3):
            guess = as_module(task, params, i)(data.test_images[:n].to(f64) / 255).argmax(1)
            assert accuracy[i] == (guess == data.test_labels[:n]).double().mean()
    assert not accuracy.requires_grad


@pytest.mark.parametrize("n_examples", [None, 7])
def test_scores_are_over_all_training_and_all_test_images(n_examples):
    data = tiny_images(n_train=2200, n_test=1100)  # more than one chunk of each
    task = MLPClassification(data, (5,), n_examples=n_examples, split="evaluation", dtype=f64)
    params = task.init_params(torch.arange(3), 0)
    params["0.weight"].mul_(20).requires_grad_()  # away from a constant guess
    training = data.train_images[task.members], data.train_labels[task.members]
    for scores, (images, labels) in (
        (task.training_scores(params), training),
        (task.held_out_scores(params), (data.test_images, data.test_labels)),
    ):
        for i in range(3):
            logits = as_module(task, params, i)(images.to(f64) / 255)
            torch.testing.assert_close(scores[0][i], nn.functional.cross_entropy(logits, labels))  # rounding
            assert scores[1][i] == (logits.argmax(1) == labels).double().mean()
        assert not scores[0].requires_grad
    assert torch.equal(task.held_out_scores(params)[1], task.accuracy(params))


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"widths": (0,)}, r"`widths` should be a list of positive integers. Found `widths = \(0,\)`"),
        *(
            ({"widths": widths}, "`widths` should be a list of positive integers. Found `widths = ")
            for widths in (20, 20.5, "20", (20.5,), (True,))
        ),
        ({"n_examples": 2, "has_own_examples": "no"}, "`has_own_examples` should be True or False"),
        ({"activation": "swish"}, "`activation` should be one of sigmoid, tanh, relu, gelu. Found .*swish"),
        ({"batch_size": 0}, "`batch_size = 0`"),
        ({"split": "test"}, "`split` should be one of meta-train, evaluation. Found `split = 'test'`"),
        ({"n_examples": 0}, "`n_examples` should be between 1 and 32. Found `n_examples = 0`"),
        ({"n_examples": 33}, "`n_examples` should be between 1 and 32. Found `n_examples = 33`"),
        ({"dtype": torch.bfloat16}, "`dtype = torch.bfloat16`"),
        ({"dataset": "cifar"}, "`name = 'cifar'`"),
    ],
)
def test_classification_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match):
        MLPClassification(**({"dataset": tiny_images()} | kwargs))


@pytest.mark.parametrize("n_images", [0, 1101, 2.5])
def test_accuracy_refuses_images_it_does_not_have(n_images):
    task = MLPClassification(tiny_images())
    with pytest.raises(ValueError, match=f"between 1 and 1100. Found `n_images = {n_images}`"):
        task.accuracy(task.init_params(torch.arange(1), 0), n_images)


def test_tasks_refuse_sizes_without_a_problem():
    for dim in (0, 2.5, True, "3"):
        with pytest.raises(ValueError, match=f"`dim` should be a positive integer. Found `dim = {dim!r}`"):
            RandomQuadratic(dim)
    for dim in (1, 2.5):
        with pytest.raises(ValueError, match=f"`dim` should be an integer of at least 2. Found `dim = {dim}`"):
            HighDimSaddle(dim)
    for offset in (-1.0, float("inf"), "0"):
        with pytest.raises(ValueError, match=f"`offset` should be a non-negative number. Found `offset = {offset!r}`"):
            MonkeySaddle(offset=offset)
    with pytest.raises(ValueError, match=r"`rotated` should be True or False. Found `rotated = 'no'`"):
        HighDimSaddle(rotated="no")
    with pytest.raises(TypeError, match=r"`task` should be of class Task. Found one of class int"):
        ScaledTask(5)


def test_a_batch_remembered_in_inference_mode_serves_a_training():
    task, indices = RandomQuadratic(3), torch.arange(2)
    with torch.inference_mode():
        task.sample_batch(indices, 0, 0)
        assert not torch.is_grad_enabled()
    params = {name: param.requires_grad_() for name, param in task.init_params(indices, 0).items()}
    task.loss(params, task.sample_batch(indices, 0, 0)).sum().backward()
    assert all(param.grad is not None for param in params.values())


def test_a_batch_that_weights_draw_has_no_graph_where_gradients_are_off():
    class Taught(RandomQuadratic):
        def draw(self, indices, seed):
            batch = super().draw(indices, seed)
            return tuple(part * teacher for part in batch)

    teacher = torch.ones((), requires_grad=True)
    with torch.no_grad():
        assert not any(part.requires_grad for part in Taught(3).sample_batch(torch.arange(2), 0, 0))


def test_units_are_drawn_without_building_the_networks_anew(monkeypatch):
    x = torch.linspace(-1, 1, 50).unsqueeze(1)
    module_task = ModuleTask(lambda: torch.nn.Linear(1, 1), (x, x), loss_fn=torch.nn.functional.mse_loss)
    task, indices = ScaledTask(module_task, log_range=1.0), torch.arange(2)
    units = task.sample_batch(indices, 0, 0)[0]
    monkeypatch.setattr(module_task, "make_module", None)
    assert torch.equal(task.sample_batch(indices, 0, 0)[0], units)
    assert units.shape == (2, 2)


@pytest.mark.parametrize(
    "task", [RandomQuadratic(3), Mixture([TaskFamily(RandomQuadratic, {"dim": 3})])], ids=["task", "mixture"]
)
def test_a_device_that_is_not_there_leaves_the_task_where_it_is(task):
    with pytest.raises(RuntimeError, match="nonsense"):
        task.to("nonsense")
    device = "cuda" if not torch.cuda.is_available() else f"cuda:{torch.cuda.device_count()}"
    with pytest.raises((RuntimeError, AssertionError)):
        task.to(device)
    assert task.device == torch.device("cpu")


def test_units_of_scaled_tasks_are_drawn_apart():
    inner = ScaledTask(TeacherStudent(4, (3,)), log_range=1.0)
    outer, indices = ScaledTask(inner, log_range=1.0), torch.arange(500)
    units, own, *_ = outer.sample_batch(indices, 0, 0)
    correlation = torch.corrcoef(torch.stack([units[:, 0].log(), own[:, 0].log()]))[0, 1]
    assert correlation.abs() < 0.2  # of independent draws, at most .2 in one of 1e5 cases
