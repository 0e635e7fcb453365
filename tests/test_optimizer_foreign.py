"""Parameters that other libraries have cut, flattened or handed out: refused by name, or stepped as what they are."""

import pytest
import torch
import torch.distributed as dist
from optimizer_toys import LeakySum, assert_same, loss_of, port_hamiltonian, small_model
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy
from torch.distributed.tensor import DTensor, Partial

from odeopt.optimizer import LearnedOptimizer

REFUSAL = r"should be whole on each process, .*fully_shard.*DistributedDataParallel.*Found a tensor that belongs to "


@pytest.fixture(scope="module")
def process(tmp_path_factory):
    """One process that is a group by itself."""
    store = tmp_path_factory.mktemp("group") / "store"
    dist.init_process_group("gloo", f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def flattened(model, **options):
    return FullyShardedDataParallel(model, device_id=torch.device("cpu"), **options)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("keeps_views", [False, True])
@pytest.mark.parametrize("rule", [LeakySum(), port_hamiltonian(coordinatewise=True)], ids=["whole", "coordinatewise"])
def test_flat_parameters_and_views_into_them_are_refused(process, keeps_views, rule):
    strategy = ShardingStrategy.SHARD_GRAD_OP
    model = flattened(small_model(), use_orig_params=keeps_views, sharding_strategy=strategy)
    with pytest.raises(ValueError, match=f"Parameter `.*weight|flat.*` {REFUSAL}FullyShardedDataParallel"):
        LearnedOptimizer(model.named_parameters(), rule)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
def test_model_that_is_flattened_after_the_optimizer_was_built_is_refused_before_it_moves(process):
    model = small_model()
    optimizer = LearnedOptimizer(model.named_parameters(), LeakySum())
    wrapped = flattened(model, use_orig_params=True)
    loss_of(wrapped).backward()
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match=f"`0.weight` {REFUSAL}FullyShardedDataParallel"):
        optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize(("mark", "owner"), [("ds_id", "DeepSpeed ZeRO"), ("local_shards", "ShardedTensor")])
def test_pieces_that_others_mark_are_refused_also_in_the_middle_of_a_run(mark, owner):
    params = [nn.Parameter(torch.ones(3)) for _ in range(2)]
    setattr(params[1], mark, "0_3")
    with pytest.raises(ValueError, match=f"`b` {REFUSAL}{owner}"):
        LearnedOptimizer([("a", params[0]), ("b", params[1])], LeakySum())
    optimizer = LearnedOptimizer(params[:1], LeakySum())
    optimizer.param_groups[0]["params"] = params[1:]  # as DeepSpeed does with the groups that it is handed
    params[1].grad = torch.ones(3)
    with pytest.raises(ValueError, match=f"{REFUSAL}{owner}"):
        optimizer.step()
    assert params[1].eq(1).all()


def test_parameter_of_which_processes_hold_summands_is_refused(process):
    param = nn.Parameter(DTensor.from_local(torch.ones(3), init_device_mesh("cpu", (1,)), [Partial()]))
    with pytest.raises(ValueError, match=f"`w` {REFUSAL}DTensor of placements.*[Pp]artial"):
        LearnedOptimizer([("w", param)], LeakySum())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_zero_redundancy_optimizer_hands_out_whole_parameters(process):
    from torch.distributed.optim import ZeroRedundancyOptimizer  # importing it warns

    models, rule = (small_model(), small_model()), port_hamiltonian()
    partitioned = ZeroRedundancyOptimizer(models[0].parameters(), optimizer_class=LearnedOptimizer, rule=rule)
    plain = LearnedOptimizer(models[1].parameters(), rule)
    for optimizer, model in zip((partitioned, plain), models, strict=True):
        for step in range(3):
            optimizer.zero_grad()
            loss_of(model, step).backward()
            optimizer.step()
    assert_same(*models)
    partitioned.consolidate_state_dict()
    plain.load_state_dict(partitioned.state_dict())
    assert plain.n_steps == 3
