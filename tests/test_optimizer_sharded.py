"""LearnedOptimizer on two gloo processes: DistributedDataParallel, and parameters of which each holds a part."""

import contextlib
import warnings
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from optimizer_toys import port_hamiltonian
from rank_toys import on_two_processes
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

from odeopt import stepping
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, HamiltonianUpdate, LSTMUpdate, RMSpropUpdate, SGDUpdate, UpdateRule
from odeopt.stepping import layout


class Paced(UpdateRule):
    """A toy whose state begins with the norm of the whole parameter."""

    def init_state(self, param):
        return PacedState(param.norm(dim=-1, keepdim=True))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        return -0.01 * state.pace * grad, state


class PacedState(NamedTuple):
    pace: torch.Tensor


MATRICES = {"initial_coherence": 1.0, "initial_decay": 0.1, "trust_ratio": 0.1, "row_power": 0.5, "depth_power": 0.5}
RULES = {
    "port-hamiltonian": lambda: port_hamiltonian(uses_progress=True),
    "mass of q": lambda: port_hamiltonian(mass="network", modes=1),
    "coordinatewise": lambda: port_hamiltonian(coordinatewise=True, potential="network"),
    "adam": lambda: AdamUpdate(0.01),
    "sgd": lambda: SGDUpdate(0.05, momentum=0.9),
    "rmsprop": lambda: RMSpropUpdate(0.01),
    "lstm": lambda: LSTMUpdate(hidden_size=3, output_scale=1.0),
    "lstm, normalized": lambda: LSTMUpdate(hidden_size=3, normalize=True),
    "hamiltonian": lambda: HamiltonianUpdate(preprocess=True),
    # what is gathered, because sums are not enough
    "hamiltonian, normalized": lambda: HamiltonianUpdate(normalize=True),
    "paced": Paced,
    "matrices": lambda: port_hamiltonian(kinetic=("spectral", "quadratic"), uses_progress=True, **MATRICES),
}
# what differs from: all tensors in one bucket, each of two processes with its rows
RUNS = {name: {"rule": name} for name in RULES} | {
    "in place": {"threshold": 2},
    "in place, mass of q": {"threshold": 2, "rule": "mass of q"},
    "in place, lstm": {"threshold": 2, "rule": "lstm"},
    "by columns": {"by_columns": True},
    "by columns, lstm": {"by_columns": True, "rule": "lstm"},
    "copies of shards": {"mesh": (1, 2)},
    "shards of copies": {"mesh": (2, 1)},
    "tensor parallel": {"mesh": (1, 2), "tensor_parallel": True},
    "clipped": {"clip": 0.1},
    "not a number": {"hurt": True},
    "not a number, in place": {"hurt": True, "threshold": 2},
    "not a number, adam": {"hurt": True, "rule": "adam"},
    "matrices, by columns": {"rule": "matrices", "by_columns": True},
    "matrices, copies of shards": {"rule": "matrices", "mesh": (1, 2)},
    "matrices, tensor parallel": {"rule": "matrices", "mesh": (1, 2), "tensor_parallel": True},
    "matrices, clipped": {"rule": "matrices", "clip": 0.1},
    "matrices, not a number": {"rule": "matrices", "hurt": True},
    "matrices of blocks": {"rule": "matrices", "n_blocks": 3},
}
STACK_RULES = ("matrices", "port-hamiltonian", "adam", "lstm")
N_STEPS = 5
# Rounding: float64, rules included. Sums in another order differ by 1e-16 of them, and a few steps make no more of it.
SAME = {"rtol": 1e-9, "atol": 1e-12}


def make_rule(name="port-hamiltonian"):
    torch.manual_seed(2)
    rule = RULES[name]().double()
    rule.chunk_size = 400  # several chunks for the larger tensors
    return rule


class Model(nn.Sequential):
    """Weights of 701, 6 and 1 rows for two processes: uneven pieces, several rows of a bucket, empty pieces."""

    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__(nn.Linear(4, 701), nn.Tanh(), nn.Linear(701, 6), nn.Tanh(), nn.Linear(6, 1))
        self.double()


