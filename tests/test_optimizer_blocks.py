"""Matrices that consist of blocks of rows, such as query, key and value: each has singular values of its own."""

import copy

import pytest
import torch
from rule_toys import draws, port_hamiltonian
from test_optimizer_matrices import VARIANTS, over_variants
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from odeopt import LearnedOptimizer, load_pretrained, param_groups
from odeopt.rules import AdamUpdate
from odeopt.stepping.native import native_status

f64 = torch.float64
SHAPES = [(36, 20), (36, 7), (36, 50), (3, 4, 2, 2), (192, 64)]
needs_native = pytest.mark.skipif(not native_status().startswith("native"), reason="the step in C was not built")


def trained(rule, shapes, n_blocks, *, dtype=torch.float32, is_stack=False, implementation="eager", n_steps=6):
    params = [nn.Parameter(draws(*shape, seed=k).to(dtype)) for k, shape in enumerate(shapes)]
    groups = [{"params": params, "n_blocks": n_blocks, "is_stack": is_stack}]
    settings = {"total_steps": n_steps + 2, "weight_decay": 1e-4, "implementation": implementation}
    optimizer = LearnedOptimizer(groups, rule, **settings)
    for step in range(n_steps):
        for k, param in enumerate(params):
            rows = 1 + torch.arange(param.shape[is_stack]).reshape(-1, *(param.ndim - 1 - is_stack) * [1]) // 3
            param.grad = (rows * draws(*param.shape, seed=100 * step + k)).to(dtype)  # of other sizes in other blocks
        optimizer.step()
    return params, optimizer


@needs_native
@pytest.mark.parametrize("n_threads", [1, 2])
@pytest.mark.parametrize("is_stack", [False, True])
@over_variants
def test_the_native_step_of_blocks_is_the_eager_one(variant, is_stack, n_threads):
    rule = port_hamiltonian(**VARIANTS[variant], dtype=torch.float32)
    shapes = [(2, *shape) for shape in SHAPES] if is_stack else SHAPES
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        eager, native = (
            trained(rule, shapes, 3, is_stack=is_stack, implementation=implementation)
            for implementation in ("eager", "native")
        )
    finally:
        torch.set_num_threads(before)
    for x, y in zip(eager[0], native[0], strict=True):
        torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)
        for name, value in eager[1].state[x].items():
            torch.testing.assert_close(native[1].state[y][name], value, rtol=2e-5, atol=2e-5, msg=name)


@pytest.mark.parametrize("implementation", ["eager", "auto"])
def test_blocks_of_any_size_are_moved_alike(implementation):
    own = draws(8, 6).float()
    grad = torch.cat((own, 100 * own, 0.01 * own))
    moves = {}
    for n_blocks in (1, 3):
        param = nn.Parameter(torch.zeros(24, 6))
        optimizer = LearnedOptimizer([{"params": [param], "n_blocks": n_blocks}], implementation=implementation)
        param.grad = grad.clone()
        optimizer.step()
        moves[n_blocks] = param.detach().unflatten(0, (3, 8))
    first, *others = moves[3]
    for other in others:
        torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-6)
    sizes = moves[1].norm(dim=(1, 2))
    assert sizes[1] > 10 * sizes[2]  # in a matrix of one block the large ones move, and the small ones hardly do
    singular = torch.linalg.svdvals(first)
    assert singular.max() < 2 * singular.min()


