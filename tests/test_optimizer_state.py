"""LearnedOptimizer refuses what it cannot use, and resumes, copies and moves without losing a bit."""

import copy
import math
import pickle
import warnings
from io import BytesIO

import pytest
import torch
from optimizer_toys import (
    LeakySum,
    assert_same,
    loss_of,
    over_dtypes,
    over_rules,
    parameter,
    small_model,
    train,
)
from torch import nn

from odeopt.evaluation import compare
from odeopt.meta import MetaConfig, meta_train
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, SGDUpdate
from odeopt.tasks import RandomQuadratic

# -------------------- gradients that go wrong


@pytest.mark.filterwarnings("ignore:Parameter `weight_decay` takes:UserWarning")  # less is lost in bfloat16
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@over_dtypes
@over_rules
def test_non_finite_gradient_moves_nothing_is_counted_and_warned_of_once(rule, dtype, bad):
    good, hurt = (parameter([1.0, 2.0, 3.0], [1.0, 2.0, -1.0], dtype) for _ in range(2))
    optimizer = LearnedOptimizer([("good", good), ("hurt", hurt)], rule, weight_decay=0.01)
    optimizer.step()
    before, state = hurt.detach().clone(), dict(optimizer.state[hurt])
    good_before = good.detach().clone()
    hurt.grad[1] = bad
    with pytest.warns(RuntimeWarning, match=r"Parameter `hurt` was not moved at step 2") as record:
        optimizer.step()
    assert record[0].filename == __file__
    optimizer.step()  # warnings are errors here: a second one would fail the test
    assert torch.equal(hurt, before)
    assert not torch.equal(good, good_before)
    assert all(value is state[name] for name, value in optimizer.state[hurt].items())
    assert optimizer.n_skipped == 2
    assert optimizer.n_steps == 3
    hurt.grad[1] = 1.0
    optimizer.step()
    assert not torch.equal(hurt, before)
    assert hurt.isfinite().all()


def test_non_finite_first_gradient_leaves_the_state_at_its_start():
    param = parameter([1.0], [float("nan")])
    optimizer = LearnedOptimizer([param], AdamUpdate())
    with pytest.warns(RuntimeWarning, match="n_skipped"):
        optimizer.step()
    assert all(value.eq(0).all() for value in optimizer.state[param].values())
    assert optimizer.n_skipped == 1
    assert param.item() == 1.0


@pytest.mark.parametrize("opposed", [False, True])
def test_large_finite_gradient_whose_sum_overflows_is_not_skipped(opposed):
    largest = torch.finfo(torch.float32).max
    param = parameter([1.0, 1.0], [largest, -largest if opposed else largest])
    optimizer = LearnedOptimizer([param], SGDUpdate(1e-38))
    optimizer.step()
    assert optimizer.n_skipped == 0
    assert param[0].item() == pytest.approx(1 - largest * 1e-38, rel=1e-5)  # 1e-38 is subnormal: few bits


