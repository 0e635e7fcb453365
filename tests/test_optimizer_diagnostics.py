"""Diagnostics say what the next step does, for every rule, without doing it; and TensorBoard and a figure show them."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import odeopt
from odeopt.report import diagnostics, plot_diagnostics, write_diagnostics
from odeopt.rules.base import UpdateRule

BALANCE = {"energy", "energy_rate", "dissipated", "supplied", "step_size", "friction", "gain"}


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def backward(model, step):
    x = torch.randn(8, 6, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
    model.zero_grad()
    model(x).square().mean().backward()


def rules():
    torch.manual_seed(1)
    return {
        "spectral": odeopt.load_pretrained("port-hamiltonian-spectral"),
        "every second step": odeopt.load_pretrained("port-hamiltonian-spectral").with_options(matrix_interval=2),
        "coordinates": odeopt.load_pretrained("port-hamiltonian"),
        "coordinatewise": odeopt.PortHamiltonianUpdate(coordinatewise=True),
        "mixed": odeopt.PortHamiltonianUpdate(modes=3, kinetic=("quadratic", "spectral", "relativistic")),
        "networks": odeopt.PortHamiltonianUpdate(friction="network", potential="network", solver="rk4"),
        "adam": odeopt.AdamUpdate(),
        "lstm": odeopt.load_pretrained("lstm"),
        "hamiltonian": odeopt.load_pretrained("hamiltonian"),
    }


@pytest.mark.parametrize("name", list(rules()))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_step_is_the_one_that_was_told_and_asking_changes_nothing(name, dtype):
    model = network(dtype)
    other = copy.deepcopy(model)
    options = {"rule": rules()[name], "total_steps": 9, "weight_decay": 1e-3, "maximize": True}
    ours, silent = (odeopt.LearnedOptimizer(x.named_parameters(), **options) for x in (model, other))
    for step in range(4):
        backward(model, step)
        backward(other, step)
        told = ours.diagnostics()
        before = [param.detach().double().clone() for param in model.parameters()]
        ours.step()
        silent.step()
        assert list(told) == [name for name, _ in model.named_parameters()]
        for (key, param), old in zip(model.named_parameters(), before, strict=True):
            ratio = ((param.double() - old).norm() / old.norm()).item()
            # a change is rounded to the parameter's dtype: half a unit in the last place of each weight
            rounding = torch.finfo(dtype).eps
            assert told[key]["update_to_weight"].item() == pytest.approx(ratio, rel=1e-4, abs=2 * rounding)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "name", ["spectral", "every second step", "coordinates", "mixed", "networks", "coordinatewise"]
)
def test_powers_balance_and_stay_within_what_passivity_allows(name):
    model = network()
    optimizer = odeopt.LearnedOptimizer(model.named_parameters(), rules()[name], total_steps=20)
    for step in range(6):
        backward(model, step)
        for key, found in optimizer.diagnostics().items():
            unknown = {"friction", "gain"} if name == "networks" else set()
            assert found.keys() - {"update_to_weight"} == BALANCE - unknown
            assert all(x.shape == () for quantity, x in found.items() if quantity not in ("friction", "gain"))
            assert all(found[quantity] >= 0 for quantity in ("energy", "dissipated", "step_size")), key
            scale = found["dissipated"] + found["supplied"].abs() + 1e-6
            assert (found["energy_rate"] - found["supplied"] + found["dissipated"]).abs() <= 1e-4 * scale
            if name != "networks":
                assert found["friction"].shape == found["gain"].shape == (optimizer.rule.modes,)
                assert all(0 < friction < 2 for friction in found["friction"])
        optimizer.step()


def test_only_what_the_next_step_moves_is_named():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = odeopt.LearnedOptimizer(model.parameters())
    assert optimizer.diagnostics() == {}
    backward(model, 0)
    assert list(optimizer.diagnostics()) == [f"param_groups[0]['params'][{k}]" for k in (1, 2, 3)]


def test_a_rule_of_ones_own_need_not_account_for_anything():
    class Descent(UpdateRule):
        crosses_coordinates = False

        def init_state(self, param):
            return odeopt.SGDUpdate(lr=0.1).init_state(param)

        def forward(self, grad, state, *, param=None, shape=None, progress=None):
            return -0.1 * grad, state

    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight.grad = torch.tensor([0.0, 5.0])
    found = odeopt.LearnedOptimizer([("weight", weight)], Descent()).diagnostics()["weight"]
    del UpdateRule.registry["Descent"]
    assert found.keys() == {"update_to_weight"}
    assert found["update_to_weight"].item() == pytest.approx(0.1)


class Writer:
    def __init__(self):
        self.numbers = {}

    def add_scalar(self, tag, scalar_value, global_step):
        self.numbers[tag] = scalar_value, global_step


def test_tensorboard_gets_one_chart_per_quantity_and_a_line_for_each_mode():
    found = {"0.weight": {"energy": torch.tensor(2.0), "friction": torch.tensor([0.25, 0.5])}}
    writer = Writer()
    write_diagnostics(writer, found, 7)
    assert writer.numbers == {
        "energy/0.weight": (2.0, 7),
        "friction/0.weight/mode 1": (0.25, 7),
        "friction/0.weight/mode 2": (0.5, 7),
    }


@pytest.mark.parametrize("name", ["spectral", "adam"])
def test_a_run_is_drawn_with_gaps_where_nothing_is_known(name, tmp_path):
    model = network()
    optimizer = odeopt.LearnedOptimizer(model.named_parameters(), rules()[name])
    history = [{}]
    for step in range(3):
        backward(model, step)
        history.append(optimizer.diagnostics())
        optimizer.step()
    path = plot_diagnostics(history, tmp_path / "run.png", title="a run")
    assert path.stat().st_size > 5000
    sizes = [plot_diagnostics(some, tmp_path / "x.png").stat().st_size for some in (history, history[1:])]
    assert all(a != b for a, b in pairwise(sizes))


@pytest.fixture
def figures(monkeypatch):
    """Figures that were drawn, in place of their files."""
    drawn = []
    monkeypatch.setattr(diagnostics, "save_figure", lambda figure, path: drawn.append(figure) or path)
    return drawn


def history_of(n_tensors, n_steps=5, **others):
    """The k-th tensor has k + 1 in each step."""
    found = {f"layers.{k}.weight": torch.tensor(k + 1.0) for k in range(n_tensors)} | others
    return [{name: {"energy": x, "supplied": -x, "friction": x} for name, x in found.items()}] * n_steps


def names_below(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("n", [1, 8])
def test_few_tensors_have_a_line_each(figures, n):
    plot_diagnostics(history_of(n), "x.png")
    [figure] = figures
    for axes in figure.axes:
        assert len(axes.get_lines()) == n
        assert axes.get_legend() is None
    assert len(figure.legends[0].get_texts()) == n


@pytest.mark.parametrize("n", [9, 81])
def test_of_many_tensors_those_that_stand_out_are_named_and_all_others_in_the_range(figures, n):
    plot_diagnostics(history_of(n), "x.png")
    [figure] = figures
    highest, lowest = ([f"layers.{k}.weight" for k in each] for each in ((n - 1, n - 2), (1, 0)))
    for axes, sign in zip(figure.axes, (1, -1, 1), strict=True):
        named = [*highest, *lowest]
        assert names_below(axes) == (named if sign == 1 else named[::-1])
        assert len(axes.get_lines()) == 5  # and the median
        [band] = axes.collections
        heights = band.get_paths()[0].vertices[:, 1]
        assert sorted({sign * heights.min(), sign * heights.max()}) == [1, n]
        assert {sign * y for y in axes.get_lines()[0].get_ydata()} == {(n + 1) // 2}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        f"least to greatest of {n} tensors",
        "their median",
    ]


def test_legends_of_many_long_names_cover_no_panel(figures):
    prefix = "module.decoder.transformer.layers.self_attention.projection."
    plot_diagnostics([{prefix + name: x for name, x in found.items()} for found in history_of(80)], "x.png", title="a")
    [figure] = figures
    figure.canvas.draw()
    boxes = [axes.get_window_extent() for axes in figure.axes]
    legends = [axes.get_legend().get_window_extent() for axes in figure.axes] + [figure.legends[0].get_window_extent()]
    assert not any(box.overlaps(legend) for box in boxes for legend in legends)
    assert not any(a.overlaps(b) for k, a in enumerate(legends) for b in legends[:k])
    assert all(figure.bbox.containsx(x) for legend in legends for x in (legend.x0, legend.x1))


@pytest.mark.parametrize("n", [3, 20])
def test_tensors_of_which_a_panel_shows_nothing_are_counted_in_its_title(figures, n):
    plot_diagnostics(history_of(n, dead=torch.tensor(0.0), broken=torch.tensor(torch.nan)), "x.png")
    titles = [axes.get_title(loc="left") for axes in figures[0].axes]
    assert titles == [
        f"energy stored, {n} of {n + 2} tensors",  # of a logarithmic axis
        f"power supplied by the gradient, {n + 1} of {n + 2} tensors",
        f"friction, mean of the modes, {n + 1} of {n + 2} tensors",
    ]


def test_tensors_stand_out_by_their_median_or_by_one_number():
    values = torch.arange(20.0)[:, None].repeat(1, 5)
    values[7, 2], values[11, 3], values[13] = 100.0, -100.0, torch.nan
    assert diagnostics.outstanding(values) == [19, 18, 11, 7, 1, 0]


def test_a_figure_of_nothing_and_steps_of_another_number_are_refused(tmp_path):
    with pytest.raises(ValueError, match="Parameter `history` should be of one step at least"):
        plot_diagnostics([], tmp_path / "run.png")
    with pytest.raises(
        ValueError, match=r"Parameter `steps` should be as many as `history`, 1. Found `steps = \[1, 2\]"
    ):
        plot_diagnostics([{}], tmp_path / "run.png", steps=[1, 2])


def test_a_step_that_is_skipped_is_told_as_one():
    param = nn.Parameter(torch.ones(3))
    optimizer = odeopt.LearnedOptimizer([param])
    param.grad = torch.tensor([1.0, float("nan"), 1.0])
    assert next(iter(optimizer.diagnostics().values()))["update_to_weight"] == 0


def test_a_sparse_gradient_is_refused_by_the_name_of_its_parameter():
    table = nn.Embedding(4, 2, sparse=True)
    optimizer = odeopt.LearnedOptimizer(table.named_parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="`weight` should have a dense, real gradient"):
        optimizer.diagnostics()