def optimizer_of(model, rule="port-hamiltonian", n_blocks=1, **options):
    """Mixed groups: weights that decay, and biases whose run has an end; the weight of six rows may have blocks."""
    named = list(model.named_parameters())
    weights, biases = ([(name, p) for name, p in named if (p.dim() > 1) == has_axes] for has_axes in (True, False))
    groups = [{"params": weights, "lr": 0.5, "weight_decay": 0.002}, {"params": biases, "total_steps": 2 * N_STEPS}]
    if n_blocks > 1:
        groups.append(groups[0] | {"params": [weights.pop(1)], "n_blocks": n_blocks})
    return LearnedOptimizer(groups, make_rule(rule), **options)


def shard(model, mesh=(2,), by_columns=False, tensor_parallel=False):
    mesh = init_device_mesh("cpu", mesh, mesh_dim_names=("first", "second")[: len(mesh)])
    if tensor_parallel:
        parallelize_module(model, mesh["second"], {"2": ColwiseParallel(output_layouts=Replicate())})
        mesh = mesh["first"]

    def place(param):
        return Shard(1) if param.shape == (1, 6) else None  # no other columns divide by two, as columns have to

    for layer in model:
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh, shard_placement_fn=place if by_columns else None)
    return fully_shard(model, mesh=mesh)


def local(x):
    return x.to_local() if isinstance(x, DTensor) else x


def whole(x):
    return x.full_tensor() if isinstance(x, DTensor) else x


def backward(model, step, rank=None):
    """Gradients of the mean loss over a batch, of which each rank takes its half."""
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 4, generator=generator, dtype=torch.float64)
    y = (x.square().sum(1, keepdim=True) - 4).tanh()
    rows = slice(None) if rank is None else slice(4 * rank, 4 * rank + 4)
    model.zero_grad()
    (model(x[rows]) - y[rows]).square().mean().backward()


def hurt(model):
    """Break what the second of two processes holds of the first weight, and the first of the last bias."""
    first, last = (local(p.grad) for p in (model[0].weight, model[4].bias))
    if not isinstance(model[0].weight, DTensor) or dist.get_rank() == 1:
        first[-1, -1] = float("nan")
    if last.numel() > 0:
        last[0] = float("inf")


def train(model, optimizer, steps, rank=None, *, clip=None, hurts_at=()):
    for step in steps:
        backward(model, step, rank)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if step in hurts_at:
            hurt(model)
        optimizer.step()


def snapshot(model, optimizer):
    """All that training has changed, whole: the same on every rank, whoever holds it."""
    model = getattr(model, "module", model)
    tensors = {}
    for name, param in model.named_parameters():
        tensors[name] = whole(param.detach()).clone()
        for field, value in optimizer.state[param].items():
            tensors[f"{name} {field}"] = whole(value).clone()
    counters = [(group["n_steps"], group["n_skipped"]) for group in optimizer.state_dict()["param_groups"]]
    return {"tensors": tensors, "counters": counters}


def assert_same(found, wanted, **tolerance):
    assert found["tensors"].keys() == wanted["tensors"].keys()
    for name, tensor in wanted["tensors"].items():
        close = {"msg": lambda text, name=name: f"{name}: {text}"} | (tolerance or {"rtol": 0, "atol": 0})
        torch.testing.assert_close(found["tensors"][name], tensor, **close)
    assert found["counters"] == wanted["counters"]


@contextlib.contextmanager
def stepped_in_place(threshold):
    """Step tensors whose pieces have this many coordinates where they lie."""
    kept, kept_alone = dict(layout._STEPPED_IN_PLACE), layout._EXCHANGES_ALONE
    if threshold is not None:
        layout._STEPPED_IN_PLACE["cpu"] = layout._EXCHANGES_ALONE = threshold
    yield
    layout._STEPPED_IN_PLACE.update(kept)
    layout._EXCHANGES_ALONE = kept_alone


@contextlib.contextmanager
def exchanges():
    """Shapes of what is added up over the ranks."""
    kept, shapes = dist.all_reduce, []

    def counted(tensor, *args, **kwargs):
        shapes.append(tuple(tensor.shape))
        return kept(tensor, *args, **kwargs)

    dist.all_reduce = counted
    yield shapes
    dist.all_reduce = kept