@over_variants
@pytest.mark.parametrize("implementation", ["eager", "auto"])
def test_all_else_is_of_the_matrix_as_a_whole(variant, implementation):
    rule = port_hamiltonian(**VARIANTS[variant], dtype=torch.float32)
    (one, whole), (other, in_blocks) = (
        trained(rule, [(24, 7)], n_blocks, implementation=implementation, n_steps=1) for n_blocks in (1, 3)
    )
    for name in ("scale", "slow_scale", "step"):
        torch.testing.assert_close(in_blocks.state[other[0]][name], whole.state[one[0]][name])
    mean = (1 + torch.arange(24).unsqueeze(1) // 3) * draws(24, 7).abs().float()
    torch.testing.assert_close(in_blocks.state[other[0]]["scale"].squeeze(), mean.mean(), rtol=1e-5, atol=0)


@over_variants
def test_energy_and_powers_are_those_of_the_blocks(variant):
    rule = port_hamiltonian(**VARIANTS[variant])
    grad, param, shape = draws(3 * 28), draws(3 * 28, seed=1), (4, 7)
    state = rule.init_state(param)
    state = state._replace(p=draws(*state.p.shape, seed=2), scale=torch.ones_like(state.scale), step=state.step + 3)
    whole = rule.energy(state, shape=shape)
    blocks = [rule.energy(state._replace(p=p), shape=shape) for p in state.p.unflatten(-1, (3, 28)).unbind(-2)]
    if rule.output == "sum":  # else the energy is that of each coordinate
        torch.testing.assert_close(whole, sum(blocks))
    balance = rule.power_balance(grad, state, param=param, shape=shape, progress=torch.tensor(0.5, dtype=f64))
    torch.testing.assert_close(balance.residual / balance.energy_rate, torch.zeros_like(balance.residual))
    assert (balance.dissipated >= 0).all()


def test_the_rate_of_the_energy_is_its_derivative():
    rule = port_hamiltonian(kinetic=("spectral", "spectral"))
    shape, grad = (4, 7), draws(3 * 28)
    state = rule.init_state(grad)
    state = state._replace(p=draws(*state.p.shape, seed=2), scale=torch.ones_like(state.scale))
    # with the norm that the step holds the energy is a function of the momenta, whose derivative is the velocity
    p = state.p.unflatten(-1, (3, *shape))
    norm = torch.linalg.matrix_norm(p)
    momenta = p.clone().requires_grad_()
    energy = rule.spectral_energy.energy(momenta, norm).sum()
    (velocity,) = torch.autograd.grad(energy, momenta)
    torch.testing.assert_close(velocity, rule.spectral_energy.velocity(p, norm))
    torch.testing.assert_close(energy, rule.energy(state, shape=shape).sum())


def test_blocks_too_narrow_for_singular_values_are_not_told_apart():
    rule = load_pretrained("port-hamiltonian-spectral")
    assert not rule.is_whole((rule.narrow, 40))
    assert rule.is_whole((3 * rule.narrow, 40))
    whole, blocks = (trained(rule, [(3 * rule.narrow, 40)], n, implementation="auto")[0][0] for n in (1, 3))
    assert torch.equal(whole, blocks)


@pytest.mark.parametrize("rule", [AdamUpdate(0.01), "port-hamiltonian"], ids=str)
def test_rules_without_singular_values_step_coordinates(rule):
    whole, blocks = (trained(rule, [(12, 20)], n, implementation="auto")[0][0] for n in (1, 3))
    assert torch.equal(whole, blocks)


@pytest.mark.parametrize("implementation", ["eager", "auto"])
def test_blocks_count_from_the_step_at_which_the_group_is_told_of_them(implementation):
    param = nn.Parameter(torch.zeros(24, 6))
    optimizer = LearnedOptimizer([param], implementation=implementation)
    param.grad = draws(24, 6).float()
    optimizer.step()
    optimizer.param_groups[0]["n_blocks"] = 3
    twin = nn.Parameter(param.detach().clone())
    other = LearnedOptimizer([{"params": [twin], "n_blocks": 3}], implementation=implementation)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert other.param_groups[0]["n_blocks"] == 3
    before = param.detach().clone()
    for each, own in ((param, optimizer), (twin, other)):
        each.grad = draws(24, 6, seed=1).float()
        own.step()
    assert not torch.equal(param, before)
    assert torch.equal(param, twin)


def test_diagnostics_are_of_the_blocks():
    param = nn.Parameter(draws(24, 6))
    optimizer = LearnedOptimizer([{"params": [("qkv", param)], "n_blocks": 3}])
    found = []
    for step in range(2):
        param.grad = draws(24, 6, seed=step)
        if step:
            found = optimizer.diagnostics()["qkv"]
            before = param.detach().clone()
        optimizer.step()
    moved = (param - before).norm() / before.norm()
    assert found["update_to_weight"].item() == pytest.approx(moved.item(), rel=1e-4)


@pytest.mark.parametrize("n_blocks", [0, -1, 1.5, True, None, "3"])
def test_number_of_blocks_is_a_positive_integer(n_blocks):
    with pytest.raises(ValueError, match=r"`n_blocks` should be a positive integer\. Found `n_blocks = "):
        LearnedOptimizer([{"params": [nn.Parameter(draws(6, 3))], "n_blocks": n_blocks}])


@pytest.mark.parametrize("shape", [(7, 3), (), (8,)])
def test_rows_are_those_of_whole_blocks(shape):
    group = {"params": [("attention.qkv", nn.Parameter(draws(*shape)))], "n_blocks": 3}
    with pytest.raises(ValueError, match=r"`attention\.qkv` should consist of 3 blocks of as many rows.*Found shape"):
        LearnedOptimizer([group])


@pytest.mark.parametrize("rule", [port_hamiltonian(), port_hamiltonian(kinetic="spectral", narrow=3)])
@pytest.mark.parametrize("shape", [(8, 6), (2, 6), (1, 6)])
def test_scales_do_not_depend_on_the_blocks(rule, shape):
    grad = draws(144)
    _, state = rule(grad, rule.init_state(grad), param=grad, shape=shape)
    torch.testing.assert_close(state.scale, grad.abs().mean().reshape(1), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match=r"`shape` should be that of a tensor of 144 coordinates, or of each of its"):
        rule(grad, rule.init_state(grad), param=grad, shape=(5, 6))


class Mixed(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)
        self.crossed = nn.MultiheadAttention(8, 2, kdim=6, vdim=6)
        self.gru, self.lstm = nn.GRU(5, 4, bidirectional=True), nn.LSTM(5, 4, proj_size=3)
        self.cell, self.plain = nn.LSTMCell(5, 4), nn.RNN(5, 4)
        self.block = nn.ModuleDict({"qkv": nn.Linear(8, 24), "out": nn.Linear(8, 24)})
        self.grouped = nn.ModuleDict({"qkv_proj": nn.Linear(8, 16)})  # fewer keys and values than queries


def test_layers_that_stack_matrices_are_known():
    groups = param_groups(Mixed(), weight_decay=1e-4)
    found = {n: {name for name, _ in group["params"]} for group in groups if (n := group.get("n_blocks", 1)) > 1}
    gates = {f"gru.weight_{kind}_l0{way}" for kind in ("ih", "hh") for way in ("", "_reverse")}
    assert found == {
        3: {"attention.in_proj_weight", "block.qkv.weight"} | gates,
        4: {"lstm.weight_ih_l0", "lstm.weight_hh_l0", "cell.weight_ih", "cell.weight_hh"},
    }
    assert {group["weight_decay"] for group in groups if group.get("n_blocks", 1) > 1} == {1e-4}
    LearnedOptimizer(groups)


class OwnCell(nn.LSTMCell):
    pass


@pytest.mark.parametrize(
    ("make", "wanted"),
    [
        (lambda: weight_norm(nn.GRU(5, 4), "weight_hh_l0"),
         {"weight_ih_l0", "parametrizations.weight_hh_l0.original1"}),
        (lambda: spectral_norm(nn.LSTMCell(5, 4), "weight_hh"), {"weight_ih", "parametrizations.weight_hh.original"}),
        (lambda: OwnCell(5, 4), {"weight_ih", "weight_hh"}),
        (lambda: nn.ModuleDict({"qkv": weight_norm(nn.Linear(8, 24))}), {"qkv.parametrizations.weight.original1"}),
        (lambda: nn.ModuleDict({"qkv": torch.compile(nn.Linear(8, 24))}), {"qkv._orig_mod.weight"}),
        (lambda: weight_norm(nn.MultiheadAttention(8, 2), "in_proj_weight"),
         {"parametrizations.in_proj_weight.original1"}),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # of importing what torch.compile needs
def test_parametrized_subclassed_and_compiled_layers_are_known(make, wanted):
    groups = param_groups(make())
    assert {name for group in groups if group.get("n_blocks", 1) > 1 for name, _ in group["params"]} == wanted
