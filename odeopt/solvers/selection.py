"""Choice among problems or methods that have names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TypeVar

from odeopt.checks import require
from odeopt.ode.checks import check_choice

T = TypeVar("T")


def select(parameter: str, wanted: Iterable[str | T] | str | T | None, known: Mapping[str, T], group: str) -> list[T]:
    """Look things up by their names or those of their groups.

    Args:
        parameter: Name of the parameter, for errors.
        wanted: Names, names of groups or things themselves, one or several; None for all that are known.
        known: Things by name.
        group: Attribute of a thing that names its group.

    Returns:
        The things, one of each name.

    Raises:
        ValueError: If there is no thing or group of a name, two things have one name, or nothing is wanted.
    """
    if wanted is None:
        return list(known.values())
    kind = type(next(iter(known.values())))
    groups = {getattr(thing, group) for thing in known.values()}
    found: dict[str, T] = {}
    for item in [wanted] if isinstance(wanted, str | kind) else wanted:
        if isinstance(item, kind):
            items = [item]
        else:
            check_choice(parameter, item, {*known, *groups})
            items = [thing for name, thing in known.items() if item in (name, getattr(thing, group))]
        for thing in items:
            is_known = found.setdefault(thing.name, thing) is thing
            require(is_known, parameter, thing, "things with names of their own: another one has this name")
    require(len(found) > 0, parameter, [], "at least one")
    return list(found.values())
