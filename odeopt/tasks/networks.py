"""Small networks of the kinds people train: convolutions, normalisation, skip connections, attention, recurrence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .base import Batch
from .classification import load_split
from .datasets import ImageDataset
from .module import ModuleTask
from .perceptron import ACTIVATIONS
from .random import integers, normal, uniform


class _Activation(nn.Module):
    """A named activation as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class _Residual(nn.Module):
    """``x + f(norm(x))``."""

    def __init__(self, width: int, block: nn.Module) -> None:
        super().__init__()
        self.norm, self.block = nn.LayerNorm(width), block

    def forward(self, x: Tensor) -> Tensor:
        return x + self.block(self.norm(x))


class _SelfAttention(nn.Module):
    """Attention over the second last axis, in plain matrix products, which vmap and second derivatives take."""

    def __init__(self, width: int, n_heads: int, *, is_causal: bool) -> None:
        super().__init__()
        self.inputs, self.outputs = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.n_heads, self.is_causal = n_heads, is_causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, self.n_heads, -1)).transpose(-4, -2).unbind(-3)
        scores = q @ k.mT * q.shape[-1] ** -0.5
        if self.is_causal:
            n = scores.shape[-1]
            future = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, float("-inf"))
        return self.outputs((scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))


def _attention_layers(width: int, depth: int, activation: str, *, is_causal: bool) -> list[nn.Module]:
    """Build layers of attention and of a perceptron, normalised first."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers.append(_Residual(width, _SelfAttention(width, 2, is_causal=is_causal)))
        block = (nn.Linear(width, 2 * width), _Activation(activation), nn.Linear(2 * width, width))
        layers.append(_Residual(width, nn.Sequential(*block)))
    return [*layers, nn.LayerNorm(width)]


class _Recurrence(nn.Module):
    """A recurrent network written with linear layers: torch's kernels have no batching rule under vmap."""

    def __init__(self, width: int, activation: str) -> None:
        super().__init__()
        self.inputs, self.hidden = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.activation = ACTIVATIONS[activation]

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = torch.zeros_like(x[..., 0, :]), []
        for driven in self.inputs(x).unbind(-2):
            h = self.activation(driven + self.hidden(h))
            outputs.append(h)
        return torch.stack(outputs, dim=-2)


