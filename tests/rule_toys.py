"""Every update rule at weights where nothing is zero, and inputs for them; shared by the tests of rules."""

import json

import pytest
import safetensors
import torch
from torch import nn

from odeopt.rules import (
    AdamUpdate,
    HamiltonianUpdate,
    LSTMUpdate,
    PortHamiltonianUpdate,
    RMSpropUpdate,
    SGDUpdate,
)

# every part that can depend on q, one at a time and together
VARIANTS = {
    "default": {},
    "coordinatewise": {"coordinatewise": True},
    "progress": {"uses_progress": True, "modes": 1},
    "mass": {"mass": "network"},
    "potential": {"potential": "network"},
    "friction": {"friction": "network"},
    "port": {"port": "network"},
    "everything": {
        "mass": "network",
        "potential": "network",
        "friction": "network",
        "port": "network",
        "modes": 3,
    },
    "coordinatewise, potential": {"coordinatewise": True, "potential": "network"},
}
NEEDS_Q = [name for name, options in VARIANTS.items() if "network" in options.values()]

over_variants = pytest.mark.parametrize("variant", VARIANTS)


def randomised(rule, *, seed=0, scale=0.3, dtype=torch.float64):
    """Draw ALL weights, in place, also those that start at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in rule.parameters():
            weight.copy_(scale * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return rule.to(dtype)


def port_hamiltonian(variant="default", *, seed=0, scale=0.3, dtype=torch.float64, **options):
    options = VARIANTS[variant] | {"hidden": (6,)} | options
    return randomised(PortHamiltonianUpdate(**options), seed=seed, scale=scale, dtype=dtype)


RULES = {
    "sgd": lambda: SGDUpdate(0.1),
    "momentum": lambda: SGDUpdate(0.1, momentum=0.9),
    "nesterov": lambda: SGDUpdate(0.1, momentum=0.9, nesterov=True),
    "rmsprop": lambda: RMSpropUpdate(0.1, alpha=0.9),
    "adam": lambda: AdamUpdate(0.1),
    "lstm": lambda: randomised(LSTMUpdate(hidden_size=4)),
    "lstm-preprocess": lambda: randomised(LSTMUpdate(hidden_size=4, preprocess=True)),
    "lstm-normalize": lambda: randomised(LSTMUpdate(hidden_size=4, normalize=True)),
    "hamiltonian": lambda: randomised(HamiltonianUpdate()),
    "hamiltonian-normalize": lambda: randomised(HamiltonianUpdate(normalize=True)),
    "hamiltonian-preprocess": lambda: randomised(HamiltonianUpdate(preprocess=True)),
} | {f"port-hamiltonian-{variant}": lambda variant=variant: port_hamiltonian(variant) for variant in VARIANTS}

over_rules = pytest.mark.parametrize("name", RULES)


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(rule, grads, *, param=None, shape=None, state=None, progress=None):
    """Feed gradients of shape ``(n_steps, *batch, n)``; return the updates and the last state."""
    param = grads[0] if param is None else param
    state, updates = rule.init_state(param) if state is None else state, []
    for grad in grads:
        update, state = rule(grad, state, param=param, shape=shape, progress=progress)
        updates.append(update)
    return torch.stack(updates), state


def random_state(rule, n, *, seed=0, size=1.0):
    """State of a rule that has seen three gradients, with random positions and momenta."""
    _, state = run(rule, draws(3, n, seed=seed, dtype=next(rule.parameters()).dtype))
    p, q = (size * draws(*x.shape, seed=seed + i, dtype=x.dtype) for i, x in enumerate((state.p, state.q)))
    return state._replace(p=p, q=q)


def flat_weights(rule):
    return nn.utils.parameters_to_vector(rule.parameters()).detach().clone()


def fields_of(path):
    """Fields of an artefact, as any reader of safetensors sees them."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {name: json.loads(text) for name, text in file.metadata().items()}
