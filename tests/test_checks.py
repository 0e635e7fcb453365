"""What counts as a number where arguments are checked."""

import math

import pytest

from odeopt import MetaConfig
from odeopt.checks import is_number


@pytest.mark.parametrize("value", [0, -3, 2.5, 1e308, -1e308, 10**300])
def test_finite_numbers_are_numbers(value):
    assert is_number(value)


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, -math.inf, 10**400, -(10**400), 1j])
def test_what_no_float_can_hold_is_no_number(value):
    assert not is_number(value)


def test_an_integer_beyond_all_floats_is_refused_by_name():
    with pytest.raises(ValueError, match=r"`lr` should be a positive number"):
        MetaConfig(lr=10**400)
