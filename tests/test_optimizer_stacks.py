"""Stacks: several tensors in one parameter, which are stepped as if each were a parameter."""

import copy
import math
import pickle

import pytest
import torch
import torch.distributed as dist
from optimizer_toys import RULES
from rule_toys import draws, port_hamiltonian
from test_optimizer_matrices import VARIANTS
from torch import nn

import odeopt
from odeopt import Guard, LearnedOptimizer
from odeopt.rules import AdamUpdate, PortHamiltonianUpdate
from odeopt.stepping import layout
from odeopt.stepping.native import native_status

f64 = torch.float64
N_NETWORKS = 3
# of each network: alike ones, one narrow, one of several rows, vectors, one row, a number, nothing
SHAPES = [(3, 4), (3, 4), (2, 30), (4, 3, 1, 2), (40, 70), (4,), (1, 3, 4), (), (0, 4)]
SETTINGS = {
    "plain": {},
    "decay, length told": {"lr": 0.7, "weight_decay": 0.001, "total_steps": 5},
    "climbing, average": {"maximize": True, "averaging": 8.0, "lr": torch.tensor(0.3)},
    "captured": {"capturable": True, "total_steps": 4},
}
over_settings = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
needs_native = pytest.mark.skipif(not native_status().startswith("native"), reason="the step in C was not built")


def start(dtype=f64, shapes=SHAPES):
    return [draws(N_NETWORKS, *shape, seed=k).to(dtype) for k, shape in enumerate(shapes)]


def gradients(step, dtype=f64, shapes=SHAPES):
    """Of several sizes, and none for one parameter at first."""
    found = [10.0 ** (k % 3) * draws(N_NETWORKS, *shape, seed=100 * step + k) for k, shape in enumerate(shapes)]
    return [None if step == 0 and k == 1 else grad.to(dtype) for k, grad in enumerate(found)]


def as_stacks(rule, dtype=f64, shapes=SHAPES, **settings):
    params = [nn.Parameter(x.clone()) for x in start(dtype, shapes)]
    return params, LearnedOptimizer([{"params": params, "is_stack": True}], rule, **settings)


def as_networks(rule, dtype=f64, shapes=SHAPES, **settings):
    """The same networks, of parameters of their own, each with an optimizer of its own."""
    networks = [[nn.Parameter(x[k].clone()) for x in start(dtype, shapes)] for k in range(N_NETWORKS)]
    return networks, [LearnedOptimizer(params, rule, **settings) for params in networks]


def step_both(stacks, networks, step):
    (params, optimizer), (all_own, optimizers) = stacks, networks
    grads = gradients(step, params[0].dtype, [tuple(param.shape[1:]) for param in params])
    for index, (param, grad) in enumerate(zip(params, grads, strict=True)):
        param.grad = None if grad is None else grad.clone()
        for k, own in enumerate(all_own):
            own[index].grad = None if grad is None else grad[k].clone()
    for each in (optimizer, *optimizers):
        each.step()


def assert_alike(stacks, networks, close):
    """Compare parameters and states, the fields of which lie along one more axis in those of a stack."""
    (params, optimizer), (all_own, optimizers) = stacks, networks
    for index, param in enumerate(params):
        for k, (own, other) in enumerate(zip(all_own, optimizers, strict=True)):
            close(param[k].detach(), own[index].detach())
            found, wanted = optimizer.state[param], other.state[own[index]]
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                axis = next(i for i in range(value.ndim + 1) if found[name].shape == _with_axis(value.shape, i))
                close(found[name].select(axis, k), value)


def _with_axis(shape, axis):
    return (*shape[:axis], N_NETWORKS, *shape[axis:])


def to_the_bit(found, wanted):
    assert torch.equal(found, wanted)


def to_rounding(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)  # sums and products of other batches, in float64


# -------------------- equality with parameters of their own


