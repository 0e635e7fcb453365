"""Matrices that a rule steps as a whole: by LearnedOptimizer, in meta-training's layouts and tensor by tensor."""

import copy
import importlib
import math
import warnings

import pytest
import torch
from rule_toys import draws, port_hamiltonian
from torch import nn

from odeopt.meta import unroll
from odeopt.meta.estimators.perturbations import Perturbed, perturbed
from odeopt.meta.layouts import CompiledSteps, Grouped, Packed, Separate, Stacked, layout_for
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, PortHamiltonianUpdate
from odeopt.tasks import ScaledTask, Task
from odeopt.tasks.random import normal

f64 = torch.float64
# in this order: alike ones apart, a table of the shape of others, one row, scalars, nothing
SHAPES = {
    "first": (3, 4), "bias": (4,), "table": (3, 4), "wide": (2, 30), "second": (3, 4), "kernel": (4, 3, 1, 2),
    "row": (1, 3, 4), "scalar": (), "empty": (0, 4), "third": (3, 4),
}  # fmt: skip
VARIANTS = {
    "spectral": {"kinetic": "spectral"},
    "everything": {
        "kinetic": ("relativistic", "spectral"), "schedule": "power", "uses_progress": True, "memory": 2,
        "initial_decay": 0.1, "decay_growth": 1.1, "horizon_power": 0.4, "decay_horizon": 2.0,
        "ratio_floor": 0.3, "depth_power": 1.0, "alignment_rate": 2.0, "trust_ratio": 0.1,
    },
    "efforts by coordinates": {"kinetic": ("spectral", "quadratic"), "matrix_normalization": "coordinate"},
    "narrow": {"kinetic": "spectral", "narrow": 2, "depth_power": 1.0, "initial_decay": 0.1, "alignment_rate": 2.0},
    "every second step": {
        "kinetic": ("spectral", "quadratic"), "matrix_interval": 2, "initial_decay": 0.3, "trust_ratio": 0.2,
        "schedule": "power", "uses_progress": True, "horizon_power": 0.4,
    },
    "output": {"output": "spectral", "normalization": "tensor", "uses_progress": True},
}  # fmt: skip
over_variants = pytest.mark.parametrize("variant", VARIANTS)


class Tensors(Task):
    """Parameters of all kinds, coupled by one number that noise is added to."""

    tables = frozenset(["table"])

    def __init__(self, shapes=SHAPES):
        super().__init__(dtype=f64)
        self.shapes = shapes

    def init_params(self, indices, seed):
        return {
            name: normal(indices, shape, seed=seed, stream=f"test/{name}", dtype=f64)
            for name, shape in self.shapes.items()
        }

    def sample_batch(self, indices, step, seed):
        return (normal(indices, (1,), seed=seed, stream="test/noise", step=step, dtype=f64),)

    def loss(self, params, batch):
        x = torch.cat([param.reshape(len(param), param[0].numel()) for param in params.values()], 1)
        total = x.sin() @ torch.linspace(1, 2, x.shape[1], dtype=f64)
        return 0.1 * x.square().sum(1) + (0.3 * total + batch[0].squeeze(1)).sin()


N_STEPS, INDICES = 6, torch.tensor([5, 1, 2])


def spectral(variant, **options):
    return port_hamiltonian(**(VARIANTS[variant] | options))


def one_by_one(rule, step_of, shapes=SHAPES):
    """Losses and parameters of each task, the steps of which ``step_of(rule, params)`` takes."""
    task, losses, last = Tensors(shapes), [], []
    for index in INDICES:
        index = index.reshape(1)
        params = {name: nn.Parameter(x[0].clone()) for name, x in task.init_params(index, 0).items()}
        step, own = step_of(rule, params), []
        for number in range(N_STEPS + 1):
            batch = task.sample_batch(index, number, 0)
            loss = task.loss({name: x.unsqueeze(0) for name, x in params.items()}, batch).sum()
            own.append(loss.detach())
            for param, grad in zip(params.values(), torch.autograd.grad(loss, list(params.values())), strict=True):
                param.grad = grad
            if number < N_STEPS:
                step(number)
        losses.append(torch.stack(own))
        last.append({name: x.detach() for name, x in params.items()})
    return torch.stack(losses, 1), {name: torch.stack([x[name] for x in last]) for name in shapes}


