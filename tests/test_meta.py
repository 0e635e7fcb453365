"""The unrolled computation, the meta-loss, and the gradient of one through the other."""

import pytest
import torch
from rule_toys import draws, flat_weights, port_hamiltonian, randomised
from torch import nn

from odeopt import LearnedOptimizer
from odeopt.meta import Backpropagation, MetaObjective, unroll
from odeopt.rules import AdamUpdate, HamiltonianUpdate, LSTMUpdate, SGDUpdate
from odeopt.tasks import ModuleTask, RandomQuadratic

f64 = torch.float64
INDICES = torch.tensor([3, 0, 11])
QUADRATIC = RandomQuadratic(4, dtype=f64)


# -------------------- one trajectory, however it is run

RULES = {
    "port-hamiltonian": lambda: port_hamiltonian(uses_progress=True),
    "lstm": lambda: randomised(LSTMUpdate(hidden_size=5, preprocess=True)),
    "hamiltonian": lambda: randomised(HamiltonianUpdate(normalize=True)),
    "adam": lambda: AdamUpdate(0.05),
}


def small_network(dtype=f64):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def network_task():
    inputs, targets = draws(12, 3), draws(12, 2, seed=1)
    return ModuleTask(small_network, (inputs, targets), loss_fn=nn.functional.mse_loss, batch_size=5)


@pytest.mark.parametrize("name", RULES)
def test_unroll_equals_a_loop_by_hand_and_the_optimizer(name):
    rule, task, n_steps, index = RULES[name](), network_task(), 8, torch.tensor([5])
    with torch.no_grad():
        expected = unroll(rule, task, indices=index, n_steps=n_steps, seed=2, total_steps=n_steps)
    start = {key: value[0] for key, value in task.init_params(index, 2).items()}
    batches = [[part[0] for part in task.sample_batch(index, step, 2)] for step in range(n_steps + 1)]

    def loss_of(params, step):
        x, y = batches[step]
        hidden = torch.tanh(x @ params["0.weight"].T + params["0.bias"])
        return (hidden @ params["2.weight"].T + params["2.bias"] - y).square().mean()

    # one network, no axis of tasks: gradients and updates written out
    params, losses = {key: value.clone() for key, value in start.items()}, []
    states = {key: rule.init_state(value.flatten()) for key, value in params.items()}
    for step in range(n_steps + 1):
        leaves = {key: value.detach().requires_grad_() for key, value in params.items()}
        loss = loss_of(leaves, step)
        losses.append(loss.item())
        grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        if step == n_steps:
            break
        for key, value in params.items():
            update, states[key] = rule(
                grads[key].flatten(),
                states[key],
                param=value.flatten(),
                shape=value.shape,
                progress=torch.tensor(step / n_steps, dtype=f64),
            )
            params[key] = (value + update.view(value.shape)).detach()

    model = small_network()
    model.load_state_dict(start)
    optimizer, optimizer_losses = LearnedOptimizer(model.parameters(), rule, total_steps=n_steps), []
    for step in range(n_steps + 1):
        optimizer.zero_grad()
        x, y = batches[step]
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer_losses.append(loss.item())
        if step < n_steps:
            optimizer.step()

    # batched and single products round differently: 1e-16, grown over eight steps
    tolerances = {"rtol": 1e-9, "atol": 1e-11}
    torch.testing.assert_close(torch.tensor(losses, dtype=f64), expected.losses[:, 0], **tolerances)
    torch.testing.assert_close(torch.tensor(optimizer_losses, dtype=f64), expected.losses[:, 0], **tolerances)
    for key, value in model.state_dict().items():
        torch.testing.assert_close(params[key], expected.params[key][0], **tolerances)
        torch.testing.assert_close(value, expected.params[key][0], **tolerances)
    assert abs(losses[-1] - losses[0]) > 1e-3


