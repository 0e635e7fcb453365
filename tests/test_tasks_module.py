"""Tasks from modules: equal to a loop over modules, and clear about what vmap cannot take."""

import random

import pytest
import torch
from scipy import stats
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from odeopt import LearnedOptimizer, compare, load_pretrained, meta_train, param_groups
from odeopt.meta import MetaConfig, gradient_flow, unroll
from odeopt.physics import PortHamiltonianSystem
from odeopt.rules import AdamUpdate, SGDUpdate
from odeopt.tasks import MLPClassification, ModuleTask, load_dataset
from odeopt.tasks import random as rnd

f64 = torch.float64


def draw_problems(task, indices, step=0, seed=0):
    return task.init_params(indices, seed), task.sample_batch(indices, step, seed)


def line_task(make_module=lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)).to(f64), **kwargs):
    x = torch.linspace(-1, 1, 50, dtype=f64).unsqueeze(1)
    return ModuleTask(
        make_module,
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
        module.head.bias.requires_grad_(False).zero_()
        return module

    task = ModuleTask(make_module, sequences(), loss_fn=mean_squared)
    params, batch = draw_problems(task, torch.arange(2))
    assert "scale" not in params
    assert "head.bias" not in params
    before = task.loss(params, batch)
    task.module.scale.zero_()
    assert not torch.equal(task.loss(params, batch), before)


@pytest.mark.parametrize("kind", ["buffer", "frozen"])
def test_shared_tensors_that_are_drawn_are_warned_of(kind):
    def make_module():
        module, drawn = nn.Linear(1, 1), torch.randn(3)
        if kind == "buffer":
            module.register_buffer("features", drawn)
        else:
            module.features = nn.Parameter(drawn, requires_grad=False)
        return module

    x = torch.linspace(-1, 1, 50).unsqueeze(1)
    with pytest.warns(UserWarning, match=r"should draw trained parameters alone. Found other `features` under another"):
        ModuleTask(make_module, (x, x), loss_fn=nn.functional.mse_loss)


class Changing(nn.Linear):
    """A line that changes what it keeps beside its weights, in one of several ways."""

    def __init__(self, how, after=0):
        super().__init__(1, 1, dtype=f64)
        self.how, self.after, self.n_calls, self.last = how, after, 0, None
        self.register_buffer("mean", torch.zeros(1, dtype=f64))
        self.register_buffer("n", torch.zeros((), dtype=f64), persistent=False)
        self.register_buffer("unset", None)
        self.inner = nn.Module()
        self.inner.frozen = nn.Parameter(torch.ones(1, dtype=f64), requires_grad=False)

    def forward(self, x):
        if self.n >= 0 and x.shape[0] > self.after:  # a condition that holds for some batches
            getattr(self, self.how)(x)
        return super().forward(x) * self.inner.frozen + self.mean + self.n + self.n_calls

    def in_place(self, x):
        self.n += 0.1

    def by_copy(self, x):
        self.n.copy_(torch.ones_like(self.n))

    def out_of_place(self, x):
        self.mean = 0.9 * self.mean + 0.1 * x.mean(0)

    def set_at_last(self, x):
        self.unset = x.mean().detach()

    def frozen_in_place(self, x):
        with torch.no_grad():
            self.inner.frozen.mul_(1.1)

    def attribute(self, x):
        self.n_calls, self.last = self.n_calls + 1, x


CHANGES = {
    "in_place": "n",
    "by_copy": "n",
    "out_of_place": "mean",
    "set_at_last": "unset",
    "frozen_in_place": "inner.frozen",
}


@pytest.mark.parametrize("how", CHANGES)
def test_module_that_changes_its_buffers_is_refused_by_their_names(how):
    with pytest.raises(ValueError, match=rf"Found `Changing`, which changes {CHANGES[how]}; pass what changes"):
        line_task(make_module=lambda: Changing(how))


@pytest.mark.parametrize("how", sorted(CHANGES.keys() - {"frozen_in_place"}))
def test_module_that_changes_its_buffers_later_is_refused_then_and_nothing_stays_of_it(how):
    x = lambda indices, step, seed: (torch.ones(len(indices), 9 if step else 4, 1, dtype=f64),)  # noqa: E731
    task = ModuleTask(lambda: Changing(how, after=5), x, loss_fn=lambda output: output.square().mean())
    params, batch = draw_problems(task, torch.arange(3))
    before = task.loss(params, batch)
    kept = {name: (value, value.clone()) for name, value in task.module.named_buffers()}
    with pytest.raises(ValueError, match=f"which changes {CHANGES[how]};"):
        task.loss(params, task.sample_batch(torch.arange(3), 1, 0))
    now = dict(task.module.named_buffers())
    assert now.keys() == kept.keys()
    assert all(now[name] is value and torch.equal(value, copy) for name, (value, copy) in kept.items())
    assert torch.equal(task.loss(params, batch), before)


def test_what_forward_assigns_to_attributes_reaches_no_other_evaluation():
    task = line_task(make_module=lambda: Changing("attribute"))
    runs = [unroll(SGDUpdate(0.1), task, indices=torch.arange(n), n_steps=4).losses for n in (2, 3, 2)]
    assert torch.equal(runs[0], runs[2])
    assert torch.equal(runs[0], runs[1][:, :2])
    assert (task.module.n_calls, task.module.last) == (0, None)


def test_failed_evaluation_leaves_the_module_as_it_was():
    task = line_task(make_module=lambda: Changing("attribute"))
    params, (x, y) = draw_problems(task, torch.arange(2))
    before = task.loss(params, (x, y))
    with pytest.raises(RuntimeError):
        task.loss(params, (x.expand(2, 8, 3), y))
    assert task.module.n_calls == 0
    assert torch.equal(task.loss(params, (x, y)), before)


def test_buffers_are_lent_in_inference_mode_too():
    task = ModuleTask(Attention, sequences(), loss_fn=mean_squared)
    params, batch = draw_problems(task, torch.arange(2))
    with torch.inference_mode():
        assert torch.equal(task.loss(params, batch), task.loss(params, batch))


def test_loss_that_counts_is_refused():
    class Warming(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.ones((), dtype=f64))

        def forward(self, output, target):
            self.n += 1
            return self.n * (output - target).square().mean()

    with pytest.raises(
        ValueError, match="`make_module` and `loss_fn` should give a loss that depends on parameters and"
    ):
        line_task(loss_fn=Warming())


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
        (lambda: nn.Embedding(4, 2, sparse=True), "Found `Embedding`: `sparse` has no second"),
        (lambda: nn.Sequential(nn.EmbeddingBag(4, 2, max_norm=1.0)), "Found `0 = EmbeddingBag`: `max_norm` has no"),
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
        ({"batch_size": 2.5}, ValueError, "`batch_size` should be a positive integer. Found `batch_size = 2.5`"),
        (
            {"make_module": nn.Linear(1, 1)},
            TypeError,
            r"`make_module` should be a function\. Found `make_module = Linear",
        ),
        ({"make_module": lambda: 3}, TypeError, "`make_module` should return a module. Found `3`"),
        ({"loss_fn": "mse"}, TypeError, "`loss_fn` should be a function. Found `loss_fn = 'mse'`"),
        ({"loss_fn": lambda a, b: 1.0}, TypeError, "`loss_fn` should return a 0-d tensor. Found `1.0`"),
        (
            {"make_module": lambda: nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1).double())},
            ValueError,
            r"`make_module` .* all torch.float64. Found 0.bias \(torch.float32\), 1.bias \(torch.float64\)",
        ),
        ({"make_module": lambda: nn.Linear(1, 1).half()}, ValueError, r"`make_module`.*Found bias \(torch.float16\)"),
        (
            {"loss_fn": lambda a, b: (a - b).square()},
            ValueError,
            r"`loss_fn` should be one that returns a 0-d.*shape \(8, 1\)",
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
        ((torch.ones(3, 1), torch.ones(2)), ValueError, r"examples\. Found `data = \[3, 2\]`"),
        ((torch.ones(0, 1),), ValueError, r"Found `data = \[0\]`"),
        ((torch.tensor(1.0),), ValueError, r"Found `data = \[None\]`"),
        (
            lambda i, step, seed: (torch.ones(3, 4, 1),),
            ValueError,
            r"`data` .* as `indices`, here 2. Found `data = \[\(3, 4, 1\)",
        ),
        (lambda i, step, seed: ([1.0],), ValueError, r"`data` .* Found `data = \[\[1.0\]\]`"),
        (lambda i, step, seed: (), ValueError, r"`data` .* Found `data = \[\]`"),
    ],
)
def test_module_task_refuses_data(data, error, match):
    with pytest.raises(error, match=match):
        ModuleTask(lambda: nn.Linear(1, 1), data, loss_fn=mean_squared)


