"""Files that several commands read and write."""

from __future__ import annotations

from pathlib import Path

from odeopt import artifacts, hub
from odeopt.rules import UpdateRule


def prepare(out: Path, may_overwrite: bool) -> None:
    """See before the work that its result can be written."""
    if out.exists() and not may_overwrite:
        raise FileExistsError(f"Parameter `--out` should be a new file, or --overwrite be given. Found `{out}`.")
    out.parent.mkdir(parents=True, exist_ok=True)


def named_rule(text: str) -> tuple[str, UpdateRule]:
    """Load a rule from a file, or one of the package; and its name."""
    if text.endswith(".safetensors") or text.startswith(hub.PREFIX):
        return Path(text).stem, hub.load(text)
    return text, artifacts.load_pretrained(text)
