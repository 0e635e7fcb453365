"""Tuning finds optima that are known, also beyond its first grid; the committed table is what it says."""

import json
import math
from importlib import resources

import pytest
import torch

import odeopt.tasks
from odeopt.evaluation import baselines
from odeopt.evaluation.baselines import (
    FAMILIES,
    PLAIN_SGD,
    Family,
    Tuned,
    build,
    make_baselines_table,
    read_baselines,
    tune,
)
from odeopt.rules import SGDUpdate
from odeopt.tasks import ImageDataset, MLPClassification, RandomQuadratic, Task


class Bowl(Task):
    """f(theta) = sum_i a_i theta_i^2 / 2 from theta = 1."""

    def __init__(self, *curvatures):
        super().__init__(dtype=torch.float64, curvatures=list(curvatures))
        self.curvatures = torch.tensor(curvatures, dtype=torch.float64)

    def init_params(self, indices, seed):
        return {"theta": torch.ones(len(indices), len(self.curvatures), dtype=torch.float64)}

    def sample_batch(self, indices, step, seed):
        return ()

    def loss(self, params, batch):
        return (self.curvatures * params["theta"].square()).sum(-1) / 2


@pytest.fixture
def tiny_mnist():
    """Images under MNIST's name, for what depends on the name only."""
    images, labels = torch.zeros(20, 784, dtype=torch.uint8), torch.zeros(20, dtype=torch.int64)
    return ImageDataset("mnist", images, labels, images, labels, 10, (28, 28))


@pytest.mark.parametrize("curvature", [1e-4, 0.05, 1.0, 20.0, 1e5])
def test_tuning_finds_the_step_that_solves_a_quadratic_at_once(curvature):
    """One step of gradient descent reaches the minimum for lr = 1 / a, wherever the first grid lies."""
    tuned = tune(PLAIN_SGD, Bowl(curvature), n_steps=1, n_tasks=1, score="final")
    assert tuned.settings["lr"] == pytest.approx(1 / curvature, rel=1e-12)
    assert tuned.score == pytest.approx(0, abs=1e-20 * curvature)


def test_tuning_finds_the_best_step_between_two_curvatures():
    """lr = 2 / (a_1 + a_2) makes the slowest factor smallest; twenty values per decade come within 7 %."""
    tuned = tune(PLAIN_SGD, Bowl(1.0, 10.0), n_steps=200, n_tasks=1, score="final")
    assert tuned.settings["lr"] == pytest.approx(2 / 11, rel=0.07)


def test_the_best_has_tried_neighbours_on_both_sides():
    tuned = tune(PLAIN_SGD, Bowl(1e-3), n_steps=3, n_tasks=1)
    lrs = sorted(settings["lr"] for settings, _ in tuned.tried)
    assert len(set(lrs)) == len(lrs)
    position = lrs.index(tuned.settings["lr"])
    assert 0 < position < len(lrs) - 1
    assert lrs[position + 1] / lrs[position - 1] < 1.15**2
    assert tuned.score == min(score for _, score in tuned.tried)


def test_the_grid_of_the_second_setting_is_extended_at_its_edge():
    """At a condition number of 100 much momentum is best, ((10 - 1) / (10 + 1))^2 = .67 in the long run."""
    values = (0.1, 0.3, 0.5, 0.7, 0.9, 0.99)
    family = Family("Momentum", SGDUpdate, other="momentum", values=values, first=(0.1, 0.3))
    tuned = tune(family, Bowl(1.0, 0.01), n_steps=80, n_tasks=1, score="final")
    assert tuned.settings["momentum"] == 0.7
    assert {settings["momentum"] for settings, _ in tuned.tried} == set(values) - {0.99}


def test_candidates_that_diverge_are_out():
    """Steps that overflow score infinity, and a search that begins among them walks out."""
    family = Family("SGD", SGDUpdate, lr=(1e2, 1e3))
    tuned = tune(family, Bowl(1.0), n_steps=400, n_tasks=1)
    assert tuned.settings["lr"] < 2
    assert any(math.isinf(score) for settings, score in tuned.tried if settings["lr"] > 10)


def test_candidates_without_a_score_are_out():
    """Scores that are no numbers count as infinite, and a search that begins among them walks out."""
    family = Family("SGD", SGDUpdate, lr=(10.0, 100.0))
    tuned = tune(family, Bowl(1.0), n_steps=3, n_tasks=1, score=lambda losses: -(losses[0] - losses[-1]).log())
    assert tuned.settings["lr"] == 1.0
    assert any(math.isinf(score) for settings, score in tuned.tried if settings["lr"] > 2)


def test_no_setting_left_is_an_error():
    with pytest.raises(RuntimeError, match="SGD: no setting kept all 1 runs finite over 2 steps"):
        tune(PLAIN_SGD, Bowl(math.nan), n_steps=2, n_tasks=1)


def test_all_candidates_see_the_same_tasks():
    """Settings that do nothing score exactly alike, so differences come from settings alone."""
    family = Family("SGD", lambda lr: SGDUpdate(0.0), lr=(0.1, 1.0))
    tuned = tune(family, MLPClassification("digits", (3,)), n_steps=2, n_tasks=2)
    assert len({score for _, score in tuned.tried}) == 1


