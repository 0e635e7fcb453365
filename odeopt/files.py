"""Files of results: JSON that is whole or not there."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any


def write_json(path: str | os.PathLike, content: Any, *, is_by_row: bool = False, sort_keys: bool = False) -> None:
    """Write JSON beside its place and move it there: an interruption leaves the old file or the new one.

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
    temporary = Path(path).with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