def test_module_drawn_by_another_generator_is_told_of():
    def network():
        network = nn.Linear(1, 1)
        nn.init.constant_(network.weight, random.random())
        return network

    with pytest.warns(RuntimeWarning, match="`make_module` gives something else .* by torch's own generator alone"):
        ModuleTask(network, (torch.ones(4, 1), torch.ones(4, 1)), loss_fn=nn.functional.mse_loss)


@pytest.mark.parametrize("n_examples", [30, 0.75])
def test_examples_are_held_out(n_examples):
    numbers = torch.arange(40.0).unsqueeze(1)
    task = ModuleTask(lambda: nn.Linear(1, 1), (numbers,), loss_fn=torch.mean, batch_size=20, n_examples=n_examples)
    assert task.describe()["n_examples"] == n_examples
    indices = torch.tensor([7, 2])

    def drawn(sample):
        return [
            set(torch.cat([sample(indices, step, 5)[0][k] for step in range(30)]).flatten().tolist()) for k in (0, 1)
        ]

    trained, held_out = drawn(task.sample_batch), drawn(task.sample_held_out)
    for own, others in zip(trained, held_out, strict=True):
        assert (len(own), len(others), len(own | others)) == (30, 10, 40)
    assert trained[0] != trained[1]
    assert sum(abs(a - b) == 1 for a in held_out[0] for b in held_out[0]) < 14  # in another order than the data's


