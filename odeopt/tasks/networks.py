"""Small networks of the kinds people train on images: convolutions, norms, skip connections, attention."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import KW_ONLY, InitVar, dataclass

from torch import Tensor, nn

from odeopt.checks import require, require_counts, require_one_of

from .base import Batch
from .classification import labelled_images, load_split
from .datasets import ImageDataset
from .examples import Examples, count_of
from .layers import (
    Activation,
    AsPatches,
    Mean,
    Residual,
    TransformerFields,
    WithPositions,
    attention_layers,
    check_network,
    hidden_layers,
)
from .module import NetworkTask


def _normalised(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    layers = hidden_layers((n_in, *(width,) * depth), activation, has_norms=True)
    return nn.Sequential(*layers, nn.Linear(width, n_out))


def _residual(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    blocks = (
        Residual(width, nn.Sequential(nn.Linear(width, width), Activation(activation), nn.Linear(width, width)))
        for _ in range(depth)
    )
    return nn.Sequential(nn.Linear(n_in, width), *blocks, nn.Linear(width, n_out))


def _as_image(n_pixels: int) -> nn.Module:
    """Rows of pixels to square images of one channel."""
    return nn.Unflatten(-1, (1, *2 * (math.isqrt(n_pixels),)))


def _convolutional(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    side, layers = math.isqrt(n_in), [_as_image(n_in)]
    for a, b in itertools.pairwise((1, *(width,) * depth)):
        layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), Activation(activation)]
        side = (side + 1) // 2
    return nn.Sequential(*layers, nn.Flatten(-3), nn.Linear(width * side * side, n_out))


def _attentive(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    side = math.isqrt(n_in)
    layers = attention_layers(width, depth, activation, is_causal=False)
    rows = nn.Unflatten(-1, (side, side)), nn.Linear(side, width), WithPositions(side, width)
    return nn.Sequential(*rows, *layers, Mean(), nn.Linear(width, n_out))


def _autoencoder(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    return nn.Sequential(*hidden_layers((n_in, *(width,) * depth), activation), nn.Linear(width, n_in))


class _ConvolutionalBlock(nn.Module):
    """Two convolutions with batch norms, beside a skip connection that follows them in size."""

    def __init__(self, n_in: int, n_out: int, activation: str, stride: int) -> None:
        super().__init__()
        first, second = _convolution(n_in, n_out, 3, stride), _convolution(n_out, n_out, 3, 1)
        self.block = nn.Sequential(*first, Activation(activation), *second)
        is_same = n_in == n_out and stride == 1
        skip = () if is_same else _convolution(n_in, n_out, 1, stride)
        self.skip, self.activation = nn.Sequential(*skip), Activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.skip(x) + self.block(x))


def _convolution(n_in: int, n_out: int, size: int, stride: int) -> tuple[nn.Module, nn.Module]:
    """A convolution and a batch norm that keeps no running statistics, which all problems would write into at once."""
    convolution = nn.Conv2d(n_in, n_out, size, stride=stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(n_out, track_running_stats=False)


def _residual_convolutional(n_in: int, n_out: int, width: int, depth: int, activation: str) -> nn.Module:
    stem = *_convolution(1, width, 3, 2), Activation(activation)
    blocks = [_ConvolutionalBlock(width, width, activation, 1)]
    blocks += [_ConvolutionalBlock(width << k, width << k + 1, activation, 2) for k in range(depth - 1)]
    ends = nn.AdaptiveAvgPool2d(1), nn.Flatten(-3), nn.Linear(width << depth - 1, n_out)
    return nn.Sequential(_as_image(n_in), *stem, *blocks, *ends)


ARCHITECTURES: dict[str, Callable[[int, int, int, int, str], nn.Module]] = {
    "normalised": _normalised,
    "residual": _residual,
    "convolutional": _convolutional,
    "residual-convolutional": _residual_convolutional,
    "attention": _attentive,
    "autoencoder": _autoencoder,
}


@dataclass(eq=False, repr=False)
class ImageTask(NetworkTask):
    """A network on the images of a split, or on some of them that each problem has for its own.

    Networks take rows of pixels in [0, 1]. To write one, see :class:`NetworkTask`.

    Args:
        dataset: Images, or the name of a dataset for :func:`load_dataset`.
        batch_size: Images per step, drawn with replacement.
        split: ``"meta-train"`` or ``"evaluation"``.
        n_examples: Images of the split that a problem trains on, or a fraction of them; it holds out the others. All by
            default, so that none is held out, and :meth:`sample_held_out` draws from the same.
        device: See :class:`Task`.

    Raises:
        ValueError: If an argument is out of range.
    """

    dataset: InitVar[ImageDataset | str]
    _: KW_ONLY
    batch_size: int = 64
    split: str = "meta-train"
    n_examples: float | None = None

    def __post_init__(self, dataset: ImageDataset | str) -> None:
        dataset, members = load_split(dataset, self.split)
        # all images, which tasks share, and not a copy of the split, of which a mixture would hold dozens
        self.images, self.labels, self.members = dataset.train_images, dataset.train_labels, members
        self.n_pixels, self.n_classes, self.image_shape = self.images.shape[1], dataset.n_classes, dataset.image_shape
        n_trained = count_of(self.n_examples, len(members))
        self.examples = Examples(len(members), n_trained, f"image-network/{self.split}")
        super().__post_init__()
        self.config["dataset"] = dataset.name
        if self.n_examples is None:  # a whole split is told by its name
            del self.config["n_examples"]

    def draw(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        """Images as numbers in [0, 1], ``(n_tasks, batch_size, n_pixels)``, and labels."""
        drawn = self.examples.draw(indices, self.batch_size, step=step, seed=seed, held_out=held_out)
        return labelled_images(self, self.members[drawn])


@dataclass(eq=False, repr=False)
class ImageNetwork(ImageTask):
    r"""Networks other than perceptrons on images: classification, or reconstruction by an autoencoder.

    The loss is the mean cross-entropy in nats; of an autoencoder half the squared error per image, summed over
    pixels in [0, 1]. Images are split as :class:`~odeopt.tasks.classification.MLPClassification` splits them, and
    parameters are initialised as torch does.

    Args:
        dataset: Images, or the name of a dataset for :func:`load_dataset`.
        architecture: ``"normalised"`` (layer norms between linear layers), ``"residual"`` (normalised blocks of two
            layers beside a skip connection), ``"convolutional"`` (3 x 3 with stride two), ``"residual-convolutional"``
            (blocks of two with batch norms, channels doubling from block to block), ``"attention"`` (over the
            rows of an image, two heads), or ``"autoencoder"``.
        width: Units of a hidden layer, channels, or width of the attention (an even number there).
        depth: Number of hidden layers or blocks.
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        batch_size: Images per step, drawn with replacement.
        split: ``"meta-train"`` or ``"evaluation"``.
        n_examples: See :class:`ImageTask`.
        device: See :class:`~odeopt.tasks.base.Task`.

    Raises:
        ValueError: If an argument is not one of these.

    Example:
        >>> import torch
        >>> task = ImageNetwork("digits", "convolutional", width=4, depth=2)
        >>> indices = torch.arange(3)
        >>> task.loss(task.init_params(indices, seed=0), task.sample_batch(indices, step=0, seed=0)).shape
        torch.Size([3])
    """

    architecture: str = "convolutional"
    _: KW_ONLY
    width: int = 8
    depth: int = 1
    activation: str = "relu"

    def __post_init__(self, dataset: ImageDataset | str) -> None:
        require_one_of(ARCHITECTURES, architecture=self.architecture)
        check_network(self.width, self.depth, self.activation, has_two_heads=self.architecture == "attention")
        super().__post_init__(dataset)

    def build(self) -> nn.Module:
        make = ARCHITECTURES[self.architecture]
        return make(self.n_pixels, self.n_classes, self.width, self.depth, self.activation)

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        if self.architecture == "autoencoder":
            return (output - target).square().sum(-1).mean() / 2
        return super().criterion(output, target)

    def draw(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        images, labels = super().draw(indices, step, seed, held_out=held_out)
        return images, images if self.architecture == "autoencoder" else labels


@dataclass(eq=False, repr=False, kw_only=True)
class VisionTransformer(TransformerFields, ImageTask):
    """A transformer that classifies images by their patches: learned positions, no class token, the mean of positions.

    Args:
        dataset: Images, or the name of a dataset for :func:`load_dataset`.
        patch: Height and width of a patch in pixels, a divisor of those of the images.
        width: Width of the layers, a multiple of ``n_heads``.
        depth: Number of layers, each of attention and of a perceptron.
        n_heads: Number of heads.
        expansion: Width of the perceptrons in units of ``width``.
        norm: ``"pre"`` (norms before attention and perceptrons), ``"post"`` (after the sums), or ``"none"``.
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        init_std: Deviation of all initial weights, biases being zero; as torch initialises layers by default.
        batch_size: Images per step, drawn with replacement.
        split: ``"meta-train"`` or ``"evaluation"``.
        n_examples: See :class:`ImageTask`.
        device: See :class:`~odeopt.tasks.base.Task`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Dosovitskiy et al. (2021), An image is worth 16x16 words, Section 3.1.
    """

    patch: int = 4

    def __post_init__(self, dataset: ImageDataset | str) -> None:
        require_counts(patch=self.patch)
        super().__post_init__(dataset)

    def build(self) -> nn.Module:
        is_right = all(side % self.patch == 0 for side in self.image_shape)
        require(is_right, "patch", self.patch, f"a divisor of {self.image_shape}")
        n_patches = math.prod(side // self.patch for side in self.image_shape)
        layers = self.layers(is_causal=False)
        first = AsPatches(self.patch), nn.Linear(self.patch**2, self.width), WithPositions(n_patches, self.width)
        return self.drawn(nn.Sequential(*first, *layers, Mean(), nn.Linear(self.width, self.n_classes)))
