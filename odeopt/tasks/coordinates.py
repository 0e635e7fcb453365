"""Networks of coordinates: a picture as a function of the place."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, InitVar, dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from odeopt.checks import is_integer, is_number, require, require_counts, require_one_of, require_positive

from .base import Batch
from .classification import SPLITS, load_split
from .datasets import ImageDataset
from .layers import check_network, hidden_layers
from .module import NetworkTask
from .random import integers, normal, uniform


@dataclass(eq=False, repr=False)
class CoordinateNetwork(NetworkTask):
    r"""Fit a perceptron to a picture, a new one for each problem, from points of the unit square.

    .. math:: f_t(\theta) = \frac{1}{B m} \sum_b \lVert n_\theta(\gamma(x_{tb})) - y(x_{tb}) \rVert^2, \qquad
              \gamma(x) = (\cos 2\pi A x, \sin 2\pi A x), \quad A_{ij} \sim N(0, s^2)

    A picture is a sum of waves, :math:`y(x) = \sqrt{2 / K} \sum_k a_k \sin(2\pi w_k \cdot x + \varphi_k)` with
    :math:`a_k \sim N(0, I)` and :math:`w_k \sim N(0, d^2 I)`, of mean square one per channel; or an image of a dataset
    with pixels in [0, 1], interpolated between them. The frequencies :math:`A` are the problem's and are not trained.

    Args:
        dataset: Images, or the name of a dataset for :func:`load_dataset`; waves by default.
        n_features: Number of frequencies, rows of :math:`A`; 0 for the coordinates themselves, in [-1, 1].
        bandwidth: Their deviation :math:`s`, in periods per picture.
        detail: Deviation :math:`d` of the waves' frequencies, likewise; not for images.
        n_channels: Number :math:`m` of values at a point; one for images.
        width: Units of a hidden layer.
        depth: Number of hidden layers.
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        batch_size: Points per step.
        n_points: Train on so many points of each problem's own, drawn with replacement; never the same ones by default.
        split: ``"meta-train"`` or ``"evaluation"``, halves of the images; waves are named by the split too.
        device: See :class:`Task`.

    Raises:
        ValueError: If an argument is out of range.

    References:
        Tancik et al. (2020), Fourier features let networks learn high frequency functions in low dimensional domains,
        Section 6.1.
    """

    N_WAVES: ClassVar[int] = 24

    dataset: InitVar[ImageDataset | str | None] = None
    _: KW_ONLY
    n_features: int = 32
    bandwidth: float = 2.0
    detail: float | None = None
    n_channels: int = 1
    width: int = 64
    depth: int = 2
    activation: str = "relu"
    batch_size: int = 128
    n_points: int | None = None
    split: str = "meta-train"

    def __post_init__(self, dataset: ImageDataset | str | None) -> None:
        check_network(self.width, self.depth, self.activation)
        require_counts(n_channels=self.n_channels)
        require_counts(n_points=self.n_points, or_none=True)
        require_positive(bandwidth=self.bandwidth)
        is_right = is_integer(self.n_features) and self.n_features >= 0
        require(is_right, "n_features", self.n_features, "an integer of at least 0")
        is_right = self.detail is None or (dataset is None and is_number(self.detail) and self.detail > 0)
        require(is_right, "detail", self.detail, "a positive number, or None where there is a dataset")
        require(dataset is None or self.n_channels == 1, "n_channels", self.n_channels, "1 where there is a dataset")
        require_one_of(SPLITS, split=self.split)
        self.images, self.stream = None, f"picture/{self.split}"
        if dataset is not None:
            dataset, self.members = load_split(dataset, self.split)
            self.images = dataset.train_images.unflatten(1, (1, *dataset.image_shape))
        super().__post_init__()
        self.config["dataset"] = None if dataset is None else dataset.name

    def build(self) -> nn.Module:
        sizes = (2 * self.n_features or 2, *(self.width,) * self.depth)
        return nn.Sequential(*hidden_layers(sizes, self.activation), nn.Linear(self.width, self.n_channels))

    def criterion(self, output: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(output, target)

    def draw(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        """Features of points, ``(n_tasks, batch_size, 2 n_features)``, and the picture there."""
        options = {"seed": seed, "dtype": self.dtype}
        if held_out or self.n_points is None:
            stream = f"{self.stream}/{'held-out' if held_out else 'points'}"
            x = uniform(indices, (self.batch_size, 2), stream=stream, step=step, **options)
        else:
            pool = uniform(indices, (self.n_points, 2), stream=f"{self.stream}/points", **options)
            stream = f"{self.stream}/minibatch"
            chosen = integers(indices, (self.batch_size, 1), self.n_points, seed=seed, stream=stream, step=step)
            x = pool.take_along_dim(chosen, dim=1)
        return self._features(x, indices, options), self.picture(x, indices, seed)

    def _features(self, x: Tensor, indices: Tensor, options: dict) -> Tensor:
        if self.n_features == 0:
            return 2 * x - 1
        A = self.bandwidth * normal(indices, (2, self.n_features), stream=f"{self.stream}/features", **options)
        angles = 2 * math.pi * (x @ A)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)

    def picture(self, x: Tensor, indices: Tensor, seed: int) -> Tensor:
        """Evaluate each problem's picture.

        Args:
            x: Points of the unit square, shape ``(n_tasks, n_points, 2)``.
            indices: Global numbers of the problems, int64, shape ``(n_tasks,)``.
            seed: As in :meth:`init_params`.

        Returns:
            Shape ``(n_tasks, n_points, n_channels)``.
        """
        if self.images is not None:
            which = integers(indices, (), len(self.members), seed=seed, stream=f"{self.stream}/image")
            images = self.images[self.members[which]].to(self.dtype) / 255
            return F.grid_sample(images, (2 * x - 1).unsqueeze(2), align_corners=True).flatten(2).mT

        def numbers(*shape: int, of: str) -> Tensor:
            return normal(indices, shape, seed=seed, stream=f"{self.stream}/{of}", dtype=self.dtype)

        K, detail = self.N_WAVES, 1.5 if self.detail is None else self.detail
        phase = uniform(indices, (1, K), seed=seed, stream=f"{self.stream}/phases", dtype=self.dtype)
        waves = (2 * math.pi * (detail * (x @ numbers(2, K, of="waves")) + phase)).sin()
        return math.sqrt(2 / K) * waves @ numbers(K, self.n_channels, of="amplitudes")