@pytest.mark.parametrize("name", RULES)
def test_tasks_of_a_batch_run_as_if_alone(name):
    rule = RULES[name]()
    with torch.no_grad():
        together = unroll(rule, QUADRATIC, indices=INDICES, n_steps=6)
        alone = [unroll(rule, QUADRATIC, indices=INDICES[i : i + 1], n_steps=6) for i in range(3)]
    torch.testing.assert_close(together.losses, torch.cat([t.losses for t in alone], dim=1), rtol=1e-9, atol=1e-11)
    assert together.losses.shape == (7, 3)


def test_unroll_does_the_same_with_and_without_derivatives():
    rule = port_hamiltonian()
    with_graph = unroll(rule, QUADRATIC, indices=INDICES, n_steps=5)
    detached = unroll(rule, QUADRATIC, indices=INDICES, n_steps=5, detach=True)
    with torch.no_grad():
        without = unroll(rule, QUADRATIC, indices=INDICES, n_steps=5)
    assert with_graph.losses.requires_grad
    assert detached.losses.requires_grad
    assert not without.losses.requires_grad
    assert torch.equal(with_graph.losses, without.losses)
    assert torch.equal(detached.losses, without.losses)


@pytest.mark.parametrize("name", RULES)
def test_pieces_of_a_run_continue_it_exactly(name):
    rule, task = RULES[name](), network_task()
    with torch.no_grad():
        whole = unroll(rule, task, indices=INDICES, n_steps=10, total_steps=10)
        first = unroll(rule, task, indices=INDICES, n_steps=5, total_steps=10)
        kept = {key: value.clone() for key, value in first.params.items()}
        second = unroll(
            rule,
            task,
            indices=INDICES,
            n_steps=5,
            start=5,
            params=first.params,
            states=first.states,
            total_steps=10,
        )
    assert torch.equal(torch.cat((first.losses[:-1], second.losses)), whole.losses)
    for key, value in whole.params.items():
        assert torch.equal(value, second.params[key])
        assert all(torch.equal(a, b) for a, b in zip(whole.states[key], second.states[key], strict=True))
        assert torch.equal(first.params[key], kept[key])  # what was handed in is left alone


class Recorder(SGDUpdate):
    """Gradient descent that keeps what it is told."""

    def __init__(self):
        super().__init__(0.01)
        self.calls = []

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        self.calls.append((param.shape, shape, progress))
        return super().forward(grad, state)


@pytest.mark.parametrize("factor", [0.5, 3.0])
def test_update_scale_is_the_learning_rate_of_a_linear_rule(factor):
    task, indices = RandomQuadratic(3), torch.arange(4)
    with torch.no_grad():
        scaled = unroll(SGDUpdate(0.01), task, indices=indices, n_steps=5, update_scale=factor)
        other = unroll(SGDUpdate(0.01 * factor), task, indices=indices, n_steps=5)
    torch.testing.assert_close(scaled.losses, other.losses)


def test_rule_sees_flat_tensors_their_shape_and_the_fraction_of_the_run_that_is_done():
    rule, task = Recorder(), network_task()
    unroll(rule, task, indices=INDICES, n_steps=2, start=1, total_steps=4)
    assert [(tuple(flat), tuple(shape)) for flat, shape, _ in rule.calls[:4]] == [
        ((3, 12), (4, 3)),
        ((3, 4), (4,)),
        ((3, 8), (2, 4)),
        ((3, 2), (2,)),
    ]
    assert [progress.item() for *_, progress in rule.calls] == [0.25] * 4 + [0.5] * 4
    assert all(progress.shape == () for *_, progress in rule.calls)
    rule.calls.clear()
    unroll(rule, task, indices=INDICES, n_steps=1)
    assert all(progress is None for *_, progress in rule.calls)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_steps": 0}, "`n_steps` should be a positive integer. Found `n_steps = 0`"),
        ({"n_steps": 2.5}, "`n_steps` should be a positive integer. Found `n_steps = 2.5`"),
        ({"n_steps": 1, "start": -1}, "`start` should be an integer of at least 0. Found `start = -1`"),
        (
            {"n_steps": 1, "total_steps": "8"},
            "`total_steps` should be a positive integer or None. Found `total_steps = '8'`",
        ),
        (
            {"n_steps": 5, "start": 3, "total_steps": 7},
            r"`total_steps` should be at least `start \+ n_steps = 8`. Found `total_steps = 7`",
        ),
    ],
)
def test_unroll_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        unroll(SGDUpdate(), QUADRATIC, indices=INDICES, **options)


