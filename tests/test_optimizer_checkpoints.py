"""State dictionaries of LearnedOptimizer: what they hold beside the rule's state, and which rule they belong to."""

import copy
import pickle
from io import BytesIO

import pytest
import torch
from optimizer_toys import RULES, LeakySum, parameter, port_hamiltonian, small_model, train
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import lr_scheduler

from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, RMSpropUpdate, SGDUpdate


def through_file(state_dict):
    buffer = BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def reloaded(optimizer):
    optimizer.load_state_dict(through_file(optimizer.state_dict()))
    return optimizer


# -------------------- what callers keep in the state

CARRIES = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "load": reloaded}
over_carries = pytest.mark.parametrize("carry", CARRIES.values(), ids=CARRIES)


@pytest.mark.parametrize("again", CARRIES.values(), ids=CARRIES)
@over_carries
def test_an_optimizer_that_was_carried_along_can_be_carried_again(carry, again):
    param, other = (parameter(torch.ones(3), torch.tensor([1.0, -2.0, 0.5])) for _ in range(2))
    once, twice = LearnedOptimizer([param], AdamUpdate(0.1)), LearnedOptimizer([other], AdamUpdate(0.1))
    for optimizer in (once, twice):
        optimizer.step()
    twice = again(carry(twice))
    [other] = twice.param_groups[0]["params"]
    other.grad = param.grad.clone()
    for optimizer in (once, reloaded(twice)):
        optimizer.step()
    assert torch.equal(param, other)


@over_carries
@pytest.mark.parametrize("size", [3, 2**16])
def test_callers_entries_are_carried_along_to_the_bit(carry, size):
    param = parameter(torch.ones(size), torch.ones(size), torch.bfloat16)
    optimizer = LearnedOptimizer([param], AdamUpdate(0.1))
    optimizer.step()
    entries = {"average": torch.full((size,), 1 / 3), "numbers": {"n": 2, "x": torch.tensor([0.1])}, "done": True}
    optimizer.state[param].update(entries)
    optimizer.state["calls"] = {"n": torch.tensor(7), "names": ["a", "b"]}
    optimizer.step()
    twin = carry(optimizer)
    twin_param = twin.param_groups[0]["params"][0]
    found = twin.state[twin_param]
    assert torch.equal(found["average"], entries["average"])  # in float32 beside a bfloat16 parameter
    assert (found["numbers"]["n"], found["done"]) == (2, True)
    assert torch.equal(found["numbers"]["x"], entries["numbers"]["x"])
    assert twin.state["calls"]["names"] == ["a", "b"]
    assert twin.state["calls"]["n"].item() == 7
    twin_param.grad = torch.ones(size, dtype=torch.bfloat16)
    twin.step()  # and the rule goes on
    assert twin.state[twin_param]["step"].item() == 3
    assert torch.equal(twin.state[twin_param]["average"], entries["average"])


@pytest.mark.parametrize("shape", [(2,), (0, 3)])
def test_entry_that_is_there_before_the_first_step_leaves_the_state_to_begin(shape):
    params = [parameter(torch.ones(shape), torch.ones(shape)) for _ in range(2)]
    optimizer = LearnedOptimizer([params[0]], LeakySum())
    optimizer.state[params[0]]["average"] = torch.ones(shape)
    other = LearnedOptimizer([params[1]], LeakySum())
    other.load_state_dict(optimizer.state_dict())
    for each, param in zip((optimizer, other), params, strict=True):
        each.step()
        assert set(each.state[param]) == {"average", "total", "step"}
        assert torch.equal(each.state[param]["total"], param.grad)


def test_state_of_which_a_field_is_missing_is_refused_whatever_stands_beside_it():
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([("w", param)], LeakySum())
    optimizer.step()
    saved = optimizer.state_dict()
    saved["state"][0]["average"] = saved["state"][0].pop("total")
    with pytest.raises(ValueError, match=r"Parameter `w` should have a state of .*'total'.* Found .*'average'"):
        optimizer.load_state_dict(saved)


# -------------------- a state dictionary is as it was when it was made


