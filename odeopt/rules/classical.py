"""Hand-designed optimizers as update rules, equal to ``torch.optim`` to rounding."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from odeopt.checks import is_list, is_number, require, require_flags, require_non_negative
from odeopt.rules.base import UpdateRule, per_coordinate, per_tensor


class SGDState(NamedTuple):
    """Momentum buffer, shape ``(*batch, n)``; and the step count, shape ``(*batch, 1)``."""

    momentum_buffer: Tensor
    step: Tensor


class SGDUpdate(UpdateRule):
    r"""Gradient descent with momentum or Nesterov momentum, as ``torch.optim.SGD``.

    .. math:: b_t = \mu b_{t-1} + g_t, \qquad \Delta_t = -\eta\, b_t \ \text{ or }\ -\eta\,(g_t + \mu b_t)

    Args:
        lr: Learning rate, per step.
        momentum: Decay of the momentum buffer, in ``[0, 1)``.
        nesterov: Whether the step looks ahead.

    Raises:
        ValueError: If an argument is out of range, or ``nesterov`` is set without momentum.

    References:
        Sutskever, Martens, Dahl, Hinton (2013), On the importance of initialization and momentum, Eq. (1)-(4).
    """

    crosses_coordinates = False
    starts_at_zero = True

    def __init__(self, lr: float = 1e-2, *, momentum: float = 0.0, nesterov: bool = False) -> None:
        require_non_negative(lr=lr)
        require(is_number(momentum) and 0 <= momentum < 1, "momentum", momentum, "in [0, 1)")
        require_flags(nesterov=nesterov)
        require(momentum > 0 or not nesterov, "momentum", momentum, "positive where `nesterov` is set")
        lr, momentum = float(lr), float(momentum)  # 1 and 1.0 are one rule
        super().__init__(lr=lr, momentum=momentum, nesterov=nesterov)
        self.lr, self.momentum, self.nesterov = lr, momentum, nesterov

    def init_state(self, param: Tensor) -> SGDState:
        return SGDState(per_coordinate(param), per_tensor(param))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        buffer = self.momentum * state.momentum_buffer + grad
        direction = grad + self.momentum * buffer if self.nesterov else buffer
        return -self.lr * direction, SGDState(buffer, state.step + 1)


class RMSpropState(NamedTuple):
    """Running square of the gradient, shape ``(*batch, n)``; and the step count, shape ``(*batch, 1)``."""

    square_avg: Tensor
    step: Tensor


class RMSpropUpdate(UpdateRule):
    r"""RMSprop, as ``torch.optim.RMSprop``.

    .. math:: v_t = \alpha v_{t-1} + (1 - \alpha) g_t^2, \qquad \Delta_t = -\eta\, g_t / (\sqrt{v_t} + \epsilon)

    Args:
        lr: Learning rate, per step.
        alpha: Decay of the running square, in ``[0, 1)``.
        eps: Added to the root, in units of the gradient.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Tieleman, Hinton (2012), Lecture 6.5, Neural Networks for Machine Learning.
    """

    crosses_coordinates = False
    starts_at_zero = True

    def __init__(self, lr: float = 1e-2, *, alpha: float = 0.99, eps: float = 1e-8) -> None:
        require_non_negative(lr=lr, eps=eps)
        require(is_number(alpha) and 0 <= alpha < 1, "alpha", alpha, "in [0, 1)")
        lr, alpha, eps = float(lr), float(alpha), float(eps)
        super().__init__(lr=lr, alpha=alpha, eps=eps)
        self.lr, self.alpha, self.eps = lr, alpha, eps

    def init_state(self, param: Tensor) -> RMSpropState:
        return RMSpropState(per_coordinate(param), per_tensor(param))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        square_avg = self.alpha * state.square_avg + (1 - self.alpha) * grad * grad
        return -self.lr * grad / (square_avg.sqrt() + self.eps), RMSpropState(square_avg, state.step + 1)


class AdamState(NamedTuple):
    """Running gradient and its running square, shape ``(*batch, n)``; the step count, ``(*batch, 1)``."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor


class AdamUpdate(UpdateRule):
    r"""Adam, as ``torch.optim.Adam``; with cosine decay also as ``CosineAnnealingLR`` over the whole run makes it.

    .. math:: \Delta_t = -\eta\, \frac{m_t / (1 - \beta_1^t)}{\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}, \qquad
              \eta \to \tfrac{\eta}{2}\,(1 + \cos \pi \tau) \ \text{with cosine decay, } \tau \text{ the progress}

    Args:
        lr: Learning rate, per step.
        betas: Decays of the running gradient and of its square, each in ``[0, 1)``.
        eps: Added to the root, in units of the gradient.
        cosine: Whether the learning rate decays to zero over the run, whose length must then be known.

    Raises:
        ValueError: If an argument is out of range, or a step with ``cosine`` is not told the progress.

    References:
        Kingma, Ba (2015), Adam: a method for stochastic optimization, Algorithm 1.
        Loshchilov, Hutter (2017), SGDR: stochastic gradient descent with warm restarts, Eq. (5), without restarts.
    """

    crosses_coordinates = False
    starts_at_zero = True

    def __init__(
        self,
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        cosine: bool = False,
    ) -> None:
        require_non_negative(lr=lr, eps=eps)
        are_decays = is_list(betas) and len(betas) == 2 and all(is_number(b) and 0 <= b < 1 for b in betas)
        require(are_decays, "betas", betas, "two numbers in [0, 1)")
        require_flags(cosine=cosine)
        lr, betas, eps = float(lr), [float(b) for b in betas], float(eps)
        super().__init__(lr=lr, betas=betas, eps=eps, cosine=cosine)
        self.lr, self.betas, self.eps, self.cosine = lr, tuple(betas), eps, cosine

    def init_state(self, param: Tensor) -> AdamState:
        return AdamState(per_coordinate(param), per_coordinate(param), per_tensor(param))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        beta1, beta2 = self.betas
        step = state.step + 1
        exp_avg = beta1 * state.exp_avg + (1 - beta1) * grad
        exp_avg_sq = beta2 * state.exp_avg_sq + (1 - beta2) * grad * grad
        # expm1: in float32, 1 - 0.999 ** 1 would already be off by 6e-5
        bias1, bias2 = (-torch.expm1(step * math.log(b)) if b > 0 else 1.0 for b in self.betas)
        denominator = (exp_avg_sq / bias2).sqrt() + self.eps
        update = -self._lr(progress) * (exp_avg / bias1) / denominator
        return update, AdamState(exp_avg, exp_avg_sq, step)

    def _lr(self, progress: Tensor | None) -> Tensor | float:
        if not self.cosine:
            return self.lr
        require(progress is not None, "progress", progress, "the fraction of the run that is done, for `cosine`")
        return self.lr * (1 + torch.cos(math.pi * progress)) / 2