def test_a_score_can_be_a_function():
    tuned = tune(PLAIN_SGD, Bowl(1.0), n_steps=3, n_tasks=2, score=lambda losses: losses[1])
    assert tuned.settings["lr"] == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"lr": (1.0, 0.1)},
            r"Parameter `lr` should be two rising, positive numbers. Found `lr = \(1.0, 0.1\)`",
        ),
        ({"other": "momentum"}, r"Parameter `first` should be values of `momentum`.* Found `first = \(\)`"),
        (
            {"other": "momentum", "values": (0.5,), "first": (0.9,)},
            r"Parameter `first` should be values of `momentum` among \(0.5,\). Found `first = \(0.9,\)`",
        ),
    ],
)
def test_a_family_checks_its_grid(options, message):
    with pytest.raises(ValueError, match=message):
        Family("SGD", SGDUpdate, **options)


def test_labels_and_rules_carry_the_settings():
    (label, rule), *rest = build([Tuned("Nesterov", {"lr": 1.0, "momentum": 0.9}, 0.3, ())]).items()
    assert not rest
    assert label == "Nesterov (lr 1, momentum 0.9)"
    assert rule.config == {"lr": 1.0, "momentum": 0.9, "nesterov": True}


# ------------------------------------------------------------------------------------- the committed table


def test_a_table_reads_back_what_was_tuned(tmp_path, monkeypatch, tiny_mnist):
    outcomes = (
        Tuned("Adam", {"lr": 0.1}, 0.25, (({"lr": 0.1}, 0.25), ({"lr": 10.0}, math.inf))),
        Tuned("Momentum", {"lr": 0.1, "momentum": 0.9}, 0.5, (({"lr": 0.1, "momentum": 0.9}, 0.5),)),
    )
    monkeypatch.setattr(baselines, "tune_all", lambda *args, **kwargs: outcomes)
    monkeypatch.setattr(odeopt.tasks, "load_dataset", lambda name, data_dir: tiny_mnist)
    path = tmp_path / "baselines.json"
    make_baselines_table(path, tmp_path / "data", progress_bar=False)
    assert list(tmp_path.iterdir()) == [path]
    assert str(tmp_path) not in path.read_text()
    for split in ("meta-train", "evaluation"):
        task = MLPClassification(tiny_mnist, activation="relu", split=split)
        assert read_baselines(task, 100, path) == outcomes
    assert read_baselines(RandomQuadratic(), 100, path) == outcomes


def test_other_tasks_and_horizons_are_not_in_the_table(tiny_mnist):
    assert read_baselines(RandomQuadratic(), 99) is None
    assert read_baselines(RandomQuadratic(11), 100) is None
    assert read_baselines(MLPClassification(tiny_mnist, (21,)), 100) is None
    assert read_baselines(MLPClassification("digits"), 100) is None


@pytest.mark.parametrize("activation", [None, "sigmoid", "relu"])
def test_the_committed_optima_lie_inside_their_grids(activation, tiny_mnist):
    task = RandomQuadratic() if activation is None else MLPClassification(tiny_mnist, activation=activation)
    outcomes = read_baselines(task, 100)
    assert [tuned.family for tuned in outcomes] == [family.name for family in FAMILIES]
    for tuned in outcomes:
        assert tuned.score == min(score for _, score in tuned.tried)
        others = {name: value for name, value in tuned.settings.items() if name != "lr"}
        lrs = [settings["lr"] for settings, _ in tuned.tried if others.items() <= settings.items()]
        assert min(lrs) < tuned.settings["lr"] < max(lrs)


def test_the_committed_table_names_its_command_and_no_machine():
    text = (resources.files("odeopt") / "pretrained" / "baselines.json").read_text(encoding="utf-8")
    assert json.loads(text)["command"].startswith("python -m odeopt tune")
    assert "/" not in text.replace("odeopt/pretrained/baselines.json", "")


def test_baselines_come_from_the_table_or_are_tuned_and_say_so():
    quadratic, other = RandomQuadratic(), RandomQuadratic(2)
    rules, origin = baselines.baselines_for(quadratic, quadratic, n_steps=100, score="final")
    assert list(rules) == [tuned.label for tuned in read_baselines(quadratic, 100)]
    assert "committed table" in origin
    rules, origin = baselines.baselines_for(other, other, n_steps=2, n_tasks=4, progress_bar=False)
    assert [label.split(" (")[0] for label in rules] == [family.name for family in FAMILIES]
    assert origin == "tuned on the fly on 4 separate tasks of 2 steps"


@pytest.mark.parametrize(
    ("options", "is_committed"),
    [
        ({"score": "final", "families": FAMILIES[:1]}, True),
        ({"score": "final"}, True),
        ({"score": "last ten"}, False),
        ({"score": "final", "families": (FAMILIES[0], PLAIN_SGD)}, False),
    ],
)
def test_the_committed_settings_are_those_of_the_families_and_the_score_that_are_asked_for(
    options, is_committed, monkeypatch
):
    monkeypatch.setattr(baselines, "tune_all", lambda *args, families, **options: [Tuned("Adam", {"lr": 5.0}, 0.0, ())])
    task = RandomQuadratic()
    rules, origin = baselines.baselines_for(task, task, n_steps=100, **options)
    assert ("committed" in origin) == is_committed
    wanted = [family.name for family in options.get("families", FAMILIES)] if is_committed else ["Adam"]
    assert [name.split(" (")[0] for name in rules] == wanted
    with pytest.raises(ValueError, match=r"`score` should be one of .* Found `score = 'nonsense'`"):
        baselines.baselines_for(task, task, n_steps=100, score="nonsense")
