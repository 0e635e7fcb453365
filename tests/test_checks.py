"""What counts as a number where arguments are checked."""

import math

import pytest
import torch

from odeopt import LearnedOptimizer, MetaConfig, integrate, load_pretrained
from odeopt.checks import is_integer, is_number, require, require_counts, require_positive
from odeopt.rules import PortHamiltonianUpdate


@pytest.mark.parametrize("value", [0, -3, 2.5, 1e308, -1e308, 10**300])
def test_finite_numbers_are_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, -math.inf, 10**400, -(10**400), 1j])
def test_what_no_float_can_hold_is_no_number(value):
    assert not is_number(value)


def test_an_integer_beyond_all_floats_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`lr` should be a positive number"):
        MetaConfig(lr=10**400)


def test_long_values_are_cut_in_messages():
    weights = load_pretrained("lstm").state_dict()  # in place of the rule: its text has thousands of characters
    with pytest.raises(TypeError, match=r"`rule` should be an instance of UpdateRule.*`rule = OrderedDict") as refused:
        LearnedOptimizer([torch.nn.Parameter(torch.zeros(2))], weights)
    assert len(str(refused.value)) < 800
    with pytest.raises(ValueError, match=r"Found `sizes = \[0, 1, 2, .*\.\.\.`\.$"):
        require(False, "sizes", list(range(1000)), "few")
    with pytest.raises(ValueError, match=r"Found `sizes = \[0, 1, 2\]`\.$"):
        require(False, "sizes", [0, 1, 2], "few")


@pytest.mark.parametrize("value", [0, -1, 1.0, True, "1", 2**64])
def test_no_count_is_refused_by_the_name_of_its_parameter(value):
    require_counts(n_steps=1, n_tasks=2**64 - 1)
    with pytest.raises(ValueError, match=r"`n_steps` should be a positive integer\. Found `n_steps = "):
        require_counts(n_tasks=1, n_steps=value)
    with pytest.raises(ValueError, match=r"`n_steps` should be a positive integer or None\. Found `n_steps = "):
        require_counts(n_steps=value, or_none=True)


@pytest.mark.parametrize("value", [0, -0.1, math.inf, math.nan, True, "1"])
def test_what_is_not_positive_is_refused_by_the_name_of_its_parameter(value):
    require_positive(lr=1, clip=1e-300)
    with pytest.raises(ValueError, match=r"`lr` should be a positive number\. Found `lr = "):
        require_positive(clip=0.1, lr=value)
    with pytest.raises(ValueError, match=r"`lr` should be a positive number or None\. Found `lr = "):
        require_positive(lr=value, or_none=True)


@pytest.mark.parametrize("check", [require_counts, require_positive])
def test_none_passes_where_it_may(check):
    check(value=None, or_none=True)
    with pytest.raises(ValueError, match="Found `value = None`"):
        check(value=None)


def test_integers_have_at_most_64_bits():
    assert all(map(is_integer, (0, 2**64 - 1, -(2**63))))
    assert not any(map(is_integer, (2**64, -(2**63) - 1, 10**30, True, 1.0)))


@pytest.mark.parametrize("name", ["modes", "memory"])
def test_a_size_beyond_any_memory_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be"):
        PortHamiltonianUpdate(**{name: 2**70})


def test_an_integer_is_the_rule_that_the_equal_float_is():
    kinds = {"kinetic": "spectral", "initial_decay": 1}
    whole, real = (
        PortHamiltonianUpdate(**kinds, **options) for options in ({"decay_growth": 16}, {"decay_growth": 16.0})
    )
    assert [repr(rule.config["decay_growth"]) for rule in (whole, real)] == ["16.0", "16.0"]
    param = torch.ones(2)
    rule = PortHamiltonianUpdate(initial_kappa=10**25)
    update, _ = rule(torch.ones(2), rule.init_state(param), param=param)
    assert update.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rtol": torch.ones(2, dtype=torch.complex64)}, "Parameter `rtol` should be real"),
        ({"atol": 1e-3 + 0j}, "Parameter `atol` should be real"),
        ({"adjoint": torch.ones(2)}, "Parameter `adjoint` should be True or False"),
        ({"throw": 1}, "Parameter `throw` should be True or False"),
    ],
)
def test_options_of_a_solver_are_checked_before_it_begins(options, message):
    with pytest.raises(ValueError, match=message):
        integrate(lambda t, x: -x, torch.ones(2), [0.0, 1.0], **{"method": "dopri5"} | options)
