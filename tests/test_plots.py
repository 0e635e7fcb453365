"""Figures are written without a display and without touching matplotlib's global state."""

import subprocess
import sys
from itertools import combinations, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from odeopt import report
from odeopt.evaluation import compare, trailing_mean
from odeopt.report import line_styles, plot_escape, plot_losses
from odeopt.report.figure import _spread
from odeopt.rules import AdamUpdate, PortHamiltonianUpdate, SGDUpdate
from odeopt.tasks import RandomQuadratic

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def comparison():
    rules = {"learned": PortHamiltonianUpdate(), "Adam": AdamUpdate(0.1), "diverging": SGDUpdate(1e30)}
    return compare(rules, RandomQuadratic(3), n_steps=12, n_runs=4, progress_bar=False)


def test_importing_the_library_does_not_import_matplotlib():
    code = "import sys, odeopt, odeopt.report, odeopt.evaluation.baselines; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_comparison_is_drawn(comparison, tmp_path, suffix):
    path = comparison.plot(tmp_path / "new" / f"figure.{suffix}", title="A title")
    assert path.stat().st_size > 5000
    assert suffix != "png" or path.read_bytes().startswith(PNG)


def test_the_users_settings_and_figures_are_left_alone(comparison, tmp_path):
    import matplotlib

    with matplotlib.rc_context({"lines.linewidth": 7.0, "font.size": 20.0}):
        before = dict(matplotlib.rcParams)
        comparison.plot(tmp_path / "figure.png")
        assert dict(matplotlib.rcParams) == before


def test_trailing_mean_is_over_a_twentieth_of_the_steps_so_far():
    losses = torch.arange(200.0).unsqueeze(1) ** 2 * torch.tensor([1.0, -3.0])
    losses[50, 1] = 1e30  # which may not hide what comes after it
    means = trailing_mean(losses)
    assert torch.equal(means[:39], losses[:39].double())  # less than two steps
    assert means[39, 0] == (38.0**2 + 39.0**2) / 2
    assert means[199, 0] == (torch.arange(190.0, 200.0) ** 2).mean()
    assert means[199, 1] == -3 * means[199, 0]


@pytest.mark.parametrize(
    ("losses", "part", "match"),
    [
        (torch.ones(5), 0.1, r"`losses` should be a tensor of shape \(n_steps, n_runs\).* Found `losses = \(5,\)`"),
        (torch.ones(0, 2), 0.1, r"Found `losses = \(0, 2\)`"),
        ([1.0, 2.0], 0.1, r"Found `losses = \[1.0, 2.0\]`"),
        (torch.ones(5, 1), 0.0, r"`part` should be a number in \(0, 1\]. Found `part = 0.0`"),
        (torch.ones(5, 1), 1.5, "Found `part = 1.5`"),
        (torch.ones(5, 1), float("nan"), "Found `part = nan`"),
    ],
)
def test_arguments_of_trailing_means_are_checked(losses, part, match):
    with pytest.raises(ValueError, match=match):
        trailing_mean(losses, part)
    assert torch.equal(trailing_mean(torch.ones(3, 2), 1.0), torch.ones(3, 2, dtype=torch.float64))


def test_one_run_and_one_step_can_be_drawn(tmp_path):
    single = compare({"Adam": AdamUpdate(0.1)}, RandomQuadratic(3), n_steps=1, n_runs=1, progress_bar=False)
    assert single.plot(tmp_path / "figure.png").read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    ("losses", "scale"),
    [([2.0, 1.0, 0.5], "log"), ([2.0, 1.0, 0.0], "log"), ([-1.0, -2.0, -3.0], "linear"), ([0.0, 0.0, 0.0], "linear")],
)
def test_the_axis_of_losses_holds_all_of_them_and_is_logarithmic_where_none_is_negative(
    losses, scale, tmp_path, monkeypatch
):
    figures = []
    monkeypatch.setattr(report.losses, "save_figure", lambda figure, path: figures.append(figure))
    band = torch.tensor([losses] * 3, dtype=torch.float64)
    plot_losses({"one": band}, {"one": False}, tmp_path / "figure.png", title="", xlabel="", ylabel="")
    [axes] = figures[0].axes
    low, high = axes.get_ylim()
    assert axes.get_yscale() == scale
    assert all(low < loss < high for loss in losses if loss > 0 or scale == "linear")