@pytest.mark.parametrize("size", [1, 1000, 2**16 + 1])
@pytest.mark.parametrize("name", ["adam", "lstm", "port-hamiltonian"])
def test_state_dict_does_not_change_with_later_steps_and_the_state_does(name, size):
    param = parameter(torch.ones(size), torch.ones(size))
    optimizer = LearnedOptimizer([param], RULES[name](), lr=torch.tensor(0.5), capturable=True)
    optimizer.state["seen"] = seen = torch.zeros(1)
    optimizer.step()
    saved, live = optimizer.state_dict(), dict(optimizer.state[param])
    before = copy.deepcopy(saved)
    optimizer.step()
    seen += 1
    optimizer.param_groups[0]["lr"].mul_(0.1)
    for fields in (saved["state"][0], before["state"][0]):
        assert fields.keys() == live.keys()
    assert all(torch.equal(x, before["state"][0][field]) for field, x in saved["state"][0].items())
    assert any(not torch.equal(x, before["state"][0][field]) for field, x in live.items())
    assert all(x is optimizer.state[param][field] for field, x in live.items())
    assert saved["state"]["seen"].item() == 0
    group = saved["param_groups"][0]
    assert (group["n_steps"].item(), group["lr"].item(), optimizer.n_steps) == (1, 0.5, 2)


# -------------------- a checkpoint belongs to a rule


def nudged():
    rule = LeakySum()
    rule.weight.data.mul_(1 + 1e-6)
    return rule


ALIKE_IN_SHAPE = {
    "weights": (LeakySum, nudged),
    "configuration": (lambda: SGDUpdate(0.1, momentum=0.9), lambda: SGDUpdate(0.1, momentum=0.8)),
    "solver": (port_hamiltonian, lambda: port_hamiltonian().with_options(solver="heun3")),
    "precision": (port_hamiltonian, lambda: port_hamiltonian().double()),
}


@pytest.mark.parametrize("pair", ALIKE_IN_SHAPE.values(), ids=ALIKE_IN_SHAPE)
def test_state_of_a_rule_alike_in_shape_is_refused_and_its_own_is_taken(pair):
    param = parameter([1.0, 2.0], [1.0, -1.0])
    first, same, other = (LearnedOptimizer([param], make()) for make in (pair[0], pair[0], pair[1]))
    first.step()
    saved = through_file(first.state_dict())
    same.load_state_dict(saved)
    other.step()
    before = {name: x.clone() for name, x in other.state[param].items()}
    found = rf"Found another one, \w+ \(`rule_digest` \d+; in `state_dict` {first.defaults['rule_digest']}\)"
    message = rf"Parameter `rule` should be the one that `state_dict` was saved with: .* {found}"
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    assert all(torch.equal(x, other.state[param][name]) for name, x in before.items())
    for group in saved["param_groups"]:
        del group["rule_digest"]  # on purpose
    with pytest.warns(UserWarning, match="does not say by which rule it was made") as record:
        other.load_state_dict(saved)
    assert record[0].filename == __file__
    assert other.state_dict()["param_groups"][0]["rule_digest"] == other.defaults["rule_digest"]
    assert other.defaults["rule_digest"] != first.defaults["rule_digest"]


def test_state_that_does_not_name_its_rule_has_to_have_the_rules_fields():
    param = parameter([1.0], [1.0])
    first, second = LearnedOptimizer([param], RULES["lstm"]()), LearnedOptimizer([("w", param)], LeakySum())
    first.step()
    saved = first.state_dict()
    del saved["param_groups"][0]["rule_digest"]
    with (
        pytest.warns(UserWarning, match="does not say"),
        pytest.raises(ValueError, match=r"`w` should have a state of .*'total'.* Found .*'h1'"),
    ):
        second.load_state_dict(saved)


def named(order, n_groups=1):
    """Three parameters of one shape, by name, each with its own gradient; and an optimizer of them, in an order."""
    params = {name: parameter(torch.ones(3), torch.tensor([1.0, -2.0, 0.5 + k])) for k, name in enumerate("abc")}
    members = [(name, params[name]) for name in order]
    groups = [{"params": members[k::n_groups]} for k in range(n_groups)]
    return params, LearnedOptimizer(groups, AdamUpdate(0.1))


