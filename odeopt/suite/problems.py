"""The problems of the suite: today's architectures, each with data, a loss and a horizon."""

from __future__ import annotations

import hashlib
import math
import os
import pydoc_data.topics
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeopt.checks import require_counts, require_one_of
from odeopt.evaluation.intervals import RESOLUTION
from odeopt.suite.networks import (
    CharacterGRU,
    CharacterTransformer,
    CoordinateNetwork,
    Perceptron,
    ResidualNet,
    VariationalAutoencoder,
    VisionTransformer,
)
from odeopt.tasks import load_dataset
from odeopt.tasks.classification import load_split
from odeopt.tasks.random import integers, normal, permutation, uniform

_VERSION = 1  # to be raised where a problem changes in what its settings do not show
_ONE = torch.zeros(1, dtype=torch.int64)  # the one task whose numbers are drawn


class Batch(NamedTuple):
    """Inputs of a network, and what its outputs are compared with."""

    inputs: tuple[Tensor, ...]
    target: Tensor


class Data(Protocol):
    """Source of batches that are functions of their seed and step, and of held-out batches."""

    @property
    def description(self) -> str:
        """Tells data apart."""

    def batch(self, step: int, seed: int) -> Batch:
        """Draw the batch of a step of a run."""

    def held_out(self, seed: int) -> Iterator[Batch]:
        """Yield what is held out from a run of a seed, in batches of one size, or nearly."""


@dataclass(frozen=True)
class Problem:
    """A network, its data and its loss.

    Attributes:
        name: Name on the command line and in files.
        title: Title in tables and figures.
        n_steps: Length of a run.
        make_network: Builds the network, by torch's global generator.
        data: Training and held-out batches.
        criterion: Loss of outputs and target.
        tuned_on: ``"train"`` or ``"held_out"``: the loss by which learning rates are chosen.
    """

    name: str
    title: str
    n_steps: int
    make_network: Callable[[], nn.Module]
    data: Data
    criterion: Callable[[Any, Tensor], Tensor] = F.cross_entropy
    tuned_on: str = "train"

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Describe all that a run depends on, beside its seed and its optimizer, in values that JSON can hold."""
        network = hashlib.sha256(repr(self.make_model(0)).encode()).hexdigest()[:16]
        settings = {"n_steps": self.n_steps, "data": self.data.description, "network": network}
        criterion = getattr(self.criterion, "func", self.criterion)  # of a partial
        criterion = getattr(criterion, "__name__", type(criterion).__name__)
        settings |= {"criterion": criterion, "first_loss": f"{self._first_loss():.3g}"}
        return {"problem": self.name, "version": _VERSION, **settings}

    def _first_loss(self) -> float:
        """Loss at the start of a run, which tells apart what names do not: criteria, initial weights, examples."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return self.loss(self.make_network(), to_device(self.batch(0, 0), "cpu")).item()

    def make_model(self, seed: int) -> nn.Module:
        """Build the network with the initial weights of a seed; the global generator stays as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make_network()

    def batch(self, step: int, seed: int) -> Batch:
        """Draw the batch of a step of the run of a seed."""
        return self.data.batch(step, seed)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean loss of a batch."""
        return self.criterion(model(*batch.inputs), batch.target)

    @torch.no_grad()
    def held_out_loss(self, model: nn.Module, seed: int, device: torch.device | str = "cpu") -> float:
        """Mean loss of the held-out examples, the model in its mode of evaluation."""
        model.eval()
        total, n = 0.0, 0
        for batch in self.data.held_out(seed):
            total += self.loss(model, to_device(batch, device)).item() * len(batch.target)
            n += len(batch.target)
        return total / n


def to_device(batch: Batch, device: torch.device | str) -> Batch:
    """Move a batch."""
    return Batch(tuple(x.to(device) for x in batch.inputs), batch.target.to(device))


# --------------------------------------------------------------------------------------- data


@cache
def english() -> str:
    """Return English prose that every CPython brings along: the help on the language's topics, in ASCII.

    Paragraphs that several topics share stand there once, so that none is both trained on and held out.
    """
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return "\n\n".join(dict.fromkeys(re.split(r"\n{2,}", text)))


