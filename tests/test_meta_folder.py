"""Folders of meta-training: continued by the same run, however its task was built, and by no other."""

import functools
from dataclasses import replace

import numpy
import pytest
import torch
from rule_toys import flat_weights
from torch import nn

from odeopt.meta import (
    Backpropagation,
    DampedBackpropagation,
    EvolutionStrategies,
    MetaConfig,
    MetaObjective,
    meta_train,
)
from odeopt.meta.outliers import Outliers
from odeopt.rules import PortHamiltonianUpdate
from odeopt.tasks import Mixture, ModuleTask, RandomQuadratic, ScaledTask, TaskFamily
from odeopt.tasks.random import EVALUATION_SEED, TUNING_SEED, VALIDATION_SEED

CONFIG = MetaConfig(n_meta_steps=4, n_tasks=2, horizon=3, validate_every=2, n_validation_tasks=2)
ANOTHER = r"hold a checkpoint of the same run. Found `.*checkpoint.pt` with another "


def rule(seed=0):
    torch.manual_seed(seed)
    return PortHamiltonianUpdate(hidden=(3,), modes=1)


def train(task, folder, own=None, **options):
    return meta_train(own or rule(), task, CONFIG, folder=folder, progress_bar=False, **options)


def data(last=0.0, dtype=torch.float32):
    x = torch.linspace(-1, 1, 400, dtype=dtype).view(200, 2)
    y = x.sum(1, keepdim=True).sin()
    y[-1] += last
    return x, y


def huber(delta):
    return lambda output, target: nn.functional.huber_loss(output, target, delta=delta)


def sampler(scale):
    return lambda indices, step, seed: tuple(scale * torch.ones(len(indices), 4, n) for n in (2, 1))


def line(make=lambda: nn.Linear(2, 1), data=None, loss_fn=nn.functional.mse_loss, **options):
    return ModuleTask(make, globals()["data"]() if data is None else data, loss_fn=loss_fn, batch_size=4, **options)


class Slope(nn.Linear):
    """A line whose weights start elsewhere, beside a buffer."""

    def __init__(self, factor=1.0, offset=0.0, negative_slope=0.1):
        super().__init__(2, 1)
        self.negative_slope = negative_slope
        self.register_buffer("offset", torch.tensor(offset))
        with torch.no_grad():
            self.weight.mul_(factor)

    def forward(self, x):
        return nn.functional.leaky_relu(super().forward(x) + self.offset, self.negative_slope)


class Noted(RandomQuadratic):
    """Quadratics under a name that says nothing of what is in them."""

    def __init__(self, factor):
        super().__init__(3)
        self.factor = factor

    def loss(self, params, batch):
        return self.factor * super().loss(params, batch)