@over_settings
@pytest.mark.parametrize("in_place_from", [1, 2**16], ids=["in place", "packed"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_stacks_are_stepped_as_the_networks_by_themselves(variant, in_place_from, settings, monkeypatch):
    monkeypatch.setattr(layout, "_STEPPED_IN_PLACE", {"cpu": in_place_from})
    rule = port_hamiltonian(**VARIANTS[variant])
    pair = [make(rule, implementation="eager", **settings) for make in (as_stacks, as_networks)]
    for step in range(4):
        step_both(*pair, step)
    assert_alike(*pair, to_rounding)
    moved = [not torch.equal(param, x) for param, x in zip(pair[0][0], start(), strict=True)]
    assert moved == [param.numel() > 0 for param in pair[0][0]]


@needs_native
@over_settings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_natively_they_are_the_same_to_the_bit(variant, dtype, settings):
    rule = port_hamiltonian(**VARIANTS[variant], dtype=torch.float32)
    settings = {"implementation": "native", "state_dtype": dtype} | settings
    pair = [make(rule, dtype, **settings) for make in (as_stacks, as_networks)]
    for step in range(4):
        step_both(*pair, step)
    assert all(plan.native is not None for plan in pair[0][1]._layout.plans)
    assert_alike(*pair, to_the_bit)


@pytest.mark.parametrize("implementation", ["eager", "auto"])
@pytest.mark.parametrize("name", ["port-hamiltonian-spectral", "port-hamiltonian"])
def test_shipped_rules_step_stacks_as_networks(name, implementation):
    rule = odeopt.load_pretrained(name)
    settings = {"implementation": implementation, "total_steps": 6, "weight_decay": 1e-4}
    pair = [make(rule, torch.float32, **settings) for make in (as_stacks, as_networks)]
    for step in range(6):
        step_both(*pair, step)
    # Newton-Schulz multiplies roundings of float32 by up to 485
    assert_alike(*pair, lambda found, wanted: torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4))


@pytest.mark.parametrize("name", [*RULES, "adaptive"])
def test_any_rule_steps_stacks_as_networks(name):
    rule = port_hamiltonian(solver="dopri5") if name == "adaptive" else RULES[name]()
    pair = [make(rule.double(), total_steps=9) for make in (as_stacks, as_networks)]
    for step in range(3):
        step_both(*pair, step)
    assert_alike(*pair, to_rounding)


def test_tables_of_several_networks_are_stacks_too():
    rule, shapes = port_hamiltonian(kinetic="spectral"), [(5, 3), (6,)]
    stacks, networks = pair = [make(rule, shapes=shapes) for make in (as_stacks, as_networks)]
    for each in (stacks[1], *networks[1]):
        each.param_groups[0]["is_table"] = True
    for step in range(2):
        step_both(*pair, step)
    assert_alike(*pair, to_rounding)
    assert all(placed.rule.steps_tables for placed in stacks[1]._layout.placed)


@pytest.mark.parametrize("implementation", ["eager", "auto"])
def test_stacks_whose_memory_is_not_contiguous_are_stepped_as_their_copies(implementation):
    rule = port_hamiltonian(kinetic=("spectral", "quadratic"), dtype=torch.float32)
    turned, plain = nn.Parameter(draws(4, 3, 5).float().permute(1, 2, 0)), nn.Parameter(torch.empty(3, 5, 4))
    plain.data.copy_(turned.detach())
    for param in (turned, plain):
        optimizer = LearnedOptimizer([{"params": [param], "is_stack": True}], rule, implementation=implementation)
        for step in range(3):
            param.grad = draws(3, 5, 4, seed=step).float()
            optimizer.step()
    assert not turned.is_contiguous()
    assert torch.equal(turned, plain)


# -------------------- depth


def test_a_stack_counts_as_one_matrix_in_the_depth_of_the_network():
    rule = port_hamiltonian(kinetic="spectral", depth_power=1.0)
    for n_layers in (1, 2, 3, 6):
        for beside in (0, 1):
            shapes = [*[(3, 4)] * n_layers, (4,)]
            stacks, networks = (make(rule, shapes=shapes) for make in (as_stacks, as_networks))
            if beside:
                for optimizer in (stacks[1], *networks[1]):
                    optimizer.add_param_group({"params": [nn.Parameter(draws(5, 6))]})
            step_both(stacks, networks, 1)
            assert_alike(stacks, networks, to_rounding)
            factors = {placed.rule.depth_factor for placed in stacks[1]._layout.placed if placed.bucket.is_whole}
            assert factors == {rule.for_depth(n_layers + beside).depth_factor}


# -------------------- tensors that have trouble, or nothing to do


@pytest.mark.parametrize("implementation", ["eager", "auto"])
@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("shape", [(3, 4), (4,), (40, 70)], ids=str)
def test_a_gradient_that_is_not_finite_stops_its_tensor_alone(shape, bad, implementation):
    rule = port_hamiltonian(kinetic="spectral", initial_decay=0.1, dtype=torch.float32)
    options = {"implementation": implementation, "weight_decay": 1e-3}
    experts = nn.Parameter(draws(4, *shape).float())
    own = [nn.Parameter(x.clone()) for x in experts.detach()]
    optimizer = LearnedOptimizer([{"params": [("experts", experts)], "is_stack": True}], rule, **options)
    others = [LearnedOptimizer([param], rule, **options) for param in own]
    for step in range(4):
        grad = draws(4, *shape, seed=step).float()
        if step == 2:
            grad[1].view(-1)[-1] = bad
        experts.grad, before = grad.clone(), experts[1].detach().clone()
        for param, x in zip(own, grad, strict=True):
            param.grad = x.clone()
        if step == 2:
            with pytest.warns(RuntimeWarning, match=r"Parameter `experts\[1\]` was not moved at step 3"):
                optimizer.step()
            assert torch.equal(experts[1], before)
            with pytest.warns(RuntimeWarning, match="was not moved"):
                others[1].step()
            for k in (0, 2, 3):
                others[k].step()
        else:
            for each in (optimizer, *others):
                each.step()
    assert optimizer.n_skipped == 1
    assert optimizer.state[experts]["step"].flatten().tolist() == [4, 3, 4, 4]
    torch.testing.assert_close(experts, torch.stack(own), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "auto"])
