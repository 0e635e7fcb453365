"""State that is moved in memory, narrow rules, what a resumption may lose, and other surprises of a long run."""

import copy
import warnings
from typing import NamedTuple

import pytest
import torch
from optimizer_toys import loss_of, parameter, small_model, train
from torch import nn

import odeopt
from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, PortHamiltonianUpdate, UpdateRule
from odeopt.stepping.guard import Guard

SPECTRAL = "port-hamiltonian-spectral"


def step(optimizer, n=1):
    for _ in range(n):
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad = param.detach().sin() + 0.1
        optimizer.step()


# -------------------- state


def replace_data(x):
    x.data = x.data.clone()


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("move", [replace_data, lambda x: x.share_memory_()], ids=["data", "share_memory"])
def test_state_that_is_moved_in_memory_is_stepped_where_it_lies(move, implementation):
    moved, other = ([nn.Parameter(torch.linspace(-1, 1, n).view(shape)) for n, shape in ((1200, (40, 30)), (7, (7,)))]
                    for _ in range(2))  # fmt: skip
    optimizers = [LearnedOptimizer(params, implementation=implementation) for params in (moved, other)]
    for optimizer in optimizers:
        step(optimizer, 3)
    for state in optimizers[0].state.values():
        for x in state.values():
            if x is not None:
                move(x)
    for optimizer in optimizers:
        step(optimizer, 3)
    for a, b in zip(moved, other, strict=True):
        torch.testing.assert_close(a, b)
        assert optimizers[0].state[a]["step"].item() == 6
        for name, x in optimizers[1].state[b].items():
            torch.testing.assert_close(optimizers[0].state[a][name], x)
    assert optimizers[0].state_dict()["state"][0]["step"].item() == 6


@pytest.mark.parametrize(
    ("rule", "implementation"),
    [(SPECTRAL, "auto"), (SPECTRAL, "eager"), ("port-hamiltonian", "auto"), ("lstm", "auto")],
)
def test_state_in_shared_memory_stays_there(rule, implementation):
    params = [nn.Parameter(torch.ones(n, n)) for n in (4, 4, 40)] + [nn.Parameter(torch.ones(3))]
    optimizer = LearnedOptimizer(params, rule, implementation=implementation)
    step(optimizer)
    held = [x for state in optimizer.state.values() for x in state.values() if x.numel() > 0]
    for x in held:
        x.share_memory_()
    before = [x.clone() for x in held]
    step(optimizer)
    assert all(x.is_shared() for x in held)
    now = [x for state in optimizer.state.values() for x in state.values() if x.numel() > 0]
    assert all(x is y for x, y in zip(held, now, strict=True))
    assert sum(not torch.equal(x, y) for x, y in zip(held, before, strict=True)) > len(held) / 2


@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_freezing_a_parameter_leaves_the_state_of_others_in_its_place(implementation):
    params = [nn.Parameter(torch.linspace(-1, 1, 12 * n).view(n, 12)) for n in (9, 10, 11)]
    optimizer = LearnedOptimizer(params, implementation=implementation)
    step(optimizer, 2)
    states = {param: (state, dict(state)) for param, state in optimizer.state.items()}
    params[1].requires_grad_(False)
    params[1].grad = None
    fresh = LearnedOptimizer(params, implementation=implementation)
    fresh.load_state_dict(optimizer.state_dict())
    copies = [param.detach().clone() for param in params]
    for param in params[::2]:
        param.grad = torch.ones_like(param)
    optimizer.step()
    for param, (state, fields) in states.items():
        assert optimizer.state[param] is state
        assert all(state[name] is x for name, x in fields.items())
        assert state["step"].item() == (2 if param is params[1] else 3)
    moved = [param.detach().clone() for param in params]
    for param, copied in zip(params, copies, strict=True):
        param.detach().copy_(copied)
    fresh.step()  # as of a network of two matrices
    for param, other in zip(params, moved, strict=True):
        torch.testing.assert_close(param.detach(), other)


