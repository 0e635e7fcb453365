"""Digests: the same for the same content, in any process, and another for any other."""

import copy
import enum
import functools
import os
import pickle
import subprocess
import sys
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from odeopt.tasks import (
    Mixture,
    MLPClassification,
    NoisyQuadratic,
    RandomQuadratic,
    Rosenbrock,
    ScaledTask,
    SequencePrediction,
    TaskFamily,
    TeacherStudent,
    load_dataset,
)
from odeopt.tasks.base import Task
from odeopt.tasks.fingerprint import are_alike, digest

X = torch.arange(12.0)
Pair = namedtuple("Pair", ["a", "b"])


@dataclass
class Data:
    x: torch.Tensor
    n: int = 1


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Sampler:
    def __init__(self, x):
        self.x = x

    def __call__(self, indices, step, seed):
        return (self.x,)

    def method(self):
        return self.x


def enclosing(value):
    return lambda: value


def with_default(value):
    def function(x=value, *, y=value):
        return x

    return function


def frozen(value):
    return nn.Parameter(torch.tensor(value), requires_grad=False)


# each list holds values that are all different from each other
APART = {
    "numbers": [0, 1, True, None, 1.0, 2.0, -0.0, 0.0, float("inf"), 1j, "1", b"1", "", range(3), ...],
    "tensors": [X, X.view(3, 4), X.double(), X.int(), X + 1e-6, X[:0], X.bool(), X[0], X.view(3, 4).T, X.bfloat16()],
    "arrays": [
        np.arange(3.0),
        np.arange(3),
        np.arange(3.0, dtype="f4"),
        np.arange(3.0) + 1,
        np.ones((3, 1)),
        np.ones(3),
    ],
    "containers": [
        [],
        (),
        {},
        set(),
        [1],
        [[1]],
        [1, 2],
        [2, 1],
        {1: 2},
        {2: 1},
        {1, 2},
        [[1], 2],
        [[1, 2]],
        Pair(1, 2),
    ],
    "arrays of objects": [np.array([1, "a"], dtype=object), np.array([1, "b"], dtype=object)],
    "strings": [["ab", "c"], ["a", "bc"], ["abc"], "abc"],
    "closures": [
        enclosing(1),
        enclosing(2),
        enclosing(X),
        enclosing(X + 1),
        enclosing([X, 1]),
        enclosing(enclosing(1)),
    ],
    "defaults": [with_default(1), with_default(2), with_default(X)],
    "names": [torch.sin, torch.cos, nn.functional.mse_loss, nn.functional.l1_loss, nn.MSELoss, nn.L1Loss, len],
    "partials": [functools.partial(len, 1), functools.partial(len, 2), functools.partial(len, x=1)],
    "callables": [Sampler(X), Sampler(X + 1), Sampler(X).method, Sampler(X + 1).method, Sampler],
    "dataclasses": [Data(X), Data(X + 1), Data(X, 2)],
    "enumerations": [Colour.RED, Colour.BLUE],
    "data sets": [torch.utils.data.TensorDataset(X), torch.utils.data.TensorDataset(X + 1)],
    "modules": [
        nn.Dropout(0.1),
        nn.Dropout(0.2),
        nn.Dropout(0.1).eval(),
        nn.Sequential(nn.Tanh(), nn.ReLU()),
        nn.Sequential(nn.ReLU(), nn.Tanh()),
        nn.ParameterDict({"a": frozen(1.0)}),
        nn.ParameterDict({"a": frozen(2.0)}),
        nn.ParameterDict({"b": frozen(1.0)}),
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(label_smoothing=0.1),
        nn.CrossEntropyLoss(weight=torch.ones(3)),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 1.0, 2.0])),
    ],
}


@pytest.mark.parametrize("kind", APART)
def test_other_content_has_another_digest(kind):
    digests = [digest(value) for value in APART[kind]]
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize("kind", APART)
def test_copies_have_the_same_digest(kind):
    assert [digest(value) for value in copy.deepcopy(APART[kind])] == [digest(value) for value in APART[kind]]


def test_functions_made_anew_have_the_same_digest():
    for make in (enclosing, with_default):
        assert digest(make(X)) == digest(make(X.clone()))


