"""Rules on the Hugging Face Hub: one safetensors file and a model card; ``huggingface_hub`` is the extra ``hub``."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from odeopt import artifacts
from odeopt._version import __version__
from odeopt.checks import MissingExtraError, install_command, require
from odeopt.rules.base import UpdateRule

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hf://"
FILE = "rule.safetensors"
_ADDRESS = re.compile(rf"{PREFIX}(?P<repo>[\w.-]+/[\w.-]+)(@(?P<revision>[\w./-]+))?")
_CARD = """---
library_name: odeopt
tags: [learned-optimizer, pytorch]
---

# {name}

An update rule for [odeopt](https://pypi.org/project/odeopt/) {version}: `{rule}` of {n:,} weights.

```python
import odeopt

rule = odeopt.load("{prefix}{repo}")
optimizer = odeopt.LearnedOptimizer(odeopt.param_groups(model), rule, total_steps=n_steps)
```

## Training

As the file says of itself:

```json
{trained_for}
```

## Options of the rule

```json
{config}
```
"""


def load(path: str) -> UpdateRule:
    """Read a rule from a file of :func:`odeopt.save`, or from the Hugging Face Hub.

    Nothing is unpickled and no code is imported: weights, options and the account of the training are checked against
    the checksum that is kept with them.

    Args:
        path: The file; or ``hf://user/name``, ``hf://user/name@revision`` of a repository that
            :meth:`UpdateRule.push_to_hub` made (extra ``hub``). It is kept in the cache of
            ``huggingface_hub``.

    Returns:
        The rule, on the CPU, in the dtypes of the file; ``rule.trained_for`` is the account of its training.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, was made by a newer version, names a class that is not known, or
            does not fit its class; the message names the file and the field. If an address is not of that form.
        ImportError: If the extra ``hub`` is not installed.
        huggingface_hub.errors.HfHubHTTPError: If there is no such repository, or it may not be read.
    """
    if not str(path).startswith(PREFIX):
        return artifacts.load(path)
    address = _ADDRESS.fullmatch(path)
    require(address is not None, "path", path, f"`{PREFIX}user/name` or `{PREFIX}user/name@revision`")
    return artifacts.load(_api().hf_hub_download(address["repo"], FILE, revision=address["revision"]))


def push_to_hub(
    rule: UpdateRule,
    repo_id: str,
    *,
    trained_for: Mapping[str, Any] | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str = "Upload a rule",
) -> str:
    """Write the rule to a repository on the Hugging Face Hub, with a model card; the repository is made if need be.

    Args:
        rule: The rule.
        repo_id: ``user/name``.
        trained_for: Account of the training, as :func:`odeopt.save` takes it; that of the rule if None.
        private: Whether a new repository is private; the account's default if None.
        revision: Branch; the main one if None.
        message: Of the commit.

    Returns:
        The address that :func:`odeopt.load` takes, at the commit that was made.

    Raises:
        ImportError: If the extra ``hub`` is not installed.
        ValueError: If ``repo_id`` is not of that form, or the rule cannot be saved.
        ConnectionError: If the Hub cannot be reached.
        huggingface_hub.errors.HfHubHTTPError: If the user is not logged in, or may not write there.

    Example:
        >>> odeopt.load("mine.safetensors").push_to_hub("me/my-rule")  # doctest: +SKIP
        'hf://me/my-rule@5f3c...'
    """
    found = _ADDRESS.fullmatch(f"{PREFIX}{repo_id}")
    require(found is not None and found["revision"] is None, "repo_id", repo_id, "`user/name`")
    api = _api()
    with tempfile.TemporaryDirectory() as folder:
        account = rule.trained_for if trained_for is None else trained_for
        artifacts.save(rule, Path(folder, FILE), trained_for=account)
        Path(folder, "README.md").write_text(model_card(rule, repo_id, account), encoding="utf-8")
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            commit = api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
        except Exception as error:
            # by the library that huggingface_hub speaks through, another one in each of its major versions
            if not type(error).__module__.startswith(("httpx", "requests")):
                raise
            raise ConnectionError(
                f"The rule was not uploaded to `{repo_id}`: the Hugging Face Hub, {api.endpoint}, cannot be reached "
                f"({type(error).__name__}: {error})."
            ) from error
    return f"{PREFIX}{repo_id}@{commit.oid}"


def model_card(rule: UpdateRule, repo_id: str, trained_for: Mapping[str, Any]) -> str:
    """Text of the card: how to use the rule, and what its file says of its training."""
    texts = {"trained_for": dict(trained_for), "config": rule.config}
    texts = {name: json.dumps(value, indent=2, sort_keys=True) for name, value in texts.items()}
    n = sum(p.numel() for p in rule.parameters())  # of an optimizer's rule, which is frozen, too
    facts = {"name": repo_id.split("/")[1], "repo": repo_id, "rule": type(rule).__name__, "n": n}
    return _CARD.format(**facts, **texts, prefix=PREFIX, version=__version__)


def _api() -> HfApi:
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise MissingExtraError(f"Rules on the Hub need huggingface_hub: {install_command('hub')}") from error
    return HfApi(library_name="odeopt", library_version=__version__)


# here and not in the class, which knows nothing of files
UpdateRule.push_to_hub = push_to_hub
