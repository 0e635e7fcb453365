"""Groups, state and parameters that are edited between steps count from the next step on, as with torch.optim."""

from collections import defaultdict
from io import BytesIO

import pytest
import torch
from optimizer_toys import LeakySum, LeakySumState, parameter
from torch import nn

from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, SGDUpdate, UpdateRule
from odeopt.stepping import layout


def stepped(rule=None, n=2, **options):
    """Parameters ``a, b, ...`` of three coordinates each, and an optimizer of one group that has stepped twice."""
    params = [parameter([1.0, 2.0, 3.0], [1.0, -2.0, 0.5 + index]) for index in range(n)]
    optimizer = LearnedOptimizer(params, rule or AdamUpdate(0.1), **options)
    for _ in range(2):
        optimizer.step()
    return params, optimizer


def moves(optimizer, params):
    """How far each parameter moves in a step."""
    before = [param.detach().clone() for param in params]
    optimizer.step()
    return [(param.detach() - old).abs().sum().item() for param, old in zip(params, before, strict=True)]


# -------------------- groups


def test_removed_group_rests_and_the_others_go_on_with_their_own_options():
    a, b = parameter([1.0], [1.0]), parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([{"params": [a], "lr": 1.0}, {"params": [b], "lr": 0.1}], SGDUpdate(1.0))
    assert moves(optimizer, [a, b]) == pytest.approx([1.0, 0.1])
    del optimizer.param_groups[0]
    assert moves(optimizer, [a, b]) == pytest.approx([0.0, 0.1])
    b.grad[0] = float("nan")
    with pytest.warns(RuntimeWarning, match=r"`param_groups\[0\]\['params'\]\[0\]` was not moved at step 3"):
        optimizer.step()


def test_removed_parameter_rests_and_goes_on_with_its_state_when_it_is_back():
    (a, b), optimizer = stepped()
    optimizer.param_groups[0]["params"].remove(a)
    assert moves(optimizer, [a, b]) == [0.0, pytest.approx(0.3, rel=1e-3)]
    assert optimizer.state[b]["step"].item() == 3
    optimizer.param_groups[0]["params"].append(a)
    optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [3, 4]


def test_parameter_that_changes_groups_follows_the_options_of_its_new_one():
    a, b = parameter([1.0], [1.0]), parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([{"params": [a]}, {"params": [b], "lr": 0.0}], SGDUpdate(1.0, momentum=0.5))
    assert moves(optimizer, [a, b]) == [1.0, 0.0]
    optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())
    optimizer.param_groups[1]["lr"] = 2.0
    assert moves(optimizer, [a, b]) == [3.0, 3.0]  # 2 * (0.5 * 1 + 1)


@pytest.mark.parametrize("capturable", [False, True])
def test_empty_groups_are_taken(capturable):
    param = parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([{"params": []}, {"params": [param]}], SGDUpdate(0.5), capturable=capturable)
    optimizer.step()
    assert param.item() == 0.5
    assert optimizer.n_steps == 1


