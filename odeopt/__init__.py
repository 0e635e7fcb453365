"""odeopt: optimizers learned as port-Hamiltonian systems and integrated by ODE solvers."""

from odeopt._version import __version__
from odeopt.artifacts import available_pretrained, load_pretrained, save
from odeopt.evaluation import compare
from odeopt.hub import load
from odeopt.meta import MetaConfig, gradient_flow, meta_train, unroll
from odeopt.ode import integrate
from odeopt.optimizer import LearnedOptimizer
from odeopt.parameters import param_groups
from odeopt.physics import PhaseState, PortHamiltonianSystem
from odeopt.rules import (
    AdamUpdate,
    HamiltonianUpdate,
    LSTMUpdate,
    PortHamiltonianUpdate,
    RMSpropUpdate,
    SGDUpdate,
    UpdateRule,
)
from odeopt.solvers import compare_solvers
from odeopt.stepping.guard import Guard
from odeopt.stepping.native import native_status

__all__ = [
    "AdamUpdate",
    "Guard",
    "HamiltonianUpdate",
    "LSTMUpdate",
    "LearnedOptimizer",
    "MetaConfig",
    "PhaseState",
    "PortHamiltonianSystem",
    "PortHamiltonianUpdate",
    "RMSpropUpdate",
    "SGDUpdate",
    "UpdateRule",
    "__version__",
    "available_pretrained",
    "compare",
    "compare_solvers",
    "gradient_flow",
    "integrate",
    "load",
    "load_pretrained",
    "meta_train",
    "native_status",
    "param_groups",
    "save",
    "unroll",
]
