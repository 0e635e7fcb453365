"""Mechanical systems: true ones, models that learn them from their motions, and how well they did."""

from odeopt.systems.coordinates import Coordinates
from odeopt.systems.data import INPUTS, Data, Trajectories, make_data, simulate
from odeopt.systems.identification import (
    Errors,
    FitConfig,
    FitResult,
    Gauge,
    Parts,
    Rises,
    energy_rises,
    fit,
    fit_kept,
    fix_gauge,
    part_errors,
    parts_at,
    trajectory_errors,
)
from odeopt.systems.mechanics import MECHANISMS, Mechanism, acrobot, cart_pole, embedded_pendulum, pendulum
from odeopt.systems.models import (
    MODELS,
    GeometricBaseline,
    NaiveBaseline,
    Sine,
    UnstructuredHamiltonian,
    make_model,
    structured,
)
from odeopt.systems.observed import ObservedSystem, PortHamiltonianModel

__all__ = [
    "INPUTS",
    "MECHANISMS",
    "MODELS",
    "Coordinates",
    "Data",
    "Errors",
    "FitConfig",
    "FitResult",
    "Gauge",
    "GeometricBaseline",
    "Mechanism",
    "NaiveBaseline",
    "ObservedSystem",
    "Parts",
    "PortHamiltonianModel",
    "Rises",
    "Sine",
    "Trajectories",
    "UnstructuredHamiltonian",
    "acrobot",
    "cart_pole",
    "embedded_pendulum",
    "energy_rises",
    "fit",
    "fit_kept",
    "fix_gauge",
    "make_data",
    "make_model",
    "part_errors",
    "parts_at",
    "pendulum",
    "simulate",
    "structured",
    "trajectory_errors",
]