def test_without_examples_to_hold_out_there_is_no_held_out_loss():
    task = line_task()
    with pytest.raises(ValueError, match=r"`n_examples` should be fewer than all \d+ examples of the data, so that"):
        task.sample_held_out(torch.arange(2), 0, 0)
    with pytest.raises(ValueError, match=r"`n_examples` should be None where `data` is a function"):
        ModuleTask(lambda: nn.Linear(1, 1), lambda *_: (torch.ones(2, 1),), loss_fn=torch.mean, n_examples=3)


def test_no_problems_are_refused():
    with pytest.raises(ValueError, match="`indices` should be the number of at least one problem"):
        unroll(SGDUpdate(0.1), line_task(), indices=torch.arange(0), n_steps=1)


class Mixed(nn.Module):
    """Learned positions, gains of two axes and, if there is one, a stack of experts."""

    def __init__(self, n_experts=0):
        super().__init__()
        self.pos_embed = nn.Parameter(0.1 * torch.randn(1, 3, 8))
        self.body, self.head = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm((3, 8))), nn.Linear(24, 5)
        self.experts = nn.Parameter(torch.randn(n_experts, 8, 8) / 3) if n_experts else None

    def forward(self, x):
        x = self.body(x + self.pos_embed).tanh()
        return self.head((x if self.experts is None else torch.einsum("eoi,nki->nko", self.experts, x)).flatten(1))


def test_modules_are_stepped_as_by_an_optimizer_with_the_groups_that_fit_them():
    data = torch.randn(64, 3, 8), torch.randint(5, (64,))
    loss_fn, one = nn.functional.cross_entropy, torch.zeros(1, dtype=torch.int64)
    task, rule = ModuleTask(Mixed, data, loss_fn=loss_fn, batch_size=8), load_pretrained("port-hamiltonian-spectral")
    found = unroll(rule, task, indices=one, n_steps=5).losses[-1]
    module = Mixed()
    module.load_state_dict({name: x[0] for name, x in task.init_params(one, 0).items()})
    optimizer = LearnedOptimizer(param_groups(module), rule)
    for step in range(6):
        inputs, labels = task.sample_batch(one, step, 0)
        loss = loss_fn(module(inputs[0]), labels[0])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(found, loss.detach()[None], rtol=1e-3, atol=0)
    with pytest.warns(UserWarning, match="Parameters experts are stacks, which a task steps as one tensor each"):
        ModuleTask(lambda: Mixed(4), data, loss_fn=loss_fn, batch_size=8)


class Scaled(nn.Module):
    """A line with a gain of no axis, and a layer that the loss does not reach."""

    def __init__(self):
        super().__init__()
        self.line, self.idle, self.gain = nn.Linear(1, 1), nn.Linear(1, 3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.gain * self.line(x)


@pytest.mark.parametrize("name", ["port-hamiltonian", "port-hamiltonian-spectral", "lstm", "hamiltonian"])
def test_scalars_and_what_the_loss_does_not_reach_are_trained_and_compared(name):
    task = line_task(lambda: Scaled().to(f64))
    rule = load_pretrained(name)
    meta_train(rule, task, MetaConfig(n_meta_steps=1, n_tasks=2, horizon=3, n_validation_tasks=2), progress_bar=False)
    found = compare({"rule": rule, "adam": AdamUpdate(0.1)}, task, n_steps=3, n_runs=2)
    assert all(result.losses.isfinite().all() for result in found.results.values())
    start = task.init_params(torch.arange(2), 0)
    run = unroll(AdamUpdate(0.1), task, indices=torch.arange(2), n_steps=3)
    assert torch.equal(run.params["idle.weight"], start["idle.weight"])
    assert not torch.equal(run.params["gain"], start["gain"])


def test_flow_of_a_module_with_a_scalar():
    task = line_task(lambda: Scaled().to(f64))
    flow = gradient_flow(task, PortHamiltonianSystem(1, dissipation=1.0), [0.0, 1.0], indices=torch.arange(2))
    assert (flow.losses[-1] < flow.losses[0]).all()


def test_loss_without_a_gradient_is_refused():
    with pytest.raises(ValueError, match="`loss_fn` should be a loss that can be differentiated"):
        line_task(loss_fn=lambda output, target: (output.round() != target).double().mean())