@pytest.mark.parametrize("rule", [SPECTRAL, "port-hamiltonian"])
def test_what_stays_frozen_is_left_out_of_the_buckets(rule):
    params = [nn.Parameter(torch.linspace(-1, 1, 30).view(5, 6) + k) for k in range(4)]
    optimizer = LearnedOptimizer(params, rule, implementation="eager")
    step(optimizer, 2)
    kept = [copy.deepcopy(optimizer.state[param]) for param in params]
    for param in params[1:]:
        param.requires_grad_(False)
        param.grad = None
    for _ in range(12):
        params[0].grad = torch.ones(5, 6)
        optimizer.step()
    assert [placed.bucket.params for placed in optimizer._layout.placed] == [params[:1]]
    assert optimizer.state[params[0]]["step"].item() == 14
    for param, before in zip(params[1:], kept[1:], strict=True):
        assert all(torch.equal(optimizer.state[param][name], x) for name, x in before.items())
    for param in params:
        param.requires_grad_(True)
    step(optimizer)
    assert [optimizer.state[param]["step"].item() for param in params] == [15, 3, 3, 3]


def test_a_state_that_a_user_puts_in_stays_the_users():
    param = nn.Parameter(torch.linspace(-1, 1, 12).view(3, 4))
    optimizer = LearnedOptimizer([param])
    step(optimizer, 2)
    kept = copy.deepcopy(optimizer.state[param])
    before = copy.deepcopy(kept)
    optimizer.state[param] = kept
    step(optimizer)
    assert optimizer.state[param]["step"].item() == 3
    assert all(torch.equal(kept[name], x) for name, x in before.items())


@pytest.mark.parametrize("is_stack", [False, True])
def test_matrices_without_a_gradient_are_not_computed(monkeypatch, is_stack):
    shapes = [(2, 9, 9), (3, 9, 9), (1, 9, 9)] if is_stack else 3 * [(9, 9)]
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    others = copy.deepcopy(params)  # each in a bucket of its own
    groups = [[{"params": params, "is_stack": is_stack}], [{"params": [x], "is_stack": is_stack} for x in others]]
    both = [LearnedOptimizer(each, implementation="eager") for each in groups]
    for optimizer in both:
        step(optimizer)
    for some in (params, others):
        some[1].grad = some[2].grad = None
    untouched = [param.detach().clone() for param in params[1:]]
    sizes, forward = [], PortHamiltonianUpdate.forward

    def counted(rule, grad, *args, **options):
        sizes.append(len(grad))
        return forward(rule, grad, *args, **options)

    monkeypatch.setattr(PortHamiltonianUpdate, "forward", counted)
    for optimizer in both:
        optimizer.step()
    assert sizes == 2 * [2 if is_stack else 1]
    torch.testing.assert_close(params, others)
    assert all(map(torch.equal, params[1:], untouched))
    assert [both[0].state[param]["step"].max().item() for param in params] == [2, 1, 1]


def test_a_parameter_that_gets_its_shape_late_is_stepped_as_a_matrix():
    early, late = nn.Parameter(torch.ones(3)), nn.Parameter(torch.empty(0))
    optimizer = LearnedOptimizer([early, late])
    early.grad = torch.ones(3)
    optimizer.step()
    late.data = torch.randn(12, 12)
    late.grad = torch.randn(12, 12)
    optimizer.step()
    (factor,) = {placed.rule.depth_factor for placed in optimizer._layout.placed if placed.bucket.is_whole}
    assert factor == optimizer.rule.for_depth(1).depth_factor


