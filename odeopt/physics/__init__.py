"""Port-Hamiltonian systems, of optimizers or of anything else: this room knows nothing of either."""

from odeopt.physics.balance import PowerBalance
from odeopt.physics.energy import GivenPotential, Hamiltonian, PhaseState, Potential
from odeopt.physics.given import GivenMatrix
from odeopt.physics.kinetic import (
    MUON_COEFFICIENTS,
    SHORT_COEFFICIENTS,
    KineticEnergy,
    MatrixEnergy,
    QuadraticEnergy,
    RelativisticEnergy,
    SpectralEnergy,
    frobenius_norm,
    newton_schulz,
    spectral_power_balance,
)
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
from odeopt.physics.system import PortHamiltonianSystem, StructureMatrices

__all__ = [
    "MUON_COEFFICIENTS",
    "SHORT_COEFFICIENTS",
    "GivenMatrix",
    "GivenPotential",
    "Hamiltonian",
    "KineticEnergy",
    "LearnedMatrix",
    "MatrixEnergy",
    "MatrixPart",
    "NonNegativeDiagonal",
    "PhaseState",
    "PortHamiltonianSystem",
    "PortMatrix",
    "PositiveDefinite",
    "PositiveSemidefinite",
    "Potential",
    "PowerBalance",
    "QuadraticEnergy",
    "RelativisticEnergy",
    "ScaledSigmoid",
    "SpectralEnergy",
    "StructureMatrices",
    "frobenius_norm",
    "mlp",
    "newton_schulz",
    "spectral_power_balance",
    "symplectic_matrix",
]