@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_groups_of_one_parameter_step_as_one_group_and_are_laid_out_at_once(implementation, monkeypatch):
    calls = []
    for name, owner in (("_make_plans", layout.Layout), ("parameter_names", layout)):
        kept = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, n=name, f=kept: calls.append(n) or f(*args))
    ends = []
    for is_split in (False, True):
        torch.manual_seed(0)
        params = [parameter(torch.randn(shape), torch.randn(shape)) for shape in [(3,), (4, 5), (0,), (6,), (4, 5)]]
        late = params[3].grad
        params[3].grad = None
        groups = [{"params": [param]} for param in params] if is_split else params
        optimizer = LearnedOptimizer(groups, implementation=implementation)
        calls.clear()
        optimizer.step()
        assert sorted(calls) == ["_make_plans", "parameter_names"]
        params[3].grad = late
        optimizer.step()
        optimizer.step()
        assert sorted(calls) == 2 * ["_make_plans"] + 2 * ["parameter_names"]
        assert all(param in optimizer.state for param in params)
        ends.append(params)
    for a, b in zip(*ends, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # float32: stacked or not, sums are in another order


@pytest.mark.parametrize("is_split", [False, True])
def test_a_refused_state_of_one_parameter_keeps_no_other_from_stepping_later(is_split):
    a, b = parameter([1.0], [1.0]), parameter([1.0], [1.0], dtype=torch.float64)  # in buckets of their own
    groups = [{"params": [a]}, {"params": [b]}] if is_split else [a, b]
    optimizer = LearnedOptimizer(groups, SGDUpdate(0.5, momentum=0.5))
    optimizer.state[b] = {"momentum_buffer": torch.zeros(7)}
    with pytest.raises(ValueError, match="should have a state of"):
        optimizer.step()
    assert [a.item(), b.item()] == [1.0, 1.0]
    b.grad = None
    assert moves(optimizer, [a, b]) == [0.5, 0.0]


# -------------------- state


@pytest.mark.parametrize(
    "reset",
    [
        lambda optimizer: optimizer.state.clear(),
        lambda optimizer: setattr(optimizer, "state", defaultdict(dict)),
        lambda optimizer: [optimizer.state.__setitem__(p, {}) for p in list(optimizer.state)],
    ],
    ids=["cleared", "replaced", "of each parameter"],
)
def test_state_that_is_thrown_away_starts_afresh_and_is_saved_again(reset):
    params, optimizer = stepped()
    reset(optimizer)
    optimizer.step()
    assert [state["step"].item() for state in optimizer.state_dict()["state"].values()] == [1, 1]
    twin = LearnedOptimizer([parameter([0.0, 0.0, 0.0], params[0].grad)], AdamUpdate(0.1))
    twin.step()
    for name, value in twin.state[twin.param_groups[0]["params"][0]].items():
        assert torch.equal(optimizer.state[params[0]][name], value)


@pytest.mark.parametrize("edit", ["dict", "tensor"])
@pytest.mark.parametrize("size", [3, 2**16])
def test_state_that_is_replaced_is_taken_up(size, edit):
    a, b = (parameter(torch.ones(size), torch.ones(size)) for _ in range(2))
    optimizer = LearnedOptimizer([a, b], LeakySum())
    optimizer.step()
    if edit == "dict":
        optimizer.state[a] = {name: torch.zeros_like(x) for name, x in optimizer.state[a].items()}
    else:
        optimizer.state[a]["total"] = torch.zeros(size)
    optimizer.step()
    assert optimizer.state[a]["total"].unique().tolist() == [1.0]
    assert optimizer.state[b]["total"].unique().tolist() == pytest.approx([1.9])
    optimizer.step()
    assert optimizer.state[a]["total"].unique().tolist() == pytest.approx([1.9])


def test_state_edited_in_place_is_stepped_without_a_new_layout():
    (a, _), optimizer = stepped(LeakySum())
    placed = list(optimizer._layout.placed)
    optimizer.state[a]["total"].zero_()
    optimizer.step()
    assert torch.equal(optimizer.state[a]["total"], a.grad)
    assert all(x is y for x, y in zip(optimizer._layout.placed, placed, strict=True))


def test_state_that_is_not_the_rules_is_refused_by_name_before_anything_moves():
    a, b = parameter([1.0], [1.0]), parameter([1.0], [1.0])
    optimizer = LearnedOptimizer([{"params": [("a", a)]}, {"params": [("b", b)]}], LeakySum())
    optimizer.step()
    kept, optimizer.state[b] = optimizer.state[b], {"total": torch.zeros(2), "step": torch.zeros(1)}
    before = a.detach().clone()
    with pytest.raises(ValueError, match=r"Parameter `b` should have a state of .*'total': \(1,\).* Found .*\(2,\)"):
        optimizer.step()
    assert torch.equal(a, before)
    optimizer.state[b] = kept
    optimizer.step()
    assert [optimizer.state[p]["total"].item() for p in (a, b)] == pytest.approx([1.9, 1.9])


def test_field_of_the_state_under_another_name_is_missed():
    (a, _), optimizer = stepped()
    name = [*optimizer.state[a]][-1]
    optimizer.state[a]["another"] = optimizer.state[a].pop(name)
    with pytest.raises(ValueError, match=name):
        optimizer.step()


def test_what_others_keep_beside_the_state_stays_there():
    (a, b), optimizer = stepped()
    optimizer.state[a]["slow weights"] = slow = a.detach().clone()
    del optimizer.state[b]
    optimizer.step()
    assert optimizer.state[a]["slow weights"] is slow
    assert [optimizer.state[p]["step"].item() for p in (a, b)] == [3, 1]


def test_counts_of_skipped_gradients_survive_a_new_layout():
    (a, _), optimizer = stepped()
    optimizer._layout.placed[0].bucket.n_skipped[1] = 1  # as on a GPU, where the count waits to be fetched
    optimizer.param_groups[0]["params"].remove(a)
    with pytest.warns(RuntimeWarning, match="was not moved at or before step 2") as record:
        optimizer.step()
    assert record[0].filename == __file__
    assert optimizer.n_skipped == 1


def test_counts_of_skipped_gradients_survive_a_load_that_fails():
    _, optimizer = stepped()
    optimizer._layout.placed[0].bucket.n_skipped[1] = 1
    with pytest.raises(ValueError, match="`state_dict` should be the state of a LearnedOptimizer"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{"params": [0, 1]}]})
    with pytest.warns(RuntimeWarning, match="was not moved at or before step 2"):
        assert optimizer.n_skipped == 1


