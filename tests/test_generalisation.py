"""Generalisation at equal training loss: crossings, differences, records, files, the example."""

import json
import math
import os
import runpy
from pathlib import Path

import held_out
import pytest
import torch
from held_out import (
    Curves,
    at_equal_training_loss,
    at_the_end,
    by_level,
    generalisation_table,
    read_columns,
    record,
    summary_tables,
    write_columns,
)
from held_out_figure import _ticks, plot_generalisation
from hypothesis import example as including
from hypothesis import given, settings
from hypothesis import strategies as st

import odeopt
from odeopt.evaluation import baselines
from odeopt.meta.unroll import unroll
from odeopt.rules import AdamUpdate, SGDUpdate
from odeopt.tasks import MLPClassification

EXAMPLE = Path(__file__).parents[1] / "examples" / "studies" / "generalisation.py"
NAN, INF = math.nan, math.inf
losses = st.floats(1e-6, 10)


def curves_of(*runs, held_out=None):
    """Curves of hand-made runs; the held-out loss is a power of the training loss unless it is given."""
    training = torch.tensor(runs, dtype=torch.float64).T
    held_out = training.sqrt() if held_out is None else torch.tensor(held_out, dtype=torch.float64).T
    return Curves(training, held_out, 1 - held_out / 10)


def line(slope, offset, *runs):
    """Curves whose held-out loss is linear in the logarithm of the training loss."""
    return curves_of(*runs, held_out=[[offset + slope * math.log(x) for x in run] for run in runs])


def at(curves, level):
    return [x.item() for x in curves.at(torch.tensor([level], dtype=torch.float64))]


# ------------------------------------------------------------------------------------- the crossing


@settings(deadline=None)
@given(st.lists(st.tuples(losses, losses), min_size=2, max_size=12), losses)
@including([(math.nextafter(1e-6, 1), 1.0), (1e-6, 2.0)], 1e-6)  # neighbouring floats
def test_the_crossing_is_the_first_one(records, level):
    """Against a loop over the records."""
    training, held_out = zip(*records, strict=True)
    expected = NAN
    for k in range(len(training)):
        if training[k] <= level:
            if k > 0:
                weight = math.log(training[k - 1] / level) / math.log(training[k - 1] / training[k])
                expected = (1 - weight) * held_out[k - 1] + weight * held_out[k]
            break
    loss, accuracy = at(curves_of(training, held_out=[held_out]), level)
    # logarithms that nearly cancel: twelve digits of sixteen
    assert loss == pytest.approx(expected, rel=1e-4, abs=1e-9, nan_ok=True)
    assert accuracy == pytest.approx(1 - loss / 10, rel=1e-9, nan_ok=True)


@settings(deadline=None)
@given(st.lists(losses, min_size=3, max_size=20, unique=True), st.floats(0.001, 0.999), st.data())
def test_what_is_linear_in_the_logarithm_does_not_depend_on_the_records(training, share, data):
    training = sorted(training, reverse=True)
    level = training[0] ** (1 - share) * training[-1] ** share
    kept = [x for x in training[1:-1] if data.draw(st.booleans())]
    for run in (training, [training[0], *kept, training[-1]]):
        assert at(line(0.3, 2.0, run), level)[0] == pytest.approx(2.0 + 0.3 * math.log(level), abs=1e-9)


@settings(deadline=None)
@given(st.lists(losses, min_size=2, max_size=10), losses, st.lists(losses, max_size=5))
def test_what_comes_after_the_crossing_does_not_matter(run, level, later):
    before = at(curves_of(run), level)
    if before[0] == before[0]:
        assert at(curves_of([*run, *later]), level) == before


def test_a_level_that_is_a_record_is_met_there():
    curves = curves_of([2.0, 1.0, 0.3, 0.1], held_out=[[5.0, 4.0, 3.7, 9.0]])
    assert at(curves, 0.3)[0] == 3.7


def test_a_curve_that_rises_again_is_met_where_it_first_comes_down():
    curves = curves_of([2.0, 1.0, 3.0, 0.5], held_out=[[1.0, 2.0, 3.0, 4.0]])
    assert at(curves, 1.0)[0] == 2.0
    assert at(curves, math.sqrt(2))[0] == pytest.approx(1.5)
    assert 3.0 < at(curves, 0.9)[0] < 4.0


