"""Update rules: pure functions of gradients behind one interface."""

from odeopt.rules.base import UpdateRule
from odeopt.rules.classical import AdamUpdate, RMSpropUpdate, SGDUpdate
from odeopt.rules.hamiltonian import HamiltonianUpdate
from odeopt.rules.lstm import LSTMUpdate
from odeopt.rules.port_hamiltonian import PortHamiltonianUpdate

__all__ = [
    "AdamUpdate",
    "HamiltonianUpdate",
    "LSTMUpdate",
    "PortHamiltonianUpdate",
    "RMSpropUpdate",
    "SGDUpdate",
    "UpdateRule",
]