class Characters:
    """Windows of text, whose every character is predicted from those before it; the last tenth is held out.

    Args:
        context: Characters in a window.
        batch_size: Windows per step, at random places.
    """

    def __init__(self, context: int = 64, batch_size: int = 16) -> None:
        text = english()
        alphabet = sorted(set(text))
        numbers = torch.tensor([*map({character: i for i, character in enumerate(alphabet)}.get, text)])
        self.n_characters, self.context, self.batch_size = len(alphabet), context, batch_size
        n_train = len(numbers) * 9 // 10
        self._train, self._held_out = numbers[:n_train], numbers[n_train:]
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        self.description = f"{batch_size} windows of {context} characters of {digest}"

    def batch(self, step: int, seed: int) -> Batch:
        """Draw windows at random places of the text."""
        n_places = len(self._train) - self.context
        places = integers(_ONE, (self.batch_size,), n_places, seed=seed, stream="suite/windows", step=step)[0]
        return self._windows(self._train, places)

    def held_out(self, seed: int) -> Iterator[Batch]:
        """Yield the windows of the held-out text, one after the other."""
        for places in torch.arange(0, len(self._held_out) - self.context, self.context).split(64):
            yield self._windows(self._held_out, places)

    def _windows(self, numbers: Tensor, places: Tensor) -> Batch:
        windows = numbers[places.unsqueeze(1) + torch.arange(self.context + 1)]
        return Batch((windows[:, :-1],), windows[:, 1:])


class Images:
    """Images and their classes; trained on images that no rule in the package has been meta-trained on.

    Args:
        dataset: Name for :func:`odeopt.tasks.load_dataset`.
        data_dir: Its folder.
        batch_size: Images per step, drawn with replacement.
        n_examples: Train on so many images only, others for each seed.
    """

    def __init__(
        self,
        dataset: str = "mnist",
        data_dir: str | os.PathLike | None = None,
        *,
        batch_size: int = 64,
        n_examples: int | None = None,
    ) -> None:
        self._images, self._members = load_split(load_dataset(dataset, data_dir), "evaluation")
        require_counts(n_examples=n_examples, or_none=True)
        self.n_examples = min(n_examples or len(self._members), len(self._members))
        self.batch_size, self.side = batch_size, self._images.image_shape[0]
        pixels = self._images.train_images[self._members].float()
        self._shift, self._scale = pixels.mean(), pixels.std()
        self.description = f"{batch_size} of {self.n_examples} images of {dataset}"

    def batch(self, step: int, seed: int) -> Batch:
        """Draw images at random."""
        drawn = self._draw(step, seed)
        return self._labelled(self._images.train_images[drawn], self._images.train_labels[drawn])

    def held_out(self, seed: int) -> Iterator[Batch]:
        """Yield the test images."""
        yield from map(self._labelled, self._images.test_images.split(500), self._images.test_labels.split(500))

    def _draw(self, step: int, seed: int) -> Tensor:
        picked = integers(_ONE, (self.batch_size,), self.n_examples, seed=seed, stream="suite/images", step=step)[0]
        if self.n_examples < len(self._members):
            picked = permutation(len(self._members), seed=seed, stream="suite/examples")[picked]
        return self._members[picked]

    def _labelled(self, pixels: Tensor, labels: Tensor) -> Batch:
        images = ((pixels.float() - self._shift) / self._scale).unflatten(1, (1, self.side, self.side))
        return Batch((images,), labels)


class Pixels(Images):
    """Images in [0, 1] to be encoded and decoded again, and the noise of their codes.

    Args:
        n_latents: Numbers in a code.
        *images: See :class:`Images`.
        **options: See :class:`Images`.
    """

    def __init__(self, n_latents: int, *images: Any, **options: Any) -> None:
        super().__init__(*images, **options)
        self.n_latents = n_latents
        self.description += ", with noise"

    def batch(self, step: int, seed: int) -> Batch:
        """Draw images and noise at random."""
        return self._with_noise(self._images.train_images[self._draw(step, seed)], step, seed, "suite/noise")

    def held_out(self, seed: int) -> Iterator[Batch]:
        """Yield the test images, each with noise that is the same in every run."""
        for i, pixels in enumerate(self._images.test_images.split(500)):
            yield self._with_noise(pixels, i, 0, "suite/held-out noise")

    def _with_noise(self, pixels: Tensor, step: int, seed: int, stream: str) -> Batch:
        noise = normal(_ONE, (len(pixels), self.n_latents), seed=seed, stream=stream, step=step)[0]
        pixels = pixels / 255
        return Batch((pixels, noise), pixels)


