"""Learning a rule: the unrolled computation, estimators of its gradient, and the training loop."""

from odeopt.meta.estimators import Backpropagation, Estimator
from odeopt.meta.objective import MetaObjective
from odeopt.meta.trainer import MetaConfig, MetaResult, meta_train
from odeopt.meta.unroll import Trajectory, unroll

__all__ = [
    "Backpropagation",
    "Estimator",
    "MetaConfig",
    "MetaObjective",
    "MetaResult",
    "Trajectory",
    "meta_train",
    "unroll",
]