@pytest.mark.parametrize("implementation", ["auto", "eager"])
@pytest.mark.parametrize("rule", [AdamUpdate(0.1), "port-hamiltonian"], ids=["adam", "port-hamiltonian"])
def test_parameters_that_come_to_share_memory_are_both_stepped(rule, implementation):
    def moved(is_late):
        a, b = nn.Parameter(torch.ones(6)), nn.Parameter(torch.ones(6))
        optimizer = LearnedOptimizer([a, b], rule, implementation=implementation)
        if is_late:
            step(optimizer)
            a.data, b.data = torch.ones(6), torch.ones(6)
        b.data = a.data
        a.grad, b.grad = torch.ones(6), torch.ones(6)
        alone = LearnedOptimizer([nn.Parameter(torch.ones(6))], rule, implementation=implementation)
        if is_late:
            step(alone)
            alone.param_groups[0]["params"][0].data = torch.ones(6)
        alone.param_groups[0]["params"][0].grad = torch.ones(6)
        alone.step()
        optimizer.step()
        return (1 - a[0]).item() / (1 - alone.param_groups[0]["params"][0][0]).item()

    assert moved(is_late=False) == pytest.approx(2, rel=0.05)  # the weights of a step enter the next one
    assert moved(is_late=True) == pytest.approx(2, rel=0.05)


def test_memory_does_not_grow_with_the_sets_of_parameters_that_have_gradients():
    params = [nn.Parameter(torch.ones(2)) for _ in range(20)]
    optimizer = LearnedOptimizer(params, AdamUpdate(0.1))
    generator = torch.Generator().manual_seed(0)
    for k in range(100):
        for param, has in zip(params, (torch.rand(20, generator=generator) < 0.5).tolist(), strict=True):
            param.grad = torch.ones(2) if has or k == 0 else None
        optimizer.step()
    assert max(len(placed.bucket._masks) for placed in optimizer._layout.placed) <= 64


def test_parameters_of_the_same_name_in_two_groups_are_all_diagnosed():
    models = [nn.Sequential(nn.Linear(n, n)) for n in (3, 4)]
    optimizer = LearnedOptimizer([{"params": [*model.named_parameters()]} for model in models])
    step(optimizer)
    assert [*optimizer.diagnostics()] == [f"param_groups[{i}]['params'][{j}]" for i in (0, 1) for j in (0, 1)]


# -------------------- narrow rules


@pytest.mark.parametrize("name", ["port-hamiltonian-spectral", "port-hamiltonian"])
def test_constants_of_a_rule_in_bfloat16_are_those_of_the_rule(name, tmp_path):
    rule = odeopt.load_pretrained(name)
    narrow = copy.deepcopy(rule).bfloat16()
    odeopt.save(narrow, tmp_path / "narrow.safetensors", trained_for={"horizon": 1, "task": "none"})
    for each in (narrow, odeopt.load(tmp_path / "narrow.safetensors"), narrow.float()):
        for buffer in ("decays", "time_scales", "start"):
            assert torch.equal(getattr(each, buffer), getattr(rule, buffer))
    params = [nn.Parameter(torch.ones(5, 5)), nn.Parameter(torch.ones(5))]
    optimizer = LearnedOptimizer(params, copy.deepcopy(rule).bfloat16())
    step(optimizer, 3)
    for param in params:
        assert param.isfinite().all()
        assert optimizer.state[param]["slow_scale"].isfinite().all()


# -------------------- resumption


def averaged(n_steps=5):
    model = small_model()
    optimizer = LearnedOptimizer(model.parameters(), averaging=8)
    train(model, optimizer, range(n_steps))
    return model, optimizer


def test_hooks_before_a_dictionary_of_state_act_on_what_is_saved():
    model, optimizer = averaged()
    weights = [param.detach().clone() for param in model.parameters()]
    optimizer.register_state_dict_pre_hook(lambda optimizer: optimizer.train())
    optimizer.eval()
    saved = optimizer.state_dict()
    assert not any(group["shows_averages"] for group in saved["param_groups"])
    assert all(map(torch.equal, model.parameters(), weights))
    averaged(2)[1].load_state_dict(saved)


