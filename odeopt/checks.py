"""Checks of what a caller passes, worded alike everywhere."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Sequence

_LONGEST_SHOWN = 500  # characters


def require(condition: bool, name: str, value: object, wanted: str) -> None:
    """Raise a ValueError that names a parameter and the value found, unless ``condition`` holds."""
    if not condition:
        raise ValueError(f"Parameter `{name}` should be {wanted}. Found `{name} = {shown(value)}`.")


def require_counts(*, or_none: bool = False, **values: object) -> None:
    """Refuse values, given by the names of their parameters, that are no positive integers."""
    wanted = "a positive integer or None" if or_none else "a positive integer"
    for name, value in values.items():
        require((or_none and value is None) or (is_integer(value) and value >= 1), name, value, wanted)


def require_positive(*, or_none: bool = False, **values: object) -> None:
    """Refuse values, given by the names of their parameters, that are no finite positive numbers."""
    wanted = "a positive number or None" if or_none else "a positive number"
    for name, value in values.items():
        require((or_none and value is None) or (is_number(value) and value > 0), name, value, wanted)


def require_non_negative(**values: object) -> None:
    """Refuse values, given by the names of their parameters, that are no finite numbers of at least 0."""
    for name, value in values.items():
        require(is_number(value) and value >= 0, name, value, "a non-negative number")


def require_flags(**values: object) -> None:
    """Refuse values, given by the names of their parameters, that are neither True nor False."""
    for name, value in values.items():
        require(isinstance(value, bool), name, value, "True or False")


def require_one_of(choices: Collection[str], **values: object) -> None:
    """Refuse values, given by the names of their parameters, that are none of the choices."""
    for name, value in values.items():
        require(value in choices, name, value, f"one of {', '.join(choices)}")


def suggestion(found: object, known: Collection[str]) -> str:
    """Ask in a message whether the name that is most like the one found was meant; nothing if none is like it."""
    close = difflib.get_close_matches(str(found), known, n=1)
    return f" Did you mean `{close[0]}`?" if close else ""


def check_class(name: str, value: object, wanted: type) -> None:
    """Raise a TypeError that names a parameter and the class found, unless the value is of a class."""
    if not isinstance(value, wanted):
        found = f"{type(value).__module__}.{type(value).__qualname__}".removeprefix("builtins.")
        raise TypeError(f"Parameter `{name}` should be of class {wanted.__name__}. Found one of class {found}.")


def shown(value: object) -> str:
    """Show a value in a message, cut where it is long: a state dictionary would push the message off the screen."""
    text = repr(value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}..."


def n_of(n: int, noun: str) -> str:
    """A number of things, as in ``1 run`` and ``2 runs``."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


class MissingExtraError(ImportError):
    """A package that an extra installs, and that the rest of the library does without, is not there."""


def install_command(extra: str) -> str:
    """The command that installs an extra: a bare ``odeopt`` on the package index is another project."""
    return f'pip install -c constraints.txt -e ".[{extra}]"'


def is_integer(value: object) -> bool:
    """Whether ``value`` is an integer that 64 bits hold, with a sign or without, and not a truth value."""
    return isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**64


def is_number(value: object) -> bool:
    """Whether ``value`` is a finite real number, also as a float, and not a truth value."""
    largest = sys.float_info.max  # integers beyond it have no float; NaN is not below anything
    return isinstance(value, int | float) and not isinstance(value, bool) and -largest <= value <= largest


def is_list(value: object, kind: type | tuple[type, ...] = object) -> bool:
    """Whether ``value`` is a list, a tuple or the like, every item of which is of a kind."""
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(item, kind) for item in value)