class Picture:
    """Points of a picture of gratings and discs, others for each seed; held out are the points in between.

    Args:
        side: Points along a side.
    """

    def __init__(self, side: int = 32) -> None:
        self.side = side
        self.description = f"{side} x {side} points of a picture"

    def batch(self, step: int, seed: int) -> Batch:
        """Return all points, at every step."""
        return self._points(self.side, seed)

    def held_out(self, seed: int) -> Iterator[Batch]:
        """Yield the centres between the points."""
        yield self._points(self.side - 1, seed)

    @cache  # noqa: B019 (a batch per seed; the suite keeps its few problems as long as it runs)
    def _points(self, n: int, seed: int) -> Batch:
        reach = (n - 1) / (self.side - 1)
        line = torch.linspace(-reach, reach, n)
        points = torch.cartesian_prod(line, line)
        waves, discs = uniform(_ONE, (2, 6, 4), seed=seed, stream="suite/picture")[0]
        angle, frequency, phase, height = (waves * torch.tensor([math.pi, 7.0, 2.0, 1.0])).T
        directions = torch.stack((angle.cos(), angle.sin()))
        picture = (height * torch.sin(math.pi * ((1 + frequency) * (points @ directions) + phase))).sum(1)
        distances = torch.cdist(points, 2 * discs[:, :2] - 1)
        picture = picture + ((4 * discs[:, 3] - 2) * torch.sigmoid(20 * (0.4 * discs[:, 2] + 0.1 - distances))).sum(1)
        return Batch((points,), picture / 2)


# ---------------------------------------------------------------------------------------- losses


def next_character(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy over all positions, in nats per character."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


def evidence_bound(outputs: tuple[Tensor, Tensor, Tensor], pixels: Tensor) -> Tensor:
    """Negative lower bound of the evidence of a variational autoencoder, in nats per pixel."""
    logits, mean, log_variance = outputs
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1)
    return F.binary_cross_entropy_with_logits(logits, pixels) + divergence.mean() / pixels.shape[1]


def resolution_of(criterion: str) -> float:
    """Return the loss below which losses count as equal: the rounding of single precision for cross-entropies."""
    return RESOLUTION if criterion in ("cross_entropy", "CrossEntropyLoss", "next_character") else 0.0


# --------------------------------------------------------------------------------------- problems


class _Kind(NamedTuple):
    title: str
    n_steps: int
    make_network: Callable[[Any], nn.Module]
    make_data: Callable[..., Data] = Images
    criterion: Callable[[Any, Tensor], Tensor] = F.cross_entropy
    tuned_on: str = "train"


def _transformer(data: Characters, **sizes: Any) -> nn.Module:
    return CharacterTransformer(data.n_characters, data.context, **sizes)


_on_text = partial(_Kind, make_data=lambda *images: Characters(), criterion=next_character)
_KINDS = {
    "transformer": _on_text("character transformer, 2 layers of 96", 600, partial(_transformer, width=96, n_layers=2)),
    "deep-transformer": _on_text(
        "character transformer, 4 layers of 48", 400, partial(_transformer, width=48, n_layers=4, init_std=0.02)
    ),
    "vit": _Kind("ViT, 2 layers of 64", 500, lambda data: VisionTransformer(data.side, width=64, n_layers=2)),
    "perceptron": _Kind("ReLU perceptron, 4 of 256", 1000, lambda data: Perceptron(data.side**2, 4 * (256,), 10)),
    "convnet": _Kind("residual convnet, BatchNorm", 400, lambda data: ResidualNet()),
    "vae": _Kind(
        "VAE",
        1000,
        lambda data: VariationalAutoencoder(data.side**2, width=256, n_latents=data.n_latents),
        partial(Pixels, 16),
        evidence_bound,
    ),
    "coordinates": _Kind(
        "coordinate network", 2000, lambda data: CoordinateNetwork(), lambda *images: Picture(), F.mse_loss
    ),
    "recurrent": _on_text(
        "GRU on characters", 300, lambda data: CharacterGRU(data.n_characters, n_embedded=64, width=128)
    ),
    "few-examples": _Kind(
        "perceptron, 2,000 examples",
        1000,
        lambda data: Perceptron(data.side**2, (100,), 10),
        partial(Images, n_examples=2000),
        tuned_on="held_out",
    ),
}


def available_problems() -> tuple[str, ...]:
    """Names of the problems."""
    return tuple(_KINDS)


def make_problem(
    name: str, *, dataset: str = "mnist", data_dir: str | os.PathLike | None = None, n_steps: int | None = None
) -> Problem:
    """Build a problem of the suite.

    Args:
        name: One of :func:`available_problems`.
        dataset: Images of the problems on images; see :func:`odeopt.tasks.load_dataset`.
        data_dir: Folder of the images.
        n_steps: Length of a run, in place of the problem's own.

    Returns:
        The problem.

    Raises:
        ValueError: If there is no problem of this name, or the number of steps is not positive.
    """
    require_one_of(_KINDS, name=name)
    require_counts(n_steps=n_steps, or_none=True)
    kind = _KINDS[name]
    data = kind.make_data(dataset, data_dir)
    network = partial(kind.make_network, data)
    return Problem(name, kind.title, n_steps or kind.n_steps, network, data, kind.criterion, kind.tuned_on)