class KeepsDtype(UpdateRule):
    """Its state begins in the dtype that it is asked for."""

    crosses_coordinates = False

    def init_state(self, param):
        return LeakySumState(torch.zeros_like(param), param.new_zeros((*param.shape[:-1], 1)))

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        total = state.total + 1e-3 * grad
        return -total, LeakySumState(total, state.step + 1)


def test_state_like_the_parameter_is_float32_beside_bfloat16():
    param = parameter([1.0], [1.0], torch.bfloat16)
    optimizer = LearnedOptimizer([param], KeepsDtype())
    for _ in range(300):
        optimizer.step()
    assert {x.dtype for x in optimizer.state[param].values()} == {torch.float32}
    assert optimizer.state[param]["step"].item() == 300  # bfloat16 stops counting at 256
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    assert {x.dtype for x in optimizer.state[param].values()} == {torch.float32}


# -------------------- parameters and checkpoints


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("shape", [(5, 6), (30,), (8, 5), (1, 5)], ids=str)
@pytest.mark.parametrize(
    "rule", ["port-hamiltonian", "port-hamiltonian-spectral", AdamUpdate()], ids=["", "matrix", "adam"]
)
def test_a_parameter_of_another_shape_is_refused_by_name_until_its_state_is_deleted(rule, shape, implementation):
    torch.manual_seed(0)
    grown, other = parameter(torch.ones(6, 5), torch.randn(6, 5)), parameter(torch.ones(4), torch.randn(4))
    optimizer = LearnedOptimizer([("grown", grown), ("other", other)], rule, implementation=implementation)
    optimizer.step()
    grown.grad = None
    grown.data = torch.ones(shape)
    grown.grad = torch.randn(shape)
    before = other.detach().clone()
    with pytest.raises(ValueError, match=r"Parameter `grown` should have a state of .* Found .*\(6, 5\)"):
        optimizer.step()
    assert torch.equal(other, before)
    assert torch.equal(grown, torch.ones(shape))
    del optimizer.state[grown]
    optimizer.step()
    fresh = parameter(torch.ones(shape), grown.grad)
    LearnedOptimizer([fresh], rule, implementation=implementation).step()
    torch.testing.assert_close(grown, fresh, rtol=0, atol=1e-6)  # packed or not, sums are in another order
    assert not torch.equal(other, before)


@pytest.mark.parametrize("size", [3, 128])
def test_model_brought_to_another_memory_format_goes_on(size):
    torch.manual_seed(0)
    conv, twin = nn.Conv2d(size, size, 3), nn.Conv2d(size, size, 3)
    twin.load_state_dict(conv.state_dict())
    for model in (conv, twin):
        optimizer = LearnedOptimizer(model.parameters(), AdamUpdate(0.1))
        for step in range(3):
            if model is twin and step == 1:
                twin.to(memory_format=torch.channels_last)
            for param in model.parameters():
                param.grad = torch.full_like(param, step + 1.0)
            optimizer.step()
    assert not twin.weight.is_contiguous()
    torch.testing.assert_close(twin.weight, conv.weight)  # another loop, another rounding
    assert optimizer.state[twin.weight]["step"].item() == 3


def test_checkpoint_of_small_tensors_holds_no_padding():
    params = [parameter(torch.ones(size), torch.ones(size)) for size in (*[10] * 100, 1025, 2**16)]
    optimizer = LearnedOptimizer(params, AdamUpdate())
    optimizer.step()
    saved = optimizer.state_dict()
    for fields in saved["state"].values():
        assert all(x.untyped_storage().nbytes() == x.nbytes for x in fields.values())
    file = BytesIO()
    torch.save({"state": {key: saved["state"][key] for key in range(100)}}, file)
    assert len(file.getvalue()) < 200_000  # 300 tensors of 40 bytes; torch.save takes half a kB for each
    before = {name: x.clone() for name, x in saved["state"][0].items()}
    optimizer.step()
    assert all(torch.equal(saved["state"][0][name], x) for name, x in before.items())
