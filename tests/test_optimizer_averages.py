"""LearnedOptimizer keeps averages of the weights, shows them on request, and loses neither."""

import copy
import pickle
from typing import NamedTuple

import pytest
import torch
from optimizer_toys import DTYPES, assert_same, loss_of, parameter, small_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, UpdateRule

POWER = 3


def averaging(model, **options):
    return LearnedOptimizer(model.parameters(), AdamUpdate(0.1), averaging=POWER, **options)


def step(model, optimizer, number):
    optimizer.zero_grad()
    loss_of(model, number).backward()
    optimizer.step()


def run(n_steps, dtype=torch.float32):
    model = small_model(dtype)
    optimizer = averaging(model)
    for number in range(n_steps):
        step(model, optimizer, number)
    return model, optimizer


def values(model):
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_averages_are_those_of_torch_with_weights_that_rise_with_the_power(dtype):
    model = small_model(dtype)
    optimizer = averaging(model)

    def fold(average, now, n):
        return average + (now - average) * (POWER + 1) / (n + 1 + POWER)

    reference = AveragedModel(small_model(torch.float64), avg_fn=fold)
    for number in range(12):
        step(model, optimizer, number)
        reference.update_parameters(copy.deepcopy(model).double())
    trained = values(model)
    optimizer.eval()
    for found, wanted, other in zip(values(model), reference.parameters(), trained, strict=True):
        torch.testing.assert_close(found, wanted.to(dtype))
        assert not torch.equal(found, other)
    optimizer.train()
    assert all(map(torch.equal, values(model), trained))


def test_sums_are_of_powers_of_the_step():
    """With r = 1 the weights are proportional to t: 1 x 1, 2 x 2, 3 x 3, ..."""
    param = parameter([0.0], [1.0], torch.float64)
    optimizer = LearnedOptimizer([param], AdamUpdate(0.1), averaging=1)
    seen = []
    for _ in range(5):
        optimizer.step()
        seen.append(param.item())
    optimizer.eval()
    assert param.item() == pytest.approx(sum(t * x for t, x in enumerate(seen, 1)) / 15)


def test_modes_may_be_asked_for_again_and_again():
    model, optimizer = run(4)
    trained = values(model)
    for _ in range(2):
        optimizer.eval()
        shown = values(model)
        optimizer.eval()
        assert all(map(torch.equal, values(model), shown))
        optimizer.train()
        optimizer.train()
        assert all(map(torch.equal, values(model), trained))


def test_showing_changes_nothing_of_the_run():
    wanted, _ = run(6)
    model, optimizer = run(3)
    for number in range(3, 6):
        optimizer.eval()
        optimizer.train()
        step(model, optimizer, number)
    assert_same(model, wanted)


def test_step_on_averages_is_refused_and_moves_nothing():
    model, optimizer = run(2)
    optimizer.eval()
    before = values(model)
    with pytest.raises(RuntimeError, match=r"hold the averaged weights: call `optimizer.train\(\)`"):
        optimizer.step()
    assert all(map(torch.equal, values(model), before))


@pytest.mark.parametrize("shown", [False, True])
@pytest.mark.parametrize("how", ["state_dict", "pickle", "deepcopy"])
def test_run_continues_bit_for_bit(how, shown):
    wanted, at_end = run(8)
    model, optimizer = run(4)
    if shown:
        optimizer.eval()
    if how == "state_dict":
        fresh = small_model()
        fresh.load_state_dict(model.state_dict())
        other = averaging(fresh)
        other.load_state_dict(optimizer.state_dict())
    else:
        both = (model, optimizer)
        fresh, other = pickle.loads(pickle.dumps(both)) if how == "pickle" else copy.deepcopy(both)
    other.train()
    for number in range(4, 8):
        step(fresh, other, number)
    assert_same(fresh, wanted)
    at_end.eval()
    other.eval()
    assert_same(fresh, wanted)


def test_parameter_that_begins_late_is_averaged_from_then_on():
    first, late = parameter([1.0], [1.0]), parameter([5.0], [1.0])
    late.grad = None
    optimizer = LearnedOptimizer([first, late], AdamUpdate(0.1), averaging=POWER)
    optimizer.step()
    late.grad = torch.ones(1)
    optimizer.step()
    moved = late.item()
    optimizer.eval()
    assert late.item() == moved


def test_nothing_is_averaged_unless_asked_for():
    model = small_model()
    optimizer = LearnedOptimizer(model.parameters(), AdamUpdate(0.1))
    step(model, optimizer, 0)
    before = values(model)
    optimizer.eval()
    assert all(map(torch.equal, values(model), before))
    step(model, optimizer, 1)  # nothing is shown, so that nothing is refused
    assert not any("averaging_average" in held for held in optimizer.state.values())


@pytest.mark.parametrize("is_shown", [False, True])
def test_averages_of_another_optimizer_are_not_shown_where_none_are_kept(is_shown):
    (source, averaged), model = run(3), small_model()
    optimizer = LearnedOptimizer(model.parameters(), AdamUpdate(0.1))
    trained = values(source)
    if is_shown:
        averaged.eval()
    model.load_state_dict(source.state_dict())
    optimizer.load_state_dict(averaged.state_dict())
    optimizer.train()
    assert all(map(torch.equal, values(model), trained))
    step(model, optimizer, 3)
    trained = values(model)
    optimizer.eval()
    assert all(map(torch.equal, values(model), trained))


