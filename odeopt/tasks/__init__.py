"""Distributions of optimization problems, drawn and evaluated many at a time."""

from .autoencoders import Autoencoder
from .base import Batch, FixedBatchTask, Params, Task
from .classification import MLPClassification
from .coordinates import CoordinateNetwork
from .datasets import (
    DATASETS,
    DatasetCorrupt,
    DatasetUnavailable,
    ImageDataset,
    default_data_dir,
    load_dataset,
    load_dataset_or_digits,
)
from .landscapes import HighDimSaddle, Landscape, MonkeySaddle, Rosenbrock, Saddle
from .mixture import Draw, Mixture, TaskFamily
from .module import ModuleTask
from .networks import ImageNetwork, ImageTask, VisionTransformer
from .quadratic import NoisyQuadratic, RandomQuadratic
from .regression import TeacherStudent
from .scaled import ScaledTask
from .sequences import SequencePrediction
from .text import TextNetwork, TextRecurrence, TextTransformer

__all__ = [
    "DATASETS",
    "Autoencoder",
    "Batch",
    "CoordinateNetwork",
    "DatasetCorrupt",
    "DatasetUnavailable",
    "Draw",
    "FixedBatchTask",
    "HighDimSaddle",
    "ImageDataset",
    "ImageNetwork",
    "ImageTask",
    "Landscape",
    "MLPClassification",
    "Mixture",
    "ModuleTask",
    "MonkeySaddle",
    "NoisyQuadratic",
    "Params",
    "RandomQuadratic",
    "Rosenbrock",
    "Saddle",
    "ScaledTask",
    "SequencePrediction",
    "Task",
    "TaskFamily",
    "TeacherStudent",
    "TextNetwork",
    "TextRecurrence",
    "TextTransformer",
    "VisionTransformer",
    "default_data_dir",
    "load_dataset",
    "load_dataset_or_digits",
]