@pytest.mark.parametrize("loads_model", [False, True])
def test_loading_while_averages_are_shown_keeps_the_weights(loads_model):
    model, optimizer = averaged()
    saved, weights = optimizer.state_dict(), copy.deepcopy(model.state_dict())
    optimizer.eval()
    assert not all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    if loads_model:
        weights = copy.deepcopy(averaged(2)[0].state_dict())
        model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    optimizer.train()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_a_state_saved_in_eval_shows_averages_before_and_after_it_is_loaded():
    model, optimizer = averaged()
    weights = copy.deepcopy(model.state_dict())
    optimizer.eval()
    shown = copy.deepcopy(model.state_dict())
    optimizer.load_state_dict(optimizer.state_dict())
    assert all(torch.equal(x, shown[name]) for name, x in model.state_dict().items())
    optimizer.train()
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())


def test_averages_that_come_without_the_weights_are_refused():
    model = small_model()
    optimizer = LearnedOptimizer(model.parameters(), averaging=8)
    train(model, optimizer, range(4))
    optimizer.eval()
    saved = optimizer.state_dict()
    LearnedOptimizer(small_model().parameters(), averaging=8).load_state_dict(saved)
    for state in saved["state"].values():  # as some tools do, which save what a new optimizer has
        state.pop("averaging_weights")
    with pytest.raises(ValueError, match=r"`state_dict` should be saved after `optimizer.train\(\)`"):
        LearnedOptimizer(small_model().parameters(), averaging=8).load_state_dict(saved)
    optimizer.train()
    LearnedOptimizer(small_model().parameters(), averaging=8).load_state_dict(optimizer.state_dict())


def test_averages_that_are_not_followed_are_forgotten():
    model, without = small_model(), small_model()
    optimizer = LearnedOptimizer(model.parameters(), averaging=8)
    train(model, optimizer, range(4))
    second = LearnedOptimizer(without.parameters())
    second.load_state_dict(optimizer.state_dict())
    assert not any("averaging_average" in state for state in second.state.values())
    optimizer.eval()
    second.load_state_dict(optimizer.state_dict())  # the weights are there
    second.train()
    assert not any("averaging_average" in state for state in second.state.values())


def test_the_highest_lr_of_a_guard_is_kept_by_what_a_new_optimizer_has():
    guarded = LearnedOptimizer([parameter([1.0], [1.0])], guard=True)
    assert guarded.param_groups[0]["guard_lr"] == 0
    guarded.report(1.0)
    guarded.step()
    assert guarded.state_dict()["param_groups"][0]["guard_lr"] == 1
    plain = LearnedOptimizer([parameter([1.0], [1.0])])
    plain.add_param_group(dict(guarded.param_groups[0], params=[parameter([2.0], [1.0])]))
    assert not plain.param_groups[1].keys() & {"guard", "guard_lr"}


@pytest.mark.parametrize("window", [16, 10])
def test_a_guard_with_a_smaller_window_goes_on_judging(window):
    first = LearnedOptimizer([parameter([1.0], [1.0])], guard=Guard(window=20))
    losses = torch.linspace(1, 0.45, 55).tolist()
    for loss in losses:
        first.report(loss)
        first.step()
    second = LearnedOptimizer([parameter([1.0], [1.0])], guard=Guard(window=window))
    second.load_state_dict(first.state_dict())
    for loss in torch.linspace(0.45, 1.65, 300).tolist():
        second.report(loss)
        second.step()
    assert second.guard_status.n_handovers > 0


# -------------------- others


def test_what_is_frozen_while_it_has_a_gradient_counts_no_longer_than_that():
    params = [nn.Parameter(torch.eye(8) + k) for k in range(5)]
    optimizer = LearnedOptimizer(params, total_steps=20)
    step(optimizer, 2)
    for param in params[:4]:
        param.requires_grad_(False)  # its gradient of the last step is still there
    for param in params:
        param.grad = torch.ones(8, 8)
    optimizer.step()
    optimizer.zero_grad()
    params[4].grad = torch.ones(8, 8)
    optimizer.step()
    factors = [placed.rule.depth_factor for placed in optimizer._layout.placed]
    assert factors == [optimizer.rule.for_depth(1).depth_factor]


