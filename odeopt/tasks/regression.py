"""Regression on what another network says."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

from torch import Tensor

from odeopt.checks import require_counts, require_non_negative

from .base import Batch, Params
from .perceptron import ACTIVATIONS, PerceptronTask, perceptron, perceptron_shapes
from .random import normal


@dataclass(eq=False, repr=False)
class TeacherStudent(PerceptronTask):
    r"""Fit a perceptron to a random one, a new teacher for each problem, from inputs that never come twice.

    .. math:: f_t(\theta) = \frac{1}{B m} \sum_{b=1}^{B} \lVert n_\theta(x_{tb}) - n_*(x_{tb}) \rVert^2, \qquad
              x_{tbi} \sim N(0, s_i^2)

    The teacher is a tanh network of one hidden layer whose weights are normal, with variance four over the fan-in in
    the first layer and one over it in the second, so that its outputs are of order one. Scales of the inputs are
    spread: ``ln s_i`` is normal with deviation ``spread``, and their root mean square is one.

    Args:
        n_inputs: Number of inputs.
        widths: Widths of the student's hidden layers.
        n_outputs: Number of outputs :math:`m`.
        activation: Of the student: one of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        teacher_width: Hidden units of the teacher.
        spread: Deviation of the logarithm of the inputs' scales.
        batch_size: Examples per step.
        device: See :class:`Task`.
        dtype: See :class:`Task`.

    Raises:
        ValueError: If an argument is out of range.
    """

    n_inputs: int = 16
    widths: Sequence[int] = (20,)
    n_outputs: int = 1
    _: KW_ONLY
    activation: str = "tanh"
    teacher_width: int = 8
    spread: float = 0.0

    def __post_init__(self) -> None:
        require_counts(teacher_width=self.teacher_width)
        require_non_negative(spread=self.spread)
        super().__post_init__(self.n_inputs, self.n_outputs, "teacher-student/student")
        self.teacher_shapes = perceptron_shapes((self.n_inputs, self.teacher_width, self.n_outputs))

    def sample_batch(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw inputs, ``(n_tasks, B, n_inputs)``, and what the teachers say, ``(n_tasks, B, n_outputs)``."""
        indices = self._indices(indices)

        def draw(shape: Sequence[int], name: str, step: int = 0) -> Tensor:
            return normal(indices, shape, seed=seed, stream=f"teacher-student/{name}", step=step, dtype=self.dtype)

        x = draw((self.batch_size, self.n_inputs), "inputs", step)
        scales = (self.spread * draw((1, self.n_inputs), "scales")).exp()
        x = x * (scales * scales.square().mean(-1, keepdim=True).rsqrt())
        teacher = {}
        for gain, (name, shape) in zip((2.0, 0.0, 1.0, 0.0), self.teacher_shapes.items(), strict=True):
            teacher[name] = draw(shape, f"teacher/{name}") * (gain / math.sqrt(shape[-1]))
        return x, perceptron(teacher, x, ACTIVATIONS["tanh"])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean squared error, shape ``(n_tasks,)``; see :meth:`Task.loss`."""
        x, y = batch
        return (self.outputs(params, x) - y).square().mean((1, 2))
