"""Mixtures of tasks, and the tasks that are there to be mixed."""

import gc
import json
import math
import weakref
from functools import partial

import pytest
import torch
from torch import nn

from odeopt.tasks import (
    Mixture,
    MLPClassification,
    NoisyQuadratic,
    RandomQuadratic,
    ScaledTask,
    TaskFamily,
    TeacherStudent,
    load_dataset,
)

f64 = torch.float64
INDICES = torch.arange(400)


def mixture(**options):
    return Mixture(
        [
            TaskFamily(RandomQuadratic, choices={"dim": [2, 5]}, share=3.0),
            TaskFamily(TeacherStudent, {"n_inputs": 8}, {"widths": [[], [4], [8, 8]], "activation": ["tanh", "relu"]}),
            TaskFamily(NoisyQuadratic, {"dim": 4}, log_range=1.0),
        ],
        **options,
    )


# -------------------- draws


def test_draws_are_functions_of_number_and_seed():
    one, other = mixture(), mixture()
    numbers = [3, 0, 7, 3]
    for number in numbers:
        a, b = one.draw(number, seed=5), other.draw(number, seed=5)
        assert a.task.describe() == b.task.describe()
        assert torch.equal(a.indices, b.indices)
        assert a[2:] == b[2:]
    kinds = {
        seed: [repr(one.draw(n, seed).task) + str(one.draw(n, seed).horizon) for n in range(20)] for seed in (0, 1)
    }
    assert kinds[0] != kinds[1]


def test_families_come_by_their_share_and_choices_alike():
    draws = [mixture().draw(n, seed=0) for n in range(1000)]
    kinds = [type(draw.task).__name__ for draw in draws]
    # shares 3, 1 and 1, half of the last one rescaled; five sigma of a count of a thousand is 79 at most
    for kind, p in (("RandomQuadratic", 0.6), ("TeacherStudent", 0.2), ("NoisyQuadratic", 0.1), ("ScaledTask", 0.1)):
        assert abs(kinds.count(kind) - 1000 * p) < 5 * math.sqrt(1000 * p * (1 - p)), kind
    pairs = [(tuple(d.task.config["widths"]), d.task.config["activation"]) for d in draws if "widths" in d.task.config]
    assert len(set(pairs)) == 6
    assert min(map(pairs.count, set(pairs))) > len(pairs) / 6 - 5 * math.sqrt(len(pairs) * 5 / 36)
    assert abs(sum(d.tells_horizon for d in draws) - 700) < 5 * math.sqrt(1000 * 0.21)


def test_no_problem_is_drawn_twice():
    seen = [index for n in range(50) for index in mixture(n_problems=3).draw(n, seed=0).indices.tolist()]
    assert len(seen) == len(set(seen)) > 50


def test_horizons_are_log_uniform():
    draws = [mixture(horizons=(10, 999)).draw(n, seed=0) for n in range(500)]
    logs = torch.tensor([math.log10(draw.horizon) for draw in draws])
    assert {10 <= draw.horizon <= 999 for draw in draws} == {True}
    # uniform over two decades: mean 2, deviation .58
    assert abs(logs.mean() - 2) < 5 * 0.58 / math.sqrt(500)


def test_large_tasks_come_alone_and_for_fewer_steps():
    family = TaskFamily(RandomQuadratic, choices={"dim": [2, 100]})
    sizes = {2: set(), 100: set()}
    for n in range(200):
        draw = Mixture([family], horizons=(5, 50), work=1000, coordinates=100, n_problems=4).draw(n, seed=0)
        sizes[draw.task.dim].add((len(draw.indices), draw.horizon > 10))
    assert sizes == {2: {(4, False), (4, True)}, 100: {(1, False)}}


def test_description_is_plain_and_says_everything():
    described = json.loads(json.dumps(mixture(horizons=(7, 9)).describe()))
    assert described["horizons"] == [7, 9]
    assert [family["task"] for family in described["families"]] == [
        "RandomQuadratic",
        "TeacherStudent",
        "NoisyQuadratic",
    ]
    assert described["families"][1]["choices"]["activation"] == ["tanh", "relu"]
    assert described["families"][2]["log_range"] == 1.0


