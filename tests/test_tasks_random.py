"""Random numbers named by seed, stream, step and index: their quality, and that no batch changes them."""

import math

import pytest
import torch
from scipy import stats

from odeopt.tasks import random as rnd

f64 = torch.float64

N = 40_000
FIVE_SIGMA = 5.0  # deterministic numbers: a good generator fails one statistic in two million at this level


def test_bits_are_splitmix64():
    """The published sequence of SplitMix64 seeded with 1234567."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    states = torch.tensor([rnd._signed((1234567 + (k + 1) * rnd._GOLDEN) % 2**64) for k in range(4)])
    assert [int(b) % 2**64 for b in rnd._mix(states)] == published
    assert [rnd._mix(int(s) % 2**64) & rnd._WORD for s in states] == published


def test_every_bit_is_fair():
    bits = rnd.random_bits(torch.arange(N // 4), 4, seed=0, stream="test").flatten()
    counts = torch.stack([((bits >> k) & 1).sum() for k in range(64)])
    # A fair bit's count has standard deviation sqrt(N) / 2.
    assert ((counts - N / 2).abs() < FIVE_SIGMA * math.sqrt(N) / 2).all()


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_uniform_is_uniform(dtype):
    u = rnd.uniform(torch.arange(N // 8), (2, 4), seed=3, stream="test", dtype=dtype)
    assert u.dtype == dtype
    assert u.shape == (N // 8, 2, 4)
    assert u.min() >= 0
    assert u.max() < 1
    counts = torch.histc(u.flatten(), 100, 0, 1)
    # Chi-squared with 99 degrees of freedom: mean 99, standard deviation sqrt(198).
    chi2 = ((counts - N / 100).square() / (N / 100)).sum()
    assert abs(chi2 - 99) < FIVE_SIGMA * math.sqrt(198)


@pytest.mark.parametrize("dtype", [torch.float32, f64])
def test_normal_is_standard_normal(dtype):
    z = rnd.normal(torch.arange(N // 5), (5,), seed=3, stream="test", dtype=dtype).double().flatten()
    # Standard deviations of the sample moments of a standard normal.
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - mean) < FIVE_SIGMA * math.sqrt(variance / N)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-4
    assert torch.isfinite(z).all()


def test_normal_is_finite_where_the_uniform_is_zero(monkeypatch):
    monkeypatch.setattr(rnd, "random_bits", lambda indices, n_lanes, **name: torch.zeros(len(indices), n_lanes).long())
    assert torch.equal(rnd.normal(torch.arange(2), (2,), seed=0, stream="s")[:, 1], torch.zeros(2))
    assert torch.isfinite(rnd.normal(torch.arange(2), (2,), seed=0, stream="s")).all()


def test_integers_are_uniform_over_their_range():
    k = rnd.integers(torch.arange(N // 8), (8,), 30, seed=1, stream="test").flatten()
    counts = torch.bincount(k)
    assert len(counts) == 30
    chi2 = ((counts - N / 30).square() / (N / 30)).sum()
    assert abs(chi2 - 29) < FIVE_SIGMA * math.sqrt(58)


@pytest.mark.parametrize("part", ["index", "lane", "step", "seed", "stream"])
def test_neighbouring_names_give_independent_numbers(part):
    a = {"seed": 5, "stream": "a", "step": 7}
    b = a | {"step": 8} if part == "step" else a | {"seed": 6} if part == "seed" else a
    b = b | {"stream": "b"} if part == "stream" else b
    indices = torch.arange(N // 4)
    x, y = rnd.normal(indices, (4,), dtype=f64, **a), rnd.normal(indices, (4,), dtype=f64, **b)
    if part == "index":
        x, y = x[:-1], y[1:]
    if part == "lane":
        x, y = x[:, :-1], y[:, 1:]
    for f in (
        lambda v: v,
        torch.square,
    ):  # correlation of the numbers, and of their squares (Box-Muller's radius)
        r = torch.corrcoef(torch.stack((f(x).flatten(), f(y).flatten())))[0, 1]
        assert abs(r) < FIVE_SIGMA / math.sqrt(x.numel())


@pytest.mark.parametrize("n", [1, 2, 7, 33])
def test_numbers_do_not_depend_on_the_batch(n):
    indices = torch.tensor([3, 10**12, 0, -5, 77] * 7)[:n]
    draws = {
        "uniform": lambda i: rnd.uniform(i, (3, 3), seed=9, stream="s", step=2),
        "normal": lambda i: rnd.normal(i, (3, 3), seed=9, stream="s", step=2),
        "normal64": lambda i: rnd.normal(i, (3, 3), seed=9, stream="s", step=2, dtype=f64),
        "integers": lambda i: rnd.integers(i, (3, 3), 1000, seed=9, stream="s", step=2),
    }
    for draw in draws.values():
        together = draw(indices)
        assert all(torch.equal(draw(i[None])[0], row) for i, row in zip(indices, together, strict=True))


def test_lanes_do_not_depend_on_their_number():
    indices = torch.arange(3)
    for draw in (rnd.uniform, rnd.normal):
        assert torch.equal(draw(indices, (10,), seed=0, stream="s")[:, :5], draw(indices, (5,), seed=0, stream="s"))


def test_permutation_moves_every_number_once():
    order = rnd.permutation(1000, seed=0, stream="s")
    assert torch.equal(order.sort().values, torch.arange(1000))
    assert (order == torch.arange(1000)).sum() < 10  # one fixed point is expected


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: rnd.uniform(torch.zeros(2), (1,), seed=0, stream="s"), ValueError, "`indices` should be"),
        (lambda: rnd.uniform(torch.zeros(2, 2).long(), (1,), seed=0, stream="s"), ValueError, r"\(2, 2\)"),
        (lambda: rnd.uniform([1], (1,), seed=0, stream="s"), ValueError, r"Found `indices = \[1\]`"),
        (lambda: rnd.uniform(torch.arange(1), (1,), seed=0.5, stream="s"), TypeError, "`seed = 0.5`"),
        (
            lambda: rnd.uniform(torch.arange(1), (1,), seed=0, stream="s", step=None),
            TypeError,
            "`step = None`",
        ),
        (
            lambda: rnd.normal(torch.arange(1), (1,), seed=0, stream="s", dtype=torch.half),
            ValueError,
            "float16",
        ),
        (lambda: rnd.integers(torch.arange(1), (1,), 0, seed=0, stream="s"), ValueError, "`high = 0`"),
    ],
)
def test_random_refuses(call, error, match):
    with pytest.raises(error, match=match):
        call()


@pytest.mark.gpu
def test_numbers_are_the_same_on_cuda():
    indices = torch.arange(1000)
    for draw in (rnd.uniform, rnd.normal):
        on_cpu = draw(indices, (5,), seed=1, stream="s")
        on_cuda = draw(indices.cuda(), (5,), seed=1, stream="s").cpu()
        # One unit in the last place of a float32 normal; uniforms are exact.
        tolerance = 0 if draw is rnd.uniform else 1.2e-7
        torch.testing.assert_close(on_cuda, on_cpu, rtol=tolerance, atol=0)