@pytest.mark.parametrize(
    ("run", "level"),
    [([2.0, 1.0, 0.5], 0.4), ([2.0, 1.0], 2.0), ([2.0, 1.0], 3.0), ([2.0, NAN, NAN], 1.0), ([2.0, INF, NAN], 1.0)],
)
def test_a_level_that_is_never_come_down_to_gives_nan(run, level):
    assert all(value != value for value in at(curves_of(run), level))


def test_losses_of_zero_are_met_at_the_resolution_of_a_loss():
    curves = curves_of([1.0, 1e-3, 0.0, 0.0], held_out=[[1.0, 2.0, 3.0, 4.0]])
    assert at(curves, 0.0)[0] == 3.0
    assert 2.0 < at(curves, 1e-5)[0] < 3.0


# ------------------------------------------------------------------------------------- differences


def test_the_level_is_the_lowest_that_both_come_down_to():
    mine, other = line(1.0, 5.0, [2.0, 0.5, 0.7], [2.0, 0.2, 0.1]), line(1.0, 4.0, [2.0, 0.8, 0.4], [2.0, 0.9, 0.3])
    difference = at_equal_training_loss(mine, other)
    assert difference.level == pytest.approx(math.sqrt(0.5 * 0.3))
    # lines of one slope: everywhere 1 apart
    assert difference.held_out_loss == pytest.approx((1.0, 1.0, 1.0))
    assert difference.accuracy == pytest.approx((-0.1, -0.1, -0.1))
    assert (difference.n_compared, difference.n_runs) == (2, 2)
    # at the end they are not: log(.7 / .4) + 1 and log(.1 / .3) + 1
    assert at_the_end(mine, other).held_out_loss.mean == pytest.approx(1 + math.log(0.7 / 0.4 * 0.1 / 0.3) / 2)


runs = st.lists(st.lists(losses, min_size=6, max_size=6), min_size=2, max_size=2)


@settings(deadline=None)
@given(runs, runs)
def test_the_difference_changes_sign_with_the_order(first, second):
    first, second = curves_of(*first), curves_of(*second)
    one, other = at_equal_training_loss(first, second), at_equal_training_loss(second, first)
    assert one[2:4] == other[2:4]
    if one.n_compared:
        assert one.level == other.level
        # a mean of logarithms rounds
        assert one.level >= max(first.lowest.min(), second.lowest.min()).item() * (1 - 1e-12)
        assert one.held_out_loss.mean == -other.held_out_loss.mean
        assert one.accuracy.low == -other.accuracy.high


@settings(deadline=None)
@given(runs, runs, st.floats(-2, 2))
def test_networks_that_depend_on_their_training_loss_alone_do_not_differ(first, second, slope):
    difference = at_equal_training_loss(line(slope, 1.0, *first), line(slope, 1.0, *second))
    assert difference.n_compared == 0 or abs(difference.held_out_loss.mean) < 1e-9


def test_runs_that_cannot_be_compared_are_counted_and_said():
    mine = line(1.0, 5.0, *3 * [[2.0, 0.5]])
    other = line(1.0, 4.0, [2.0, 0.4], [2.0, NAN], [2.0, 3.0])  # the second diverges, the third never comes down
    difference = at_equal_training_loss(mine, other)
    assert (difference.n_compared, difference.n_runs) == (1, 3)
    assert difference.held_out_loss.mean == pytest.approx(1.0)
    assert "+1.0000 [one run], 1 of 3 runs" in generalisation_table({"mine": mine, "other (lr 1)": other})
    nothing = generalisation_table({"mine": mine, "other": curves_of(*3 * [[2.0, NAN]])})
    last = nothing.splitlines()[-1]
    assert (last.count("diverged"), last.count("none of 3 runs")) == (3, 2)