def described(value):
    """What is said of an argument, after a way through a file."""
    mixture = Mixture([TaskFamily(RandomQuadratic, {"value": value, "dim": 2}, {"choice": [value]})])
    family = json.loads(json.dumps(mixture.describe(), allow_nan=False))["families"][0]
    assert family["choices"]["choice"] == [family["value"]]
    assert family["dim"] == 2
    return family["value"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (nn.functional.mse_loss, "mse_loss"),
        (nn.Linear, "Linear"),
        (partial(nn.Linear, 3, bias=False), "Linear(3, bias=False)"),
        (lambda x: x, "<lambda>"),
        (nn.Tanh(), "Tanh()"),
        (f64, "torch.float64"),
        (torch.device("cpu"), "cpu"),
        (load_dataset("digits/2"), "digits/2"),
        (math.inf, "inf"),
        (torch.linspace(0, 1, 2, dtype=f64)[1].numpy().item(), 1.0),
        ({"a": (1, None, True), 2: [{"b": f64}]}, {"a": [1, None, True], "2": [{"b": "torch.float64"}]}),
        ({"b", "a"}, ["a", "b"]),
        (RandomQuadratic(3, dtype=f64), {"task": "RandomQuadratic", "dim": 3}),
    ],
)
def test_every_value_is_described_by_what_json_can_hold(value, expected):
    assert described(value) == expected


def test_values_are_described_without_where_they_lie_or_what_they_are_made_of():
    class Nameless:
        pass

    assert described(Nameless()) == described(Nameless())
    number = torch.ones(1, dtype=f64).numpy()[0]  # a float, and one that a checkpoint cannot hold
    assert isinstance(number, float)
    assert type(Mixture([TaskFamily(RandomQuadratic, {"x": number})]).describe()["families"][0]["x"]) is float


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_tensors_are_described_by_shape_and_digest(dtype):
    values = torch.arange(6).view(2, 3).to(dtype)
    said = described(values)
    assert (said["shape"], said["dtype"]) == ([2, 3], str(dtype))
    assert said == described(values.clone())
    assert said["sha256"] == described(values.T.contiguous().T)["sha256"]
    assert said["sha256"] != described(values.flip(0))["sha256"]
    assert len(json.dumps(described(torch.zeros(10_000, dtype=dtype)))) < 100
    assert described(torch.zeros(0, dtype=dtype))["shape"] == [0]


def test_families_are_described_by_name_and_nothing_is_overwritten():
    families = [
        TaskFamily(partial(NoisyQuadratic, 4)),
        TaskFamily(lambda task, device: task, {"task": RandomQuadratic(2), "share": 3}, share=0.5),
        TaskFamily(RandomQuadratic, name="mine"),
    ]
    first, second, third = Mixture(families).describe()["families"]
    assert (first["task"], second["task"], third["task"]) == ("NoisyQuadratic(4)", "<lambda>", "mine")
    assert (second["share"], second["fixed share"]) == (0.5, 3)
    assert second["fixed task"] == RandomQuadratic(2).describe()
    assert repr(Mixture(families)) == "Mixture(NoisyQuadratic(4), <lambda>, mine; horizons=(30, 300))"


# -------------------- tasks that are kept


def quadratics():
    return Mixture([TaskFamily(RandomQuadratic, choices={"dim": list(range(1, 200))})], n_problems=1)


def test_mixture_keeps_the_tasks_drawn_last_and_no_more():
    mixture, alive = quadratics(), weakref.WeakSet()
    for number in range(200):
        alive.add(mixture.draw(number, seed=0).task)
    gc.collect()
    assert len(alive) == 64
    for number in range(199, 169, -1):
        assert mixture.draw(number, seed=0).task in alive


def test_task_in_use_is_kept_and_a_forgotten_one_is_built_again():
    numbers = {quadratics().draw(number, seed=0).task.dim: number for number in range(150)}
    often, once, *others = list(numbers.values())[:80]
    mixture = quadratics()
    first, forgotten = (mixture.draw(number, seed=0).task for number in (often, once))
    for number in others:
        mixture.draw(number, seed=0)
        assert mixture.draw(often, seed=0).task is first
    again = mixture.draw(once, seed=0).task
    assert again is not forgotten
    assert again.describe() == forgotten.describe()
    for a, b in zip(again.draw(INDICES[:2], 0), forgotten.draw(INDICES[:2], 0), strict=True):
        assert torch.equal(a, b)