# -------------------- the meta-loss


@pytest.mark.parametrize(
    ("weights", "expected"),
    [("uniform", [0.25] * 4), ("linear", [0.1, 0.2, 0.3, 0.4]), ("last", [0, 0, 0, 1.0])],
)
def test_meta_loss_weighs_the_losses(weights, expected):
    losses = draws(4, 3).square()
    value = MetaObjective(weights, log=False)(losses, start=0, horizon=4)
    torch.testing.assert_close(value, torch.tensor(expected, dtype=f64) @ losses)
    in_logs = MetaObjective(weights, eps=0.1)(losses, start=0, horizon=4)
    torch.testing.assert_close(in_logs, torch.tensor(expected, dtype=f64) @ (losses + 0.1).log())


@pytest.mark.parametrize("weights", ["uniform", "linear", "last"])
def test_weights_sum_to_one_over_the_horizon_and_pieces_add_up(weights):
    objective = MetaObjective(weights, log=False)
    torch.testing.assert_close(objective(torch.ones(7, 1, dtype=f64), start=0, horizon=7), torch.ones(1, dtype=f64))
    losses = draws(7, 2)
    pieces = [objective(losses[i:j], start=i, horizon=7) for i, j in ((0, 3), (3, 5), (5, 7))]
    torch.testing.assert_close(sum(pieces), objective(losses, start=0, horizon=7))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"weights": "first"}, "`weights` should be one of uniform, linear, late, last. Found `weights = 'first'`"),
        ({"eps": 0.0}, "`eps` should be a positive number. Found `eps = 0.0`"),
    ],
)
def test_meta_loss_refuses(options, match):
    with pytest.raises(ValueError, match=match):
        MetaObjective(**options)


# -------------------- the meta-gradient


def meta_gradient(rule, *, horizon=5, **options):
    rule.zero_grad()
    estimator, objective = Backpropagation(**options), MetaObjective()
    losses = list(estimator.gradients(rule, QUADRATIC, objective, indices=INDICES, horizon=horizon, seed=1))
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in rule.parameters()]
    return nn.utils.parameters_to_vector(grads), losses


def meta_loss(rule, *, horizon=5):
    with torch.no_grad():
        losses = unroll(rule, QUADRATIC, indices=INDICES, n_steps=horizon, seed=1, total_steps=horizon).losses
    weights = torch.arange(1, horizon + 1, dtype=f64)
    return (weights / weights.sum()) @ (losses[1:] + 1e-8).log().mean(-1)


META_RULES = {
    "port-hamiltonian": port_hamiltonian,
    "port-hamiltonian, mass": lambda: port_hamiltonian("mass"),
    "hamiltonian": lambda: randomised(HamiltonianUpdate(normalize=True), seed=1),
    "lstm": lambda: randomised(LSTMUpdate(output_scale=1.0)),
}