@pytest.mark.parametrize("guard", [None, True])
@pytest.mark.parametrize(
    ("option", "value"),
    [
        *(("lr", value) for value in (math.nan, -1.0, "1", None, torch.tensor(-1.0), torch.tensor(math.nan))),
        *(("weight_decay", value) for value in (math.nan, -1.0, "1", None, True)),
        *(("total_steps", value) for value in (0, -5, 2.5, "10", True)),
        *((name, value) for name in ("maximize", "is_table", "is_stack") for value in ("no", 1, None)),
    ],
    ids=str,
)
def test_an_option_that_went_wrong_in_the_middle_of_a_run_moves_nothing(option, value, guard):
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([param], SGDUpdate(0.1), guard=guard)
    saved = optimizer.state_dict()
    for groups, use in ((optimizer.param_groups, optimizer.step), (saved["param_groups"], None)):
        groups[0][option] = value
        optimizer.report(1.0)
        with pytest.raises(ValueError, match=f"Parameter `{option}` should be .*Found `{option} = "):
            use() if use is not None else optimizer.load_state_dict(saved)
        optimizer.zero_grad(set_to_none=False)
        param.grad.fill_(1.0)
    assert param.item() == 1.0


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64])
def test_frozen_parameters_of_any_type_pass_as_in_torch(dtype):
    frozen, param = nn.Parameter(torch.ones(2, dtype=dtype), requires_grad=False), parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([frozen, param], SGDUpdate(0.1))
    optimizer.step()
    assert torch.equal(frozen, torch.ones(2, dtype=dtype))
    assert param.item() == pytest.approx(0.9)
    copy = LearnedOptimizer([frozen, param], SGDUpdate(0.1))
    copy.load_state_dict(optimizer.state_dict())
    frozen.grad = torch.ones_like(frozen)
    with pytest.raises(ValueError, match=r"`param_groups\[0\]\['params'\]\[0\]` should have a dense, real gradient"):
        copy.step()
    assert param.item() == pytest.approx(0.9)


def test_truth_value_is_no_learning_rate():
    with pytest.raises(ValueError, match=r"`lr` should be a number or a one-element tensor\. Found `lr = True`"):
        LearnedOptimizer([parameter([1.0], [1.0])], SGDUpdate(0.1), lr=True)


def test_state_of_another_optimizer_is_refused():
    param = parameter([1.0], [1.0])
    other = torch.optim.Adam([param], lr=1e-3)
    optimizer = LearnedOptimizer([param], SGDUpdate(0.1))
    with pytest.raises(ValueError, match="`state_dict` should be the state of a LearnedOptimizer"):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.param_groups[0]["lr"] == 1.0


def test_grad_scaler_unscales_and_skips_a_step_with_an_infinity():
    model, twin = small_model(), small_model()
    optimizer = LearnedOptimizer(model.parameters(), AdamUpdate(0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 2:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
    train(twin, LearnedOptimizer(twin.parameters(), AdamUpdate(0.01)), [0, 1, 3])
    assert_same(model, twin)  # powers of two scale without rounding
    assert optimizer.n_skipped == 0  # the scaler never called step
    assert scaler.get_scale() == 2.0**9


def test_gradient_clipping_limits_the_step():
    model = small_model()
    before = copy.deepcopy(model)
    optimizer = LearnedOptimizer(model.parameters(), SGDUpdate(1.0))
    (1e6 * loss_of(model)).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    optimizer.step()
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert moved.norm().item() == pytest.approx(0.1, rel=1e-4)  # clip_grad_norm_ adds 1e-6 to the norm


def test_sparse_gradient_is_refused_by_name_before_anything_moves():
    dense, sparse = nn.Linear(3, 1), nn.Embedding(4, 3, sparse=True)
    optimizer = LearnedOptimizer([*dense.named_parameters(), ("table", sparse.weight)], LeakySum())
    before = copy.deepcopy(dense)
    dense(sparse(torch.tensor([1]))).sum().backward()
    with pytest.raises(ValueError, match=r"`table` should have a dense, real gradient.*torch\.sparse_coo"):
        optimizer.step()
    assert_same(dense, before)


def test_gradient_turned_complex_is_refused_by_name():
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([("w", param)], LeakySum())
    param.data = param.data.to(torch.complex64)
    param.grad = torch.ones(1, dtype=torch.complex64)
    with pytest.raises(ValueError, match=r"`w` should have a dense, real gradient.*torch\.complex64"):
        optimizer.step()


# -------------------- refused arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1}, r"Parameter `lr` should be non-negative and finite. Found `lr = -1`."),
        ({"lr": float("nan")}, r"Parameter `lr` should be non-negative and finite. Found `lr = nan`."),
        ({"lr": float("inf")}, r"Parameter `lr` should be non-negative and finite. Found `lr = inf`."),
        ({"lr": "0.1"}, r"Parameter `lr` should be a number or a one-element tensor. Found `lr = '0.1'`."),
        ({"lr": torch.ones(2)}, r"Parameter `lr` should be a number or a one-element tensor"),
        ({"lr": torch.tensor(-1.0)}, r"Parameter `lr` should be non-negative"),
        (
            {"weight_decay": -0.1},
            r"Parameter `weight_decay` should be non-negative and finite. Found `weight_decay = -0.1`.",
        ),
        ({"weight_decay": None}, r"Parameter `weight_decay` should be a number"),
        ({"total_steps": 0}, r"Parameter `total_steps` should be a positive integer or None"),
        ({"total_steps": 1.5}, r"Parameter `total_steps` should be a positive integer or None"),
        ({"maximize": "no"}, r"Parameter `maximize` should be True or False. Found `maximize = 'no'`."),
    ],
)
@pytest.mark.parametrize("where", ["argument", "group"])
def test_options_out_of_range_are_refused_by_name_and_value(options, message, where):
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([param], LeakySum())
    attempt = {
        "argument": lambda: LearnedOptimizer([param], LeakySum(), **options),
        "group": lambda: optimizer.add_param_group({"params": [parameter([1.0], [1.0])], **options}),
    }[where]
    with pytest.raises(ValueError, match=message):
        attempt()
    assert len(optimizer.param_groups) == 1