# -------------------- arguments


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Mixture([]), "`families` should be at least one family"),
        (lambda: Mixture(3), "`families` should be at least one family, in a list. Found `families = 3`"),
        (lambda: Mixture([RandomQuadratic]), "`families` should be at least one family"),
        (lambda: mixture(horizons=(9, 7)), r"`horizons` should be two rising integers.* `horizons = \(9, 7\)`"),
        (lambda: mixture(horizons=[30.0, 30.0]), r"`horizons` should be two rising .* `horizons = \[30.0, 30.0\]`"),
        (lambda: mixture(horizons=30), "`horizons` should be two rising integers .* Found `horizons = 30`"),
        (lambda: mixture(horizons=(0, 7)), "`horizons` should be two rising integers of at least 1"),
        (lambda: mixture(told=1.5), "`told` should be a number between 0 and 1. Found `told = 1.5`"),
        (lambda: mixture(told="x"), "`told` should be a number between 0 and 1. Found `told = 'x'`"),
        (lambda: mixture(n_problems=2.0), "`n_problems` should be a positive integer. Found `n_problems = 2.0`"),
        (lambda: mixture(n_problems=True), "`n_problems` should be a positive integer. Found `n_problems = True`"),
        (lambda: mixture(coordinates=None), "`coordinates` should be a positive number. Found `coordinates = None`"),
        (lambda: mixture(work=math.inf), "`work` should be a positive number. Found `work = inf`"),
        (lambda: TaskFamily(3), "`make` should be a class of tasks, or a function that builds one. Found `make = 3`"),
        (
            lambda: TaskFamily(RandomQuadratic, 3),
            "`fixed` should be a dictionary of arguments by name. Found `fixed = 3`",
        ),
        (lambda: TaskFamily(RandomQuadratic, choices=3), "`choices` should be a dictionary .* Found `choices = 3`"),
        (
            lambda: TaskFamily(RandomQuadratic, choices=[3]),
            r"`choices` should be a dictionary .* Found `choices = \[3\]`",
        ),
        (lambda: TaskFamily(RandomQuadratic, {3: 3}), "`fixed` should be a dictionary of arguments by name"),
        (
            lambda: TaskFamily(RandomQuadratic, choices={"dim": []}),
            r"`choices\['dim'\]` should be a list of values. Found `.* = \[\]`",
        ),
        (
            lambda: TaskFamily(RandomQuadratic, {"device": "cpu"}),
            "`fixed` should be without `device`, which is the mixture's",
        ),
        (lambda: TaskFamily(RandomQuadratic, share="x"), "`share` should be a positive number. Found `share = 'x'`"),
        (
            lambda: TaskFamily(RandomQuadratic, log_range="x"),
            "`log_range` should be a number of at least 0. Found .*'x'",
        ),
        (lambda: TaskFamily(RandomQuadratic, name=3), "`name` should be a string. Found `name = 3`"),
        (
            lambda: ScaledTask(RandomQuadratic(), log_range="x"),
            "`log_range` should be a non-negative number. Found `log_range = 'x'`",
        ),
        (
            lambda: TaskFamily(RandomQuadratic, choices={"dim": 3}),
            r"`choices\['dim'\]` should be a list of values. Found `.* = 3`",
        ),
        (
            lambda: TaskFamily(RandomQuadratic, {"dim": 3}, {"dim": [3]}),
            r"`choices\['dim'\]` should be left out, since it is fixed",
        ),
        (lambda: TaskFamily(RandomQuadratic, share=0.0), "`share` should be a positive number. Found `share = 0.0`"),
        (lambda: NoisyQuadratic(condition=0.5), "`condition` should be a finite number of at least 1. Found .* 0.5"),
        (lambda: TeacherStudent(n_inputs=0), "`n_inputs` should be a positive integer. Found `n_inputs = 0`"),
        (lambda: TeacherStudent(spread=-1.0), "`spread` should be a non-negative number. Found .* -1.0"),
        (
            lambda: ScaledTask(RandomQuadratic(), log_range=-0.5),
            "`log_range` should be a non-negative number. Found .* -0.5`",
        ),
        (
            lambda: load_dataset("digits/3"),
            r"`name` should be one that ends in a number that divides \(8, 8\). Found .*digits/3",
        ),
        (lambda: load_dataset("digits/x"), "`name` should be one that ends in a number"),
    ],
)
def test_arguments_out_of_range_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# -------------------- noisy quadratics