def test_escapes_are_drawn(tmp_path):
    losses = {"a": {"learned": torch.tensor([[0.0, 0.0], [-1.0, 0.0], [-1.0, -1.0]])}}
    path = plot_escape(losses, {"a": -0.5}, {"learned": True}, tmp_path / "figure.png", title="A title")
    assert path.read_bytes().startswith(PNG)


def test_no_two_rules_look_alike_without_colour():
    styles = line_styles({f"learned {i}": True for i in range(4)} | {f"other {i}": False for i in range(5)})
    looks = [(style["linewidth"], str(style["linestyle"])) for style in styles.values()]
    assert len(set(looks)) == len(looks)
    assert len({style["color"] for style in styles.values()}) == len(styles)
    assert min(styles[f"learned {i}"]["linewidth"] for i in range(4)) > max(
        styles[f"other {i}"]["linewidth"] for i in range(5)
    )


@pytest.mark.parametrize("order", [[True] * 20, [True] * 4 + [False] * 5 + [True, False], [False, True] * 10])
def test_no_two_rules_look_alike_where_colours_come_again(order):
    styles = line_styles({str(i): is_learned for i, is_learned in enumerate(order)})
    looks = [(style["color"], str(style["linestyle"]), style["linewidth"]) for style in styles.values()]
    assert len(set(looks)) == len(looks)


def test_known_rules_have_one_colour_in_all_figures():
    known = ("Adam", "ours", "Muon")
    one = line_styles({"a": False, "ours": True, "b": False, "Muon": False}, known)
    other = line_styles({"Muon": False, "c": True, "Adam": False, "ours": True}, known)
    assert all(one[name]["color"] == other[name]["color"] for name in ("ours", "Muon"))
    for styles in (one, other):
        assert len({style["color"] for style in styles.values()}) == 4


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_labels_keep_apart_in_order_and_inside(heights):
    wanted, gap = {str(i): height for i, height in enumerate(heights)}, 0.08
    placed = _spread(wanted, gap)
    names = sorted(wanted, key=wanted.get)
    ordered = [placed[name] for name in names]
    # sums of a dozen heights round at 1e-15
    assert all(upper - lower >= gap - 1e-12 for lower, upper in pairwise(ordered))
    assert ordered[0] >= -1e-12
    assert ordered[-1] <= 1 + 1e-12


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6))
def test_no_label_or_block_of_labels_can_come_nearer_to_its_curves(heights):
    wanted, gap = {str(i): height for i, height in enumerate(heights)}, 0.08
    placed = _spread(wanted, gap)
    names = sorted(wanted, key=wanted.get)

    def squares(found):
        return sum((found[name] - wanted[name]) ** 2 for name in names)

    for start, end in combinations(range(len(names) + 1), 2):
        for move in (-1e-4, 1e-4):
            moved = {name: placed[name] + move * (start <= i < end) for i, name in enumerate(names)}
            ordered = [moved[name] for name in names]
            # heights that touch are apart by the gap up to rounding
            if ordered[0] >= 0 and ordered[-1] <= 1 and all(b - a >= gap - 1e-12 for a, b in pairwise(ordered)):
                assert squares(placed) <= squares(moved) + 1e-10


def test_labels_that_touch_lie_around_their_curves():
    assert _spread({"a": 0.5, "b": 0.5}, 0.1) == pytest.approx({"a": 0.45, "b": 0.55})
    assert _spread({"a": 1.0, "b": 1.0, "c": 0.2}, 0.1) == pytest.approx({"c": 0.2, "a": 0.9, "b": 1.0})
    assert _spread({"a": 0.0, "b": 0.05}, 0.1) == pytest.approx({"a": 0.0, "b": 0.1})


def test_labels_that_do_not_touch_stay_where_they_are():
    wanted = {"a": 0.2, "b": 0.5, "c": 0.9}
    assert _spread(wanted, 0.05) == pytest.approx(wanted, abs=1e-15)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_of_which_none_is_finite_are_drawn_as_diverged(tmp_path, value):
    band = torch.full((3, 4), value, dtype=torch.float64)
    path = plot_losses({"sgd": band}, {"sgd": False}, tmp_path / "losses.png", title="none", xlabel="", ylabel="")
    assert path.stat().st_size > 1000
