"""The learned port-Hamiltonian rule, a subject a file: the step, its signals, coefficients, energies and arguments."""

from odeopt.rules.port_hamiltonian.rule import PortHamiltonianState, PortHamiltonianUpdate

__all__ = ["PortHamiltonianState", "PortHamiltonianUpdate"]
