"""Landscapes: their minima and saddles, where they start, and when a saddle is left."""

import math

import pytest
import torch

from odeopt.tasks import HighDimSaddle, MonkeySaddle, Rosenbrock
from odeopt.tasks import random as rnd

f64 = torch.float64
FIVE_SIGMA = 5.0  # of a statistic of fixed numbers, which a right law passes but for one in two million

LANDSCAPES = {
    "rosenbrock": lambda: Rosenbrock(dtype=f64),
    "monkey": lambda: MonkeySaddle(dtype=f64, offset=1.0),
    "high-dim": lambda: HighDimSaddle(7, dtype=f64, offset=1.0),
    "high-dim rotated": lambda: HighDimSaddle(7, rotated=True, dtype=f64, offset=1.0),
}
SADDLES = {name: make for name, make in LANDSCAPES.items() if name != "rosenbrock"}


@pytest.mark.parametrize("name", LANDSCAPES)
def test_optimization_ends_at_the_known_minimum(name):
    task = LANDSCAPES[name]()
    indices = torch.arange(12)
    params, batch = task.init_params(indices, 0), task.sample_batch(indices, 0, 0)
    theta = params["theta"].requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-10, tolerance_change=0
    )

    def closure():
        optimizer.zero_grad()
        loss = task.loss({"theta": theta}, batch).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    losses = task.loss({"theta": theta}, batch)
    # The function is flat to second order: a gradient of 1e-10 leaves it at rounding.
    torch.testing.assert_close(losses, torch.full_like(losses, task.minimum_value), rtol=1e-9, atol=1e-9)
    for scale in (1e-3, 0.1, 10.0):  # nothing lower, near or far
        noise = rnd.normal(torch.arange(12), theta.shape[1:], seed=0, stream="noise", dtype=f64)
        assert (task.loss({"theta": theta + scale * noise}, batch) > task.minimum_value).all()


@pytest.mark.parametrize(
    ("task", "theta", "value"),
    [
        (Rosenbrock(dtype=f64), (-1.2, 1.0), 24.2),  # the customary start, and its published value
        (MonkeySaddle(dtype=f64), (2 * math.cos(0.3), 2 * math.sin(0.3)), 8 * math.cos(0.9) + 4),
        (HighDimSaddle(3, dtype=f64), (1.0, 2.0, 3.0), 7 - 9 + 81 / 4),
    ],
)
def test_value_is_the_formulas(task, theta, value):
    loss = task.loss({"theta": torch.tensor([theta], dtype=f64)}, task.sample_batch(torch.arange(1), 0, 0))
    assert loss.item() == pytest.approx(value, rel=1e-13)  # rounding of float64


@pytest.mark.parametrize(
    ("name", "eigenvalues"),
    [("monkey", [0.0, 0.0]), ("high-dim", [-1.0] + [1.0] * 6), ("high-dim rotated", [-1.0] + [1.0] * 6)],
)
def test_origin_is_the_saddle(name, eigenvalues):
    task = SADDLES[name]()
    batch = task.sample_batch(torch.arange(1), 0, 0)

    def value(theta):
        return task.loss({"theta": theta[None]}, batch)[0]

    origin = torch.zeros(task.dim, dtype=f64)
    assert value(origin) == task.saddle_value
    assert torch.equal(torch.func.grad(value)(origin), origin)
    hessian = torch.autograd.functional.hessian(value, origin)
    found = torch.linalg.eigvalsh(hessian)
    torch.testing.assert_close(found, torch.tensor(eigenvalues, dtype=f64), rtol=0, atol=1e-12)  # rounding
    # A saddle: values on both sides within a small ball.
    ball = 1e-2 * rnd.normal(torch.arange(200), (task.dim,), seed=0, stream="ball", dtype=f64)
    if name != "monkey":
        ball[0] = 1e-2 * torch.linalg.eigh(hessian).eigenvectors[:, 0]
    values = torch.func.vmap(value)(ball)
    assert values.min() < task.saddle_value < values.max()


@pytest.mark.parametrize("make", [MonkeySaddle, HighDimSaddle, lambda **kw: HighDimSaddle(rotated=True, **kw)])
def test_start_lies_beside_the_saddle_in_a_random_direction(make):
    theta = make(dtype=f64).init_params(torch.arange(500), 0)["theta"]
    torch.testing.assert_close(theta.norm(dim=1), torch.full((500,), 1e-3, dtype=f64), rtol=1e-12, atol=0)
    assert (theta.mean(0).abs() < FIVE_SIGMA * 1e-3 / math.sqrt(500 * theta.shape[1])).all()


def test_rotated_saddle_descends_in_its_own_direction():
    (v,) = HighDimSaddle(30, rotated=True, dtype=f64).sample_batch(torch.arange(50), 0, 0)
    torch.testing.assert_close(v.norm(dim=1), torch.ones(50, dtype=f64), rtol=1e-12, atol=0)
    assert ((v @ v.T).triu(1).abs() < FIVE_SIGMA / math.sqrt(30)).all()
    (axis,) = HighDimSaddle(3).sample_batch(torch.arange(2), 0, 0)
    assert axis.tolist() == [[0, 0, 1]] * 2


def test_escape_is_the_first_step_below_a_tenth_of_the_way():
    task = MonkeySaddle()
    assert task.escape_value == pytest.approx(-0.675)
    nan = math.nan
    losses = torch.tensor(
        [
            [0.0, 0.0, -0.7, nan, 0.0],
            [-0.6, 0.0, 0.0, nan, nan],
            [-0.7, -0.675, 0.0, nan, 0.0],
            [0.0, 0.0, -6.0, nan, -5],
        ]
    )
    losses[:, 1].clamp_(min=task.escape_value)  # at the value is not below it
    assert task.escape_step(losses).tolist() == [2, 4, 0, 4, 3]
    assert task.escape_step(losses[:, 0]) == 2
    with pytest.raises(ValueError, match="`losses` should be a tensor with an axis of steps"):
        task.escape_step(torch.tensor(0.0))


@pytest.mark.parametrize("rotated", [False, True])
def test_gradient_descent_leaves_the_high_dimensional_saddle(rotated):
    """s grows by 1 + lr a step from 1e-3 / sqrt(dim), and f = -s^2 / 2 passes -1/40 at s = .2265."""
    task = HighDimSaddle(10, rotated=rotated, dtype=f64)
    indices = torch.arange(8)
    params, batch = task.init_params(indices, 0), task.sample_batch(indices, 0, 0)
    theta, lr, losses = params["theta"], 0.1, []
    (v,) = batch
    s0 = (v * theta).sum(1).abs()
    for _ in range(150):
        theta.requires_grad_()
        loss = task.loss({"theta": theta}, batch)
        losses.append(loss.detach())
        theta = (theta - lr * torch.autograd.grad(loss.sum(), theta)[0]).detach()
    expected = (math.sqrt(1 - math.sqrt(0.9)) / s0).log() / math.log(1 + lr)
    # Linear growth is a lower bound; the cubic term costs a few percent of s near the end: a step or two.
    steps = task.escape_step(torch.stack(losses))
    assert (steps >= expected).all()
    assert (steps <= expected + 2).all()