def by_optimizer(rule, params):
    tables = [(name, x) for name, x in params.items() if name in Tensors.tables]
    others = [(name, x) for name, x in params.items() if name not in Tensors.tables]
    groups = [{"params": others}, {"params": tables, "is_table": True}]
    optimizer = LearnedOptimizer(groups, rule, total_steps=N_STEPS)
    return lambda number: optimizer.step()


def by_rule(rule, params):
    states = {name: rule.init_state(x.detach().flatten()) for name, x in params.items()}
    n_matrices = sum(rule.is_matrix(x.shape) and name not in Tensors.tables for name, x in params.items())

    @torch.no_grad()
    def step(number):
        progress = torch.tensor(number / N_STEPS, dtype=f64)
        for name, param in params.items():
            own = rule.for_tables() if name in Tensors.tables else rule.for_depth(n_matrices)
            signals = {"param": param.flatten(), "shape": param.shape, "progress": progress}
            update, states[name] = own(param.grad.flatten(), states[name], **signals)
            param += update.view(param.shape)

    return step


@pytest.mark.parametrize("n_matrices", [5, 2])
@over_variants
def test_rule_optimizer_and_unrolled_run_give_one_trajectory(variant, n_matrices):
    rule = spectral(variant)
    shapes = {
        name: shape for name, shape in SHAPES.items() if n_matrices == 5 or name not in ("first", "third", "wide")
    }
    with torch.no_grad():
        run = unroll(rule, Tensors(shapes), indices=INDICES, n_steps=N_STEPS, total_steps=N_STEPS)
    for step_of in (by_optimizer, by_rule):
        losses, params = one_by_one(rule, step_of, shapes)
        # float64: sums in another order, and products of matrices in batches, grown over six steps
        torch.testing.assert_close(run.losses, losses, rtol=1e-9, atol=1e-10)
        for name, param in params.items():
            torch.testing.assert_close(run.params[name], param, rtol=1e-9, atol=1e-10)


# -------------------- layouts


def gradient(rule, task, **options):
    owner = rule.rule if isinstance(rule, CompiledSteps) else rule
    owner.zero_grad()
    run = unroll(rule, task, indices=INDICES, n_steps=5, total_steps=5, **options)
    (run.losses + 10).log().mean().backward()
    return run, nn.utils.parameters_to_vector([weight.grad for weight in owner.parameters()])


@pytest.mark.parametrize("options", [{}, {"checkpoint_every": 2}, {"detach": True}], ids=str)
@over_variants
def test_groups_of_layouts_are_the_run_of_each_parameter_by_itself(variant, options, monkeypatch):
    rule, task = spectral(variant), Tensors()
    found, found_gradient = gradient(rule, task, **options)
    module = importlib.import_module("odeopt.meta.unroll")
    n_matrices = sum(rule.is_matrix(shape) for name, shape in SHAPES.items() if name not in (*Tensors.tables, "empty"))
    monkeypatch.setattr(module, "layout_for", lambda rule, shapes, like, tables: Separate(shapes, tables, n_matrices))
    wanted, wanted_gradient = gradient(rule, task, **options)
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found_gradient, wanted_gradient, rtol=1e-7, atol=1e-9)
    assert found_gradient.isfinite().all()
    for name, states in wanted.states.items():
        for ours, theirs in zip(found.states[name], states, strict=True):
            assert ours.shape == theirs.shape
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10, equal_nan=True)


def test_a_run_goes_on_from_the_states_of_its_groups():
    rule, options = spectral("everything"), {"task": Tensors(), "indices": INDICES, "total_steps": 7}
    with torch.no_grad():
        whole, first = unroll(rule, n_steps=7, **options), unroll(rule, n_steps=3, **options)
        rest = unroll(rule, n_steps=4, start=3, params=first.params, states=first.states, **options)
    assert torch.equal(whole.losses[3:], rest.losses)