def test_callers_averages_are_not_shown_where_none_are_kept():
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([param], AdamUpdate(0.1))
    optimizer.state[param]["average"] = optimizer.state[param]["weights"] = torch.zeros(1)
    optimizer.step()
    moved = param.item()
    optimizer.eval()
    assert param.item() == moved


def test_fake_tensors_are_averaged():
    with FakeTensorMode():
        model = nn.Linear(3, 2)
        optimizer = averaging(model)
        for _ in range(2):
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        optimizer.eval()
        optimizer.train()


@pytest.mark.parametrize("bad", [-1, float("nan"), True, "8"])
def test_powers_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=r"`averaging` should be a non-negative number or None. Found `averaging = "):
        LearnedOptimizer([parameter([1.0], [1.0])], averaging=bad)


@pytest.mark.parametrize("decay", [0.9, 0.999])
def test_decay_in_place_of_a_power_is_warned_of(decay):
    with pytest.warns(UserWarning, match=rf"`averaging` should be a power.* Found `averaging = {decay}`") as record:
        LearnedOptimizer([parameter([1.0], [1.0])], AdamUpdate(0.1), averaging=decay)
    assert record[0].filename == __file__


@pytest.mark.parametrize("power", [0, 0.5, 1, 8.0])
def test_powers_are_not_warned_of(power):
    LearnedOptimizer([parameter([1.0], [1.0])], AdamUpdate(0.1), averaging=power)  # warnings are errors here


@pytest.mark.parametrize(
    "entry", [{"weights": torch.zeros(1)}, torch.zeros(1), 3], ids=["dictionary", "tensor", "number"]
)
def test_callers_entries_under_names_are_no_averages(entry):
    model, optimizer = run(2)
    optimizer.state["note"] = entry
    step(model, optimizer, 2)
    optimizer.eval()
    optimizer.train()
    assert optimizer.state["note"] is entry
    assert_same(model, run(3)[0])


class Means(NamedTuple):
    average: torch.Tensor
    weights: torch.Tensor


class NamedAlike(UpdateRule):
    """A rule whose state has the names that averages might have."""

    crosses_coordinates = False

    def __init__(self):
        super().__init__()

    def init_state(self, param):
        return Means(torch.zeros_like(param), torch.zeros_like(param))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        return -0.1 * grad, Means(state.average + grad, state.weights)


@pytest.mark.parametrize("power", [None, POWER])
def test_fields_of_a_rule_are_its_own(power):
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([param], NamedAlike(), averaging=power)
    for number in (1, 2):
        optimizer.step()
        assert optimizer.state[param]["average"].item() == number


@pytest.mark.parametrize(("before", "after"), [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_averages_follow_the_dtype_of_the_model(before, after):
    model, optimizer = run(3, before)
    model.to(after)
    expected = copy.deepcopy(model)
    step(model, optimizer, 3)
    other = LearnedOptimizer(expected.parameters(), AdamUpdate(0.1), averaging=POWER)
    other.load_state_dict(run(3, before)[1].state_dict())
    step(expected, other, 3)
    optimizer.eval()
    other.eval()
    assert all(x.dtype == after for x in model.parameters())
    for ours, theirs in zip(values(model), values(expected), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("is_shown", [False, True])
def test_a_dictionary_that_was_loaded_does_not_change_with_later_steps(is_shown):
    model, optimizer = run(3)
    if is_shown:
        optimizer.eval()
    saved = optimizer.state_dict()
    kept = copy.deepcopy(saved)
    for _ in range(2):
        other = copy.deepcopy(model)
        resumed = averaging(other)
        resumed.load_state_dict(saved)
        resumed.train()
        for number in (3, 4):
            step(other, resumed, number)
        for key, held in kept["state"].items():
            assert all(torch.equal(saved["state"][key][name], value) for name, value in held.items())


@pytest.mark.parametrize("pause", ["frozen", "resumed"])
def test_averages_go_on_for_parameters_without_a_gradient(pause):
    """The weights that stand still are weights of the run: also after what makes the optimizer lay out anew."""

    def go_on(params, optimizer):
        for _ in range(40):
            optimizer.zero_grad()
            params[1].square().sum().backward()
            optimizer.step()
        optimizer.eval()
        return params[0].detach().clone()

    def made():
        params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
        optimizer = LearnedOptimizer(params, AdamUpdate(0.1), averaging=2.0)
        for _ in range(10):
            optimizer.zero_grad()
            sum(param.square().sum() for param in params).backward()
            optimizer.step()
        return params, optimizer

    wanted = go_on(*made())
    params, optimizer = made()
    stuck = optimizer.state[params[0]]["averaging_average"].clone()
    if pause == "frozen":
        params[0].requires_grad_(False)
    else:
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = go_on(params, optimizer)
    assert torch.equal(found, wanted)
    assert not torch.allclose(found, stuck, rtol=0.01)


def test_parameters_that_were_never_stepped_have_no_average_whatever_the_user_keeps_in_their_state():
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2))]
    optimizer = LearnedOptimizer(params, AdamUpdate(0.1), averaging=2.0)
    optimizer.state[params[0]]["note"] = "mine"
    for _ in range(3):
        optimizer.zero_grad()
        params[1].square().sum().backward()
        optimizer.step()
    assert optimizer.state[params[0]] == {"note": "mine"}
