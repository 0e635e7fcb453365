"""The suite: its problems, its runs, its opponents, and files that continue."""

import math

import pytest
import torch

from odeopt.suite import available_problems, make_problem, run
from odeopt.suite.problems import english
from odeopt.suite.run import smoothed


def adam(model, n_steps):
    return torch.optim.Adam(model.parameters(), 1e-3)


def tiny(name, n_steps=3):
    return make_problem(name, dataset="digits", n_steps=n_steps)


# ------------------------------------------------------------------------------------- problems


@pytest.mark.parametrize("name", available_problems())
def test_problems_are_learned_from_equal_starts_and_batches(name):
    """The same seed gives the same run to the bit, another seed another one; each problem can be fitted."""
    problem = tiny(name, 12)
    first, again, other = (run(problem, adam, seed) for seed in (0, 0, 1))
    assert torch.equal(first.losses, again.losses)
    assert first.held_out == again.held_out
    assert first.losses[0] != other.losses[0]
    assert first.losses[-4:].mean() < first.losses[:4].mean()
    assert math.isfinite(first.held_out)


@pytest.mark.parametrize("name", available_problems())
def test_building_a_network_leaves_the_global_generator_alone(name):
    torch.manual_seed(7)
    before = torch.get_rng_state()
    problem = tiny(name)
    weights = [[*problem.make_model(seed).state_dict().values()] for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(map(torch.equal, weights[0], weights[1]))
    assert not all(map(torch.equal, weights[0], weights[2]))


def test_text_is_ascii_and_says_nothing_twice():
    text = english()
    paragraphs = text.split("\n\n")
    assert text.isascii()
    assert len(text) > 200_000
    assert len(set(paragraphs)) == len(paragraphs)


# ----------------------------------------------------------------------------------------- runs


def test_smoothed_losses_are_means_of_a_twentieth_of_the_run():
    losses = torch.rand(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    losses[3] = 1e30  # is gone five steps later, which a running sum would not forget
    means = smoothed(losses)
    for step in range(100):
        assert means[step] == pytest.approx(losses[max(0, step - 4) : step + 1].mean().item(), rel=1e-12)
