"""LearnedOptimizer.step in the graphs of torch.compile: one operation, and the numbers of the eager step."""

import copy

import pytest
import torch
from optimizer_toys import RULES, LeakySum, parameter, port_hamiltonian, small_model
from torch import nn
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.exc import Unsupported

from odeopt.optimizer import LearnedOptimizer
from odeopt.rules import AdamUpdate, SGDUpdate

# of torch's own compiler
pytestmark = [pytest.mark.filterwarnings("ignore::DeprecationWarning"), pytest.mark.usefixtures("fresh")]


@pytest.fixture
def fresh():
    """Nothing compiled before is used, nor left behind."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs(list):
    """A backend that keeps the graphs; functionalized or as they are."""

    def __init__(self, *, is_functional):
        super().__init__()
        self.is_functional = is_functional

    def __call__(self, graph, inputs):
        self.append(graph)
        return aot_eager(graph, inputs) if self.is_functional else graph

    def count_steps(self):
        return [sum(node.target is torch.ops.odeopt.step.default for node in graph.graph.nodes) for graph in self]


def learner(rule, **options):
    """A small model in two groups, and its optimizer."""
    model = small_model()
    params = list(model.parameters())
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.001, "maximize": True}]
    settings = {"lr": torch.tensor(0.7), "total_steps": 9, "capturable": True}
    return model, LearnedOptimizer(groups, rule, **settings | options)


def give_gradients(model, x):
    for param in model.parameters():
        param.grad = torch.cos(x.sum() * (1 + param.detach()))


def total(model):
    return torch.stack([param.detach().sum() for param in model.parameters()])


def train_step(x, model, optimizer):
    give_gradients(model, x)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.99)
    before = total(model)
    optimizer.step()
    return before, total(model)


def assert_alike(found, wanted):
    """To the bit: parameters, states and counts."""
    for a, b in zip(found.param_groups, wanted.param_groups, strict=True):
        assert a["n_steps"] == b["n_steps"]
        for p, q in zip(a["params"], b["params"], strict=True):
            assert torch.equal(p, q)
            assert found.state[p].keys() == wanted.state[q].keys()
            assert all(map(torch.equal, found.state[p].values(), wanted.state[q].values()))


def inputs(step):
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(step))


@pytest.mark.parametrize("is_functional", [True, False], ids=["functional", "in place"])
@pytest.mark.parametrize("name", ["port-hamiltonian", "coordinatewise", "adam"])
def test_training_step_is_one_graph_with_one_operation_whatever_the_step_and_the_learning_rate(name, is_functional):
    """Parameters are read and changed before the step, and read after it."""
    graphs, rule = Graphs(is_functional=is_functional), RULES[name]()
    (model, optimizer), (twin, other) = (learner(rule) for _ in range(2))
    compiled = torch.compile(train_step, backend=graphs, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(5):
            found = compiled(inputs(step), model, optimizer)
            wanted = train_step(inputs(step), twin, other)
            assert all(map(torch.equal, found, wanted))  # of before the step, and of after it
            assert not torch.equal(*wanted)
            assert_alike(optimizer, other)
            for some in (optimizer, other):
                for group in some.param_groups:
                    group["lr"].mul_(0.9)
    assert graphs.count_steps() == [1]


def test_two_steps_in_one_graph_follow_each_other():
    def two(x, model, optimizer):
        for _ in range(2):
            train_step(x, model, optimizer)

    assert_one_graph(two, n_steps=2)


def test_options_that_compiled_code_sets_count_in_its_own_step():
    def move(x, values, model, optimizer):
        for group in optimizer.param_groups:
            group["lr"], group["weight_decay"] = values[0], values[1]
            group["maximize"], group["total_steps"] = not group["maximize"], values[2]
        train_step(x, model, optimizer)

    rule = RULES["port-hamiltonian"]()
    (model, optimizer), (twin, other) = (learner(rule) for _ in range(2))
    compiled = torch.compile(move, backend="aot_eager", fullgraph=True)
    for step in range(2):
        values = torch.tensor(0.3 + step / 8), 0.01 * step, 20 - step
        compiled(inputs(step), values, model, optimizer)
        move(inputs(step), values, twin, other)
        assert_alike(optimizer, other)
    assert optimizer.n_steps == 2
    for a, b in zip(optimizer.param_groups, other.param_groups, strict=True):
        assert all(a[key] == b[key] for key in ("lr", "weight_decay", "maximize", "total_steps"))


def assert_one_graph(move, n_steps=1):
    graphs, rule = Graphs(is_functional=True), port_hamiltonian()
    (model, optimizer), (twin, other) = (learner(rule) for _ in range(2))
    compiled = torch.compile(move, backend=graphs, fullgraph=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(3):
            compiled(inputs(step), model, optimizer)
            move(inputs(step), twin, other)
            assert_alike(optimizer, other)
    assert graphs.count_steps() == [n_steps]


def test_gradients_of_torch_func_and_step_are_one_graph():
    def move(x, model, optimizer):
        values = {name: param.detach() for name, param in model.named_parameters()}
        grads = torch.func.grad(lambda own: torch.func.functional_call(model, own, (x,)).square().mean())(values)
        for name, param in model.named_parameters():
            param.grad = grads[name]
        optimizer.step()

    assert_one_graph(move)


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="no backward in graphs here")
def test_backward_and_step_are_one_graph():
    def move(x, model, optimizer):
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        for param in model.parameters():
            param.grad = None

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        assert_one_graph(move)


LEFT_OUT = {
    "count on the host": {"capturable": False},
    "averages": {"averaging": 8},
}


def assert_left_out_of_the_graph(run, pair, n_steps):
    (model, optimizer), (twin, other) = pair
    graphs = Graphs(is_functional=True)
    compiled = torch.compile(run, backend=graphs)
    for step in range(n_steps):
        compiled(inputs(step), model, optimizer)
        run(inputs(step), twin, other)
        assert_alike(optimizer, other)
    assert sum(graphs.count_steps()) == 0


@pytest.mark.parametrize("options", LEFT_OUT.values(), ids=LEFT_OUT)
def test_step_that_no_graph_can_hold_is_a_graph_break_or_an_error(options):
    def move(x, model, optimizer):
        give_gradients(model, x)
        optimizer.step()
        return x + 1

    pair = [learner(LeakySum(), **options) for _ in range(2)]
    assert_left_out_of_the_graph(move, pair, 3)
    with pytest.raises(Unsupported, match="_step_beside_graph"):
        torch.compile(pair[0][1].step, backend="eager", fullgraph=True)()


@pytest.mark.parametrize("options", [{"lr": 0.5}, {"weight_decay": torch.tensor(0.1)}], ids=["number", "tensor"])
def test_step_is_left_out_of_the_graph_where_the_learning_rate_is_a_number_or_another_option_a_tensor(options):
    pair = [learner(port_hamiltonian()) for _ in range(2)]
    for _, optimizer in pair:
        optimizer.param_groups[0].update(options)
    assert_left_out_of_the_graph(train_step, pair, 2)


def test_closure_and_step_without_gradients_are_left_out_of_the_graph():
    model, optimizer = learner(LeakySum())
    with pytest.raises(Unsupported, match="_step_beside_graph"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)()
    give_gradients(model, inputs(0))
    with pytest.raises(Unsupported, match="_step_beside_graph"):
        torch.compile(optimizer.step, backend="eager", fullgraph=True)(lambda: 1.0)
    assert optimizer.n_steps == 0


def test_skipped_gradients_are_counted_after_the_graph_has_run():
    def move(x, model, optimizer):
        for param in model.parameters():
            param.grad = x * torch.ones_like(param)
        optimizer.step()
        return optimizer.n_skipped

    model, optimizer = learner(LeakySum())
    compiled = torch.compile(move, backend="aot_eager")
    with pytest.warns(RuntimeWarning, match="was not moved"):
        assert [compiled(torch.tensor(x), model, optimizer) for x in (1.0, float("nan"))] == [0, 4]


@pytest.mark.parametrize("read", [lambda some: some.n_skipped, LearnedOptimizer.diagnostics], ids=["count", "account"])
def test_what_is_kept_beside_the_graph_is_not_read_by_it(read):
    _, optimizer = learner(LeakySum())
    with pytest.raises(Unsupported, match="marked"):
        torch.compile(lambda: read(optimizer), backend="eager", fullgraph=True)()


def test_copy_of_an_optimizer_is_stepped_in_place_of_the_one_that_was_copied():
    params = [parameter([1.0, 2.0], [0.3, 0.4])]
    optimizer = LearnedOptimizer(params, LeakySum(), lr=torch.tensor(1.0), capturable=True)
    other = copy.deepcopy(optimizer)
    (param,), (copied,) = (some.param_groups[0]["params"] for some in (optimizer, other))
    copied.grad = torch.ones(2)
    torch.compile(other.step, backend="aot_eager", fullgraph=True)()
    assert (optimizer.n_steps, other.n_steps) == (0, 1)
    assert torch.equal(param, torch.tensor([1.0, 2.0]))
    assert torch.equal(copied, torch.tensor([1.0, 2.0]) - 0.1)


def test_step_that_is_refused_leaves_everything_as_it_was():
    model, optimizer = learner(AdamUpdate(), implementation="native")
    give_gradients(model, inputs(0))
    params, lr = list(model.parameters()), optimizer.param_groups[0]["lr"]
    before = [(param.data_ptr(), param.grad, param.detach().clone()) for param in params]
    with pytest.raises(ValueError, match="no native step of AdamUpdate"):
        torch.compile(optimizer.step, backend="aot_eager", fullgraph=True)()
    for param, (pointer, grad, value) in zip(params, before, strict=True):
        assert param.data_ptr() == pointer
        assert param.grad is grad
        assert torch.equal(param, value)
    assert optimizer.param_groups[0]["lr"] is lr
    assert optimizer.n_steps == 0


def arguments(optimizer):
    (group,) = optimizer.param_groups
    params = [param.detach() for param in group["params"]]
    grads = [None, *(torch.ones_like(param) for param in params[1:])]
    numbers = [0.01, 1.0, 20.0, 0.0, 0.0, 0.0, 1.0]  # weight_decay, maximize, total_steps, three forms, n_blocks
    return optimizer._handle, params, grads, [group["n_steps"]], [torch.tensor(0.5)], numbers


def test_operation_is_what_torch_asks_of_one():
    # a rule without a state: the operation is called several times, and the results compared
    params = [nn.Parameter(torch.full(shape, 0.5)) for shape in [(3,), (2, 3), ()]]
    optimizer = LearnedOptimizer(params, SGDUpdate(0.1), capturable=True)
    torch.library.opcheck(torch.ops.odeopt.step.default, arguments(optimizer))


def test_parameters_that_are_not_the_optimizers_own_are_refused():
    optimizer = LearnedOptimizer([parameter([1.0], [1.0]), parameter([2.0], [1.0])], LeakySum(), capturable=True)
    handle, params, grads, *others = arguments(optimizer)
    with pytest.raises(RuntimeError, match="added to the optimizer, or taken from it"):
        torch.ops.odeopt.step(handle, params[:1], grads[:1], *others)