OTHERS = {
    "a label": (lambda: line(), lambda: line(data=data(last=1e-6))),
    "examples": (lambda: line(), lambda: line(data=tuple(part[:-1] for part in data()))),
    "a function of data": (lambda: line(data=sampler(1.0)), lambda: line(data=sampler(1.1))),
    "the loss": (lambda: line(), lambda: line(loss_fn=nn.functional.l1_loss)),
    "a module of loss": (lambda: line(loss_fn=nn.HuberLoss(delta=1)), lambda: line(loss_fn=nn.HuberLoss(delta=1.01))),
    "a closure": (lambda: line(loss_fn=huber(50.0)), lambda: line(loss_fn=huber(51.0))),
    "a filled in argument": (
        lambda: line(loss_fn=functools.partial(nn.functional.huber_loss, delta=2.0)),
        lambda: line(loss_fn=functools.partial(nn.functional.huber_loss, delta=2.1)),
    ),
    "code alone": (
        lambda: line(loss_fn=lambda a, b: nn.functional.huber_loss(a, b, delta=1.0)),
        lambda: line(loss_fn=lambda a, b: nn.functional.huber_loss(a, b, delta=3.0)),
    ),
    "the architecture": (lambda: line(), lambda: line(lambda: nn.Sequential(nn.Linear(2, 1), nn.Tanh()))),
    "the initialisation": (lambda: line(Slope), lambda: line(lambda: Slope(1.5))),
    "a buffer": (lambda: line(Slope), lambda: line(lambda: Slope(offset=1e-4))),
    "a setting of the module": (lambda: line(Slope), lambda: line(lambda: Slope(negative_slope=0.1001))),
    "the dtype": (
        lambda: line(),
        lambda: line(lambda: nn.Linear(2, 1).double(), data(dtype=torch.float64)),
    ),
    "an attribute": (lambda: Noted(1.0), lambda: Noted(1.0001)),
    "a task inside": (lambda: ScaledTask(Noted(1.0)), lambda: ScaledTask(Noted(1.0001))),
    "two deep": (lambda: ScaledTask(ScaledTask(Noted(1.0))), lambda: ScaledTask(ScaledTask(Noted(1.0001)))),
    "a family": (
        lambda: Mixture([TaskFamily(lambda device: Noted(1.0), name="x")], horizons=(2, 3)),
        lambda: Mixture([TaskFamily(lambda device: Noted(1.0001), name="x")], horizons=(2, 3)),
    ),
    "a choice": (
        lambda: Mixture([TaskFamily(lambda device, k: Noted(1.0), choices={"k": [0, 1]}, name="x")], horizons=(2, 3)),
        lambda: Mixture([TaskFamily(lambda device, k: Noted(1 + k), choices={"k": [0, 1]}, name="x")], horizons=(2, 3)),
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_folder_of_a_run_on_another_task_is_refused_and_of_the_same_one_continued(tmp_path, kind):
    make, other = OTHERS[kind]
    expected = train(make(), None)
    assert len(train(make(), tmp_path, stop_after=0).meta_losses) == 2
    with pytest.raises(ValueError, match=ANOTHER + "`task`, `validation task`;"):
        train(other(), tmp_path)
    assert train(make(), tmp_path).meta_losses == expected.meta_losses  # built anew
    with pytest.raises(ValueError, match=ANOTHER):  # finished too
        train(other(), tmp_path)


def test_folder_of_a_run_with_another_validation_task_is_refused(tmp_path):
    train(line(), tmp_path, validation_task=line(data=data(last=1.0)), stop_after=0)
    for other in (None, line(data=data(last=2.0))):
        with pytest.raises(ValueError, match=ANOTHER + "`validation task`;"):
            train(line(), tmp_path, validation_task=other)
    assert len(train(line(), tmp_path, validation_task=line(data=data(last=1.0))).meta_losses) == 4


def test_folder_of_a_rule_that_began_otherwise_is_refused(tmp_path):
    train(line(), tmp_path, stop_after=0)
    with pytest.raises(ValueError, match=ANOTHER + "`initial weights`;"):
        train(line(), tmp_path, rule(1))
    frozen = rule()
    next(frozen.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=ANOTHER + "`learned weights`;"):
        train(line(), tmp_path, frozen)
    with pytest.raises(ValueError, match=ANOTHER + "`rule dtype`;"):
        train(line(), tmp_path, rule().double())


def test_refused_run_leaves_rule_and_folder_as_they_were(tmp_path):
    train(line(), tmp_path, stop_after=0)
    kept, own = (tmp_path / "checkpoint.pt").read_bytes(), rule(1)
    before = flat_weights(own)
    with pytest.raises(ValueError, match=ANOTHER):
        train(line(), tmp_path, own)
    assert torch.equal(flat_weights(own), before)
    assert (tmp_path / "checkpoint.pt").read_bytes() == kept


def test_rule_that_an_earlier_call_left_is_continued(tmp_path):
    expected, own = train(line(), None), rule()
    for n_done in (2, 4, 4):
        assert len(train(line(), tmp_path, own, stop_after=0).meta_losses) == n_done
    assert torch.equal(flat_weights(own), flat_weights(expected.rule))


def test_rule_that_an_interruption_left_is_continued(tmp_path):
    class Interrupted(RandomQuadratic):
        n_draws = None

        def sample_batch(self, indices, step, seed):
            if self.n_draws is not None and seed == CONFIG.seed:
                type(self).n_draws -= 1
                if self.n_draws == 0:
                    raise KeyboardInterrupt
            return super().sample_batch(indices, step, seed)

    expected = train(RandomQuadratic(3), None)
    own, task = rule(), Interrupted(3)
    train(task, tmp_path, own, stop_after=0)
    Interrupted.n_draws = 6  # in the second meta-step that follows
    with pytest.raises(KeyboardInterrupt):
        train(task, tmp_path, own)
    Interrupted.n_draws = None
    result = train(task, tmp_path, own)
    assert result.meta_losses == expected.meta_losses
    assert torch.equal(flat_weights(own), flat_weights(expected.rule))


def test_task_that_is_not_a_function_of_step_and_seed_is_told_of(tmp_path):
    def draw(indices, step, seed):
        return tuple(torch.rand(len(indices), 4, n) for n in (2, 1))

    with pytest.warns(RuntimeWarning, match="`data` gives something else each time for the same index and seed"):
        task = line(data=draw)
    with pytest.warns(RuntimeWarning, match=r"Task ModuleTask\(.*\) gives other losses for the same indices"):
        train(task, tmp_path)
    train(task, None)  # nothing to be resumed


def test_checkpoint_of_the_format_before_is_refused(tmp_path):
    train(line(), tmp_path, stop_after=0)
    path = tmp_path / "checkpoint.pt"
    torch.save(torch.load(path, weights_only=True) | {"format": 2}, path)
    with pytest.raises(ValueError, match="hold a checkpoint of this version of odeopt"):
        train(line(), tmp_path)


# -------------------- which gradients are outliers


def accepted(norms, factor=100.0):
    outliers = Outliers(factor)
    return [not outliers.has(norm) for norm in norms]


@pytest.mark.parametrize("n_calm", [10, 60, 400])
@pytest.mark.parametrize("every", [2, 5, None], ids=["every second", "every fifth", "never"])
def test_longer_gradients_are_taken_once_they_are_the_rule(n_calm, every):
    """A plateau is left: from then on norms are a thousand times those before, some of the old ones aside."""
    later = [1.0 if every and k % every == 0 else 1000.0 + k for k in range(400)]
    taken = accepted([1.0] * n_calm + later)
    assert all(taken[:n_calm])
    if every == 2:  # half of them are no rule
        assert [not is_taken for is_taken in taken[n_calm:]] == [norm > 1 for norm in later]
    else:
        n_skipped = taken.count(False)
        assert 25 <= n_skipped <= 45
        assert all(taken[-300:])


@pytest.mark.parametrize("growth", [1e3, 1e6])
def test_no_more_than_25_gradients_in_a_row_are_outliers(growth):
    norms = [growth ** (k // 40) for k in range(400)]  # longer and longer
    runs = "".join("x."[is_taken] for is_taken in accepted(norms)).split(".")
    assert max(map(len, runs)) == 25


def test_few_outliers_change_nothing_for_the_others():
    norms = [1.0 + 0.5 * (k % 7) for k in range(200)]
    with_outliers = [x for k, norm in enumerate(norms) for x in ([1e5] * 20 + [norm] if k == 50 else [norm])]
    taken = accepted(with_outliers, factor=3.0)
    assert [norm for norm, is_taken in zip(with_outliers, taken, strict=True) if is_taken] == norms


def test_what_is_usual_survives_an_interruption():
    norms = [1.0] * 20 + [500.0] * 60 + [1.0] * 5 + [5e4] * 40
    for stop in range(len(norms)):
        first, second = Outliers(100.0), Outliers(100.0)
        head = [not first.has(norm) for norm in norms[:stop]]
        second.load_state_dict(first.state_dict())
        assert head + [not second.has(norm) for norm in norms[stop:]] == accepted(norms)


# -------------------- arguments


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("estimator", [Backpropagation(), EvolutionStrategies()])
def test_disabled_gradients_are_told_of(mode, estimator):
    config = MetaConfig(n_meta_steps=1, n_tasks=1, horizon=2, estimator=estimator)
    with mode(), pytest.raises(ValueError, match=r"weights of `rule`.* Found `torch.is_grad_enabled\(\) = False`"):
        meta_train(rule(), line(), config, progress_bar=False)


def test_rule_of_two_dtypes_is_refused():
    mixed = rule()
    first = next(mixed.parameters())
    first.data = first.data.double()
    with pytest.raises(
        ValueError, match=r"`rule` should be one with weights of one dtype\. Found .*torch.float32 and torch.f"
    ):
        train(line(), None, mixed)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"validation_task": "x"}, TypeError, "`validation_task` should be of class Task or Mixture. Found `'x'`"),
        ({"on_validation": 3}, TypeError, "`on_validation` should be of class Callable or NoneType. Found `3`"),
        ({"stop_after": "x"}, ValueError, "`stop_after` should be a number of seconds.*Found `stop_after = 'x'`"),
        ({"stop_after": float("nan")}, ValueError, "Found `stop_after = nan`"),
    ],
)
def test_arguments_are_refused_by_name(options, error, match):
    with pytest.raises(error, match=match):
        train(line(), None, **options)