def test_only_equal_numbers_of_runs_can_be_paired():
    with pytest.raises(ValueError, match=r"`reference` should be of 1 runs. Found `reference = 'curves of 2 runs'`"):
        at_equal_training_loss(curves_of([2.0, 1.0]), curves_of([2.0, 1.0], [2.0, 1.0]))


def test_tables_name_the_rule_and_all_columns():
    curves = {"mine": line(1.0, 5.0, *2 * [[2.0, 0.5]]), "Adam (lr 0.1)": line(1.0, 4.0, *2 * [[2.0, 0.4]])}
    table = generalisation_table(curves, markdown=True).splitlines()
    assert "mine - it: held-out loss [nats]" in table[0]
    assert table[-1].startswith(
        "| Adam (lr 0.1) | 0.400 | 3.08 | 69.16 | 0.500 | +1.0000 [+1.0000, +1.0000] | -10.00 ["
    )
    other = {"mine": curves["mine"], "Adam (lr 0.2)": line(1.0, 3.0, *2 * [[2.0, 0.5]])}
    text = summary_tables({"a": curves, "b": other}, markdown=True)
    assert [t.splitlines()[0].split(",")[0] for t in text.split("\n\n")] == [
        f"| {what} at {where}" for where in ("equal training loss", "the end") for what in ("held-out loss", "accuracy")
    ]
    assert "| Adam | +1.0000 [+1.0000, +1.0000] | +2.0000 [+2.0000, +2.0000] |" in text.split("\n\n")[0]
    assert "| Adam | +1.2231 [+1.2231, +1.2231] | +2.0000 [+2.0000, +2.0000] |" in text.split("\n\n")[2]


@settings(deadline=None, max_examples=30)
@including([[3.0, 0.21]])  # 3 * (0.21 / 3) rounds to less than 0.21
@including([[1.0000000000000002e-06, 1e-06]])  # neighbours: there are no seven levels between them
@given(st.lists(st.lists(losses, min_size=2, max_size=6), min_size=1, max_size=1) | runs)
def test_curves_by_level_end_where_all_runs_have_come(training):
    curves = line(0.5, 9.0, *training)
    found = by_level(curves, 7)
    falling = [run for run in training if min(run) < min(run[0] for run in training)]
    assert found.shape == ((4, 7) if falling else (4, 0))
    if falling:
        levels, mean = found[:2]
        assert levels[-1] == max(min(run) for run in falling)
        assert (levels[1:] <= levels[:-1]).all()
        if levels[0] > levels[-1] * (1 + 1e-12):  # where there is room for them
            assert (levels[1:] < levels[:-1]).all()
        torch.testing.assert_close(mean, 9.0 + 0.5 * levels.log(), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------- records


def task_of(**options):
    return MLPClassification("digits", (6,), split="evaluation", batch_size=16, n_examples=60, **options)


@pytest.mark.parametrize("every", [4, 5, 100])
def test_records_are_those_of_one_uninterrupted_run(every):
    rule, task, indices = AdamUpdate(0.05, cosine=True), task_of(), torch.arange(3)  # cosine: told the whole length
    curves = record(rule, task, n_steps=12, n_runs=3, seed=5, every=every)
    steps = [0, *range(every, 12, every), 12]
    assert all(x.shape == (len(steps), 3) and x.dtype == torch.float64 for x in curves)
    for position, step in enumerate(steps):
        if step in (0, 12):
            whole = unroll(rule, task, indices=indices, n_steps=12, seed=5, total_steps=12).params
            params = whole if step else task.init_params(indices, 5)
            wanted = (task.training_scores(params)[0], *task.held_out_scores(params))
            for found, value in zip(curves, wanted, strict=True):
                assert torch.equal(found[position], value.double())


def test_batches_of_runs_change_nothing_but_rounding():
    task = task_of(dtype=torch.float64)
    whole, parts = (
        record(
            odeopt.load_pretrained("port-hamiltonian").double(), task, n_steps=6, n_runs=3, seed=0, every=3, **options
        )
        for options in ({}, {"runs_per_batch": 2})
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)  # float64, a few steps


def test_a_network_that_is_not_a_number_has_no_accuracy():
    curves = record(SGDUpdate(1e38), task_of(), n_steps=4, n_runs=2, seed=0, every=2)
    assert not curves.held_out_loss[-1].isfinite().any()
    assert curves.accuracy[-1].isnan().all()
    assert curves.accuracy[0].isfinite().all()


@pytest.mark.parametrize("name", ["n_steps", "n_runs", "every", "runs_per_batch"])
def test_numbers_are_checked(name):
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be positive. Found `{name} = 0`"):
        record(SGDUpdate(), task_of(), **{"n_steps": 2, "n_runs": 1, "seed": 0, name: 0})


# ------------------------------------------------------------------------------------- files


HEADER = {"rule": {"name": "mine", "sha256": "abc"}, "runs": 2}
COLUMNS = {"a": {"mine": curves_of([2.0, 1.0], [2.0, NAN])}, "b": {"mine": curves_of([1.0, 1 / 3], [1.0, 0.0])}}


def test_files_give_back_what_was_written_in_five_digits(tmp_path):
    path = tmp_path / "new.json"
    assert read_columns(path, HEADER) == {}
    write_columns(path, HEADER, COLUMNS)
    found = read_columns(path, HEADER)
    assert list(found) == list(COLUMNS)
    for column, by_name in COLUMNS.items():
        for a, b in zip(by_name["mine"], found[column]["mine"], strict=True):
            torch.testing.assert_close(a, b, rtol=5e-5, atol=0, equal_nan=True)
    before = path.read_bytes()
    write_columns(path, HEADER, found)
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["new.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("abc", "abd"), "field `rule` should be {'name': 'mine', 'sha256': 'abc'}. Found"),
        (lambda text: text.replace('"runs": 2', '"runs": 3'), "field `runs` should be 2. Found 3"),
        (lambda text: text.replace('"runs"', '"run"'), "field 'runs' is missing"),
        (lambda text: text.replace("held_out_loss", "held_loss"), "held_loss"),
        (lambda text: text.replace("[2.0, 1.0]", "[2.0]"), "expected sequence of length"),
        (lambda text: text[:200], "Expecting|Unterminated|delimiter"),
        (lambda text: "[]", "list indices"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, change, message):
    path = tmp_path / "columns.json"
    write_columns(path, HEADER, COLUMNS)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"columns.json: not a file that can be continued here: .*({message})"):
        read_columns(path, HEADER)


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "columns.json"
    write_columns(path, HEADER, {"a": COLUMNS["a"]})
    before = path.read_bytes()

    def stop(*args):
        raise KeyboardInterrupt("while writing")

    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt, match="while writing"):
        write_columns(path, HEADER, COLUMNS)
    assert path.read_bytes() == before