MISSPELT = {
    "weight_decy": "weight_decay",
    "weight-decay": "weight_decay",
    "wieght_decay": "weight_decay",
    "weight_decay_": "weight_decay",
    "LR": "lr",
    "maximise": "maximize",
    "total_step": "total_steps",
    "is_tabel": "is_table",
    "is_stacked": "is_stack",
}


@pytest.mark.parametrize(("found", "meant"), MISSPELT.items())
@pytest.mark.parametrize("where", ["constructor", "later"])
def test_option_of_a_group_that_is_misspelt_is_refused_by_name_and_value(found, meant, where):
    group = {"params": [parameter([1.0], [1.0])], found: 0.1}
    optimizer = LearnedOptimizer([parameter([1.0], [1.0])], LeakySum())
    with pytest.raises(ValueError, match=rf"Parameter `{meant}` should be .* Found `{found} = 0\.1`\."):
        LearnedOptimizer([group], LeakySum()) if where == "constructor" else optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert len(group) == 2


# of schedulers, trainers and users
FOREIGN = """
    initial_lr max_lr min_lr swa_lr base_lr lr0 lr_scale lr_mult wd_mult weight_decay_mult initial_weight_decay decay
    decoupled_weight_decay minimize max_steps step name layer use_weight_decay no_weight_decay max_weight_decay
    weight_decay_end
"""


@pytest.mark.parametrize("name", [*FOREIGN.split(), 0])
def test_other_names_in_a_group_pass(name):
    optimizer = LearnedOptimizer([{"params": [parameter([1.0], [1.0])], name: ["given"]}], LeakySum())
    assert optimizer.param_groups[0][name] == ["given"]


def test_groups_of_another_optimizer_and_of_schedulers_pass():
    param = parameter([1.0], [1.0])
    first = LearnedOptimizer([("weight", param)], LeakySum(), guard=True)
    torch.optim.lr_scheduler.OneCycleLR(first, max_lr=1.0, total_steps=10, cycle_momentum=False)
    first.report(1.0)
    first.step()
    again = LearnedOptimizer(first.param_groups, LeakySum())
    assert again.param_groups[0]["max_lr"] == 1.0
    adam = torch.optim.AdamW([param])
    adam.param_groups[0]["lr"] = 1.0
    adam.param_groups[0]["weight_decay"] = 0.0
    LearnedOptimizer(adam.param_groups, LeakySum())


def test_unknown_option_is_refused():
    with pytest.raises(TypeError, match="momentum"):
        LearnedOptimizer([parameter([1.0], [1.0])], LeakySum(), momentum=0.9)