# -------------------- what a rank does


def run(rank, folder, *, rule="port-hamiltonian", threshold=None, clip=None, hurt=False, n_blocks=1, **options):
    model = shard(Model(), **options)
    optimizer = optimizer_of(model, rule, n_blocks)
    batch_of = None if options.get("tensor_parallel") else rank
    with stepped_in_place(threshold), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        train(model, optimizer, range(N_STEPS - 1), batch_of, clip=clip, hurts_at=[0, 2] if hurt else ())
        with exchanges() as shapes:
            train(model, optimizer, [N_STEPS - 1], batch_of, clip=clip)
    out = snapshot(model, optimizer) | {"exchanged": shapes, "warnings": [str(w.message) for w in caught]}
    out["placements"] = {
        f"{name} {field}": (str(tuple(value.placements)), tuple(value.shape), tuple(value.to_local().shape))
        for name, param in model.named_parameters()
        for field, value in [("", param), *optimizer.state[param].items()]
        if isinstance(value, DTensor)
    }
    return out


def data_parallel(rank, folder):
    model = DistributedDataParallel(Model())
    optimizer = optimizer_of(model.module)
    with exchanges() as shapes:
        train(model, optimizer, range(N_STEPS), rank)
    return snapshot(model, optimizer) | {"exchanged": shapes}


class Experts(nn.Module):
    """Five experts, one of which no input is sent to, and a row for each."""

    def __init__(self, seed=0):
        super().__init__()
        draws = torch.Generator().manual_seed(seed)
        self.experts = nn.Parameter(torch.randn(5, 6, 4, generator=draws, dtype=torch.float64))
        self.rows = nn.Parameter(torch.randn(5, 3, generator=draws, dtype=torch.float64))

    def forward(self, x):
        outputs = torch.einsum("eoi,bi->beo", self.experts, x).tanh().sum(2) + self.rows.sum(1)
        return outputs[:, [0, 1, 3, 4]].sum(1, keepdim=True)


def with_optimizer_of_stacks(model, rule):
    return model, LearnedOptimizer([{"params": [*model.named_parameters()], "is_stack": True}], make_rule(rule))


def stacks(rank, folder):
    """Stacks of which each rank holds some tensors: a run, and one that goes on from its checkpoint."""
    mesh, out = init_device_mesh("cpu", (2,)), {}

    def split(seed=0):
        return fully_shard(Experts(seed), mesh=mesh)

    for name in STACK_RULES:
        model, optimizer = with_optimizer_of_stacks(split(), name)
        with exchanges() as shapes:
            train(model, optimizer, range(2), rank)
            save(model, optimizer, folder / f"stacks-{name}")
            train(model, optimizer, range(2, N_STEPS), rank)
        out[name] = snapshot(model, optimizer) | {"exchanged": shapes}
        model, optimizer = with_optimizer_of_stacks(split(seed=9), name)
        load(model, optimizer, folder / f"stacks-{name}")
        train(model, optimizer, range(2, N_STEPS), rank)
        out[f"{name}, resumed"] = snapshot(model, optimizer)
    local(model.experts.grad)[-1, 0, 0] = float("nan")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        optimizer.step()
    return out | {"warned": str(caught[0].message)}


def averages(rank, folder):
    """Averaged weights of a run, and of one that takes up its own state as whole tensors half way."""
    out = {}
    for is_loaded in (False, True):
        model = shard(Model())
        optimizer = optimizer_of(model, averaging=4)
        train(model, optimizer, range(3), rank)
        if is_loaded:
            optimizer.load_state_dict(tree_map(whole, optimizer.state_dict()))
        train(model, optimizer, range(3, N_STEPS), rank)
        optimizer.eval()
        out[is_loaded] = snapshot(model, optimizer)
    return out