@pytest.mark.parametrize("name", ["port-hamiltonian-spectral", "port-hamiltonian", "adam"])
@pytest.mark.parametrize("shape", [(6, 5), (5,), (300, 300)], ids=str)
def test_an_expert_that_no_input_was_sent_to_is_left_alone(shape, name, implementation, monkeypatch):
    """As a parameter without a gradient is: no decay, no move along an old momentum, and time stands still."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    rule = AdamUpdate(0.01) if name == "adam" else odeopt.load_pretrained(name)
    experts, routed = nn.Parameter(draws(4, *shape).float()), [[0, 2], [0], [0, 1, 2], [], [1, 2, 3]]
    own = [nn.Parameter(x.clone()) for x in experts.detach()]
    settings = {"implementation": implementation, "total_steps": 8, "weight_decay": 1e-3}
    optimizer = LearnedOptimizer([{"params": [experts], "is_stack": True}], rule, **settings)
    others = [LearnedOptimizer([param], rule, **settings) for param in own]
    for step, chosen in enumerate(routed):
        grad = torch.zeros(4, *shape)
        grad[chosen] = draws(4, *shape, seed=step).float()[chosen]
        experts.grad, before = grad, experts.detach().clone()
        for k, param in enumerate(own):
            param.grad = grad[k].clone() if k in chosen else None
        for each in (optimizer, *others):
            each.step()
        assert [k for k in range(4) if not torch.equal(experts[k], before[k])] == chosen
    assert optimizer.n_skipped == 0
    assert optimizer.state[experts]["step"].flatten().tolist() == [3, 2, 3, 1]
    # the same products in larger batches; Newton-Schulz multiplies their roundings by up to 485
    torch.testing.assert_close(experts, torch.stack(own), rtol=1e-3, atol=1e-4)


def test_diagnostics_know_of_the_expert_that_is_left_alone():
    experts = nn.Parameter(draws(3, 6, 5).float())
    optimizer = LearnedOptimizer([{"params": [("experts", experts)], "is_stack": True}], weight_decay=0.001)
    experts.grad = draws(3, 6, 5, seed=1).float()
    optimizer.step()
    experts.grad[1] = 0
    told = optimizer.diagnostics()["experts"]["update_to_weight"]
    before = experts.detach().clone()
    optimizer.step()
    moved = (experts.detach() - before).flatten(1).norm(dim=1) / before.flatten(1).norm(dim=1)
    torch.testing.assert_close(told, moved, rtol=1e-3, atol=0)
    assert told[1] == 0


# -------------------- checkpoints and edits


@pytest.mark.parametrize("implementation", ["eager", "auto"])
@pytest.mark.parametrize("way", ["state_dict", "pickle", "deepcopy"])
@pytest.mark.parametrize("variant", ["everything", "narrow"])
def test_a_resumed_run_continues_bit_for_bit(variant, way, implementation):
    rule = port_hamiltonian(**VARIANTS[variant], dtype=torch.float32)
    settings = {"total_steps": 6, "implementation": implementation, "averaging": 2.0}
    # eagerly, tensors that come later are in a call of their own until the run is resumed, and rounded otherwise
    first = 1 if implementation == "eager" else 0

    def steps(params, optimizer, numbers):
        for number in numbers:
            for param, grad in zip(params, gradients(number, torch.float32), strict=True):
                param.grad = grad
            optimizer.step()

    params, optimizer = as_stacks(rule, torch.float32, **settings)
    steps(params, optimizer, range(first, 3))
    if way == "state_dict":
        twins, other = as_stacks(rule, torch.float32, **settings)
        for param, twin in zip(params, twins, strict=True):
            twin.data.copy_(param.detach())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    else:
        other = pickle.loads(pickle.dumps(optimizer)) if way == "pickle" else copy.deepcopy(optimizer)
        twins = other.param_groups[0]["params"]
    assert other.param_groups[0]["is_stack"]
    for each in ((params, optimizer), (twins, other)):
        steps(*each, range(3, 6))
    for param, twin in zip(params, twins, strict=True):
        assert torch.equal(param, twin)
        for name, value in optimizer.state[param].items():
            assert torch.equal(value, other.state[twin][name])


@pytest.mark.parametrize("name", RULES)
def test_state_lies_in_the_shape_of_the_stack_or_has_its_axis_in_front(name):
    rule, shape = RULES[name](), (4, 5, 3)
    param, one = nn.Parameter(draws(*shape).float()), nn.Parameter(draws(*shape[1:]).float())
    for each, is_stack in ((param, True), (one, False)):
        each.grad = torch.ones_like(each)
        optimizer = LearnedOptimizer([{"params": [each], "is_stack": is_stack}], rule)
        optimizer.step()
        if is_stack:
            held = {name: x.shape for name, x in optimizer.state[each].items()}
    for name, value in optimizer.state[one].items():
        per_coordinate = value.shape[-2:] == (5, 3) or value.shape[:2] == (5, 3)
        assert held[name].numel() == 4 * value.numel()
        assert per_coordinate or held[name] == (4, *value.shape)


def test_what_is_edited_in_the_state_of_one_tensor_counts_from_the_next_step_on():
    rule = port_hamiltonian(dtype=torch.float32)  # several rows of 1,024 for each tensor
    param, twin = (nn.Parameter(torch.ones(2, 50, 60)) for _ in range(2))
    for each in (param, twin):
        each.grad = draws(2, 50, 60).float()
    a, b = (LearnedOptimizer([{"params": [x], "is_stack": True}], rule, implementation="eager") for x in (param, twin))
    for optimizer in (a, b):
        optimizer.step()
    a.state[param]["p"][:, 1] = 0
    a.state[param]["step"][1] = 40
    for optimizer in (a, b):
        optimizer.step()
    assert torch.equal(param[0], twin[0])
    assert not torch.equal(param[1], twin[1])
    assert a.state[param]["step"].flatten().tolist() == [2, 41]


def test_a_parameter_that_was_given_other_memory_is_followed():
    rule = port_hamiltonian(kinetic="spectral", dtype=torch.float32)
    params, optimizer = as_stacks(rule, torch.float32)
    twins, other = as_stacks(rule, torch.float32)
    for number in range(1, 4):
        for param, twin, grad in zip(params, twins, gradients(number, torch.float32), strict=True):
            param.grad, twin.grad, twin.data = grad.clone(), grad, twin.detach().clone()
        optimizer.step()
        other.step()
    assert all(map(torch.equal, params, twins))


def test_state_that_is_not_that_of_a_stack_is_refused_by_name():
    param = nn.Parameter(draws(3, 4, 5))
    optimizer = LearnedOptimizer([("experts", param)], port_hamiltonian())
    param.grad = draws(3, 4, 5)
    optimizer.step()
    before = param.detach().clone()
    optimizer.param_groups[0]["is_stack"] = True
    for _ in range(2):
        with pytest.raises(
            ValueError, match=r"`experts` should have a state of .*'step': \(3, 1\).* Found .*'step': \(1,"
        ):
            optimizer.step()
    assert torch.equal(param, before)
    optimizer.param_groups[0]["is_stack"] = False
    optimizer.step()
    assert not torch.equal(param, before)


# -------------------- refusals


@pytest.mark.parametrize("is_stack", [None, 1, "yes"])
def test_is_stack_is_true_or_false(is_stack):
    with pytest.raises(ValueError, match=r"`is_stack` should be True or False. Found `is_stack = "):
        LearnedOptimizer([{"params": [nn.Parameter(draws(2, 3))], "is_stack": is_stack}], AdamUpdate())


def test_a_number_is_no_stack():
    message = r"`scale` should hold several tensors along its first axis.*Found shape \(\)"
    scale = nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([{"params": [("scale", scale)], "is_stack": True}], AdamUpdate())
    optimizer = LearnedOptimizer([("scale", scale)], AdamUpdate())
    optimizer.param_groups[0]["is_stack"] = True
    scale.grad = torch.ones(())
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.fixture
def mesh():
    """Of two processes, the other one of which is not there."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