def test_spectrum_of_the_noisy_quadratic_is_log_uniform_over_its_range():
    task = NoisyQuadratic(4, condition=100.0, noise=0.0, dtype=f64)
    A, minimum = task.sample_batch(INDICES, 0, 0)
    logs = torch.linalg.eigvalsh(A.mT @ A).log10()
    assert logs.min() >= -2 - 1e-9
    assert logs.max() <= 1e-9
    # uniform on [-2, 0]: deviation .58, of 1,600 values
    assert abs(logs.mean() + 1) < 5 * 0.58 / 40
    at_minimum = task.loss({"theta": minimum}, (A, minimum))
    torch.testing.assert_close(at_minimum, torch.zeros(400, dtype=f64))


def test_noise_shakes_the_minimum_by_its_deviation():
    task = NoisyQuadratic(4, noise=0.5, dtype=f64)
    (A, first), (B, second) = (task.sample_batch(INDICES, step, 0) for step in (0, 1))
    assert torch.equal(A, B)
    assert (first - second).std().item() == pytest.approx(0.5 * math.sqrt(2), rel=5 / math.sqrt(3200))


def test_axes_of_the_noisy_quadratic_point_anywhere():
    A, _ = NoisyQuadratic(4, condition=100.0, dtype=f64).sample_batch(INDICES, 0, 0)
    axes = torch.linalg.eigh(A.mT @ A).eigenvectors
    # each entry of a random rotation in four dimensions: squares have mean 1/4 and deviation 1/4, fourth powers, which
    # tell it from a permutation of the axes, mean 1/8 and deviation 0.2
    assert (axes.square().mean(0) - 1 / 4).abs().max() < 5 * 0.25 / 20
    assert (axes.pow(4).mean(0) - 1 / 8).abs().max() < 5 * 0.2 / 20


def test_noise_of_the_gradient_has_the_covariance_of_the_squared_hessian():
    task, grads = NoisyQuadratic(3, condition=100.0, noise=0.3, dtype=f64), []
    theta = torch.ones(400, 3, dtype=f64, requires_grad=True)
    for step in range(2):
        batch = task.sample_batch(INDICES, step, 0)
        grads.append(torch.autograd.grad(task.loss({"theta": theta}, batch).sum(), theta)[0])
    curvatures, axes = torch.linalg.eigh(batch[0].mT @ batch[0])
    noise = torch.einsum("nij,ni->nj", axes, grads[1] - grads[0]) / (math.sqrt(2) * 0.3 * curvatures)
    assert noise.std().item() == pytest.approx(1.0, rel=5 / math.sqrt(2400))


# -------------------- teacher and student


def test_student_is_the_network_of_torch_and_its_loss_the_mean_square():
    task = TeacherStudent(5, (4, 3), 2, activation="gelu", batch_size=6, dtype=f64)
    params, (x, y) = task.init_params(INDICES[:3], 0), task.sample_batch(INDICES[:3], 0, 0)
    layers = (nn.Linear(5, 4), nn.GELU(), nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2))
    network = nn.Sequential(*layers).to(f64)
    for k, loss in enumerate(task.loss(params, (x, y))):
        network.load_state_dict({name: value[k] for name, value in params.items()})
        torch.testing.assert_close(loss, nn.functional.mse_loss(network(x[k]), y[k]))


def test_teachers_are_fixed_over_steps_and_of_order_one():
    task = TeacherStudent(16, (4,), 2, batch_size=64, dtype=f64)
    (x0, y0), (x1, y1) = (task.sample_batch(INDICES, step, 0) for step in (0, 1))
    assert not torch.equal(x0, x1)
    assert 0.3 < y0.std() < 1.5
    # the same function: a regression on the first batch of many tasks explains the second as well
    linear = torch.linalg.lstsq(x0, y0).solution
    residual = [((x @ linear - y).square().mean() / y.square().mean()).item() for x, y in ((x0, y0), (x1, y1))]
    assert residual[1] < 0.9
    assert residual[1] < 2.5 * residual[0]


