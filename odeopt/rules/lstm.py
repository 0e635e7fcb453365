"""The LSTM rule of Andrychowicz et al. (2016), also on normalised gradients, as Lv et al. (2017) have it."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from odeopt.checks import require, require_counts, require_flags, require_positive
from odeopt.modes import is_in_forward_mode
from odeopt.rules.base import UpdateRule, per_coordinate, per_tensor
from odeopt.rules.preprocessing import averaging_weight, coordinate_rms, log_sign

# Coordinates per pass on a CPU: their gates stay in a core's cache. Measured at hidden size 20: from 2,048 to
# 8,192 alike; 512 take 1.7 times as long, 16,384 take 1.5 times.
_CHUNK = 4096

_DECAY = 0.95  # of the moments, as Lv et al. have it


class LSTMState(NamedTuple):
    """Hidden and cell states of both layers, each ``(*batch, n, hidden_size)``."""

    h1: Tensor
    c1: Tensor
    h2: Tensor
    c2: Tensor


class NormalizedLSTMState(NamedTuple):
    """What :class:`LSTMState` holds, and moments of the gradient.

    Running mean and rms have shape ``(*batch, n)``, the step count ``(*batch, 1)``.
    """

    h1: Tensor
    c1: Tensor
    h2: Tensor
    c2: Tensor
    mean: Tensor
    rms: Tensor
    step: Tensor


class LSTMUpdate(UpdateRule):
    r"""Two LSTM cells per coordinate, their weights shared by all coordinates.

    .. math:: (h_t, c_t) = \mathrm{LSTM}^2(\nabla_t, h_{t-1}, c_{t-1}), \qquad
              \Delta_t = s\,(w^\top h_t^{(2)} + b)

    With the paper's sizes it has 5,221 parameters, or 5,301 where a gradient makes two channels. A step costs about ten
    thousand floating-point operations per coordinate, so on a CPU it runs in chunks that fit a core's cache.
    For differentiation a step of more than one chunk keeps its inputs alone, a quarter of what its gates
    would take, and computes the gates again on the way back.

    Args:
        preprocess: Whether the gradient passes through :func:`odeopt.rules.preprocessing.log_sign` (factor 10).
        normalize: Whether the cells see two channels in place of the gradient: the gradient and its running mean, both
            over the gradient's running rms (:func:`odeopt.rules.preprocessing.coordinate_rms`, decay .95). Multiplying
            the loss by a constant then changes nothing.
        hidden_size: Width of each cell; the paper's 20.
        output_scale: The factor :math:`s` on the update, in units of the parameter. It belongs to the
            trained weights: the rule is not the same rule under another scale.

    Raises:
        ValueError: If a size or the scale is not positive, or both ``preprocess`` and ``normalize`` are set.

    References:
        Andrychowicz et al. (2016), Learning to learn by gradient descent by gradient descent, Sec. 2.1, App. A.
        Lv, Jiang, Li (2017), Learning gradient descent: better generalization and longer horizons: the
        inputs of RNNprop, for ``normalize``.
    """

    crosses_coordinates = False
    starts_at_zero = True
    chunk_size = 2**13  # its temporaries are eighty numbers wide

    def __init__(
        self,
        *,
        preprocess: bool = False,
        normalize: bool = False,
        hidden_size: int = 20,
        output_scale: float = 0.1,
    ) -> None:
        require_flags(preprocess=preprocess, normalize=normalize)
        require(not (preprocess and normalize), "preprocess", preprocess, "False where `normalize` is set")
        require_counts(hidden_size=hidden_size)
        require_positive(output_scale=output_scale)
        super().__init__(preprocess=preprocess, normalize=normalize, hidden_size=hidden_size, output_scale=output_scale)
        self.preprocess, self.normalize = preprocess, normalize
        self.hidden_size, self.output_scale = hidden_size, output_scale
        self.cell1 = nn.LSTMCell(2 if preprocess or normalize else 1, hidden_size)
        self.cell2 = nn.LSTMCell(hidden_size, hidden_size)
        self.output = nn.Linear(hidden_size, 1)
        doubled = torch.tensor((1.0, 1.0, 2.0, 1.0)).repeat_interleave(hidden_size)
        self.register_buffer("_doubled", doubled, persistent=False)

    def init_state(self, param: Tensor) -> LSTMState | NormalizedLSTMState:
        zeros = torch.zeros((*param.shape, self.hidden_size), dtype=self.output.weight.dtype, device=param.device)
        cells = LSTMState(zeros, zeros, zeros, zeros)
        if not self.normalize:
            return cells
        return NormalizedLSTMState(*cells, per_coordinate(param), per_coordinate(param), per_tensor(param))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        cells, moments = state[:4], ()
        if self.normalize:
            x, moments = _normalized(grad, state)
        else:
            x = log_sign(grad) if self.preprocess else grad.unsqueeze(-1)
        rows = (x.reshape(-1, x.shape[-1]), *(s.reshape(-1, self.hidden_size) for s in cells))
        rows = [row.to(self.output.weight.dtype) for row in rows]
        weights = (*self._stacked(self.cell1), *self._stacked(self.cell2))
        # the compiler chunks and recomputes by itself; the gates of one chunk are not worth computing twice; and
        # tangents go through operations of torch
        is_plain = torch.compiler.is_compiling() or is_in_forward_mode() or len(x) <= _CHUNK
        h1, c1, h2, c2 = (_cells if is_plain else _Cells.apply)(*rows, *weights)
        update = self.output_scale * self.output(h2).reshape(grad.shape).to(grad.dtype)
        cells = (s.reshape(*grad.shape, self.hidden_size).to(state.h1.dtype) for s in (h1, c1, h2, c2))
        return update, type(state)(*cells, *moments)

    def _stacked(self, cell: nn.LSTMCell) -> tuple[Tensor, Tensor]:
        """One matrix (4h, in + h) and one bias (4h,) for all gates i, f, g, o of a cell.

        Rows of g are doubled: tanh(z) = 2 sigmoid(2z) - 1, so one sigmoid serves all gates. On a CPU it costs
        a sixth of a tanh; the difference is one rounding of a number of size one.
        """
        W = torch.cat((cell.weight_ih, cell.weight_hh), 1)
        return W * self._doubled.unsqueeze(1), (cell.bias_ih + cell.bias_hh) * self._doubled


def _normalized(grad: Tensor, state: NormalizedLSTMState) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
    """Channels ``(*batch, n, 2)`` of a gradient, and the next moments and step count."""
    step = state.step + 1
    weight = averaging_weight(step, _DECAY)
    mean = (1 - weight) * state.mean + weight * grad
    rms = coordinate_rms(grad, state.rms, weight)
    # averages that fall below the normal numbers stay there, and their ratio says nothing
    divisor = torch.where(rms > torch.finfo(rms.dtype).tiny, rms, 1.0)
    return torch.stack((grad / divisor, mean / divisor), -1), (mean, rms, step)


class _Cells(torch.autograd.Function):
    """:func:`_cells` in chunks of rows, with the gates computed again in the backward pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, h1, c1, h2, c2, W1, b1, W2, b2):
        return _by_chunks(lambda *rows: _cells(*rows, W1, b1, W2, b2), (x, h1, c1, h2, c2))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, *grads):
        *rows, W1, b1, W2, b2 = ctx.saved_tensors

        def pull_back(x, h1, c1, h2, c2, d_h1, d_c1, d_h2, d_c2):
            inputs1 = torch.cat((x, h1), 1)
            gates1, _, tanh1 = _gates(inputs1, c1, W1, b1)
            inputs2 = torch.cat((gates1[:, -h1.shape[1] :] * tanh1, h2), 1)
            gates2, _, tanh2 = _gates(inputs2, c2, W2, b2)
            d_inputs2, d_c2, *d_weights2 = _pull_back_cell(d_h2, d_c2, inputs2, c2, W2, gates2, tanh2)
            d_new_h1, d_h2 = d_inputs2.split(h1.shape[1], 1)
            d_inputs1, d_c1, *d_weights1 = _pull_back_cell(d_h1 + d_new_h1, d_c1, inputs1, c1, W1, gates1, tanh1)
            d_x, d_h1 = d_inputs1.split((x.shape[1], h1.shape[1]), 1)
            return d_x, d_h1, d_c1, d_h2, d_c2, *d_weights1, *d_weights2

        return _by_chunks(pull_back, (*rows, *grads), n_sums=4)


