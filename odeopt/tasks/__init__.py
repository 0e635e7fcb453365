"""What is optimized: distributions of problems, drawn and evaluated many at a time."""

from .base import Batch, FixedBatchTask, Params, Task
from .classification import MLPClassification
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
from .module import ModuleTask
from .quadratic import RandomQuadratic

__all__ = [
    "DATASETS",
    "Batch",
    "DatasetCorrupt",
    "DatasetUnavailable",
    "FixedBatchTask",
    "HighDimSaddle",
    "ImageDataset",
    "Landscape",
    "MLPClassification",
    "ModuleTask",
    "MonkeySaddle",
    "Params",
    "RandomQuadratic",
    "Rosenbrock",
    "Saddle",
    "Task",
    "default_data_dir",
    "load_dataset",
    "load_dataset_or_digits",
]