@pytest.mark.parametrize(
    ("rule", "found"),
    [
        (LeakySum, "the class LeakySum itself"),
        (nn.Linear(1, 1), "Linear"),
        (None, "None"),
    ],
    ids=["class", "module", "none"],
)
def test_what_is_no_update_rule_is_refused(rule, found):
    with pytest.raises(TypeError, match=f"Parameter `rule` should be an instance of UpdateRule.*{found}"):
        LearnedOptimizer([parameter([1.0], [1.0])], rule)


@pytest.mark.parametrize(
    ("tensor", "found"),
    [
        (torch.zeros(2, dtype=torch.complex64), "torch.complex64"),
        (torch.zeros(2, 2).to_sparse(), "torch.sparse_coo"),
        (torch.zeros(2, dtype=torch.float8_e5m2), "torch.float8_e5m2"),
    ],
)
def test_complex_and_sparse_parameters_are_refused_by_name(tensor, found):
    odd = nn.Parameter(tensor)
    with pytest.raises(
        ValueError,
        match=rf"Parameter `odd` should be dense, real and of a floating-point type of 16 to 64 bits.*{found}",
    ):
        LearnedOptimizer([("fine", parameter([1.0], [1.0])), ("odd", odd)], LeakySum())
    with pytest.raises(ValueError, match=r"Parameter `param_groups\[0\]\['params'\]\[1\]` should be dense"):
        LearnedOptimizer([parameter([1.0], [1.0]), odd], LeakySum())


def test_empty_parameter_list_is_refused():
    with pytest.raises(ValueError, match="empty parameter list"):
        LearnedOptimizer([], LeakySum())


# -------------------- save and resume


def through_file(state_dict):
    buffer = BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("carry", [copy.deepcopy, through_file], ids=["in memory", "through torch.save"])
@over_dtypes
@over_rules
def test_run_resumed_in_the_middle_continues_bit_for_bit(rule, dtype, carry):
    def make(model, lr=0.3):
        return LearnedOptimizer(model.named_parameters(), rule, lr=lr, weight_decay=0.001, total_steps=8)

    whole = small_model(dtype)
    optimizer = make(whole)
    train(whole, optimizer, range(4))
    model_state, saved = copy.deepcopy(whole.state_dict()), carry(optimizer.state_dict())
    losses = train(whole, optimizer, range(4, 8))
    resumed = small_model(dtype)
    resumed.load_state_dict(model_state)
    again = make(resumed, lr=0.1)  # what is loaded wins
    again.load_state_dict(saved)
    assert again.n_steps == 4
    assert train(resumed, again, range(4, 8)) == losses
    assert_same(whole, resumed)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        for name, value in optimizer.state[a].items():
            assert again.state[b][name].dtype == value.dtype
            assert torch.equal(again.state[b][name], value)


def test_counters_survive_a_state_dict():
    param = parameter([1.0], [float("inf")])
    optimizer = LearnedOptimizer([param], LeakySum(), total_steps=5)
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    again = LearnedOptimizer([param], LeakySum())
    again.load_state_dict(optimizer.state_dict())
    assert (again.n_steps, again.n_skipped, again.param_groups[0]["total_steps"]) == (1, 1, 5)


def test_bfloat16_parameters_keep_float32_state_through_load_state_dict():
    param = parameter([1.0], [1.001], torch.bfloat16)
    optimizer = LearnedOptimizer([param], AdamUpdate(0.1))
    for _ in range(3):
        optimizer.step()
    exact = {name: value.clone() for name, value in optimizer.state[param].items()}
    assert exact["exp_avg"].bfloat16().float() != exact["exp_avg"]  # so that a cast would show
    again = LearnedOptimizer([param], AdamUpdate(0.1))
    seen = []
    again.register_load_state_dict_post_hook(lambda o: seen.append(o.state[param]["exp_avg"].dtype))
    again.load_state_dict(optimizer.state_dict())
    assert seen == [torch.float32]
    for name, value in again.state[param].items():
        assert value.dtype == torch.float32
        assert torch.equal(value, exact[name])


