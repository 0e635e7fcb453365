"""Estimators of the meta-gradient, behind one interface: one file each."""

from odeopt.meta.estimators.backpropagation import Backpropagation
from odeopt.meta.estimators.base import Estimator
from odeopt.meta.estimators.damped import DampedBackpropagation
from odeopt.meta.estimators.es import EvolutionStrategies
from odeopt.meta.estimators.hybrid import Hybrid
from odeopt.meta.estimators.pes import PersistentEvolutionStrategies

_ALL = (Backpropagation, DampedBackpropagation, EvolutionStrategies, Hybrid, PersistentEvolutionStrategies)
# by the names that configurations have for them
ESTIMATORS: dict[str, type[Estimator]] = {estimator.key: estimator for estimator in _ALL}

__all__ = [
    "ESTIMATORS",
    "Backpropagation",
    "DampedBackpropagation",
    "Estimator",
    "EvolutionStrategies",
    "Hybrid",
    "PersistentEvolutionStrategies",
]