def checkpoints(rank, folder):
    """Save in the middle of a run, and go on in other objects; what they make of it beside the run itself."""
    model = shard(Model())
    optimizer = optimizer_of(model, "matrices")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        train(model, optimizer, range(3), rank, hurts_at=[1])
    save(model, optimizer, folder / "two")
    options = StateDictOptions(full_state_dict=True)
    entire = get_state_dict(model, optimizer, options=options)
    if rank == 0:
        torch.save(entire, folder / "entire.pt")
    dist.barrier()
    train(model, optimizer, range(3, N_STEPS), rank)
    out = {"uninterrupted": snapshot(model, optimizer)}

    def fresh():
        model = shard(Model(seed=9))
        return model, optimizer_of(model, "matrices")

    def go_on(name, model, optimizer):
        train(model, optimizer, range(3, N_STEPS), rank)
        out[name] = snapshot(model, optimizer)

    model, optimizer = fresh()
    load(model, optimizer, folder / "two")
    go_on("sharded", model, optimizer)

    model, optimizer = fresh()
    of_model, of_optimizer = torch.load(folder / "entire.pt", weights_only=True)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer, options=options)
    go_on("entire", model, optimizer)

    model, optimizer = fresh()
    load(model, optimizer, folder / "one")
    go_on("of one process", model, optimizer)

    # torch.optim's own way: the model by itself, then the optimizer's dict of whole tensors
    model, optimizer = fresh()
    saved = torch.load(folder / "one.pt", weights_only=True)
    set_state_dict(model, [], model_state_dict=saved["model"], optim_state_dict={}, options=options)
    optimizer.load_state_dict(saved["optimizer"])
    go_on("of one process, plain", model, optimizer)
    return out