def test_state_that_was_loaded_is_not_shared_with_the_optimizer_it_came_from():
    first, second = parameter([1.0], [1.0]), parameter([1.0], [1.0])
    optimizer, again = (LearnedOptimizer([param], LeakySum()) for param in (first, second))
    optimizer.step()
    again.load_state_dict(optimizer.state_dict())
    for _ in range(2):
        again.step()
    assert optimizer.state[first]["total"].item() == 1.0
    assert again.state[second]["total"].item() == pytest.approx(1 + 0.9 * (1 + 0.9))
    assert (optimizer.n_steps, again.n_steps) == (1, 3)


def test_pre_hook_of_the_user_edits_what_is_loaded():
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([param], LeakySum())
    optimizer.step()

    def double(_, state_dict):
        fields = {name: 2 * value for name, value in state_dict["state"][0].items()}
        return {**state_dict, "state": {0: fields}}

    again = LearnedOptimizer([param], LeakySum())
    again.register_load_state_dict_pre_hook(double)
    again.load_state_dict(optimizer.state_dict())
    assert again.state[param]["total"].item() == 2.0


@pytest.mark.parametrize(
    ("rule", "shape", "message"),
    [
        (AdamUpdate(), (3,), r"Parameter `rule` should be the one.*Found another one, LeakySum"),
        (LeakySum(), (4,), r"Parameter `w` should have a state of .*'total': \(3,\).* Found .*'total': \(4,\)"),
    ],
    ids=["rule", "shape"],
)
def test_state_of_another_rule_or_shape_is_refused_by_name_and_loads_nothing(rule, shape, message):
    other = LearnedOptimizer([parameter(torch.ones(shape), torch.ones(shape))], rule)
    other.step()
    param = parameter(torch.ones(3), torch.ones(3))
    optimizer = LearnedOptimizer([("w", param)], LeakySum())
    optimizer.step()
    before = dict(optimizer.state[param])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(other.state_dict())
    assert optimizer.state[param] == before


def test_state_dict_with_other_groups_is_refused():
    one, two = parameter([1.0], [1.0]), parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([one], LeakySum())
    with pytest.raises(ValueError, match=r"groups of \[1\] parameters, as .* Found groups of \[1, 1\]"):
        optimizer.load_state_dict(LearnedOptimizer([{"params": [one]}, {"params": [two]}], LeakySum()).state_dict())
    with pytest.raises(ValueError, match=r"Found groups of \[2\]"):
        optimizer.load_state_dict(LearnedOptimizer([one, two], LeakySum()).state_dict())