def test_matrices_are_stacked_by_shapes_and_the_rest_lies_side_by_side():
    rule, like = spectral("spectral"), torch.zeros(2, 3, dtype=f64)
    shapes = {name: torch.Size((2, *shape)) for name, shape in SHAPES.items()}

    def parts(shapes, tables=("table",)):
        layout = layout_for(rule, {name: shapes[name] for name in shapes}, like, tables)
        if type(layout) is not Grouped:
            return type(layout)
        return {tuple(part.shapes): type(part) for part in layout.layouts}

    assert parts(shapes) == {
        ("bias", "table", "row", "scalar"): Packed,
        ("first", "second", "third"): Stacked,
        ("wide",): Stacked,
        ("kernel",): Stacked,
        ("empty",): Separate,
    }
    assert parts({"first": shapes["first"]}) == {("first",): Stacked}
    assert parts({name: shapes[name] for name in ("bias", "table")}) is Packed
    assert parts({name: shapes[name] for name in ("table", "empty")}) is Separate


def test_loss_sees_the_parameters_in_the_order_of_the_task():
    """Other units are numbered in it."""
    rule, options = spectral("spectral"), {"indices": INDICES, "n_steps": 1}
    with torch.no_grad():
        plain, rescaled = (unroll(rule, task, **options) for task in (Tensors(), ScaledTask(Tensors(), log_range=1.0)))
    torch.testing.assert_close(rescaled.losses[0], plain.losses[0], rtol=1e-12, atol=1e-12)
    assert (rescaled.losses[1] - plain.losses[1]).abs().min() > 1e-3
    assert list(plain.params) == list(plain.states) == list(SHAPES)


def test_number_of_rule_calls_does_not_grow_with_the_number_of_matrices():
    calls = []
    for n in (1, 4):
        rule = spectral("spectral")
        rule.coefficient_network.register_forward_hook(lambda *_: calls.append(1))
        shapes = {"bias": (3,), **{f"matrix {k}": (3, 4) for k in range(n)}}
        with torch.no_grad():
            unroll(rule, Tensors(shapes), indices=INDICES, n_steps=2)
        assert len(calls) == 4
        calls.clear()


@pytest.mark.parametrize("kind", [perturbed, Perturbed], ids=["layers", "vmap"])
@pytest.mark.parametrize("variant", ["everything", "every second step", "output"])
def test_perturbed_rules_step_matrices_and_tables_each_by_its_own_weights(variant, kind):
    rule = spectral(variant, depth_power=1.0)  # whose steps fall with the number of matrices, up to five of them
    task = Tensors({name: SHAPES[name] for name in SHAPES if name not in ("empty", "second", "third")})
    stacks = {name: w + 0.1 * draws(2, *w.shape, seed=k) for k, (name, w) in enumerate(rule.named_parameters())}
    options = {"n_steps": 4, "total_steps": 4}
    with torch.no_grad():
        found = unroll(kind(rule, stacks), task, indices=INDICES.repeat(2), **options).losses.unflatten(1, (2, 3))
        for k in range(2):
            own = {name: stack[k] for name, stack in stacks.items()}
            rule.load_state_dict(own)
            wanted = unroll(rule, task, indices=INDICES, **options).losses
            torch.testing.assert_close(found[:, k], wanted, rtol=1e-9, atol=1e-10)
    assert (found[-1, 0] - found[-1, 1]).abs().max() > 1e-4


