"""Files that several commands read and write."""

from __future__ import annotations

from pathlib import Path

from odeopt import artifacts, hub
from odeopt.checks import require
from odeopt.cli.arguments import writable
from odeopt.meta.config import MetaResult
from odeopt.meta.files import Config
from odeopt.rules import UpdateRule


def prepare(out: Path, may_overwrite: bool) -> None:
    """See before the work that its result can be written."""
    if out.is_dir():
        raise IsADirectoryError(f"Parameter `--out` should be a file. Found the folder `{out}`.")
    if out.exists() and not may_overwrite:
        raise FileExistsError(f"Parameter `--out` should be a new file, or --overwrite be given. Found `{out}`.")
    try:
        writable(out.parent)
    except OSError as error:
        raise OSError(f"Parameter `--out` should be a file that can be written. Found `{out}`: {error}.") from error


def check_can_be_saved(config: Config, rule: UpdateRule, out: Path) -> None:
    """See before the training that its rule can be saved, by the untrained one."""
    artifacts.check_can_be_saved(config.in_use(rule), out, trained_for=config.trained_for(MetaResult(rule)))


def named_rule(text: str) -> tuple[str, UpdateRule]:
    """Load a rule from a file, or one of the package; and its name."""
    if text.endswith(".safetensors") or text.startswith(hub.PREFIX):
        return Path(text).stem, hub.load(text)
    is_like_a_file = bool(Path(text).suffix) or "/" in text or Path(text).exists()
    wanted = f"a file that ends in `.safetensors`, `{hub.PREFIX}user/name`, or a name that `odeopt rules` lists"
    require(text in artifacts.available_pretrained() or not is_like_a_file, "rule", text, wanted)
    return text, artifacts.load_pretrained(text)
