"""Parameter groups that fit a module."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.nn.utils.parametrize import register_parametrization

from odeopt import LearnedOptimizer, param_groups
from odeopt.rules import PortHamiltonianUpdate


class Network(nn.Module):
    """A head that shares the weight of a table, positions as one row, a bag, a parametrized table, a frozen matrix."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, 7, bias=False)
        self.words = nn.Embedding(7, 4)
        self.words.weight = self.head.weight
        self.bag = nn.EmbeddingBag(5, 4)
        self.scaled = weight_norm(nn.Embedding(6, 4))
        self.positions = nn.Parameter(torch.zeros(1, 3, 4))
        self.body = nn.Sequential(nn.Conv1d(3, 2, 1), nn.LayerNorm(4), nn.Linear(4, 4))
        self.body[2].weight.requires_grad_(False)

    def forward(self, x):
        x = self.words(x) + self.scaled(x % 6) + self.bag(x % 5).unsqueeze(1) + self.positions
        return self.head(self.body(x))


def names(groups):
    return [[name for name, _ in group["params"]] for group in groups]


def test_every_parameter_is_in_the_group_of_its_kind_once():
    matrices, vectors, tables = names(param_groups(Network()))
    assert sorted(matrices) == ["body.0.weight", "body.2.weight"]
    assert sorted(vectors) == ["body.0.bias", "body.1.bias", "body.1.weight", "body.2.bias"]
    scaled = [f"scaled.parametrizations.weight.original{k}" for k in range(2)]
    assert sorted(tables) == ["bag.weight", "head.weight", "positions", *scaled]
    assert sorted(matrices + vectors + tables) == sorted(name for name, _ in Network().named_parameters())


def test_matrices_alone_are_decayed():
    groups = param_groups(Network(), weight_decay=0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    # what is said to the optimizer counts for matrices too, unless it was said here, zero included
    for decay, wanted in ((None, 0.0003), (0.001, 0.001), (0.0, 0.0)):
        optimizer = LearnedOptimizer(param_groups(Network(), weight_decay=decay), weight_decay=0.0003)
        assert [group["weight_decay"] for group in optimizer.param_groups] == [wanted, 0.0, 0.0]
    assert [group.get("is_table", False) for group in groups] == [False, False, True]


def test_kinds_that_there_are_not_have_no_group():
    assert names(param_groups(nn.Linear(3, 2, bias=False))) == [["weight"]]
    assert names(param_groups(nn.LayerNorm(3))) == [["weight", "bias"]]
    assert param_groups(nn.ReLU()) == []


class Stacks(nn.Module):
    """Tensors of three and more axes: kernels, and what is none."""

    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(3, 4, 5))
        self.ensemble = nn.Parameter(torch.randn(3, 4, 2, 3, 3))
        self.bilinear = nn.Bilinear(2, 3, 4, bias=False)
        self.up = nn.ConvTranspose2d(2, 3, 2, bias=False)
        self.lazy = nn.LazyConv1d(3, 2, bias=False)
        self.lazy(torch.zeros(1, 2, 4))
        self.scaled = weight_norm(nn.Conv3d(2, 3, 2, bias=False))
        self.norm = nn.LayerNorm((2, 3, 4))
        self.gain = nn.Parameter(torch.ones(4, 1, 1))
        self.positions = nn.Parameter(torch.zeros(1, 3, 4))
        self.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        self.pos_embed = nn.Parameter(torch.zeros(7, 4))
        self.embed_projection = nn.Parameter(torch.zeros(7, 4))
        self.biases = nn.Parameter(torch.zeros(3, 4))


def test_stacks_of_matrices_are_told_from_kernels_and_stepped_one_by_one_and_decayed():
    groups = param_groups(Stacks(), weight_decay=0.1)
    matrices, vectors, tables, stacks, stacked_vectors = names(groups)
    gain, direction = (f"scaled.parametrizations.weight.original{k}" for k in range(2))
    assert sorted(matrices) == sorted(["bilinear.weight", "embed_projection", "lazy.weight", "up.weight", direction])
    assert vectors == ["class_token"]
    assert sorted(tables) == ["gain", "norm.bias", "norm.weight", "pos_embed", "positions", gain]
    assert sorted(stacks) == ["ensemble", "experts"]
    assert stacked_vectors == ["biases"]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0, 0.1, 0.0]
    assert [group.get("is_table", False) for group in groups] == [False, False, True, False, False]
    assert [group.get("is_stack", False) for group in groups] == [False, False, False, True, True]


