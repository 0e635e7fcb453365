"""Tasks from modules: equal to a loop over modules, and clear about what vmap cannot take."""

import pytest
import torch
from scipy import stats
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from odeopt.tasks import MLPClassification, ModuleTask, load_dataset
from odeopt.tasks import random as rnd

f64 = torch.float64


def draw_problems(task, indices, step=0, seed=0):
    return task.init_params(indices, seed), task.sample_batch(indices, step, seed)


def line_task(**kwargs):
    x = torch.linspace(-1, 1, 50, dtype=f64).unsqueeze(1)
    return ModuleTask(
        lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).to(f64),
        (x, x.sin()),
        **({"loss_fn": nn.functional.mse_loss, "batch_size": 8} | kwargs),
    )


class Attention(nn.Module):
    """One head of attention through torch's own module, then a number per sequence."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 1)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.head(self.attention(x, x, x, need_weights=False)[0]).mean((1, 2)) * self.scale


class Convolution(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1))


def sequences(n=40):
    x = rnd.normal(torch.arange(n), (3, 4), seed=0, stream="sequences")
    return x, x.mean((1, 2))


def mean_squared(output, target):
    return (output.reshape(target.shape) - target).square().mean()


@pytest.mark.parametrize("make_module", [Attention, lambda: Attention().eval(), Convolution])
def test_module_task_equals_a_loop_over_modules(make_module):
    task = ModuleTask(make_module, sequences(), loss_fn=mean_squared, batch_size=6)
    params, batch = draw_problems(task, torch.arange(3))
    params = {name: value.requires_grad_() for name, value in params.items()}
    values = list(params.values())

    def second_derivatives(losses):
        grads = torch.autograd.grad(losses.sum(), values, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), values)

    losses = task.loss(params, batch)
    module = make_module().train()  # its parameters and its mode do not matter: no dropout here
    with sdpa_kernel(SDPBackend.MATH):
        loop = torch.stack(
            [
                mean_squared(functional_call(module, {n: v[i] for n, v in params.items()}, x), y)
                for i, (x, y) in enumerate(zip(*batch, strict=True))
            ]
        )
    torch.testing.assert_close(losses, loop, rtol=1e-5, atol=1e-6)  # rounding of float32
    for vmapped, looped in zip(second_derivatives(losses), second_derivatives(loop), strict=True):
        torch.testing.assert_close(vmapped, looped, rtol=1e-4, atol=1e-5)  # the same, twice


def test_module_task_equals_the_perceptron_by_hand():
    data = load_dataset("digits")
    mlp = MLPClassification(data, (5,), activation="tanh", dtype=f64)
    task = ModuleTask(
        lambda: nn.Sequential(nn.Linear(64, 5), nn.Tanh(), nn.Linear(5, 10)).to(f64),
        (data.train_images.to(f64) / 255, data.train_labels),
        loss_fn=nn.functional.cross_entropy,
    )
    params, batch = draw_problems(mlp, torch.arange(4))
    torch.testing.assert_close(task.loss(params, batch), mlp.loss(params, batch), rtol=1e-12, atol=0)


def test_module_task_initialises_as_the_module_does_and_leaves_the_generator_alone():
    task = line_task()
    state = torch.get_rng_state()
    params = task.init_params(torch.arange(200), 0)
    assert torch.equal(torch.get_rng_state(), state)
    for name, fan_in in (("0.weight", 1), ("2.weight", 4)):
        law = stats.uniform(-(fan_in**-0.5), 2 * fan_in**-0.5)
        assert stats.kstest(params[name].flatten().numpy(), law.cdf).pvalue > 1e-4


def test_minibatches_keep_inputs_and_targets_together():
    x, y = line_task().sample_batch(torch.arange(3), 2, 0)
    assert x.shape == y.shape == (3, 8, 1)
    assert torch.equal(y, x.sin())


def test_buffers_and_frozen_parameters_are_shared():
    def make_module():
        module = Attention()
        module.head.bias.requires_grad_(False)
        return module

    task = ModuleTask(make_module, sequences(), loss_fn=mean_squared)
    params, batch = draw_problems(task, torch.arange(2))
    assert "scale" not in params
    assert "head.bias" not in params
    before = task.loss(params, batch)
    task.module.scale.zero_()
    assert not torch.equal(task.loss(params, batch), before)


def test_data_may_come_from_a_function():
    def sample(indices, step, seed):
        x = rnd.uniform(indices, (5, 1), seed=seed, stream="x", step=step, dtype=f64)
        return x, 2 * x

    make_module = lambda: nn.Linear(1, 1, dtype=f64)  # noqa: E731
    task = ModuleTask(make_module, sample, loss_fn=nn.functional.mse_loss, name="line")
    x, y = task.sample_batch(torch.arange(3), 4, 1)
    assert torch.equal(y, 2 * rnd.uniform(torch.arange(3), (5, 1), seed=1, stream="x", step=4, dtype=f64))
    assert task.loss(task.init_params(torch.arange(3), 0), (x, y)).shape == (3,)
    assert task.describe() == {"task": "ModuleTask", "name": "line", "batch_size": None}


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.cell = nn.LSTMCell(4, 2)

    def forward(self, x):
        return self.cell(x[:, 0])[0]


class FunctionalDropout(nn.Linear):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x))


@pytest.mark.parametrize(
    ("make_module", "match"),
    [
        (
            lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Flatten()),
            "Found `0 = BatchNorm1d`: its running statistics",
        ),
        (lambda: nn.InstanceNorm1d(3, affine=True, track_running_stats=True), "Found `InstanceNorm1d"),
        (lambda: nn.ModuleDict({"memory": nn.LSTM(4, 2)}), "Found `memory = LSTM`: .*recurrent"),
        (lambda: nn.Sequential(nn.GRU(4, 2)), "Found `0 = GRU"),
        (lambda: nn.Sequential(nn.RNN(4, 2)), "Found `0 = RNN"),
        (Recurrent, "Found `cell = LSTMCell"),
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.1)),
            "Found `1 = Dropout`: its dropout is active",
        ),
        (
            lambda: nn.MultiheadAttention(4, 2, dropout=0.1),
            "Found `MultiheadAttention`: its dropout is active",
        ),
        (lambda: FunctionalDropout(4, 1), "Found `FunctionalDropout`, where it fails: .*random"),
        (lambda: nn.Linear(4, 1, device="meta"), "on the CPU.*Found `weight` on meta"),
        (nn.Flatten, "should build a module with parameters. Found `Flatten"),
    ],
)
def test_module_task_refuses_what_vmap_cannot_take(make_module, match):
    with pytest.raises(ValueError, match=match):
        ModuleTask(make_module, sequences(), loss_fn=mean_squared)


def test_module_task_takes_what_looks_alike_and_is_not():
    """Batch statistics alone, and what evaluation mode switches off."""
    for make_module in (
        lambda: nn.Sequential(nn.BatchNorm1d(3, track_running_stats=False), nn.Flatten(), nn.Linear(12, 1)),
        lambda: nn.Sequential(nn.BatchNorm1d(3), nn.Flatten(), nn.Dropout(), nn.Linear(12, 1)).eval(),
    ):
        task = ModuleTask(make_module, sequences(), loss_fn=mean_squared)
        assert torch.isfinite(task.loss(*draw_problems(task, torch.arange(2)))).all()


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size = 0`"),
        (
            {"loss_fn": lambda a, b: (a - b).square()},
            ValueError,
            r"`loss_fn` should return a 0-d.*`\(8, 1\)`",
        ),
    ],
)
def test_module_task_refuses(kwargs, error, match):
    with pytest.raises(error, match=match):
        line_task(**kwargs)


@pytest.mark.parametrize(
    ("data", "error", "match"),
    [
        (torch.ones(3, 1), TypeError, "`data` should be a tuple of tensors or a function. Found `Tensor`"),
        ((), TypeError, "Found `tuple`"),
        ((torch.ones(3, 1), torch.ones(2)), ValueError, r"Found \[3, 2\]"),
        ((torch.ones(0, 1),), ValueError, r"Found \[0\]"),
        ((torch.tensor(1.0),), ValueError, r"Found \[None\]"),
    ],
)
def test_module_task_refuses_data(data, error, match):
    with pytest.raises(error, match=match):
        ModuleTask(lambda: nn.Linear(1, 1), data, loss_fn=mean_squared)
