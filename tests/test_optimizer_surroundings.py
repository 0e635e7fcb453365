"""LearnedOptimizer inside of torch.compile, FakeTensorMode and other devices, under schedulers, and by name."""

import contextlib
import copy
import pickle

import pytest
import torch
from optimizer_toys import (
    RULES,
    LeakySum,
    assert_same,
    loss_of,
    over_rules,
    parameter,
    port_hamiltonian,
    small_model,
    train,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import lr_scheduler

from odeopt.artifacts import available_pretrained, load_pretrained
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, SGDUpdate
from odeopt.rules.port_hamiltonian.signals import shape_features

# -------------------- torch.compile


@pytest.fixture
def counters():
    """What Dynamo counts, from zero; nothing that it has compiled is left behind."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield torch._dynamo.utils.counters
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.parametrize("name", ["lstm", "coordinatewise", "adam", "port-hamiltonian"])
@pytest.mark.parametrize("has_scheduler", [False, True])
def test_step_is_no_graph_but_a_break_between_graphs(name, has_scheduler, counters):
    model, twin, rule = small_model(), small_model(), RULES[name]()
    optimizer, other = (LearnedOptimizer(m.parameters(), rule) for m in (model, twin))
    schedulers = [lr_scheduler.ExponentialLR(o, 0.9) for o in (optimizer, other)] if has_scheduler else []
    params = list(model.parameters())

    @torch.compile(backend="eager")
    def move(scale):
        for param in params:
            param.grad = scale * torch.ones_like(param)
        optimizer.step()
        return scale + 1

    scale = torch.ones(())
    for step in range(4):
        scale = move(scale)
        for param in twin.parameters():
            param.grad = torch.full_like(param, step + 1.0)
        other.step()
        for scheduler in schedulers:
            scheduler.step()
    assert counters["stats"]["unique_graphs"] == 2  # before the step and after it
    assert_same(model, twin)


# -------------------- tensors without numbers


@pytest.mark.parametrize("device", ["cpu", "meta"])
@over_rules
def test_fake_parameters_are_stepped_as_by_torch_optim(rule, device):
    with FakeTensorMode():
        model = nn.Sequential(nn.Linear(4, 5, device=device), nn.Linear(5, 300, device=device))
        optimizer = LearnedOptimizer(model.parameters(), rule, total_steps=3, weight_decay=0.001)
        for _ in range(2):
            model(torch.ones(2, 4, device=device)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
        assert optimizer.n_skipped == 0
    for param in model.parameters():
        for value in optimizer.state[param].values():
            assert isinstance(value, FakeTensor)
            assert value.device.type == device
    # the rule itself keeps its numbers
    for kept, given in zip(optimizer.rule.parameters(), rule.parameters(), strict=True):
        assert torch.equal(kept, given)


def test_nothing_kept_is_of_fake_tensors():
    rule, shape = port_hamiltonian(), (11, 13)  # a shape that no other test has had features kept for
    for mode in (FakeTensorMode, contextlib.nullcontext):
        with mode():
            features = shape_features(rule, shape, 1, torch.float32, torch.device("cpu"))
        assert isinstance(features, FakeTensor) == (mode is FakeTensorMode)


def test_shipped_rules_are_loaded_with_their_numbers_under_fake_tensors():
    wanted = load_pretrained("lstm")
    with FakeTensorMode():
        rule = load_pretrained("lstm")
        optimizer = LearnedOptimizer([nn.Parameter(torch.ones(3))], "lstm")
    for found in (rule, optimizer.rule):
        for a, b in zip(found.parameters(), wanted.parameters(), strict=True):
            assert torch.equal(a, b)


@over_rules
def test_parameters_on_the_meta_device_are_stepped(rule):
    param = nn.Parameter(torch.ones(5, device="meta"))
    optimizer = LearnedOptimizer([param], rule)
    for _ in range(2):
        param.grad = torch.ones_like(param)
        optimizer.step()
    assert {value.device.type for value in optimizer.state_dict()["state"][0].values()} == {"meta"}


@over_rules
def test_default_device_changes_nothing(rule):
    models, results = [small_model(), small_model()], []
    for model, default in zip(models, ("cpu", "meta"), strict=True):
        for step in range(3):
            loss_of(model, step).backward()
        with torch.device(default):
            optimizer = LearnedOptimizer(model.parameters(), rule, total_steps=4, weight_decay=0.001)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            optimizer.step()
        results.append(optimizer.state_dict()["state"])
    assert_same(*models)
    for fields, others in zip(*(result.values() for result in results), strict=True):
        assert all(torch.equal(fields[name], others[name]) for name in fields)


# -------------------- schedulers that cycle a momentum, and weight decay

CYCLES = {
    "OneCycleLR": lambda o, **options: lr_scheduler.OneCycleLR(o, 0.02, total_steps=9, **options),
    "CyclicLR": lambda o, **options: lr_scheduler.CyclicLR(o, 0.001, 0.02, 2, **options),
}


@pytest.mark.parametrize("make", CYCLES.values(), ids=CYCLES)
def test_scheduler_that_would_cycle_a_momentum_moves_the_lr_alone_and_a_warning_says_so(make):
    models = small_model(), small_model()
    optimizers = [LearnedOptimizer(model.parameters(), AdamUpdate(1.0)) for model in models]
    schedulers = make(optimizers[0]), make(optimizers[1], cycle_momentum=False)
    train(models[1], optimizers[1], range(6), schedulers[1])
    with pytest.warns(UserWarning, match=r"the rule does not have.*`cycle_momentum=False` does the same") as record:
        train(models[0], optimizers[0], range(3), schedulers[0])
    assert len(record) == 1
    again = LearnedOptimizer(models[0].parameters(), AdamUpdate(1.0))
    resumed = make(again)
    again.load_state_dict(optimizers[0].state_dict())
    resumed.load_state_dict(schedulers[0].state_dict())
    with pytest.warns(UserWarning, match="does not have"):
        train(models[0], again, range(3, 6), resumed)
    assert_same(*models)


def test_no_group_has_a_momentum_unless_a_scheduler_puts_it_there():
    optimizer = LearnedOptimizer([parameter([1.0], [1.0])], SGDUpdate(0.1))
    optimizer.add_param_group({"params": [parameter([1.0], [1.0])]})
    assert not any("momentum" in group for group in copy.deepcopy(optimizer).param_groups)


@pytest.mark.parametrize("lr", [2.0, torch.tensor(2.0)], ids=["number", "tensor"])
def test_large_decay_per_step_is_warned_of_once(lr):
    groups = [{"params": [parameter([1.0], [1.0])], "weight_decay": decay} for decay in (0.005, 0.006, 0.1)]
    with pytest.warns(UserWarning, match=r"`weight_decay = 0\.006` and `lr = 2\.0`; AdamW's weight decay") as record:
        LearnedOptimizer(groups, SGDUpdate(0.1), lr=lr)
    assert len(record) == 1
    assert record[0].filename == __file__
    LearnedOptimizer(groups[:1], SGDUpdate(0.1), lr=lr)  # one percent is not more than one percent


def test_decay_of_a_learned_rule_is_warned_of_early():
    with pytest.warns(UserWarning, match=r"1e-5 for `AdamW\(lr=1e-3, weight_decay=1e-2\)`"):
        LearnedOptimizer([parameter([1.0], [1.0])], weight_decay=0.0011)  # as if it were AdamW's
    LearnedOptimizer([parameter([1.0], [1.0])], weight_decay=0.001)


@pytest.mark.parametrize("lr", [1e-3, 0.01, torch.tensor(1e-3)], ids=str)
def test_learning_rate_of_another_optimizer_is_warned_of_once(lr):
    params = [parameter([1.0], [1.0]) for _ in range(3)]
    with pytest.warns(UserWarning, match=rf"multiplies the rule's own step sizes.* Found `lr = {lr:g}`") as record:
        optimizer = LearnedOptimizer(params[:2], LeakySum(), lr=lr)
    assert [warning.filename for warning in record] == [__file__]
    optimizer.add_param_group({"params": params[2:]})
    with pytest.warns(UserWarning, match="Found `lr = 0.002`"):
        LearnedOptimizer([{"params": params[:1], "lr": 0.001}, {"params": params[1:], "lr": 0.002}], LeakySum())
    optimizer = LearnedOptimizer(params[:1], LeakySum())
    with pytest.warns(UserWarning, match=rf"Found `lr = {lr:g}`") as record:
        optimizer.add_param_group({"params": params[1:], "lr": lr})
    assert [warning.filename for warning in record] == [__file__]


@pytest.mark.parametrize("lr", [0.0, 0.011, torch.tensor(0.011)], ids=["zero", "small", "tensor"])
def test_other_learning_rates_are_not_warned_of(lr):
    params = [parameter([1.0], [1.0]), parameter([1.0], [1.0])]
    LearnedOptimizer(params, LeakySum(), lr=lr)
    LearnedOptimizer([{"params": params[:1], "lr": 0.001}, {"params": params[1:]}], LeakySum(), lr=lr or 1.0)


def test_hand_designed_rules_may_have_a_small_learning_rate():
    optimizer = LearnedOptimizer([parameter([1.0], [1.0])], SGDUpdate(1.0), lr=1e-3)
    optimizer.add_param_group({"params": [parameter([1.0], [1.0])], "lr": 1e-4})


def test_warning_points_to_the_callers_line_past_the_wrappers_of_schedulers():
    param = parameter([1.0], [float("nan")])
    optimizer = LearnedOptimizer([param], LeakySum())
    lr_scheduler.ChainedScheduler([lr_scheduler.ExponentialLR(optimizer, 0.9)])
    with pytest.warns(RuntimeWarning, match="not finite") as record:
        optimizer.step()
    assert record[0].filename == __file__


# -------------------- what is said of it


@pytest.mark.parametrize(
    ("rule", "options", "named"),
    [
        ("lstm", {}, "rule: lstm"),
        (LeakySum(), {"total_steps": 5}, "rule: LeakySum"),
        ("lstm", {"guard": True}, "rule: lstm, guard: AdamUpdate"),
    ],
)
def test_repr_names_rule_and_guard_above_the_groups_of_torch(rule, options, named):
    groups = [{"params": [(name, parameter([1.0], [1.0]))]} for name in ("a", "b")]
    optimizer = LearnedOptimizer(groups, rule, **options)
    first, *rest = repr(optimizer).split("\n")
    assert first == f"LearnedOptimizer ({named}"
    plain = torch.optim.Optimizer.__repr__(
        LearnedOptimizer(groups, optimizer.rule, total_steps=options.get("total_steps"))
    )
    assert ["LearnedOptimizer (", *rest] == plain.split("\n")
    assert f"    total_steps: {options.get('total_steps')}" in rest
    assert repr(pickle.loads(pickle.dumps(optimizer))).split("\n")[0] == first


@pytest.mark.parametrize("model", [nn.Linear(2, 1), nn.Sequential(nn.Linear(2, 1))], ids=["layer", "sequence"])
def test_a_model_in_place_of_its_parameters_is_refused(model):
    name = type(model).__name__
    with pytest.raises(TypeError, match=rf"`odeopt\.param_groups\(model\)`\. Found a module, `params = {name}\("):
        LearnedOptimizer(model)


# -------------------- rules by name


@pytest.mark.parametrize("name", available_pretrained())
def test_rule_may_be_the_name_of_a_shipped_one(name):
    results = []
    for rule in (name, load_pretrained(name)):
        param = parameter([[1.0, 2.0], [3.0, 4.0]], [[0.1, -0.2], [0.3, 1.0]])
        LearnedOptimizer([param], rule).step()
        results.append(param.detach())
    assert torch.equal(*results)


def test_rule_is_the_general_one_by_default():
    optimizer = LearnedOptimizer([parameter([1.0], [1.0])])
    named = LearnedOptimizer([parameter([1.0], [1.0])], "port-hamiltonian-spectral", lr=0.5)
    assert optimizer.defaults["rule_digest"] == named.defaults["rule_digest"]
    assert optimizer.rule.config == load_pretrained("port-hamiltonian-spectral").config


@pytest.mark.parametrize("lr", [1, 0.1])
def test_learning_rate_in_place_of_a_rule_is_refused_with_its_name(lr):
    with pytest.raises(TypeError, match=rf"Found `rule = {lr}`\. A learning rate is given by its name, `lr={lr}`"):
        LearnedOptimizer([parameter([1.0], [1.0])], lr)


def test_unknown_name_is_refused_by_the_parameter_it_was_given_for():
    with pytest.raises(ValueError, match=r"Parameter `rule` should be one of .*Found `rule = 'lstm-mnits'`\. Did you"):
        LearnedOptimizer([parameter([1.0], [1.0])], "lstm-mnits")