def test_names_of_the_rules_of_the_library_stay_theirs(tmp_path):
    known = UpdateRule.registry["PortHamiltonianUpdate"]
    mine = type("PortHamiltonianUpdate", (PortHamiltonianUpdate,), {"__module__": "mine"})
    assert UpdateRule.registry["PortHamiltonianUpdate"] is known
    assert type(odeopt.load_pretrained("port-hamiltonian")) is PortHamiltonianUpdate
    with pytest.raises(ValueError, match="by a name that no rule of odeopt has"):
        odeopt.save(mine(), tmp_path / "mine.safetensors", trained_for={"horizon": 1, "task": "none"})


class Nothing(NamedTuple):
    """A state without fields."""


class Descent(UpdateRule):
    """The gradient itself."""

    crosses_coordinates = False

    def init_state(self, param):
        return Nothing()

    def forward(self, grad, state, *, param=None, shape=None, progress=None):
        return -0.1 * grad, state


def test_rules_without_a_state_have_averages_and_are_restored():
    param = nn.Parameter(torch.ones(3))
    optimizer = LearnedOptimizer([param], Descent(), averaging=8)
    step(optimizer, 5)
    last = param.detach().clone()
    optimizer.eval()
    assert not torch.equal(param, last)
    guarded = LearnedOptimizer([param := nn.Parameter(torch.ones(3))], Descent(), guard=True)
    for loss in (1.0, float("nan")):
        guarded.report(loss)
        param.grad = torch.full((3,), 1e10)
        guarded.step()
    assert guarded.guard_status.n_restored == 1
    assert torch.equal(param, torch.ones(3))


def test_a_fallback_that_wants_a_length_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match=r"`total_steps` should be given in all groups under this guard"):
        LearnedOptimizer([parameter([1.0], [1.0])], guard=Guard(AdamUpdate(cosine=True)))
    LearnedOptimizer([parameter([1.0], [1.0])], guard=Guard(AdamUpdate(cosine=True)), total_steps=5)


def test_a_negated_view_is_stepped_downhill():
    def last_step(implementation):
        param = nn.Parameter(torch.tensor([1 + 2j]).conj().imag)
        assert param.is_neg()
        before = param.detach().clone()
        optimizer = LearnedOptimizer([param], implementation=implementation)
        param.grad = torch.ones(1)
        optimizer.step()
        return param.detach() - before

    torch.testing.assert_close(last_step("auto"), last_step("eager"))
    assert last_step("auto") < 0


def test_numbers_that_are_equal_make_equal_rules():
    params = [parameter([1.0], [1.0])]
    optimizer = LearnedOptimizer(params, AdamUpdate(1), lr=1e-3)
    optimizer.step()
    LearnedOptimizer(params, AdamUpdate(1.0), lr=1e-3).load_state_dict(optimizer.state_dict())


def test_diagnostics_are_of_the_weights_and_not_of_averages():
    model = small_model()
    optimizer = LearnedOptimizer(model.parameters(), averaging=8)
    train(model, optimizer, range(3))
    optimizer.eval()
    loss_of(model).backward()
    with pytest.raises(RuntimeError, match=r"call `optimizer.train\(\)` before diagnostics"):
        optimizer.diagnostics()


def test_a_warning_that_is_an_error_comes_after_the_step():
    params = [parameter([1.0], [1.0]), parameter([2.0], [1.0])]
    optimizer = LearnedOptimizer([{"params": params[:1], "momentum": 0.9}, {"params": params[1:]}])
    optimizer.param_groups[0]["momentum"] = 0.9
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="A scheduler cycles `momentum`"):
            optimizer.step()
    assert [group["n_steps"] for group in optimizer.param_groups] == [1, 1]
