"""Autoencoders of images, variational or not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeopt.checks import require_counts, require_flags, require_one_of

from .base import Batch
from .datasets import ImageDataset
from .layers import check_network, hidden_layers
from .networks import ImageTask
from .random import normal

LIKELIHOODS = ("bernoulli", "gaussian")


@dataclass(eq=False, repr=False, kw_only=True)
class Autoencoder(ImageTask):
    r"""Reconstruct images through a few latent numbers; encoder and decoder are perceptrons, mirror images in widths.

    .. math:: f_t(\theta) = \frac{1}{B} \sum_b D_{KL}(q_\theta(z \mid x_{tb}) \,\|\, N(0, I)) -
              \log p_\theta(x_{tb} \mid z_{tb}), \qquad
              z_{tb} = \mu_\theta(x_{tb}) + \sigma_\theta(x_{tb})\,\varepsilon_{tb}

    A variational autoencoder's noise comes with the batch, so that its loss is a function of parameters and batch; a
    plain one has :math:`z = \mu` and no divergence. Losses are in nats per image, summed over pixels: a Bernoulli
    likelihood takes pixels in [0, 1] for probabilities, a Gaussian one has deviation one and no constant.

    Args:
        dataset: Images, or the name of a dataset for :func:`load_dataset`.
        is_variational: Whether latent numbers are drawn.
        n_latent: How many there are.
        width: Units of a hidden layer.
        depth: Number of hidden layers of the encoder, and of the decoder.
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        likelihood: ``"bernoulli"`` or ``"gaussian"``.
        batch_size: Images per step, drawn with replacement.
        split: ``"meta-train"`` or ``"evaluation"``.
        n_examples: See :class:`ImageTask`.
        device: See :class:`Task`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Kingma, Welling (2014), Auto-encoding variational Bayes, Eq. (10).
    """

    is_variational: bool = True
    n_latent: int = 8
    width: int = 64
    depth: int = 1
    activation: str = "relu"
    likelihood: str = "bernoulli"

    def __post_init__(self, dataset: ImageDataset | str) -> None:
        check_network(self.width, self.depth, self.activation)
        require_counts(n_latent=self.n_latent)
        require_one_of(LIKELIHOODS, likelihood=self.likelihood)
        require_flags(is_variational=self.is_variational)
        super().__post_init__(dataset)

    def build(self) -> nn.Module:
        sizes = (self.n_pixels, *(self.width,) * self.depth, self.n_latent)
        return (_Variational if self.is_variational else _Plain)(sizes, self.activation)

    def draw(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        """Images, with the noise of their latent numbers behind the pixels, and images."""
        images, _ = super().draw(indices, step, seed, held_out=held_out)
        if not self.is_variational:
            return images, images
        stream = f"{self.examples.stream}/{'held-out-' if held_out else ''}noise"
        shape = self.batch_size, self.n_latent
        noise = normal(indices, shape, seed=seed, stream=stream, step=step, dtype=self.dtype)
        return torch.cat((images, noise), dim=-1), images

    def criterion(self, output: Tensor | tuple[Tensor, ...], target: Tensor) -> Tensor:
        decoded, *latent = output if self.is_variational else (output,)
        if self.likelihood == "bernoulli":
            nats = F.binary_cross_entropy_with_logits(decoded, target, reduction="none").sum(-1).mean()
        else:
            nats = (decoded - target).square().sum(-1).mean() / 2
        if latent:
            mean, log_variance = latent
            nats = nats + (log_variance.exp() + mean.square() - 1 - log_variance).sum(-1).mean() / 2
        return nats


class _Plain(nn.Module):
    """Layers of the sizes given, down to the latent numbers, and back."""

    n_heads = 1  # numbers per latent number that the encoder returns

    def __init__(self, sizes: tuple[int, ...], activation: str) -> None:
        super().__init__()
        self.n_latent = sizes[-1]
        self.encoder = _perceptron((*sizes[:-1], self.n_heads * sizes[-1]), activation)
        self.decoder = _perceptron(sizes[::-1], activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class _Variational(_Plain):
    """Returns what is decoded, and mean and logarithm of the variance of the latent numbers."""

    n_heads = 2

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        images, noise = x[..., : -self.n_latent], x[..., -self.n_latent :]
        mean, log_variance = self.encoder(images).chunk(2, dim=-1)
        return self.decoder(mean + (log_variance / 2).exp() * noise), mean, log_variance


def _perceptron(sizes: tuple[int, ...], activation: str) -> nn.Module:
    return nn.Sequential(*hidden_layers(sizes, activation)[:-1])