@pytest.mark.parametrize("names", [list(SHAPES), ["table", "empty"]], ids=["all", "table and nothing"])
def test_compiled_steps_leave_matrices_as_they_are(names, monkeypatch):
    # what compiling does is tested with the layouts and takes half a minute
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    rule, task = spectral("everything"), Tensors({name: SHAPES[name] for name in names})
    wanted, wanted_gradient = gradient(rule, task)
    found, found_gradient = gradient(CompiledSteps(rule), task)
    torch.testing.assert_close(found.losses, wanted.losses, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(found_gradient, wanted_gradient, rtol=1e-7, atol=1e-9)


# -------------------- the optimizer


def parameter(*shape, seed=0, dtype=f64):
    return nn.Parameter(draws(*shape, seed=seed).to(dtype))


def step(params, optimizer, n_steps=1, start=0):
    for number in range(start, start + n_steps):
        for k, param in enumerate(params):
            param.grad = draws(*param.shape, seed=100 * number + k).to(param.dtype)
        optimizer.step()


def test_matrices_of_one_shape_are_stepped_by_one_call():
    rule, calls = spectral("spectral"), []
    params = [parameter(3, 4, seed=k) for k in range(5)] + [parameter(4, 3)]
    optimizer = LearnedOptimizer(params, rule)
    rule = optimizer._layout.rule_for(params[0], optimizer.param_groups[0])
    rule.register_forward_hook(lambda _, inputs, __: calls.append(inputs[0].shape))
    step(params, optimizer, 2)
    assert sorted(calls) == sorted([(5, 12), (1, 12)] * 2)


def test_steps_of_matrices_fall_with_their_number_and_nothing_else_does():
    options = {"kinetic": "spectral", "initial_decay": 0.1}
    plain, rule = (PortHamiltonianUpdate(**options, depth_power=power).double() for power in (0.0, 1.0))
    for n_layers, factor in [(1, 16.0), (2, 4.0), (3, 2.0), (4, 4 / 3), (5, 1.0), (12, 1.0)]:
        moves = []
        for own in (plain, rule):
            layers, table, bias = [parameter(3, 4, seed=k) for k in range(n_layers)], parameter(3, 4), parameter(4)
            groups = [{"params": [*layers, bias]}, {"params": [table], "is_table": True}]
            optimizer, params = LearnedOptimizer(groups, own), [*layers, bias, table]
            before = [param.detach().clone() for param in params]
            step(params, optimizer)
            moves.append([param.detach() - old for param, old in zip(params, before, strict=True)])
        decay = 0.1 * 0.03  # per step and unit of the weight, of a matrix: the same at any depth
        for old, one, other in zip(before[:n_layers], *(x[:n_layers] for x in moves), strict=True):
            torch.testing.assert_close(other + decay * old, factor * (one + decay * old))
        for one, other in zip(*(x[n_layers:] for x in moves), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("is_by_hand", [False, True])
def test_frozen_matrices_do_not_count_and_those_unfrozen_count_from_the_next_step_on(is_by_hand):
    rule = spectral("spectral", depth_power=1.0)
    frozen = [parameter(3, 4, seed=k).requires_grad_(False) for k in range(3)]
    head, alone, beside = (parameter(3, 4, seed=9).requires_grad_(not is_by_hand) for _ in range(3))
    a, b = LearnedOptimizer([*frozen, head], rule), LearnedOptimizer([alone], rule)
    step([head], a, 2)
    step([alone], b, 2)
    assert torch.equal(head, alone)

    beside.data.copy_(head)
    c = LearnedOptimizer([*[parameter(3, 4, seed=k) for k in range(3)], beside], rule)
    c.load_state_dict(a.state_dict())
    for param in frozen:
        param.requires_grad_()
    step([head], a, start=2)
    step([alone], b, start=2)
    step([beside], c, start=2)
    assert not torch.equal(head, alone)
    assert torch.equal(head, beside)  # a run that is taken up again is the run that was not interrupted


def test_number_of_matrices_counts_those_that_came_later():
    rule = spectral("spectral", depth_power=1.0)
    first, second, later = (parameter(3, 4, seed=k) for k in range(3))
    grown, whole = [copy.deepcopy(first) for _ in range(2)]
    a, b = LearnedOptimizer([grown, second], rule), LearnedOptimizer([whole, copy.deepcopy(second), later], rule)
    step([grown], a)
    a.add_param_group({"params": [copy.deepcopy(later)]})
    step([grown], a, start=1)
    moves = []
    for param, optimizer in ((grown, a), (whole, b)):
        param.data.copy_(first)
        optimizer.state.clear()
        before = param.detach().clone()
        step([param], optimizer, start=2)
        moves.append(param.detach() - before)
    torch.testing.assert_close(*moves)


def test_in_a_stack_each_matrix_keeps_its_own_time_and_trouble():
    """One is without a gradient at first, one has a broken one later; the others do not notice."""
    rule = spectral("everything", depth_power=0.0)  # of how many there are they do
    stack, alone = ([parameter(3, 4, seed=k) for k in range(3)] for _ in range(2))
    optimizers = [LearnedOptimizer(stack, rule)] + [LearnedOptimizer([param], rule) for param in alone]
    for number in range(5):
        for k, (param, twin) in enumerate(zip(stack, alone, strict=True)):
            grad = draws(3, 4, seed=10 * number + k)
            if (number, k) == (3, 1):
                grad[1, 2] = math.inf
            param.grad, twin.grad = (None, None) if number < 2 and k == 2 else (grad, grad.clone())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            for optimizer in optimizers:
                optimizer.step()
    assert [optimizer.n_skipped for optimizer in optimizers] == [1, 0, 1, 0]
    for k, (param, twin) in enumerate(zip(stack, alone, strict=True)):
        torch.testing.assert_close(param, twin, rtol=1e-11, atol=1e-12)
        taken = (5, 4, 3)[k]
        assert optimizers[0].state[param]["step"].item() == optimizers[k + 1].state[twin]["step"].item() == taken


@pytest.mark.parametrize("variant", ["everything", "output"])
def test_checkpoint_continues_stacks_bit_for_bit(variant):
    rule = spectral(variant)
    shapes = [(3, 4), (3, 4), (5,), (2, 3, 1, 2)]
    params, twins = ([parameter(*shape, seed=k) for k, shape in enumerate(shapes)] for _ in range(2))
    options = {"rule": rule, "total_steps": 9}
    optimizer = LearnedOptimizer(params, **options)
    step(params, optimizer, 3)
    for param, twin in zip(params, twins, strict=True):
        twin.data.copy_(param.detach())
    other = LearnedOptimizer(twins[:1], **options)
    other.add_param_group({"params": twins[1:]})
    saved = copy.deepcopy(optimizer.state_dict())
    assert saved["state"][1]["p"].shape == (2, 3, 4)
    own = other.state_dict()
    own["state"] = saved["state"]
    for group in own["param_groups"]:
        group["n_steps"] = 3
    other.load_state_dict(own)
    for each, tensors in ((optimizer, params), (other, twins)):
        step(tensors, each, 4, start=3)
    for param, twin in zip(params, twins, strict=True):
        torch.testing.assert_close(param, twin, rtol=1e-11, atol=1e-12)  # other stacks, other roundings


def test_matrix_that_is_not_contiguous_is_stepped_as_its_copy_is():
    rule = spectral("everything")
    turned, plain = nn.Parameter(draws(4, 3).t()), parameter(3, 4)
    plain.data.copy_(turned.detach())
    assert not turned.is_contiguous()
    for param in (turned, plain):
        step([param], LearnedOptimizer([param], rule), 3)
    assert torch.equal(turned, plain)
    assert not turned.is_contiguous()


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_bfloat16_matrices_follow_float32(state_dtype):
    rule = PortHamiltonianUpdate(**VARIANTS["everything"])
    narrow, wide = ([parameter(8, 6, seed=k, dtype=dtype) for k in (1, 2)] for dtype in (torch.bfloat16, torch.float32))
    for params in (narrow, wide):
        step(params, LearnedOptimizer(params, rule, state_dtype=state_dtype), 4)
    for a, b, start in zip(narrow, wide, (1, 2), strict=True):
        assert a.dtype == torch.bfloat16
        # the parameter is rounded to 2^-8 of itself each step, and the gradient was
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2)
        assert (b - draws(8, 6, seed=start).float()).abs().max() > 0.05


@pytest.mark.parametrize("is_table", [False, True])
def test_what_a_group_says_of_tables_counts_from_the_next_step_on(is_table):
    rule = spectral("spectral")
    param, twin = parameter(3, 4), parameter(3, 4)
    optimizer, other = (LearnedOptimizer([{"params": [x], "is_table": is_table}], rule) for x in (param, twin))
    step([param], optimizer, 2)
    optimizer.param_groups[0]["is_table"] = not is_table
    step([param], optimizer, 1, start=2)
    step([twin], other, 2)
    saved = other.state_dict()
    saved["param_groups"][0]["is_table"] = not is_table
    other = LearnedOptimizer([twin], rule)
    other.load_state_dict(saved)
    step([twin], other, 1, start=2)
    assert torch.equal(param, twin)
    optimizer.param_groups[0]["is_table"] = is_table
    step([param], optimizer, 1, start=3)
    step([twin], other, 1, start=3)
    assert not torch.equal(param, twin)


@pytest.mark.parametrize("is_table", [None, 1, "yes"])
def test_is_table_is_true_or_false(is_table):
    with pytest.raises(ValueError, match=r"`is_table` should be True or False. Found `is_table = "):
        LearnedOptimizer([{"params": [parameter(2, 3)], "is_table": is_table}], AdamUpdate())