class _WithPositions(nn.Module):
    """Add a learned vector to each position of a sequence."""

    def __init__(self, length: int, width: int) -> None:
        super().__init__()
        self.positions = nn.Parameter(0.1 * torch.randn(length, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.positions


class _Mean(nn.Module):
    """Mean over positions."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(-2)


class _AsImage(nn.Module):
    """Rows of pixels to square images of one channel."""

    def forward(self, x: Tensor) -> Tensor:
        side = round(x.shape[-1] ** 0.5)
        return x.unflatten(-1, (1, side, side))


class _AsRows(nn.Module):
    """Rows of pixels to sequences of the images' rows."""

    def forward(self, x: Tensor) -> Tensor:
        side = round(x.shape[-1] ** 0.5)
        return x.unflatten(-1, (side, side))


def _normalised(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((n_in, *(width,) * depth)):
        layers += [nn.Linear(a, b), nn.LayerNorm(b), _Activation(activation)]
    return nn.Sequential(*layers, nn.Linear(width, n_out))


def _residual(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    blocks = (
        _Residual(width, nn.Sequential(nn.Linear(width, width), _Activation(activation), nn.Linear(width, width)))
        for _ in range(depth)
    )
    return nn.Sequential(nn.Linear(n_in, width), *blocks, nn.Linear(width, n_out))


def _convolutional(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    side, layers = round(n_in**0.5), [_AsImage()]
    for a, b in itertools.pairwise((1, *(width,) * depth)):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), _Activation(activation)]
        side = (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(-3), nn.Linear(width * side * side, n_out))


def _attentive(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    side = round(n_in**0.5)
    layers = _attention_layers(width, depth, activation, is_causal=False)
    return nn.Sequential(
        _AsRows(), nn.Linear(side, width), _WithPositions(side, width), *layers, _Mean(), nn.Linear(width, n_out)
    )


def _autoencoder(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((n_in, *(width,) * depth)):
        layers += [nn.Linear(a, b), _Activation(activation)]
    return nn.Sequential(*layers, nn.Linear(width, n_in))


ARCHITECTURES: dict[str, Callable[[int, int, int, int, str], nn.Module]] = {
    "normalised": _normalised,
    "residual": _residual,
    "convolutional": _convolutional,
    "attention": _attentive,
    "autoencoder": _autoencoder,
}
SEQUENCE_ARCHITECTURES = ("attention", "recurrent")


class ImageNetwork(ModuleTask):
    r"""Networks other than perceptrons on images: classification, or reconstruction by an autoencoder.

    The loss is the mean cross-entropy in nats; of an autoencoder half the squared error per image, summed over
    pixels in [0, 1]. Images are split as :class:`~odeopt.tasks.classification.MLPClassification` splits them, and
    parameters are initialised as torch does.

    Args:
        dataset: Images, or the name of a dataset for :func:`load_dataset`.
        architecture: ``"normalised"`` (layer norms between linear layers), ``"residual"`` (normalised blocks of two
            layers beside a skip connection), ``"convolutional"`` (3 x 3 with stride two), ``"attention"`` (over the
            rows of an image, two heads), or ``"autoencoder"``.
        width: Units of a hidden layer, channels, or width of the attention (an even number there).
        depth: Number of hidden layers or blocks.
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        batch_size: Images per step, drawn with replacement.
        split: ``"meta-train"`` or ``"evaluation"``.
        device: See :class:`~odeopt.tasks.base.Task`.

    Raises:
        ValueError: If an argument is not one of these.

    Example:
        >>> task = ImageNetwork("digits", "convolutional", width=4, depth=2)
        >>> indices = torch.arange(3)
        >>> task.loss(task.init_params(indices, seed=0), task.sample_batch(indices, step=0, seed=0)).shape
        torch.Size([3])
    """

    def __init__(
        self,
        dataset: ImageDataset | str,
        architecture: str = "convolutional",
        *,
        width: int = 8,
        depth: int = 1,
        activation: str = "relu",
        batch_size: int = 64,
        split: str = "meta-train",
        device: torch.device | str = "cpu",
    ) -> None:
        _check(architecture, ARCHITECTURES, width, depth, activation, batch_size)
        dataset, members = load_split(dataset, split)
        sizes = (dataset.train_images.shape[1], dataset.n_classes)
        self.stream = f"image-network/{split}"
        self.images, self.labels = dataset.train_images[members], dataset.train_labels[members]
        self.n_images, self.is_autoencoder = batch_size, architecture == "autoencoder"
        super().__init__(
            lambda: ARCHITECTURES[architecture](*sizes, width, depth, activation),
            self._images,
            loss_fn=_reconstruction_loss if self.is_autoencoder else F.cross_entropy,
            device=device,
        )
        self.config = {
            "dataset": dataset.name,
            "architecture": architecture,
            "width": width,
            "depth": depth,
            "activation": activation,
            "batch_size": batch_size,
            "split": split,
        }

    def _images(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Images as numbers in [0, 1], ``(n_tasks, batch_size, n_pixels)``, and labels, or the images again."""
        stream = f"{self.stream}/minibatch"
        members = integers(indices, (self.n_images,), len(self.labels), seed=seed, stream=stream, step=step)
        images = self.images.index_select(0, members.flatten()).unflatten(0, members.shape)
        images = images.to(self.dtype).div_(255)
        return images, images if self.is_autoencoder else self.labels[members]


class SequencePrediction(ModuleTask):
    r"""Predict the next symbol of a random Markov chain of second order, a new chain for each problem.

    .. math:: P(s_{t+1} = k \mid s_t = i, s_{t-1} = j) \propto \exp(A_{ik} + B_{jk}), \qquad A, B \sim 2\,N(0, 1)

    Sequences never come twice. The loss is the mean cross-entropy in nats over all positions but the first.

    Args:
        architecture: ``"attention"`` (causal, two heads, learned positions) or ``"recurrent"``.
        width: Width of the embedding and of the network; an even number for attention.
        depth: Number of layers.
        n_symbols: Size of the alphabet.
        length: Symbols of a sequence that are predicted from.
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        batch_size: Sequences per step.
        device: See :class:`~odeopt.tasks.base.Task`.

    Raises:
        ValueError: If an argument is not one of these.
    """

    def __init__(
        self,
        architecture: str = "attention",
        *,
        width: int = 16,
        depth: int = 1,
        n_symbols: int = 8,
        length: int = 12,
        activation: str = "tanh",
        batch_size: int = 16,
        device: torch.device | str = "cpu",
    ) -> None:
        _check(architecture, SEQUENCE_ARCHITECTURES, width, depth, activation, batch_size)
        for name, value in (("n_symbols", n_symbols), ("length", length)):
            if value < 2:
                raise ValueError(f"Parameter `{name}` should be at least 2. Found `{name} = {value}`.")

        def make() -> nn.Module:
            layers: list[nn.Module] = [nn.Embedding(n_symbols, width)]
            if architecture == "attention":
                layers.append(_WithPositions(length, width))
                layers += _attention_layers(width, depth, activation, is_causal=True)
            else:
                layers += [_Recurrence(width, activation) for _ in range(depth)]
            return nn.Sequential(*layers, nn.Linear(width, n_symbols))

        self.n_symbols, self.length, self.n_sequences = n_symbols, length, batch_size
        super().__init__(make, self._sequences, loss_fn=_sequence_loss, device=device)
        self.config = {
            "architecture": architecture,
            "width": width,
            "depth": depth,
            "n_symbols": n_symbols,
            "length": length,
            "activation": activation,
            "batch_size": batch_size,
        }

    def _sequences(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Symbols, ``(n_tasks, batch_size, length)``, and their successors."""
        k, options = self.n_symbols, {"seed": seed, "stream": "sequence/chain", "dtype": self.dtype}
        last, before = (2 * normal(indices, (2, k, k), **options)).unbind(1)
        # the maximum of logits and Gumbel noise is a draw from their softmax
        options["stream"] = "sequence/noise"
        u = uniform(indices, (self.n_sequences, self.length + 1, k), step=step, **options)
        noise = -(-(u.clamp(min=1e-9).log())).clamp(min=1e-9).log()
        symbols = [noise[:, :, 0].argmax(-1)]
        symbols.append((_rows(last, symbols[0]) + noise[:, :, 1]).argmax(-1))
        for t in range(2, self.length + 1):
            logits = _rows(last, symbols[-1]) + _rows(before, symbols[-2])
            symbols.append((logits + noise[:, :, t]).argmax(-1))
        sequence = torch.stack(symbols, dim=-1)
        return sequence[..., :-1], sequence[..., 1:]


def _rows(table: Tensor, symbols: Tensor) -> Tensor:
    """Rows of each problem's table, ``(n_tasks, k, k)``, that symbols ``(n_tasks, B)`` name."""
    return table.take_along_dim(symbols.unsqueeze(-1), dim=1)


def _sequence_loss(logits: Tensor, symbols: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), symbols.flatten())


def _check(architecture: str, known: Iterable[str], width: int, depth: int, activation: str, batch_size: int) -> None:
    if architecture not in known:
        wanted = f"one of {', '.join(known)}"
        raise ValueError(f"Parameter `architecture` should be {wanted}. Found `architecture = {architecture!r}`.")
    if activation not in ACTIVATIONS:
        wanted = f"one of {', '.join(ACTIVATIONS)}"
        raise ValueError(f"Parameter `activation` should be {wanted}. Found `activation = {activation!r}`.")
    for name, value in (("width", width), ("depth", depth), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"Parameter `{name}` should be positive. Found `{name} = {value}`.")
    if architecture == "attention" and width % 2:
        raise ValueError(f"Parameter `width` should be even for two heads. Found `width = {width}`.")


def _reconstruction_loss(output: Tensor, images: Tensor) -> Tensor:
    return (output - images).square().sum(-1).mean() / 2