@pytest.mark.parametrize("name", META_RULES)
def test_meta_gradient_is_exact(name):
    rule = META_RULES[name]()
    weights, step = flat_weights(rule), 1e-5
    directions = draws(6, len(weights))
    directions /= directions.norm(dim=1, keepdim=True)
    differences = []
    for direction in directions:
        values = []
        for sign in (1, -1):
            nn.utils.vector_to_parameters(weights + sign * step * direction, rule.parameters())
            values.append(meta_loss(rule))
        differences.append((values[0] - values[1]) / (2 * step))
    nn.utils.vector_to_parameters(weights, rule.parameters())
    expected = torch.stack(differences)
    exact, (loss,) = meta_gradient(rule)
    # central differences: errors of step^2 times third derivatives, and of 1e-15 / step
    torch.testing.assert_close(directions @ exact, expected, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(loss, meta_loss(rule))
    biased, _ = meta_gradient(rule, detach=True)
    assert (directions @ biased - expected).norm() > 1e-3 * expected.norm()


def test_detached_meta_gradient_holds_the_gradients_that_the_rule_sees_constant():
    rule = port_hamiltonian(modes=1)
    biased, _ = meta_gradient(rule, detach=True)
    # a run on recorded gradients: theta_t depends on the weights through the updates only
    W, y = QUADRATIC.sample_batch(INDICES, 0, 1)
    theta, state = torch.zeros(3, 4, dtype=f64), None
    state, losses = rule.init_state(theta), []
    for _ in range(5):
        residual = torch.einsum("bij,bj->bi", W, theta.detach()) - y
        grad = 2 * torch.einsum("bij,bi->bj", W, residual)
        update, state = rule(grad, state, param=theta, shape=(4,))
        theta = theta + update
        losses.append((torch.einsum("bij,bj->bi", W, theta) - y).square().sum(-1))
    weights = torch.arange(1, 6, dtype=f64) / 15
    value = (weights @ (torch.stack(losses) + 1e-8).log()).mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(value, list(rule.parameters()))])
    torch.testing.assert_close(biased, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("truncation", [5, 9])
def test_truncation_over_the_horizon_or_longer_is_the_full_gradient(truncation):
    rule = port_hamiltonian()
    full, losses = meta_gradient(rule)
    truncated, truncated_losses = meta_gradient(rule, truncation=truncation)
    assert torch.equal(full, truncated)
    assert losses == truncated_losses


def test_truncated_gradients_are_those_of_the_segments():
    rule, task, objective = port_hamiltonian(uses_progress=True), network_task(), MetaObjective()
    estimator, got = Backpropagation(truncation=2), []
    for loss in estimator.gradients(rule, task, objective, indices=INDICES, horizon=5, seed=1):
        got.append((loss, torch.cat([p.grad.flatten() for p in rule.parameters()])))
        rule.zero_grad()
    assert len(got) == 3
    run = {"indices": INDICES, "seed": 1, "total_steps": 5}
    params = states = None
    for (start, n_steps), (loss, gradient) in zip(((0, 2), (2, 2), (4, 1)), got, strict=True):
        segment = unroll(rule, task, n_steps=n_steps, start=start, params=params, states=states, **run)
        value = objective(segment.losses[1:], start=start, horizon=5).mean() * 5 / n_steps
        expected = torch.autograd.grad(value, list(rule.parameters()))
        torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in expected]))
        torch.testing.assert_close(loss, value.detach())
        params = {key: value.detach() for key, value in segment.params.items()}
        states = {key: type(s)(*(x.detach() for x in s)) for key, s in segment.states.items()}
    with torch.no_grad():
        whole = objective(unroll(rule, task, n_steps=5, **run).losses[1:], start=0, horizon=5).mean()
    torch.testing.assert_close(sum(loss * n / 5 for (loss, _), n in zip(got, (2, 2, 1), strict=True)), whole)


@pytest.mark.parametrize("truncation", [0, -3])
def test_truncation_must_be_positive(truncation):
    with pytest.raises(
        ValueError, match=f"`truncation` should be a positive integer or None. Found `truncation = {truncation}`"
    ):
        Backpropagation(truncation=truncation)


@pytest.mark.parametrize("turn", [lambda loss: loss.unsqueeze(-1), torch.mean, lambda loss: loss.tolist()])
def test_losses_that_are_not_one_number_per_problem_are_refused(turn):
    """Where tasks and steps are as many, (n_tasks, 1) would be broadcast against the weights of the steps."""

    class Own(RandomQuadratic):
        def loss(self, params, batch):
            return turn(super().loss(params, batch))

    with pytest.raises(
        ValueError, match=r"`loss` should be of shape \(n_tasks,\), here \(4,\), as Own returns it. Found"
    ):
        unroll(SGDUpdate(0.1), Own(2), indices=torch.arange(4), n_steps=4)