def test_teachers_say_what_layers_of_gain_two_and_one_do():
    task = TeacherStudent(64, (4,), 2, batch_size=64, teacher_width=32, dtype=f64)
    x, y = task.sample_batch(INDICES, 0, 0)
    # over weights of variance 4 / fan-in a hidden unit is the tanh of a normal number of deviation two (times the root
    # mean square of the inputs); over weights of variance 1 / fan-in an output has the mean square of the hidden units
    deviation = 2 * x.square().mean(-1).sqrt().mean()
    z = torch.randn(2**16, generator=torch.Generator().manual_seed(0), dtype=f64)
    expected = (deviation * z).tanh().square().mean().item()
    # 800 outputs with weights of their own: squares of normal numbers, of deviation 1.5 times their mean
    assert y.square().mean().item() == pytest.approx(expected, rel=5 * 1.5 / math.sqrt(800))


def test_scales_of_the_inputs_are_spread_and_their_mean_square_is_one():
    x, _ = TeacherStudent(16, (4,), spread=1.0, batch_size=256, dtype=f64).sample_batch(INDICES, 0, 0)
    scales = x.square().mean(1)
    assert scales.mean(1).sub(1).abs().max() < 1.5  # of chi-squared numbers, some with large weights
    assert abs(scales.mean() - 1) < 0.05
    # ln of a squared scale has deviation 2
    assert scales.log().std(1).mean().item() == pytest.approx(2.0, rel=0.1)


# -------------------- rescaled tasks, smaller images


def test_rescaled_task_starts_with_the_same_loss_and_a_longer_gradient():
    task = MLPClassification("digits", (5,), dtype=f64)
    rescaled = ScaledTask(task, log_range=1.0)
    indices = INDICES[:5]
    params, plain = rescaled.init_params(indices, 1), task.init_params(indices, 1)
    batches = rescaled.sample_batch(indices, 2, 1), task.sample_batch(indices, 2, 1)
    for values in (params, plain):
        for value in values.values():
            value.requires_grad_()
    losses = rescaled.loss(params, batches[0]), task.loss(plain, batches[1])
    torch.testing.assert_close(*losses)
    grads = [torch.autograd.grad(loss.sum(), list(v.values())) for loss, v in zip(losses, (params, plain), strict=True)]
    for k, name in enumerate(plain):
        shape = (-1, *(1,) * (plain[name].dim() - 1))
        factor = (plain[name] / params[name]).flatten(1)[:, 0]
        assert math.exp(-1) <= factor.min() < factor.max() <= math.exp(1)
        torch.testing.assert_close(grads[0][k], grads[1][k] * factor.view(shape))


def test_each_tensor_of_each_problem_has_a_factor_of_its_own():
    task = TeacherStudent(3, (2,), dtype=f64)
    rescaled = ScaledTask(task, log_range=1.5)
    params, plain = (t.init_params(INDICES, 0) for t in (rescaled, task))
    logs = torch.stack([(plain[name] / params[name]).flatten(1)[:, 0].log() for name in plain])
    assert logs.abs().max() <= 1.5
    # uniform numbers: deviation 1.5 over the root of three; correlations of 400 have deviation 1/20
    assert ((logs.std(1) / (1.5 / math.sqrt(3)) - 1).abs() < 5 / math.sqrt(800)).all()
    assert (torch.corrcoef(logs) - torch.eye(4, dtype=f64)).abs().max() < 5 / 20


def test_smaller_images_are_means_of_squares():
    whole, half = load_dataset("digits"), load_dataset("digits/2")
    assert half.name == "digits/2"
    assert half.image_shape == (4, 4)
    first = whole.train_images[0].view(8, 8).float()
    mean = first[2:4, 4:6].mean()
    assert abs(half.train_images[0].view(4, 4)[1, 2] - mean) <= 0.5
    assert load_dataset("digits/2") is half