@pytest.mark.parametrize(("axis", "n"), [(1, 2), (0, 1)], ids=["pieces of tensors", "none for one process"])
@pytest.mark.parametrize("rule", [AdamUpdate(), PortHamiltonianUpdate(kinetic="spectral")], ids=["adam", "spectral"])
def test_a_stack_that_is_sharded_otherwise_is_refused_by_name_with_a_way_out(mesh, rule, axis, n):
    from torch.distributed.tensor import DTensor, Shard

    local, shape = draws(n, 4, 4), torch.Size((n, 4 * (1 + axis), 4))
    where = {"run_check": False, "shape": shape, "stride": draws(*shape).stride()}
    shard = nn.Parameter(DTensor.from_local(local, mesh, [Shard(axis)], **where))
    message = r"`experts` should hold .* and be whole on each.*`is_table=True` in place of.*`placements = \(Shard"
    with pytest.raises(ValueError, match=message):
        LearnedOptimizer([{"params": [("experts", shard)], "is_stack": True}], rule)
    LearnedOptimizer([{"params": [("experts", shard)], "is_table": True}], rule)


@pytest.mark.parametrize("shape", [(3, 4), (50, 60)], ids=str)
@pytest.mark.parametrize("options", [{}, {"kinetic": "spectral"}], ids=str)
def test_copies_on_all_processes_are_stepped_as_one(mesh, options, shape):
    from torch.distributed.tensor import DTensor, Replicate

    def whole(x):
        return DTensor.from_local(x, mesh, [Replicate()], run_check=False)

    rule, first = port_hamiltonian(**options), draws(3, *shape)
    plain, copies = nn.Parameter(first.clone()), nn.Parameter(whole(first.clone()))
    for param in (plain, copies):
        optimizer = LearnedOptimizer([{"params": [param], "is_stack": True}], rule)
        for step in range(3):
            grad = draws(3, *shape, seed=step)
            param.grad = whole(grad) if param is copies else grad
            optimizer.step()
    assert torch.equal(copies.detach().to_local(), plain)
    assert optimizer.state[copies]["p"].shape == (2, 3, *shape)
    assert optimizer.state[copies]["p"].placements == (Replicate(),)