def test_folder_is_that_of_one_training_at_a_time(tmp_path):
    refused = []

    def meanwhile(step, score):
        with pytest.raises(OSError, match=r"`folder` should be one .* nothing else works on. Found `") as caught:
            train(line(), tmp_path, rule(seed=1))
        refused.append(str(tmp_path) in str(caught.value))
        return False

    assert len(train(line(), tmp_path, on_validation=meanwhile).meta_losses) == CONFIG.n_meta_steps
    assert refused == [True] * 3
    train(line(), tmp_path)  # freed at the end


def test_folder_of_another_class_is_refused():
    with pytest.raises(TypeError, match=r"`folder` should be of class str or PathLike or NoneType\. Found `3`"):
        train(line(), 3)


@pytest.mark.parametrize("seed", [2**64, -(2**63) - 1, 1.0, True])
def test_seeds_that_no_generator_takes_are_refused(seed):
    with pytest.raises(ValueError, match=r"`seed` should be an integer of 64 bits\. Found `seed = "):
        MetaConfig(seed=seed)
    for within in (2**64 - 1, -(2**63)):
        assert MetaConfig(seed=within).seed == within


@pytest.mark.parametrize(
    ("seed", "name"), [(VALIDATION_SEED, "validation"), (TUNING_SEED, "tuning"), (EVALUATION_SEED, "evaluation")]
)
def test_training_draws_from_no_stream_that_is_kept_for_a_measurement(seed, name):
    with pytest.raises(ValueError, match=rf"`seed` should be another one than that of the tasks of {name}\. "):
        MetaConfig(seed=seed)
    assert MetaConfig(seed=seed + 1).seed == seed + 1


NUMPY = {
    "lr": {"lr": numpy.float64(1e-3)},
    "objective": {"objective": MetaObjective(eps=numpy.float64(0.1))},
    "estimator": {"estimator": DampedBackpropagation(dampings=list(numpy.array([1.0, 0.9])))},
}


@pytest.mark.parametrize("which", NUMPY)
def test_numbers_of_numpy_are_numbers(which, tmp_path):
    config = replace(CONFIG, **NUMPY[which])
    wanted = meta_train(rule(), line(), config, progress_bar=False).meta_losses
    meta_train(rule(), line(), config, folder=tmp_path, progress_bar=False, stop_after=0)
    assert meta_train(rule(), line(), config, folder=tmp_path, progress_bar=False).meta_losses == wanted