@pytest.mark.parametrize("carry", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
@over_rules
def test_copied_and_pickled_optimizers_continue_alone_and_alike(rule, carry):
    model = small_model()
    optimizer = LearnedOptimizer(model.parameters(), rule, total_steps=6)
    train(model, optimizer, range(3))
    twin, twin_optimizer = carry((model, optimizer))
    twin_losses = train(twin, twin_optimizer, range(3, 6))
    assert train(model, optimizer, range(3, 6)) == twin_losses
    assert_same(model, twin)
    assert (twin_optimizer.n_steps, twin_optimizer.n_skipped) == (6, 0)


# -------------------- devices


@pytest.mark.gpu
@over_rules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_cuda_step_equals_the_cpu_step_and_leaves_the_rule_on_the_cpu(rule, dtype):
    grads = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    results = {}
    for device in ("cpu", "cuda"):
        param = nn.Parameter(torch.ones(4, 5, dtype=dtype, device=device))
        optimizer = LearnedOptimizer([param], rule, total_steps=3)
        for grad in grads:
            param.grad = grad.to(device)
            optimizer.step()
        assert {value.device.type for value in optimizer.state[param].values()} == {device}
        optimizer.load_state_dict(through_file(optimizer.state_dict()))
        assert {value.device.type for value in optimizer.state[param].values()} == {device}
        results[device] = param.detach().cpu()
    assert all(weight.device.type == "cpu" for weight in rule.parameters())
    # float32 transcendentals differ by a few units in the last place between devices
    tolerance = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    torch.testing.assert_close(results["cuda"], results["cpu"], rtol=tolerance, atol=1e-6)


@pytest.mark.gpu
def test_parameters_on_two_devices_step_together():
    params = [nn.Parameter(torch.ones(3, device=device)) for device in ("cpu", "cuda")]
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = LearnedOptimizer(params, LeakySum())
    optimizer.step()
    params[1].grad[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    torch.testing.assert_close(params[0].detach(), torch.full((3,), 1 - 0.1 * 2.9))
    torch.testing.assert_close(params[1].detach().cpu(), torch.full((3,), 0.9))


def test_no_warning_escapes_a_normal_run():
    model = small_model()
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        train(model, LearnedOptimizer(model.parameters(), LeakySum()), range(2))
    assert not record


# -------------------- rules that are not as they should be


class Tuple(LeakySum):
    def init_state(self, param):
        return tuple(super().init_state(param))


class CountsInPython(LeakySum):
    def init_state(self, param):
        return super().init_state(param)._replace(step=0)


class UpdateAlone(LeakySum):
    def forward(self, grad, state, **signals):
        return -grad


class OneNumber(LeakySum):
    def forward(self, grad, state, **signals):
        return -grad.mean(), state


class OneNumberByCoordinate(OneNumber):
    crosses_coordinates = False


@pytest.mark.parametrize(
    ("rule", "kind", "message"),
    [
        (
            Tuple,
            TypeError,
            r"a state that is a NamedTuple of tensors. Found a tuple from `Tuple.init_state`",
        ),
        (CountsInPython, TypeError, r"NamedTuple of tensors. Found `step = 0` from `CountsInPython.init_state`"),
        (UpdateAlone, TypeError, r"should return two things, .* Found Tensor from `UpdateAlone.forward`"),
        (OneNumber, ValueError, r"updates of the shape of `grad`, \(2,\). Found \(\) from `OneNumber.forward`"),
        (OneNumberByCoordinate, ValueError, r"Found \(\) from `OneNumberByCoordinate.forward`"),
    ],
)
def test_rules_that_return_something_else_are_refused_at_the_first_step(rule, kind, message):
    param = parameter([1.0, 2.0], [1.0, 1.0])
    with pytest.raises(kind, match=message):
        LearnedOptimizer([param], rule()).step()
    assert param.tolist() == [1.0, 2.0]
    for judge in (
        lambda: meta_train(rule(), RandomQuadratic(2), MetaConfig(n_meta_steps=1, horizon=2), progress_bar=False),
        lambda: compare({"mine": rule()}, RandomQuadratic(2), n_steps=2, n_runs=2, progress_bar=False),
    ):
        with pytest.raises(kind, match=message.replace(r"\(2,\)", r"\(2, 3\)")):
            judge()


class NormOfAll(LeakySum):
    def forward(self, grad, state, **signals):
        update, state = super().forward(grad, state, **signals)
        return update / grad.norm(), state


def test_rules_that_mix_tasks_are_refused_before_they_are_trained_or_compared():
    message = "last axis only. Found `NormOfAll`, whose update of a task depends on the task beside it"
    with pytest.raises(ValueError, match=message):
        meta_train(NormOfAll(), RandomQuadratic(2), MetaConfig(n_meta_steps=1, horizon=2), progress_bar=False)
    with pytest.raises(ValueError, match=message):
        compare({"mine": NormOfAll()}, RandomQuadratic(2), n_steps=2, n_runs=2, progress_bar=False)