@pytest.mark.parametrize("order", ["bca", "cab"])
def test_state_follows_the_names_of_parameters_that_stand_in_another_order(order):
    params, optimizer = named("abc")
    optimizer.step()
    others, other = named(order)
    for name, param in params.items():
        others[name].data.copy_(param.data)
    other.load_state_dict(through_file(optimizer.state_dict()))
    assert other.param_groups[0]["param_names"] == [*order]
    for each in (optimizer, other):
        each.step()
    for name, param in params.items():
        assert torch.equal(param, others[name])
        assert torch.equal(optimizer.state[param]["exp_avg"], other.state[others[name]]["exp_avg"])


def test_a_parameter_that_was_in_another_group_is_refused_by_its_name():
    _, optimizer = named("abc", n_groups=3)
    optimizer.step()
    with pytest.raises(ValueError, match=r"should have `b` in group 0, as this optimizer does. Found it in group 1"):
        named("bac", n_groups=3)[1].load_state_dict(optimizer.state_dict())


def test_parameters_of_other_names_are_told_apart_by_their_places():
    _, optimizer = named("abc")
    optimizer.step()
    saved = optimizer.state_dict()
    saved["param_groups"][0]["param_names"] = ["module.c", "a", "b"]  # of a wrapper, or as a layer put in between makes
    optimizer.load_state_dict(saved)
    again = optimizer.state_dict()["state"]
    assert all(torch.equal(again[key]["exp_avg"], saved["state"][key]["exp_avg"]) for key in range(3))


def test_a_name_of_two_parameters_tells_none_apart():
    """As where the parameters of two models are put into one group: no state is lost."""
    _, optimizer = named("abc")
    optimizer.param_groups[0]["param_names"] = ["w", "w", "b"]
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["param_names"] = ["w", "b", "w"]
    optimizer.load_state_dict(saved)
    again = optimizer.state_dict()["state"]
    assert all(torch.equal(again[key]["exp_avg"], saved["state"][key]["exp_avg"]) for key in range(3))


@pytest.mark.parametrize("option", ["n_skipped", "is_table", "total_steps", "lr"])
def test_group_without_an_option_is_refused_by_its_name(option):
    optimizer = LearnedOptimizer([parameter([1.0], [1.0])], LeakySum())
    saved = optimizer.state_dict()
    del saved["param_groups"][0][option]
    with pytest.raises(ValueError, match=f"should be the state of a LearnedOptimizer, with {option} in each group"):
        optimizer.load_state_dict(saved)


@over_carries
def test_digest_is_the_same_after_a_copy_and_under_a_scheduler(carry):
    model = small_model()
    optimizer = LearnedOptimizer(model.parameters(), port_hamiltonian())
    digest = optimizer.defaults["rule_digest"]
    train(model, optimizer, range(2), lr_scheduler.ExponentialLR(optimizer, 0.9))
    twin = carry(optimizer)
    twin.add_param_group({"params": [parameter([1.0], [1.0])]})
    assert [group["rule_digest"] for group in twin.param_groups] == [digest, digest]
    assert LearnedOptimizer(model.parameters(), port_hamiltonian()).defaults["rule_digest"] == digest


def test_groups_of_another_optimizer_bring_no_digest_with_them():
    param = parameter([1.0], [1.0])
    old = LearnedOptimizer([param], SGDUpdate(0.1))
    new = LearnedOptimizer(old.param_groups, RMSpropUpdate(0.1))
    assert new.param_groups[0]["rule_digest"] == new.defaults["rule_digest"] != old.defaults["rule_digest"]


@pytest.mark.parametrize("flatten", [False, True])
def test_distributed_checkpoints_carry_the_digest(flatten):
    options = StateDictOptions(flatten_optimizer_state_dict=flatten)

    def stepped(rule):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 1))
        parts = [{"params": layer.parameters(), "lr": lr} for layer, lr in zip(model, (0.1, 0.2), strict=True)]
        optimizer = LearnedOptimizer(parts, rule, total_steps=5)
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    model, optimizer = stepped(LeakySum())
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    again, other = stepped(LeakySum()), stepped(nudged())
    again[1].step()  # so that what is taken up shows
    set_optimizer_state_dict(*again, copy.deepcopy(saved), options=options)
    for a, b in zip(model.parameters(), again[0].parameters(), strict=True):
        assert torch.equal(optimizer.state[a]["total"], again[1].state[b]["total"])
    with pytest.raises(ValueError, match="Parameter `rule` should be the one"):
        set_optimizer_state_dict(*other, saved, options=options)
