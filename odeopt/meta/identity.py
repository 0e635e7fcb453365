"""Identity of a meta-training run, by which a checkpoint is known to be of it."""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor

from odeopt.meta.config import MetaConfig
from odeopt.rules.base import UpdateRule
from odeopt.tasks import Mixture, Task
from odeopt.tasks.fingerprint import are_alike


def identity_of(
    rule: UpdateRule, task: Task | Mixture, validation_task: Task | Mixture, config: MetaConfig
) -> dict[str, Any]:
    """Collect what decides the result of a run, the initial weights aside, in values that a checkpoint can hold."""
    fingerprint = task.fingerprint()
    identity = {
        "config": _deciding(config.describe()),
        "rule class": type(rule).__name__,
        "rule config": rule.config,
        "rule dtype": str(next(rule.parameters()).dtype),
        "learned weights": [name for name, p in rule.named_parameters() if p.requires_grad],
        "task": fingerprint,
        "validation task": fingerprint if validation_task is task else validation_task.fingerprint(),
    }
    return json.loads(json.dumps(identity))  # a number of NumPy's is a float, and cannot be read back


def _deciding(table: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that a run takes more or less memory by."""
    kept = {name: value for name, value in table.items() if name not in ("checkpoint_every", "chunk")}
    return {name: _deciding(value) if isinstance(value, dict) else value for name, value in kept.items()}


def differences(identity: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Name what differs between two identities."""

    def is_same(value: Any, found: Any) -> bool:
        are_tasks = isinstance(value, dict) and isinstance(found, dict) and "losses" in value and "losses" in found
        return are_alike(value, found) if are_tasks else value == found

    return [f"`{name}`" for name, value in identity.items() if not is_same(value, other.get(name))]


def are_close(weights: dict[str, Tensor], others: dict[str, Tensor]) -> bool:
    """Compare weights, up to the rounding of another machine's initialisation."""
    pairs = [(value.cpu().double(), others.get(name, value).cpu().double()) for name, value in weights.items()]
    return weights.keys() == others.keys() and all(
        a.shape == b.shape and torch.allclose(a, b, atol=1e-7, equal_nan=True) for a, b in pairs
    )
