"""Files that are whole or not there, those of results as JSON."""

from __future__ import annotations

import json
import os
import re
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
_WAIT = 600.0  # seconds for other processes, each of which holds a shared file for the time of a write


@contextmanager
def replaced(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path beside a file to write to, and move it there: an interruption leaves the old file or the new one.

    The path is that of this process alone. What was written to it is deleted if it is not moved.
    """
    # in the folder of `path`, so that the move stays within one file system; open() keeps the user's umask
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked(path: str | os.PathLike, *, timeout: float) -> Iterator[None]:
    """Hold a lock, which goes with the process, however that ends; ``path`` is a file that is made for it, and stays.

    Raises:
        OSError: If another process holds it for longer than ``timeout`` seconds, or the file cannot be written.
    """
    with ExitStack() as stack:
        try:
            lock = stack.enter_context(closing(sqlite3.connect(path, timeout=timeout)))
            lock.execute("BEGIN EXCLUSIVE")
        except sqlite3.Error as error:
            raise OSError(f"{path}: not locked for this process alone: {error}") from error
        yield


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Make the folder of a run, unless it is there, and keep other processes out of it.

    Raises:
        OSError: If another process holds it, or it cannot be written to.
    """
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked(folder / "lock", timeout=0))
        except OSError as error:
            wanted = "one that can be written to and that nothing else works on"
            raise OSError(f"Parameter `folder` should be {wanted}. Found `{folder}`: {error}.") from error
        yield


def held_to_add(path: Path) -> AbstractContextManager[None]:
    """Hold the lock of a file that several processes add to: read it again, add to what it holds by now, and write."""
    return locked(path.with_name(f".{path.name}.lock"), timeout=_WAIT)


def unfit(path: str | os.PathLike, wanted: str, found: str) -> ValueError:
    """Make the error for a folder of a run that another one, or something else, has left ``path`` in."""
    return ValueError(f"Parameter `folder` should be empty or hold {wanted}. Found `{path}`{found}.")


def write_json(path: str | os.PathLike, content: Any, *, is_by_row: bool = False, sort_keys: bool = False) -> None:
    """Write JSON, as :func:`replaced` writes files.

    Args:
        path: The file.
        content: Values that JSON can hold; it has no numbers that are not finite.
        is_by_row: Whether a list that holds no others takes one line, instead of one line per item.
        sort_keys: Whether keys are sorted.

    Raises:
        ValueError: If a number is not finite.
    """
    text = json.dumps(content, indent=1, sort_keys=sort_keys, allow_nan=False)
    if is_by_row:
        text = re.sub(r"\[([^][{}]*)\]", lambda match: f"[{' '.join(match[1].split())}]", text)
    with replaced(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(
    path: str | os.PathLike, parse: Callable[[Any], T], *, wanted: str, header: Mapping[str, Any] | None = None
) -> T:
    """Read JSON that :func:`write_json` left, or anybody else.

    Args:
        path: The file.
        parse: Makes the result out of the content.
        wanted: What the file should be, in words, for the error.
        header: Values that fields of the content should have, by name.

    Returns:
        The result of ``parse``.

    Raises:
        ValueError: If the file is not JSON, its header is another one, or ``parse`` finds a field missing or unfit.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        for name, value in (header or {}).items():
            if content[name] != value:
                raise ValueError(f"field `{name}` should be {value!r}. Found {content[name]!r}")
        return parse(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"field {error} is missing" if isinstance(error, KeyError) else error
        raise ValueError(f"{path}: not {wanted}: {reason}.") from error