# -------------------- beside the step


@pytest.mark.parametrize("settings", [{}, {"weight_decay": 0.001, "maximize": True, "total_steps": 4}], ids=str)
@pytest.mark.parametrize("variant", ["everything", "narrow"])
def test_diagnostics_of_a_stack_are_those_of_its_tensors(variant, settings):
    rule = port_hamiltonian(**VARIANTS[variant])
    pair = [make(rule, **settings) for make in (as_stacks, as_networks)]
    for step in range(1, 3):
        step_both(*pair, step)
    found, wanted = pair[0][1].diagnostics(), [other.diagnostics() for other in pair[1][1]]
    assert len(found) == len(SHAPES) - 1  # but for the one that is empty
    for name, quantities in found.items():
        for key, value in quantities.items():
            torch.testing.assert_close(value, torch.stack([own[name][key] for own in wanted]), rtol=1e-8, atol=1e-10)


def test_a_guard_hands_stacks_to_its_fallback_and_takes_them_back():
    params, optimizer = as_stacks(
        port_hamiltonian(kinetic="spectral"), shapes=[(3, 4), (4,)], guard=Guard(AdamUpdate(0.01), window=4, patience=1)
    )
    seen = set()
    for step in range(60):
        for param, grad in zip(params, gradients(step + 1, shapes=[(3, 4), (4,)]), strict=True):
            param.grad = grad
        optimizer.report(1.0 if step < 8 else 50.0 if optimizer.guard_status.stepping == "rule" else 1.0)
        optimizer.step()
        seen.add((optimizer.guard_status.stepping, len(optimizer.state[params[0]])))
    assert {stepping for stepping, _ in seen} == {"rule", "fallback"}
    assert all(param.isfinite().all() for param in params)
