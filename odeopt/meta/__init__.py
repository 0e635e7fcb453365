"""Learning a rule: the unrolled computation, estimators of its gradient, and the training loop."""

from odeopt.meta.config import MetaConfig, MetaResult
from odeopt.meta.distributed import LostRankError, World
from odeopt.meta.estimators import (
    Backpropagation,
    DampedBackpropagation,
    Estimator,
    EvolutionStrategies,
    Hybrid,
    PersistentEvolutionStrategies,
)
from odeopt.meta.flow import GradientFlow, gradient_flow
from odeopt.meta.objective import MetaObjective
from odeopt.meta.trainer import meta_train
from odeopt.meta.unroll import Trajectory, unroll

__all__ = [
    "Backpropagation",
    "DampedBackpropagation",
    "Estimator",
    "EvolutionStrategies",
    "GradientFlow",
    "Hybrid",
    "LostRankError",
    "MetaConfig",
    "MetaObjective",
    "MetaResult",
    "PersistentEvolutionStrategies",
    "Trajectory",
    "World",
    "gradient_flow",
    "meta_train",
    "unroll",
]