@pytest.mark.parametrize(
    "module",
    [
        nn.MultiheadAttention(4, 2),
        nn.Conv2d(3, 4, 2),
        nn.Conv3d(2, 3, 2),
        nn.LSTM(3, 4),
        nn.TransformerEncoderLayer(4, 2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_layers_of_torch_hold_no_stacks(module):
    assert not any(group.get("is_stack", False) for group in param_groups(module))


def test_an_ensemble_in_one_tensor_is_trained_better_than_as_one_matrix_and_by_coordinates_and_by_adamw():
    def last_losses(make_optimizer):
        torch.manual_seed(0)
        net = nn.ParameterList(torch.randn(8, a, b) / a**0.5 for a, b in ((16, 64), (64, 64), (64, 1)))
        optimizer, losses = make_optimizer(net), []
        for _ in range(150):
            x = torch.randn(64, 16)
            y = (2 * x[:, :1]).sin() * x[:, 1:2] + x[:, 2:3].abs()
            loss = (((x @ net[0]).relu() @ net[1]).relu() @ net[2] - y).square().mean((1, 2)).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return sum(losses[-20:])

    ours = last_losses(lambda net: LearnedOptimizer(param_groups(net), total_steps=150))
    as_matrix = last_losses(lambda net: LearnedOptimizer(net.parameters(), total_steps=150))
    by_coordinates = last_losses(
        lambda net: LearnedOptimizer([{"params": net.parameters(), "is_table": True}], total_steps=150)
    )
    assert ours < 0.5 * as_matrix
    assert ours < 0.6 * by_coordinates
    assert ours < 0.6 * last_losses(lambda net: torch.optim.AdamW(net.parameters(), 0.01, weight_decay=0))


def test_groups_tell_the_rule_which_parameters_are_tables():
    model, rule = Network(), PortHamiltonianUpdate(kinetic="spectral")
    optimizer = LearnedOptimizer(param_groups(model), rule)
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    loss = model(torch.arange(6).view(2, 3)).square().mean()
    loss.backward()
    optimizer.step()
    moved = {name: (param - before[name]).detach() for name, param in model.named_parameters()}
    assert not moved.pop("body.2.weight").any()
    assert all(x.any() for x in moved.values())
    # a table is stepped by coordinates: one that has no gradient does not move, where an orthogonal step moves all rows
    assert not moved["bag.weight"].view(5, 4)[model.bag.weight.grad.abs().sum(-1) == 0].any()


@pytest.mark.parametrize("module", [[nn.Parameter(torch.zeros(2))], nn.Linear(2, 2).parameters(), nn.Linear, None])
def test_what_is_no_module_is_refused(module):
    with pytest.raises(TypeError, match=r"`module` should be an nn.Module: the model itself, .*\. Found `module = "):
        param_groups(module)


@pytest.mark.parametrize("decay", [-0.1, math.inf, "0.1", True])
def test_wrong_decays_are_refused(decay):
    with pytest.raises(ValueError, match=r"`weight_decay` should be a non-negative number or None\. Found"):
        param_groups(nn.Linear(2, 2), weight_decay=decay)


LAYERS = [nn.Linear(3, 4), nn.Linear(1, 4), nn.Conv2d(3, 4, 2), nn.Conv2d(4, 4, 1, groups=4), nn.Bilinear(2, 3, 4)]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("layer", [*LAYERS, nn.ConvTranspose1d(3, 4, 2)], ids=str)
@pytest.mark.parametrize("normalised", [weight_norm, nn.utils.weight_norm])
def test_gains_of_weight_normalisation_are_not_decayed(layer, normalised):
    groups = param_groups(normalised(copy.deepcopy(layer)), weight_decay=0.1)
    (gain,) = (name for group in groups if group.get("is_table") for name, _ in group["params"])
    assert gain in ("parametrizations.weight.original0", "weight_g")
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]


def test_matrices_of_one_row_or_column_are_no_gains():
    class Adapted(nn.Linear):
        def __init__(self):
            super().__init__(3, 4)
            self.lora_A, self.lora_B = nn.Parameter(torch.ones(1, 3)), nn.Parameter(torch.ones(4, 1))

    matrices, _ = names(param_groups(Adapted()))
    assert sorted(matrices) == ["lora_A", "lora_B", "weight"]


@pytest.mark.parametrize(
    "layer",
    [nn.Conv2d(8, 1, 3), nn.ConvTranspose2d(1, 8, 3), nn.Bilinear(4, 5, 1), nn.Linear(8, 1), nn.Conv1d(3, 1, 1)],
)
def test_layers_of_one_output_are_decayed_as_others_are(layer):
    decays = {
        name: group["weight_decay"] for group in param_groups(layer, weight_decay=1e-4) for name, _ in group["params"]
    }
    assert decays == {"weight": 1e-4, "bias": 0.0}
    LearnedOptimizer(param_groups(layer, weight_decay=1e-4))


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 8, 8))
        self.b = nn.Parameter(torch.zeros(4, 8))


@pytest.mark.parametrize("parametrize", [lambda module, name: module, weight_norm, orthogonal])
def test_vectors_beside_a_stack_are_one_for_each_of_its_matrices_whatever_its_parametrization(parametrize):
    module = parametrize(Experts(), "w")
    (group,) = (group for group in param_groups(module, weight_decay=1e-4) if "b" in dict(group["params"]))
    assert group["is_stack"]
    assert group["weight_decay"] == 0


def test_weights_of_a_parametrization_are_not_beside_the_stack_that_it_makes():
    class LowRank(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix, self.down = nn.Linear(32, 8), nn.Parameter(torch.randn(8, 32))

        def forward(self, x):
            return x + self.mix(x).mean() + self.down.mean()

    module = nn.Module()
    module.experts = nn.Parameter(torch.randn(8, 16, 32))
    register_parametrization(module, "experts", LowRank())
    kinds = {name: group.get("is_stack", False) for group in param_groups(module) for name, _ in group["params"]}
    assert {name.rpartition(".")[2] for name, is_stack in kinds.items() if is_stack} == {"original"}
    module = nn.Linear(3, 2)
    module.parametrizations = ["weight"]  # a name of the user's
    assert len(param_groups(module)) == 2