def test_what_says_nothing_of_the_content_does_not_count():
    def line(seed):
        torch.manual_seed(seed)
        return nn.Linear(2, 2)

    hooked = nn.Tanh()
    hooked.register_forward_hook(print)
    for value, other in (
        (Path("here"), Path("there")),
        (torch.device("cpu"), torch.device("cuda")),
        (X, X.clone().requires_grad_()),
        (X[::2], X[::2].contiguous()),
        (X.to_sparse(), X),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (line(0), line(1)),  # where training starts
        (nn.Tanh(), hooked),
        (SimpleNamespace(x=1), SimpleNamespace(x=2)),  # any other object
    ):
        assert digest(value) == digest(other)


def test_what_holds_itself_has_a_digest():
    loops = [[1], [1], [2]]
    for loop in loops:
        loop.append(loop)
    first, second, third = map(digest, loops)
    assert first == second != third


def test_digest_is_the_same_in_every_process():
    code = "from odeopt.tasks.fingerprint import digest; print(digest([{'a', 'b', 'c'}, {'x': 1.5}, len]))"
    here = digest([{"c", "b", "a"}, {"x": 1.5}, len])
    environment = os.environ | {"PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == here


TASKS = {
    "quadratic": (lambda: RandomQuadratic(3), lambda: RandomQuadratic(4)),
    "noisy": (lambda: NoisyQuadratic(3), lambda: NoisyQuadratic(3, noise=0.5)),
    "landscape": (lambda: Rosenbrock(), lambda: Rosenbrock(dtype=torch.float64)),
    "regression": (lambda: TeacherStudent(2), lambda: TeacherStudent(3)),
    "images": (lambda: MLPClassification("digits"), lambda: MLPClassification("digits", split="evaluation")),
    "network": (lambda: SequencePrediction(width=4), lambda: SequencePrediction(width=8)),
    "rescaled": (
        lambda: ScaledTask(RandomQuadratic(3), log_range=1.0),
        lambda: ScaledTask(RandomQuadratic(3), log_range=1.1),
    ),
    "mixture": (
        lambda: Mixture([TaskFamily(RandomQuadratic, {"dim": 3})]),
        lambda: Mixture([TaskFamily(RandomQuadratic, {"dim": 3})], told=0.6),
    ),
}


@pytest.mark.parametrize("kind", TASKS)
def test_fingerprint_tells_tasks_apart_and_does_not_depend_on_what_was_drawn(kind):
    task, other = (make() for make in TASKS[kind])
    before = torch.manual_seed(5).get_state()
    fingerprint = task.fingerprint()
    assert torch.equal(torch.get_rng_state(), before)
    if isinstance(task, Task):
        task.loss(task.init_params(torch.arange(3), 4), task.sample_batch(torch.arange(3), 2, 4))
    else:
        task.draw(3, 4)
    assert task.fingerprint() == fingerprint == TASKS[kind][0]().fingerprint()
    assert are_alike(fingerprint, task.fingerprint())
    assert fingerprint["content"] != other.fingerprint()["content"]
    assert not are_alike(fingerprint, other.fingerprint())


@pytest.mark.parametrize("part", ["train_images", "train_labels"])
@pytest.mark.parametrize("in_a_mixture", [False, True])
def test_fingerprint_sees_a_single_pixel_and_a_single_label(part, in_a_mixture):
    digits = load_dataset("digits")
    other = copy.deepcopy(digits)
    getattr(other, part).view(-1)[-1] ^= 1
    make = (
        (lambda data: Mixture([TaskFamily(MLPClassification, {"dataset": data})]))
        if in_a_mixture
        else MLPClassification
    )
    assert make(digits).fingerprint() == make(copy.deepcopy(digits)).fingerprint()
    assert not are_alike(make(digits).fingerprint(), make(other).fingerprint())


def test_last_draw_is_no_part_of_a_copy():
    task = RandomQuadratic(2)
    task.sample_batch(torch.arange(2), 0, 0)
    assert "_last" not in vars(copy.deepcopy(task)) | vars(pickle.loads(pickle.dumps(task)))
    assert "_last" in vars(task)


def test_losses_may_differ_by_rounding_and_no_more():
    one = {"content": "x", "losses": [1.0, 2.0, float("nan"), float("inf"), 0.0]}
    assert are_alike(one, one | {"losses": [1.0005, 2.0, float("nan"), float("inf"), 1e-7]})
    for losses in ([1.01, *one["losses"][1:]], [1.0, 2.0, 0.0, float("inf"), 0.0], one["losses"][:-1], []):
        assert not are_alike(one, one | {"losses": losses})
    assert not are_alike(one, one | {"content": "y"})
