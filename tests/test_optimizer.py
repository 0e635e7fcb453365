"""LearnedOptimizer steps as any optimizer of torch.optim does, whatever the rule."""

import copy
from contextlib import nullcontext

import pytest
import torch
from optimizer_toys import (
    SHAPES,
    LeakySum,
    LeakySumState,
    assert_same,
    loss_of,
    over_dtypes,
    over_rules,
    parameter,
    small_model,
    train,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler

from odeopt.meta import unroll
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, RMSpropUpdate, SGDUpdate, UpdateRule
from odeopt.rules.base import state_dtype
from odeopt.tasks import RandomQuadratic


class Recorder(UpdateRule):
    """Keeps what it was called with; does not move."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def init_state(self, param):
        return LeakySumState(torch.zeros_like(param), torch.zeros(1))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        self.calls.append({"grad": grad, "param": param, "shape": shape, "progress": progress, "rule": self})
        return torch.zeros_like(grad), state


# -------------------- the step itself


@over_rules
@over_dtypes
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_shape_and_dtype_follows_the_rule_called_by_hand(rule, dtype, shape):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape).to(dtype))
    by_hand, work_dtype = param.detach().clone().reshape(-1), state_dtype(dtype)
    state = rule.init_state(by_hand.to(work_dtype))
    optimizer = LearnedOptimizer([param], rule, lr=0.5, total_steps=3)
    for step in range(3):
        param.grad = torch.randn(shape).to(dtype)
        if param.numel() > 0:
            with torch.no_grad():
                update, state = rule(
                    param.grad.reshape(-1).to(work_dtype),
                    state,
                    param=by_hand.to(work_dtype),
                    shape=param.shape,
                    progress=torch.tensor(step / 3, dtype=work_dtype),
                )
                by_hand = (by_hand.to(work_dtype) + 0.5 * update).to(dtype)
        optimizer.step()
    assert param.shape == shape
    assert param.dtype == dtype
    # exact but for a fused multiply-add of lr and update, one rounding
    torch.testing.assert_close(param.detach().reshape(-1), by_hand, rtol=2 * torch.finfo(dtype).eps, atol=1e-7)


@over_rules
def test_state_of_an_empty_parameter_is_saved_and_loaded_like_any_other(rule):
    def optimizer_of_two():
        params = [parameter(torch.zeros(0, 3), torch.zeros(0, 3)), parameter(torch.ones(3), torch.ones(3))]
        return params, LearnedOptimizer(params, rule)

    params, optimizer = optimizer_of_two()
    for _ in range(2):
        optimizer.step()
    assert list(optimizer.state[params[0]]) == list(optimizer.state[params[1]])
    saved = copy.deepcopy(optimizer.state_dict())
    assert sorted(saved["state"]) == [0, 1]  # torch.distributed.checkpoint asks for every parameter's
    others, other = optimizer_of_two()
    other.load_state_dict(saved)
    others[1].data.copy_(params[1].data)
    for each in (optimizer, other):
        each.step()
    assert params[0].shape == others[0].shape == (0, 3)
    assert torch.equal(params[1], others[1])


@over_rules
@over_dtypes
def test_state_is_plain_tensors_in_float32_or_better_under_the_names_of_the_state(rule, dtype):
    param = parameter(torch.ones(2, 3), torch.ones(2, 3), dtype)
    optimizer = LearnedOptimizer([param], rule)
    optimizer.step()
    state = optimizer.state[param]
    assert tuple(state) == rule.init_state(torch.ones(6))._fields
    assert {type(value) for value in state.values()} == {Tensor}
    assert all(value.dtype in (torch.float32, torch.float64) for value in state.values())
    assert not any(value.requires_grad for value in state.values())


@pytest.mark.parametrize("layout", ["transposed", "channels_last"])
def test_memory_layout_of_a_parameter_does_not_matter(layout):
    torch.manual_seed(0)
    value, grads = torch.randn(2, 3, 4, 5), torch.randn(3, 2, 3, 4, 5)

    def relaid(x):
        if layout == "channels_last":
            return x.contiguous(memory_format=torch.channels_last)
        return x.transpose(0, 3).contiguous().transpose(0, 3)

    plain, strided = nn.Parameter(value.clone()), nn.Parameter(relaid(value))
    assert not strided.is_contiguous()
    for param, lay in ((plain, torch.clone), (strided, relaid)):
        optimizer = LearnedOptimizer([param], AdamUpdate(0.1))
        for grad in grads:
            param.grad = lay(grad)
            optimizer.step()
    assert torch.equal(plain, strided)


def test_bfloat16_parameter_is_rounded_once_from_float32():
    param = parameter([1.0], [-1.0], torch.bfloat16)
    LearnedOptimizer([param], SGDUpdate(0.0042), weight_decay=0.001).step()
    # exactly 1.0032, nearest to 1; a rounding after the decay (to 1, then 1.0042) would end at 1.0078
    assert param.item() == 1.0


def test_rule_sees_flattened_tensor_its_shape_and_the_parameter_before_decay():
    param = parameter([[1.0, 2.0], [3.0, 4.0]], [[5.0, 6.0], [7.0, 8.0]])
    optimizer = LearnedOptimizer([param], Recorder(), weight_decay=0.01)
    rule = optimizer._layout.rule_for(param, optimizer.param_groups[0])
    seen = []
    rule.register_forward_hook(lambda *_: seen.append(rule.calls[-1]["param"].clone()))
    optimizer.step()
    call = rule.calls[0]
    assert torch.equal(call["grad"], torch.tensor([5.0, 6.0, 7.0, 8.0]))
    assert torch.equal(seen[0], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert call["shape"] == (2, 2)
    assert call["progress"] is None


def test_progress_is_the_fraction_of_steps_done_and_never_above_one():
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([param], Recorder(), total_steps=4)
    rule = optimizer._layout.rule_for(param, optimizer.param_groups[0])
    for step in range(6):
        with pytest.warns(UserWarning, match="`total_steps = 4`") if step == 4 else nullcontext():
            optimizer.step()
    progress = [call["progress"] for call in rule.calls]
    assert all(p.shape == () for p in progress)
    assert [p.item() for p in progress] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert optimizer.n_steps == 6


@over_rules
def test_trajectory_equals_the_one_of_unroll(rule):
    task, index, n_steps = RandomQuadratic(), torch.tensor([3]), 6
    with torch.no_grad():
        expected = unroll(rule, task, indices=index, n_steps=n_steps, total_steps=n_steps)
    params = {name: nn.Parameter(value[0].clone()) for name, value in task.init_params(index, 0).items()}
    optimizer, losses = LearnedOptimizer(params.values(), rule, total_steps=n_steps), []
    for step in range(n_steps + 1):
        optimizer.zero_grad()
        batched = {name: param.unsqueeze(0) for name, param in params.items()}
        loss = task.loss(batched, task.sample_batch(index, step, 0)).sum()
        loss.backward()
        losses.append(loss.detach())
        if step < n_steps:
            optimizer.step()
    # float32; a matrix product with and without the batch axis may round differently, grown over six steps
    torch.testing.assert_close(torch.stack(losses), expected.losses[:, 0], rtol=1e-5, atol=1e-6)


def test_gradients_that_are_none_leave_parameter_and_state_alone():
    used, unused = parameter([1.0], [1.0]), nn.Parameter(torch.ones(1))
    optimizer = LearnedOptimizer([used, unused], LeakySum(), weight_decay=0.001)
    optimizer.step()
    assert unused.item() == 1.0
    assert unused not in optimizer.state
    assert used.item() != 1.0


def test_zero_grad_clears_gradients():
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([param], LeakySum())
    optimizer.zero_grad(set_to_none=False)
    assert param.grad.item() == 0.0
    optimizer.zero_grad()
    assert param.grad is None


def test_closure_runs_once_with_gradients_enabled_and_its_loss_is_returned():
    model, calls = small_model(), []
    optimizer = LearnedOptimizer(model.parameters(), LeakySum())

    def closure():
        calls.append(torch.is_grad_enabled())
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss

    before = copy.deepcopy(model)
    loss = optimizer.step(closure)
    assert calls == [True]
    assert loss.item() == loss_of(before).item()
    assert loss_of(model) < loss
    assert optimizer.step() is None


def test_step_hooks_run():
    param, seen = parameter([1.0], [1.0]), []
    optimizer = LearnedOptimizer([param], LeakySum())
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


# -------------------- the same as torch.optim

TWINS = {
    "sgd": (SGDUpdate(0.05), lambda p: torch.optim.SGD(p, 0.05)),
    "nesterov": (
        SGDUpdate(0.05, momentum=0.9, nesterov=True),
        lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    ),
    "rmsprop": (RMSpropUpdate(0.01), lambda p: torch.optim.RMSprop(p, 0.01)),
    "adam": (AdamUpdate(0.02), lambda p: torch.optim.Adam(p, 0.02)),
}


@pytest.mark.parametrize("name", TWINS)
def test_trajectory_equals_torch_optim(name):
    rule, make = TWINS[name]
    ours, theirs = small_model(torch.float64), small_model(torch.float64)
    optimizer = LearnedOptimizer(ours.parameters(), rule)
    train(ours, optimizer, range(30))
    train(theirs, make(theirs.parameters()), range(30))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)  # float64 rounding, grown over 30 steps


def test_weight_decay_is_decoupled_as_in_adamw():
    ours, theirs = small_model(torch.float64), small_model(torch.float64)
    # AdamW decays by its lr times weight_decay, ours by the factor on the update times weight_decay
    train(ours, LearnedOptimizer(ours.parameters(), AdamUpdate(1.0), lr=0.02, weight_decay=0.3), range(20))
    train(theirs, torch.optim.AdamW(theirs.parameters(), 0.02, weight_decay=0.3), range(20))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_maximize_climbs_as_minimizing_the_negative():
    ours, theirs = small_model(), small_model()
    climb = LearnedOptimizer(ours.parameters(), AdamUpdate(0.01), maximize=True)
    descend = LearnedOptimizer(theirs.parameters(), AdamUpdate(0.01))
    for step in range(5):
        for model, optimizer, sign in ((ours, climb, 1), (theirs, descend, -1)):
            optimizer.zero_grad()
            (sign * loss_of(model, step)).backward()
            optimizer.step()
    assert_same(ours, theirs)
    assert loss_of(ours) > loss_of(small_model())


# -------------------- options, groups, schedulers


def test_lr_multiplies_the_update_and_groups_have_their_own():
    a, b, c = (parameter([1.0], [1.0]) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "lr": 0.5}, {"params": [c], "lr": 2.0, "weight_decay": 0.005}]
    LearnedOptimizer(groups, SGDUpdate(0.1), lr=1.0).step()
    assert [a.item(), b.item(), c.item()] == pytest.approx([0.9, 0.95, 0.8 - 0.01], rel=1e-6)  # float32


@pytest.mark.parametrize("lr", [torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5, dtype=torch.float64)])
@pytest.mark.parametrize("shape", [(), (3,)])
def test_lr_may_be_a_tensor(lr, shape):
    with_tensor, with_number = (parameter(torch.ones(shape), torch.ones(shape)) for _ in range(2))
    LearnedOptimizer([with_tensor], SGDUpdate(0.1), lr=lr, weight_decay=0.02).step()
    LearnedOptimizer([with_number], SGDUpdate(0.1), lr=0.5, weight_decay=0.02).step()
    torch.testing.assert_close(with_tensor, with_number)
    assert with_tensor.dtype == torch.float32


def test_two_optimizers_given_one_group_dict_share_no_counters():
    group = {"params": [parameter([1.0], [1.0])]}
    first, second = (LearnedOptimizer([group], LeakySum()) for _ in range(2))
    first.step()
    assert (first.n_steps, second.n_steps) == (1, 0)
    assert set(group) == {"params"}


def test_group_added_in_the_middle_of_a_run_is_trained_and_knows_the_runs_progress():
    old, new = parameter([1.0], [1.0]), parameter([1.0, 2.0], [1.0, 1.0])
    optimizer = LearnedOptimizer([old], LeakySum(), total_steps=4)
    optimizer.step()
    optimizer.add_param_group({"params": [new], "lr": 2.0})
    optimizer.step()
    # sum of one gradient, weight .1, a quarter of the run done, lr 2
    torch.testing.assert_close(new.detach(), torch.tensor([1.0, 2.0]) - 2 * 0.1 * (1 - 0.5 / 4))
    assert [group["n_steps"] for group in optimizer.param_groups] == [2, 2]


def test_named_parameters_are_taken_and_named_in_the_state_dict():
    model = small_model()
    optimizer = LearnedOptimizer(model.named_parameters(), LeakySum())
    train(model, optimizer, range(2))
    names = [name for name, _ in model.named_parameters()]
    assert optimizer.state_dict()["param_groups"][0]["param_names"] == names


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.3, total_iters=4),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 5),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.02, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=9, cycle_momentum=False),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_do_to_the_factor_what_they_do_to_the_lr_of_torch_optim(name):
    ours, theirs = small_model(torch.float64), small_model(torch.float64)
    optimizer = LearnedOptimizer(ours.parameters(), AdamUpdate(1.0), lr=0.02)
    twin = torch.optim.AdamW(theirs.parameters(), 0.02, weight_decay=0.0)  # lr outside, as ours
    train(ours, optimizer, range(8), SCHEDULERS[name](optimizer))
    train(theirs, twin, range(8), SCHEDULERS[name](twin))
    assert optimizer.param_groups[0]["lr"] == twin.param_groups[0]["lr"]
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_a_schedule_on_top_of_the_rules_own_is_warned_of_once():
    def run(n_steps, rule="port-hamiltonian-spectral", total_steps=10):
        optimizer = LearnedOptimizer([parameter([1.0], [1.0])], rule, total_steps=total_steps)
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
        for _ in range(n_steps):
            optimizer.step()
            scheduler.step()

    for quiet in ({"n_steps": 5}, {"n_steps": 9, "rule": "port-hamiltonian"}, {"n_steps": 9, "total_steps": None}):
        run(**quiet)  # warnings are errors here
    with pytest.warns(
        UserWarning, match="A scheduler has brought `lr` from 1 to 0.34.* on top of the rule's"
    ) as record:
        run(9)
    assert len(record) == 1
    assert record[0].filename == __file__


def test_reduce_on_plateau_lowers_the_factor():
    optimizer = LearnedOptimizer([parameter([1.0], [1.0])], LeakySum(), lr=1.0)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_scheduler_moves_a_tensor_lr():
    optimizer = LearnedOptimizer([parameter([1.0], [1.0])], LeakySum(), lr=torch.tensor(1.0))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"].item() == 0.5


# -------------------- the rule is a frozen copy


def test_callers_rule_is_never_changed_and_later_training_of_it_changes_nothing():
    rule = LeakySum().train()
    before = copy.deepcopy(rule.state_dict())
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([param], rule)
    optimizer.step()
    assert rule.training
    assert rule.weight.requires_grad
    assert rule.weight.grad is None
    assert torch.equal(rule.weight, before["weight"])
    with torch.no_grad():
        rule.weight.fill_(100.0)
    optimizer.step()
    assert param.item() == pytest.approx(1.0 - 0.1 * (1.0 + 1.9), rel=1e-6)  # float32
    assert not optimizer.rule.training
    assert not any(weight.requires_grad for weight in optimizer.rule.parameters())
