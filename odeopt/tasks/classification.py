"""Image classification by a multilayer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, InitVar, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from odeopt.checks import is_integer, require, require_flags, require_one_of

from .base import Batch, Params, Task
from .datasets import ImageDataset, load_dataset
from .examples import Examples, count_of
from .perceptron import PerceptronTask
from .random import permutation

SPLITS = ("meta-train", "evaluation")


def load_split(dataset: ImageDataset | str, split: str) -> tuple[ImageDataset, Tensor]:
    """Return a dataset, loaded by its name where it is one, and the numbers of a split's training images.

    Raises:
        ValueError: If there is no such split.
    """
    require_one_of(SPLITS, split=split)
    if isinstance(dataset, str):
        dataset = load_dataset(dataset)
    halves = permutation(len(dataset.train_images), seed=0, stream="classification/halves").tensor_split(2)
    return dataset, halves[SPLITS.index(split)]


def labelled_images(task: Task, members: Tensor) -> tuple[Tensor, Tensor]:
    """Images of a task as numbers in [0, 1], ``(n_tasks, batch_size, n_pixels)``, and their labels."""
    # index_select copies whole rows: measured ten times as fast as indexing with a matrix
    images = task.images.index_select(0, members.flatten()).unflatten(0, members.shape)
    return images.to(task.dtype).div_(255), task.labels[members]


@dataclass(eq=False, repr=False)
class MLPClassification(PerceptronTask):
    r"""Fit a multilayer perceptron to images, one initialisation and one order of minibatches per problem.

    .. math:: f_t(\theta) = -\frac{1}{B} \sum_{b=1}^{B} \log \mathrm{softmax}(n_\theta(x_{tb}))_{c_{tb}}

    Pixels are scaled to [0, 1] and nothing else, so pixels that are zero in every image stay zero. A fixed
    shuffle cuts the training images in two halves: ``"meta-train"`` draws its minibatches from one,
    ``"evaluation"`` from the other, and their initialisations are different too.
    Parameters are named and drawn as :class:`~odeopt.tasks.perceptron.PerceptronTask` says.

    Args:
        dataset: Images, or the name of a dataset for :func:`load_dataset`.
        widths: Widths of the hidden layers; ``()`` is logistic regression.
        activation: One of ``"sigmoid"``, ``"tanh"``, ``"relu"``, ``"gelu"``.
        batch_size: Images per step, drawn with replacement.
        split: ``"meta-train"`` or ``"evaluation"``.
        n_examples: Draw minibatches from so many images of the split only, or from a fraction of them, and hold out the
            others: the first ones for all problems. From all of them by default, so that none is held out, and
            :meth:`sample_held_out` draws from the same.
        has_own_examples: Whether each problem draws from ``n_examples`` images of its own instead. Training scores are
            over the whole split then.
        device: See :class:`Task`.
        dtype: See :class:`Task`.

    Raises:
        ValueError: If a width, the activation, the batch size, the split or the number of examples is not one of
            these.

    Example:
        >>> task = MLPClassification("digits", widths=(20,), activation="relu")
        >>> indices = torch.arange(4)
        >>> task.loss(task.init_params(indices, seed=0), task.sample_batch(indices, step=0, seed=0)).shape
        torch.Size([4])
    """

    dataset: InitVar[ImageDataset | str]
    widths: Sequence[int] = (20,)
    _: KW_ONLY
    split: str = "meta-train"
    n_examples: float | None = None
    has_own_examples: bool = False

    def __post_init__(self, dataset: ImageDataset | str) -> None:
        dataset, members = load_split(dataset, self.split)
        n_trained, is_own = count_of(self.n_examples, len(members)), self.has_own_examples
        require_flags(has_own_examples=is_own)
        is_right = self.n_examples is not None or not is_own
        require(is_right, "has_own_examples", is_own, "False where `n_examples` is None")
        stream = f"classification/{self.split}"
        super().__post_init__(dataset.train_images.shape[1], dataset.n_classes, stream)
        self.config["dataset"] = dataset.name
        for name in ("n_examples", "has_own_examples"):  # the committed baselines are looked up by the description
            if not self.config[name]:
                del self.config[name]
        self.examples = Examples(len(members), n_trained, stream, is_shared=not is_own)
        self.split_members = members
        self.members = members if is_own else members[:n_trained]
        self.images, self.labels = dataset.train_images, dataset.train_labels
        self.test_images, self.test_labels = dataset.test_images, dataset.test_labels
        self.to(self.device)

    def sample_batch(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw a minibatch per problem, uniformly from the split.

        Args:
            indices: Global numbers of the problems, int64, shape ``(n_tasks,)``.
            step: Step of the run, from 0.
            seed: As in :meth:`init_params`.

        Returns:
            Images in [0, 1], shape ``(n_tasks, batch_size, n_pixels)``, and labels, int64,
            shape ``(n_tasks, batch_size)``.
        """
        return self._minibatch(indices, step, seed)

    def sample_held_out(self, indices: Tensor, step: int, seed: int) -> Batch:
        """Draw a minibatch per problem of images that it does not train on; see :meth:`Task.sample_held_out`."""
        return self._minibatch(indices, step, seed, held_out=True)

    def _minibatch(self, indices: Tensor, step: int, seed: int, *, held_out: bool = False) -> Batch:
        drawn = self.examples.draw(self._indices(indices), self.batch_size, step=step, seed=seed, held_out=held_out)
        return labelled_images(self, self.split_members[drawn])

    def loss(self, params: Params, batch: Batch) -> Tensor:
        """Mean cross-entropy in nats, shape ``(n_tasks,)``; see :meth:`Task.loss`."""
        images, labels = batch
        return _cross_entropy(self.outputs(params, images), labels).mean(1)

    @torch.no_grad()
    def accuracy(self, params: Params, n_images: int | None = None) -> Tensor:
        """Fraction of held-out test images that are classified right.

        Args:
            params: Parameters by name, each of shape ``(n_tasks, *shape)``.
            n_images: Use the first so many images only; all by default.

        Returns:
            Shape ``(n_tasks,)``, in the dtype of the task.

        Raises:
            ValueError: If ``n_images`` is not between 1 and the number of test images.
        """
        n_images = len(self.test_images) if n_images is None else n_images
        is_there = is_integer(n_images) and 1 <= n_images <= len(self.test_images)
        require(is_there, "n_images", n_images, f"an integer between 1 and {len(self.test_images)}")
        return self._scores(params, self.test_images, self.test_labels, torch.arange(n_images, device=self.device))[1]

    def training_scores(self, params: Params) -> tuple[Tensor, Tensor]:
        """Measure mean cross-entropy in nats and fraction classified right, on all images that minibatches come from.

        Args:
            params: Parameters by name, each of shape ``(n_tasks, *shape)``.

        Returns:
            Two tensors of shape ``(n_tasks,)``, in the dtype of the task.
        """
        return self._scores(params, self.images, self.labels, self.members)

    def held_out_scores(self, params: Params) -> tuple[Tensor, Tensor]:
        """Measure what :meth:`training_scores` does, on the test images, from which no split draws."""
        every = torch.arange(len(self.test_images), device=self.device)
        return self._scores(params, self.test_images, self.test_labels, every)

    @torch.no_grad()
    def _scores(self, params: Params, images: Tensor, labels: Tensor, members: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy and fraction classified right, over those of the images that ``members`` names."""
        n_tasks = len(params["0.weight"])
        loss, n_right = torch.zeros(2, n_tasks, device=self.device, dtype=self.dtype)
        # Chunks bound the memory of the first layer's input, which every problem reads.
        for chunk in members.split(1024):
            x = images.index_select(0, chunk).to(self.dtype).div_(255).expand(n_tasks, -1, -1)
            logits, truth = self.outputs(params, x), labels[chunk].expand(n_tasks, -1)
            loss += _cross_entropy(logits, truth).sum(1)
            n_right += (logits.argmax(2) == truth).sum(1)
        return loss / len(members), n_right / len(members)


def _cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Of each image: (n_tasks, B, n_classes) and (n_tasks, B) to (n_tasks, B)."""
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none").view(labels.shape)
