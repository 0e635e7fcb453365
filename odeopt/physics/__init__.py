"""Port-Hamiltonian systems, of optimizers or of anything else: this room knows nothing of either."""

from odeopt.physics.energy import GivenPotential, Hamiltonian, PhaseState, Potential
from odeopt.physics.given import GivenMatrix
from odeopt.physics.structure import (
    LearnedMatrix,
    MatrixPart,
    NonNegativeDiagonal,
    PortMatrix,
    PositiveDefinite,
    PositiveSemidefinite,
    ScaledSigmoid,
    mlp,
    symplectic_matrix,
)
from odeopt.physics.system import PortHamiltonianSystem, PowerBalance, StructureMatrices

__all__ = [
    "GivenMatrix",
    "GivenPotential",
    "Hamiltonian",
    "LearnedMatrix",
    "MatrixPart",
    "NonNegativeDiagonal",
    "PhaseState",
    "PortHamiltonianSystem",
    "PortMatrix",
    "PositiveDefinite",
    "PositiveSemidefinite",
    "Potential",
    "PowerBalance",
    "ScaledSigmoid",
    "StructureMatrices",
    "mlp",
    "symplectic_matrix",
]