# ------------------------------------------------------------------------------------- the figure


@pytest.mark.parametrize("n_panels", [1, 3])
def test_the_figure_is_drawn_also_of_runs_that_diverge_or_are_alone(tmp_path, n_panels):
    panel = {
        "mine": by_level(curves_of([2.0, 1.0, 0.5], [2.1, 1.1, 0.6])),
        "one run": by_level(curves_of([2.0, 1.0, 1e-9])),
        "diverged": by_level(curves_of([2.0, NAN, NAN])),
    }
    panels = {f"panel {i}": panel for i in range(n_panels)} | {"empty": {"mine": by_level(curves_of([2.0, 3.0]))}}
    is_learned = {name: name == "mine" for name in panel}
    path = plot_generalisation(panels, is_learned, tmp_path / "new" / "figure.png", title="A title")
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size > 5000


@settings(deadline=None)
@given(st.floats(1e-7, 10), st.floats(1.2, 1e5))
def test_ticks_are_a_few_round_numbers_inside(low, ratio):
    ticks = _ticks(low, low * ratio)
    assert 2 <= len(ticks) <= 30
    assert all(low <= tick <= low * ratio for tick in ticks)
    assert ticks == sorted(set(ticks))


# ------------------------------------------------------------------------------------- the example


@pytest.fixture
def example(monkeypatch, tmp_path):
    """The example's main without its tuning, and what it records."""

    def tune_all(task, *, families, **options):
        assert task.split == "meta-train"
        found = ({"lr": 0.01} | ({family.other: 0.9} if family.other else {}) for family in families)
        return tuple(baselines.Tuned(f.name, s, 0.0, ()) for f, s in zip(families, found, strict=True))

    def recorded(rule, task, **options):
        if main.is_interrupted and task.sizes[1] == 100:
            raise KeyboardInterrupt("in the last column")
        main.recorded.append((type(rule).__name__, task.split, options["n_steps"]))
        return record(rule, task, **options)

    def main(*argv, out=tmp_path):
        main.recorded = []
        tiny = ["--dataset", "digits", "--steps", "2", "3", "--runs", "2", "--tuning-runs", "1", "--out", str(out)]
        runpy.run_path(str(EXAMPLE))["main"]([*tiny, *argv])

    main.is_interrupted = False
    monkeypatch.setattr(baselines, "tune_all", tune_all)
    monkeypatch.setattr(held_out, "record", recorded)
    return main