def _cells(x, h1, c1, h2, c2, W1, b1, W2, b2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Advance rows of both cells; ``x`` of shape (n, in), states (n, h)."""
    gates1, c1, tanh1 = _gates(torch.cat((x, h1), 1), c1, W1, b1)
    h1 = gates1[:, -h1.shape[1] :] * tanh1
    gates2, c2, tanh2 = _gates(torch.cat((h1, h2), 1), c2, W2, b2)
    return h1, c1, gates2[:, -h2.shape[1] :] * tanh2, c2


def _gates(inputs: Tensor, c: Tensor, W: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sigmoids of the gates (n, 4h), the next cell state (n, h) and its tanh."""
    gates = torch.addmm(b, inputs, W.t()).sigmoid_()
    i, f, g, _ = gates.chunk(4, 1)
    c = torch.addcmul(f * c - i, i, g, value=2)
    return gates, c, (2 * c).sigmoid_().mul(2).sub_(1)


def _pull_back_cell(d_h, d_c, inputs, c, W, gates, tanh) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives with respect to inputs and cell state, rows (n, ...), and with respect to W and b, sums over rows.

    ``c`` is the cell state before the step, ``tanh`` the tanh of the one after it; ``d_h`` and ``d_c`` are
    derivatives with respect to the states after it.
    """
    i, f, g, o = gates.chunk(4, 1)
    d_tanh = d_h * o
    d_c = torch.addcmul(d_c + d_tanh, d_tanh, tanh * tanh, value=-1)
    d_gates = torch.cat((torch.addcmul(-d_c, d_c, g, value=2), d_c * c, d_c * i * 2, d_h * tanh), 1)
    d_gates = torch.ops.aten.sigmoid_backward(d_gates, gates)
    return d_gates @ W, d_c * f, d_gates.t() @ inputs, d_gates.sum(0)


def _by_chunks(function: Callable, rows: tuple[Tensor, ...], n_sums: int = 0) -> tuple[Tensor, ...]:
    """Apply ``function`` to chunks of rows; join what it returns, and add up the last ``n_sums`` of it.

    One chunk where the gates have no cache to stay in, or are kept for differentiation anyway.
    """
    n_rows = len(rows[0])
    if n_rows <= _CHUNK or rows[0].device.type != "cpu" or torch.is_grad_enabled():
        return function(*rows)
    joined, sums = [], []
    for start in range(0, n_rows, _CHUNK):
        chunk = slice(start, start + _CHUNK)
        results = function(*(row[chunk] for row in rows))
        n_joined = len(results) - n_sums
        # a tensor like the results, and not like the inputs, is batched under vmap wherever they are
        joined = joined or [result.new_empty((n_rows, result.shape[1])) for result in results[:n_joined]]
        for whole, result in zip(joined, results, strict=False):
            whole[chunk] = result
        sums = [a + b for a, b in zip(sums, results[n_joined:], strict=True)] if sums else results[n_joined:]
    return *joined, *sums