def save(model, optimizer, path):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.save({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)


def load(model, optimizer, path):
    of_model, of_optimizer = get_state_dict(model, optimizer)
    dcp.load({"model": of_model, "optimizer": of_optimizer}, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=of_model, optim_state_dict=of_optimizer)


def work(rank, folder):
    """All that two ranks are asked for, in one go: starting processes takes longer than what they do."""
    out = {name: run(rank, folder, **options) for name, options in RUNS.items()}
    for other in (data_parallel, stacks, averages, checkpoints):
        out[other.__name__] = other(rank, folder)
    return out


# -------------------- beside one process


def reference(*, rule="port-hamiltonian", clip=None, hurt=False, n_blocks=1, **_):
    model = Model()
    optimizer = optimizer_of(model, rule, n_blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        train(model, optimizer, range(N_STEPS), clip=clip, hurts_at=[0, 2] if hurt else ())
    return snapshot(model, optimizer)


def half_way():
    model = Model()
    optimizer = optimizer_of(model, "matrices")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        train(model, optimizer, range(3), hurts_at=[1])
    return model, optimizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder that begins with a checkpoint of one process, for two ranks to go on from."""
    folder = tmp_path_factory.mktemp("ranks")
    model, optimizer = half_way()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, folder / "one.pt")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is")  # that this is one process, that is
        save(model, optimizer, folder / "one")
    return folder


@pytest.fixture(scope="module")
def ranks(folder):
    results = on_two_processes(work, folder)
    assert None not in results
    return results


@pytest.mark.parametrize("name", RUNS)
def test_sharded_training_is_training_on_one_process(ranks, name):
    for rank in ranks:
        assert_same(rank[name], reference(**RUNS[name]), **SAME)
    assert_same(ranks[0][name], ranks[1][name])


def test_data_parallel_training_is_training_on_the_whole_batch(ranks):
    for rank in ranks:
        assert_same(rank["data_parallel"], reference(), **SAME)
        assert rank["data_parallel"]["exchanged"] == []
    assert_same(ranks[0]["data_parallel"], ranks[1]["data_parallel"])


@pytest.mark.parametrize("name", STACK_RULES)
def test_stacks_are_stepped_where_their_tensors_lie(ranks, name):
    model, optimizer = with_optimizer_of_stacks(Experts(), name)
    train(model, optimizer, range(N_STEPS))
    wanted = snapshot(model, optimizer)
    for rank in ranks:
        assert_same(rank["stacks"][name], wanted, **SAME)
        assert rank["stacks"][name]["exchanged"] == []
        assert_same(rank["stacks"][f"{name}, resumed"], rank["stacks"][name])


def test_gradient_of_a_stack_that_is_skipped_is_named_by_its_place_in_the_whole(ranks):
    for rank, number in zip(ranks, (2, 4), strict=True):
        assert f"`experts[{number}]`" in rank["stacks"]["warned"]


def test_state_lies_as_its_parameter_does(ranks):
    for number, rank in enumerate(ranks):
        rows = [3 * (1 - number), 1 - number]  # of the weight and the bias that have six and one
        assert rank["port-hamiltonian"]["placements"]["4.bias "] == ("(Shard(dim=0),)", (1,), (rows[1],))
        assert rank["port-hamiltonian"]["placements"]["4.bias p"] == ("(Shard(dim=1),)", (2, 1), (2, rows[1]))
        assert rank["lstm"]["placements"]["4.bias h1"] == ("(Shard(dim=0),)", (1, 3), (rows[1], 3))
        by_columns = rank["by columns"]["placements"]
        assert by_columns["4.weight second_moment"] == ("(Shard(dim=1),)", (1, 6), (1, 3))
        assert by_columns["4.weight p"] == ("(Shard(dim=2),)", (2, 1, 6), (2, 1, 3))
        copies = rank["copies of shards"]["placements"]["4.bias p"]
        assert copies == ("(Replicate(), Shard(dim=1))", (2, 1), (2, rows[1]))
        # what a tensor holds once, every rank holds
        assert not any(name.endswith((" scale", " step")) for name in by_columns)


@pytest.mark.parametrize("name", [name for name in RUNS if "not a number" in name])
def test_gradient_broken_on_one_rank_is_skipped_and_counted_on_all(ranks, name):
    for rank in ranks:
        # one weight, broken on the second rank, and one bias, on the first; twice each
        assert rank[name]["counters"] == [(N_STEPS, 2), (N_STEPS, 2)]
        assert any("`0.weight` was not moved at step 1" in text for text in rank[name]["warnings"])


def test_optimizer_exchanges_a_few_numbers_for_each_tensor(ranks):
    n_weights = n_biases = 3
    for rank in ranks:
        # whether the gradient is finite and its mean magnitude; then v, u^2, theta^2, u p and p^2 of both modes
        expected = [(n, k) for n in (n_weights, n_biases) for k in (2, 7)]
        assert rank["port-hamiltonian"]["exchanged"] == expected
        assert rank["in place"]["exchanged"] == [(1, k) for _ in range(n_weights + n_biases) for k in (2, 7)]
        for name in ("coordinatewise", "adam", "lstm"):  # whether it is finite
            assert rank[name]["exchanged"] == [(n_weights, 1), (n_biases, 1)]


def test_pieces_of_pieces_are_pieces():
    """As fully_shard makes them after tensor parallelism; ``is_shard`` is False of them."""
    where = stepping.Shard(torch.Size((8, 3)), None, (_StridedShard(0, split_factor=2), Replicate(), Shard(0)))
    assert where.group_key == (None, (True, False, True))
    assert where.piece_placements(1) == (_StridedShard(1, split_factor=2), Replicate(), Shard(1))


@pytest.mark.parametrize("name", ["sharded", "entire"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(ranks, name):
    for rank in ranks:
        assert rank["checkpoints"]["uninterrupted"]["counters"] == [(N_STEPS, 1), (N_STEPS, 1)]
        assert_same(rank["checkpoints"][name], rank["checkpoints"]["uninterrupted"])


@pytest.mark.parametrize("name", ["of one process", "of one process, plain"])
def test_two_ranks_go_on_from_a_checkpoint_of_one_process(ranks, name):
    for rank in ranks:
        assert_same(rank["checkpoints"][name], rank["checkpoints"]["uninterrupted"], **SAME)


def test_averages_of_a_checkpoint_of_whole_tensors_are_sharded_again(ranks):
    for rank in ranks:
        assert_same(rank["averages"][True], rank["averages"][False])


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_one_process_goes_on_from_a_checkpoint_of_two_ranks(ranks, folder):
    model = Model(seed=9)
    optimizer = optimizer_of(model, "matrices")
    load(model, optimizer, folder / "two")
    train(model, optimizer, range(3, N_STEPS))
    assert_same(snapshot(model, optimizer), ranks[0]["checkpoints"]["uninterrupted"], **SAME)