def test_the_example_prints_tables_and_continues_an_interrupted_run(example, tmp_path, capsys):
    example(out=tmp_path / "whole")
    assert len(example.recorded) == 25  # five optimizers, two networks over two horizons and one over one
    assert {split for _, split, _ in example.recorded} == {"evaluation"}
    whole = capsys.readouterr().out
    for column in ("64-20-10, sigmoid, 2 steps, 2 runs", "64-100-10, relu, 239 images, 2 steps, 2 runs"):
        assert f"\ndigits, {column}\n" in whole
    for title in (
        "held-out loss at equal training loss, port-hamiltonian - it",
        "accuracy at the end, port-hamiltonian",
    ):
        assert f"\n{title}" in whole
    example.is_interrupted = True
    with pytest.raises(KeyboardInterrupt, match="in the last column"):
        example()
    assert len(example.recorded) == 20
    example.is_interrupted = False
    capsys.readouterr()
    example()
    assert len(example.recorded) == 5
    names = {"generalisation_digits.json", "generalisation_digits.png"}
    assert {file.name for file in tmp_path.iterdir()} == names | {"whole"}
    for name in names:
        assert (tmp_path / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()

    def tables(text):
        return [x for x in text.splitlines() if not x.startswith(("Figure", "Done"))]

    assert tables(capsys.readouterr().out) == tables(whole)
    example("--steps", "2", "--markdown")
    assert example.recorded == []
    assert "\n| optimizer | training loss [nats]" in capsys.readouterr().out


def test_the_example_refuses_numbers_of_another_rule_or_setting(example, tmp_path, monkeypatch):
    path = tmp_path / "generalisation_digits.json"
    example("--steps", "2")
    before = path.read_bytes()
    with pytest.raises(SystemExit, match=r"field `runs` should be 3. Found 2. Delete it, or name another folder"):
        example("--runs", "3")
    changed = odeopt.load_pretrained("port-hamiltonian")
    with torch.no_grad():
        next(p for p in changed.parameters() if p.numel() > 1).add_(0.1)
    monkeypatch.setattr(odeopt, "load_pretrained", lambda name: changed)
    with pytest.raises(SystemExit, match=r"field `rule` should be .*sha256.* Found .*sha256"):
        example("--steps", "2")
    assert example.recorded == []
    assert path.read_bytes() == before


def test_the_example_falls_back_to_digits_and_says_so(example, tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(odeopt.tasks.datasets, "import_torchvision", no_network)
    example("--dataset", "mnist", "--data-dir", str(tmp_path / "nothing"), "--steps", "2")
    assert capsys.readouterr().out.splitlines()[0].endswith("using scikit-learn's handwritten digits instead.")
    assert (tmp_path / "generalisation_digits.png").exists()


def test_quick_is_of_digits_and_few_steps_of_which_some_are_recorded(example, tmp_path, capsys):
    example("--quick", "--steps", "1350")
    assert "digits, 64-20-10, relu, 45 steps, 2 runs" in capsys.readouterr().out
    content = json.loads((tmp_path / "generalisation_digits_quick.json").read_text())
    # every second step, and the last
    assert [len(x["port-hamiltonian"]["accuracy"][0]) for x in content["columns"].values()] == [24] * 3
