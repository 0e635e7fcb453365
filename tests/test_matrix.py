"""The matrix: its cells, its numbers, and files that continue; Adam with cosine decay; scaled tasks."""

import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import odeopt.evaluation.matrix
import odeopt.report.matrix
from odeopt import load_pretrained
from odeopt.__main__ import main
from odeopt.artifacts import fingerprint, save
from odeopt.evaluation import EVALUATION_SEED
from odeopt.evaluation.matrix import REFERENCES, Cell, Matrix, Outcome, evaluate_matrix, grid
from odeopt.files import read_json
from odeopt.meta.unroll import unroll
from odeopt.optimizer import LearnedOptimizer
from odeopt.report.matrix import plot_ratios
from odeopt.rules import AdamUpdate, PortHamiltonianUpdate, SGDUpdate
from odeopt.suite import untrained
from odeopt.tasks import MLPClassification, RandomQuadratic, ScaledTask

TINY = Cell(dataset="digits", widths=(3,), batch_size=16, horizon=12)
SETTINGS = {"runs": 2, "tuning_runs": 1}


def cells_of(*cells):
    return {"cells": {cell.name: cell for cell in cells}}


@pytest.fixture
def two_rates(monkeypatch):
    """Tuning of two trials instead of a dozen; how well it tunes is the business of other tests."""

    def tune(family, task, *, n_steps, n_tasks, score):
        calls.append((family.name, task.task.split, n_steps, n_tasks, score))
        return odeopt.evaluation.baselines.Tuned(family.name, {"lr": 0.05}, 1.0, ())

    calls = []
    monkeypatch.setattr(odeopt.evaluation.matrix, "tune", tune)
    return calls


def evaluate(rule, *cells, **options):
    return evaluate_matrix(rule, cells_of(*cells), **{"n_runs": 2, "n_tuning_runs": 1, "progress_bar": False} | options)


# ------------------------------------------------------------------------------------- cells


def test_cells_differ_from_the_middle_by_the_one_factor_they_stand_under():
    fields = {
        "activation": "activation",
        "width": "widths",
        "depth": "widths",
        "data": "dataset",
        "horizon": "horizon",
        "loss scale": "loss_scale",
        "initial scale": "init_scale",
    }
    factors, middle = grid(), Cell()
    assert list(factors) == [*fields, "corners"]
    for factor, field in fields.items():
        assert middle in factors[factor].values()
        for cell in factors[factor].values():
            differing = [name for name in vars(cell) if getattr(cell, name) != getattr(middle, name)]
            assert differing == [field] * (cell != middle)
    assert {cell.horizon for cell in factors["horizon"].values()} == {50, 100, 300, 1000, 3000}
    assert {len(cell.widths) for cell in factors["depth"].values()} == {0, 1, 2, 3}


@pytest.mark.parametrize("quick", [False, True])
def test_no_two_cells_have_one_name(quick):
    cells = {cell for by_value in grid(quick=quick).values() for cell in by_value.values()}
    assert len({cell.name for cell in cells}) == len(cells) > 20


def test_cells_are_selected():
    assert {cell.dataset for by_value in grid(quick=True).values() for cell in by_value.values()} == {"digits"}
    assert max(cell.horizon for by_value in grid(quick=True).values() for cell in by_value.values()) == 50
    assert max(cell.horizon for by_value in grid(max_horizon=300).values() for cell in by_value.values()) == 300
    without = grid(datasets=("mnist", "digits"))
    assert list(without["data"]) == ["mnist", "digits"]
    [(factor, cells)] = grid(pattern="loss x1000$").items()
    assert (factor, list(cells)) == ("loss scale", ["1000"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": "("}, r"Parameter `pattern` should be a regular expression. Found '\('"),
        ({"pattern": "imagenet"}, "Parameter `pattern` should be found in the name of a cell"),
        ({"max_horizon": 49}, "Parameter `pattern` should be found .* horizons asked for"),
    ],
)
def test_a_selection_of_nothing_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grid(**options)


# ------------------------------------------------------------------------------------- numbers


@pytest.mark.parametrize(
    ("n", "words"), [(1, ("losses of 1 run,", "on 1 run on", "of 1 run of")), (2, ("of 2 runs,",))]
)
def test_captions_count_runs(two_rates, n, words):
    table = evaluate(AdamUpdate(0.05), TINY, n_runs=n, n_tuning_runs=n).table()
    assert all(word in table for word in words)


def test_a_rule_that_is_tuned_adam_has_ratio_one(two_rates):
    matrix = evaluate(AdamUpdate(0.05), TINY)
    assert matrix.ratio(TINY.name, "Adam") == (1, 1, 1)
    assert matrix.ratio(TINY.name, "Adam, cosine").mean != 1
    # tuned on data of its own, for the horizon of the cell
    assert two_rates == [(family.name, "meta-train", 12, 1, "last ten") for family in REFERENCES]


def test_adam_is_tuned_for_each_cell_among_many_learning_rates():
    """In units of the parameters a thousand times as large no learning rate of the first cell would do."""
    matrix = evaluate(AdamUpdate(0.05), TINY, Cell(**vars(TINY) | {"init_scale": 100.0}))
    rates = [outcomes["Adam"].lr for outcomes in matrix.outcomes.values()]
    assert rates[0] < rates[1]
    assert matrix.ratio(TINY.name).mean > 0.8


def test_scores_are_means_of_the_last_ten_losses_on_the_data_and_seed_of_evaluations(two_rates):
    cell, rules = Cell(**vars(TINY) | {"loss_scale": 4.0}), {"rule": SGDUpdate(0.1), "Adam": AdamUpdate(0.05)}
    outcomes, indices = evaluate(rules["rule"], cell).outcomes[cell.name], torch.arange(2)
    for name, rule in rules.items():
        with torch.no_grad():
            run = unroll(rule, cell.task("evaluation"), indices=indices, n_steps=12, seed=EVALUATION_SEED)
        torch.testing.assert_close(outcomes[name].scores, run.losses[-11:-1].double().mean(0) / 4, rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_the_scale_of_the_loss_is_divided_out_and_leaves_a_scale_free_rule_alone(two_rates, scale):
    scaled = Cell(**vars(TINY) | {"loss_scale": scale})
    torch.manual_seed(0)
    matrix = evaluate(PortHamiltonianUpdate(), TINY, scaled)
    plain, other = (matrix.outcomes[cell.name]["rule"].scores for cell in (TINY, scaled))
    # float32; dozens of steps amplify the rounding
    torch.testing.assert_close(plain, other, rtol=1e-4, atol=0)
    assert matrix.ratio(scaled.name).mean == pytest.approx(matrix.ratio(TINY.name).mean, rel=1e-3)
    gradient_descent = evaluate(SGDUpdate(0.5), TINY, scaled)
    assert gradient_descent.ratio(scaled.name).mean != pytest.approx(gradient_descent.ratio(TINY.name).mean, rel=1e-2)


def matrix_of(rule, adam, n_diverged=0):
    outcomes = {"rule": Outcome(torch.tensor(rule).double(), n_diverged)}
    outcomes |= {family.name: Outcome(torch.tensor(adam).double(), 0, 0.1) for family in REFERENCES}
    return Matrix("mine", cells_of(TINY), {TINY.name: outcomes}, SETTINGS)


def test_the_ratio_is_the_geometric_mean_of_paired_runs():
    """Ratios 2 and 8: mean of logs 2 ln 2, standard error ln 2, t(1) at 97.5 % 12.706."""
    ratio = matrix_of([2.0, 8.0], [1.0, 1.0]).ratio(TINY.name)
    assert ratio.mean == pytest.approx(4, rel=1e-12)
    assert ratio.high / ratio.mean == pytest.approx(2**12.7062, rel=1e-4)
    assert ratio.low * ratio.high == pytest.approx(16, rel=1e-12)


@pytest.mark.parametrize(
    ("rule", "adam", "mean"),
    [
        ([math.inf, 1.0], [1.0, 1.0], math.inf),
        ([1.0, 1.0], [math.inf, 1.0], 0),
        ([math.inf, 1.0], [math.inf, 1.0], math.inf),
        ([0.0, 1e-12], [1e-9, 0.0], 1),
    ],
)
def test_ratios_of_losses_that_are_not_finite_or_vanish(rule, adam, mean, tmp_path):
    matrix = matrix_of(rule, adam)
    assert matrix.ratio(TINY.name) == (mean, mean, mean)
    assert ("worst diverged" in matrix.summary()) == (mean == math.inf)
    assert matrix.plot(tmp_path / "matrix.png").stat().st_size > 5000


def test_losses_differ_down_to_the_resolution_of_a_cross_entropy():
    eps = torch.finfo(torch.float32).eps
    for rule, ratio in ((2e-6, 0.5), (0.0, eps / 4e-6), (eps / 3, eps / 4e-6)):
        assert matrix_of([rule], [4e-6]).ratio(TINY.name).mean == pytest.approx(ratio, rel=1e-6)


def test_the_summary_counts_what_the_targets_are_about():
    cells = [Cell(horizon=horizon) for horizon in (1, 2, 3, 4)]
    outcomes = {}
    for cell, factor in zip(cells, (0.5, 1.0, 1.05, 3.0), strict=True):
        runs = torch.tensor([1.0, 1.1, 0.9]).double()
        outcomes[cell.name] = {"rule": Outcome(factor * runs, int(factor == 3.0))}
        outcomes[cell.name] |= {family.name: Outcome(runs, 2, 0.1) for family in REFERENCES}
    matrix = Matrix("mine", cells_of(*cells), outcomes, {"runs": 3, "tuning_runs": 1})
    line = matrix.summary()
    assert "2 of 4 cells (50%) no worse, 2 worse beyond their interval" in line
    assert "worst 3.000 [3.000, 3.000] (mnist sigmoid 20, 4 steps)" in line
    assert "Diverged: 1 of 12 runs of mine, 8 of Adam." in line
    assert line in matrix.table()
    assert matrix.table(markdown=True).startswith("| cell | mine [nats] | diverged [runs] | Adam [nats]")
    assert "[one run]" in matrix_of([2.0], [1.0]).table()
    assert "worst 1.01e+30 [1.01e+30, 1.01e+30] " in matrix_of([1.01e30, 1.01e30, 1.0101e30], [1.0] * 3).summary()


def test_divergences_are_counted(two_rates, tmp_path):
    path = tmp_path / "matrix.json"
    matrix = evaluate(SGDUpdate(1e60), TINY, path=path)
    assert matrix.outcomes[TINY.name]["rule"].n_diverged == 2
    assert matrix.ratio(TINY.name).mean == math.inf
    assert "diverged" in matrix.table()
    assert json.loads(path.read_text())["cells"][TINY.name]["rule"]["scores"] == [None, None]
    assert evaluate(SGDUpdate(1e60), TINY, path=path).table() == matrix.table()


# ------------------------------------------------------------------------------------- files


def test_an_interrupted_run_continues_to_the_same_file(two_rates, tmp_path, monkeypatch):
    cells = [Cell(**vars(TINY) | {"horizon": horizon}) for horizon in (3, 2, 4)]
    whole = evaluate(AdamUpdate(0.05), *cells, path=tmp_path / "whole.json")
    path, task = tmp_path / "matrix.json", Cell.task

    def interrupted(cell, *args, **options):
        if cell.horizon == 4:
            raise KeyboardInterrupt("in the third cell")
        return task(cell, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Cell, "task", interrupted)
        with pytest.raises(KeyboardInterrupt, match="in the third cell"):
            evaluate(AdamUpdate(0.05), *cells, path=path)
    assert set(json.loads(path.read_text())["cells"]) == {cell.name for cell in cells[:2]}
    names = {"matrix.json", "whole.json"}
    assert {file.name for file in tmp_path.iterdir()} == names | {f".{name}.lock" for name in names}
    two_rates.clear()
    again = evaluate(AdamUpdate(0.05), *cells, path=path)
    assert len(two_rates) == len(REFERENCES)  # for the one cell that was missing
    assert path.read_bytes() == (tmp_path / "whole.json").read_bytes()
    assert again.table() == whole.table()


def test_two_processes_may_write_to_one_file(two_rates, tmp_path, monkeypatch):
    """While the first cell is filled another process fills two: both are kept, and neither is filled again."""
    path, task = tmp_path / "matrix.json", Cell.task
    cells = [Cell(**vars(TINY) | {"horizon": horizon}) for horizon in (2, 3, 4)]

    def meanwhile(cell, *args, **options):
        monkeypatch.setattr(Cell, "task", task)
        evaluate(AdamUpdate(0.05), *cells[1:], path=path)
        return cell.task(*args, **options)

    monkeypatch.setattr(Cell, "task", meanwhile)
    evaluate(AdamUpdate(0.05), *cells[:2], path=path)
    assert set(json.loads(path.read_text())["cells"]) == {cell.name for cell in cells}
    assert len(two_rates) == len(cells) * len(REFERENCES)


def test_the_folder_of_the_file_is_made_before_any_work(two_rates, tmp_path):
    evaluate(AdamUpdate(0.05), TINY, path=tmp_path / "new" / "folder" / "matrix.json")
    assert (tmp_path / "new" / "folder" / "matrix.json").exists()
    two_rates.clear()
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file"):
        evaluate(AdamUpdate(0.05), TINY, path=tmp_path / "file" / "matrix.json")
    assert two_rates == []


def test_references_come_from_the_file_of_another_rule(two_rates, tmp_path):
    path, other = tmp_path / "matrix.json", Cell(**vars(TINY) | {"horizon": 3})
    evaluate(SGDUpdate(0.1), TINY, path=path)
    alone = evaluate(AdamUpdate(0.05), TINY, other)
    two_rates.clear()
    matrix = evaluate(AdamUpdate(0.05), TINY, other, references_from=path)
    assert {n_steps for _, _, n_steps, *_ in two_rates} == {3}
    assert matrix.table() == alone.table()


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (AdamUpdate(0.06), {}, r"field `rule` should be {'name': 'rule', .*Found {'name': 'rule'"),
        (AdamUpdate(0.05), {"n_runs": 3}, "field `runs` should be 3. Found 2"),
        (AdamUpdate(0.05), {"n_tuning_runs": 2}, "field `tuning_runs` should be 2. Found 1"),
    ],
)
def test_a_file_of_something_else_is_refused_and_kept(two_rates, tmp_path, rule, options, message):
    path = tmp_path / "matrix.json"
    evaluate(AdamUpdate(0.05), TINY, path=path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"matrix.json: not a matrix that can be used here: {message}"):
        evaluate(rule, TINY, path=path, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace('"library_version": "', '"library_version": "9'), "field `library_version` should"),
        (lambda text: text.replace("n_diverged", "n_divorced"), "n_divorced"),
        (lambda text: text.replace('"cells"', '"cell"'), "field 'cells' is missing"),
        (lambda text: text[:100], "Unterminated|Expecting"),
        (lambda text: "[]", "list indices"),
        (lambda text: text.replace('"Adam"', '"Adamant"'), "field 'Adam' is missing"),
        (lambda text: re.sub(r'("scores": \[)[^,]*,', r"\1", text, count=1), "`scores` should have 2 numbers. Found"),
    ],
)
def test_a_damaged_file_is_refused(two_rates, tmp_path, change, message):
    path = tmp_path / "matrix.json"
    evaluate(AdamUpdate(0.05), TINY, path=path)
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=rf"matrix.json: not a matrix that can be used here: .*({message})"):
        evaluate(AdamUpdate(0.05), TINY, path=path)


def test_weights_tell_rules_apart(two_rates, tmp_path):
    rules = [PortHamiltonianUpdate(modes=1, hidden=(3,)) for _ in range(2)]
    assert rules[0].config == rules[1].config
    with torch.no_grad():
        next(p for p in rules[1].parameters() if p.numel() > 1).add_(0.1)
    evaluate(rules[0], TINY, path=tmp_path / "matrix.json")
    with pytest.raises(ValueError, match="field `rule` should be"):
        evaluate(rules[1], TINY, path=tmp_path / "matrix.json")


@pytest.mark.parametrize("option", ["n_runs", "n_tuning_runs"])
def test_arguments_are_checked(option):
    with pytest.raises(ValueError, match=f"Parameter `{option}` should be a positive integer. Found `{option} = 0`"):
        evaluate(AdamUpdate(), TINY, **{option: 0})


# ------------------------------------------------------------------------------------- the command


def test_the_command_prints_the_table_and_leaves_file_and_figure(two_rates, tmp_path, capsys):
    command = ["matrix", "--quick", "--runs", "2", "--cells", "relu 20,|linear", "--out", str(tmp_path / "new")]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert {file.name for file in (tmp_path / "new").iterdir()} == {"matrix.json", "matrix.png", ".matrix.json.lock"}
    assert "digits relu 20, 50 steps" in printed
    assert "digits linear, 50 steps" in printed
    assert "To Adam, cosine: " in printed
    assert "of 4 runs of port-hamiltonian" in printed
    assert main([*command, "--markdown"]) == 0
    assert capsys.readouterr().out.startswith("| cell |")


def test_the_command_takes_a_file_and_refuses_to_mix_rules(two_rates, tmp_path, capsys):
    save(AdamUpdate(0.05), tmp_path / "mine.safetensors", trained_for={"horizon": 10, "task": "none"})
    command = ["matrix", "--quick", "--runs", "1", "--cells", "linear", "--out", str(tmp_path)]
    assert main([*command, "--rule", str(tmp_path / "mine.safetensors")]) == 0
    assert "mine" in capsys.readouterr().out.splitlines()[0]
    assert main([*command, "--rule", "lstm"]) == 2
    assert "field `rule` should be {'name': 'lstm'" in capsys.readouterr().err


def test_the_command_takes_the_initial_weights_of_a_rule(two_rates, tmp_path, capsys):
    command = ["matrix", "--quick", "--runs", "1", "--cells", "linear", "--rule", "port-hamiltonian-spectral"]
    rule = untrained(odeopt.load_pretrained("port-hamiltonian-spectral"))
    for options, wanted in (["--untrained"], True), ([], False):
        out = tmp_path / "".join(options)
        assert main([*command, *options, "--out", str(out)]) == 0
        assert ("port-hamiltonian-spectral, untrained" in capsys.readouterr().out) == wanted
        noted = read_json(out / "matrix.json", dict, wanted="a matrix")["rule"]
        assert (noted["sha256"] == fingerprint(rule)) == wanted


def test_data_that_is_not_there_is_left_out_and_named(two_rates, tmp_path, capsys):
    command = ["matrix", "--max-horizon", "100", "--runs", "1", "--cells", "^(digits|kmnist|fashion-mnist) sigmoid 20"]
    assert main([*command, "--data-dir", str(tmp_path / "nothing"), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "Left out: KMNIST is not in the folder" in printed.err
    assert "Left out: FashionMNIST is not in the folder" in printed.err
    assert "digits sigmoid 20, 100 steps" in printed.out
    assert "of 1 cells" in printed.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "port-hamiltonain"], "Did you mean `port-hamiltonian`?"),
        (["--rule", "missing.safetensors"], "should be a file"),
        (["--cells", "("], "should be a regular expression"),
        (["--cells", "imagenet"], "should be found in the name of a cell"),
        (["--references-from", "missing.json"], "missing.json"),
    ],
)
def test_bad_options_end_with_a_message(tmp_path, capsys, options, message):
    assert main(["matrix", "--quick", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("options", [["--runs", "0"], ["--max-horizon", "long"], ["--device", "abacus"]])
def test_options_are_read_before_any_work(options, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["matrix", *options])
    assert options[0] in capsys.readouterr().err


# ------------------------------------------------------------------------------------- Adam with cosine decay


def test_cosine_decay_is_that_of_torch():
    """``CosineAnnealingLR`` over the whole run, on a network in double precision."""
    task = MLPClassification("digits", (5,), dtype=torch.float64)
    n_steps, index = 20, torch.zeros(1, dtype=torch.int64)
    ours = unroll(AdamUpdate(0.05, cosine=True), task, indices=index, n_steps=n_steps, total_steps=n_steps)
    params = {name: param.requires_grad_() for name, param in task.init_params(index, 0).items()}
    optimizer = torch.optim.Adam(params.values(), 0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, n_steps)
    for step in range(n_steps):
        optimizer.zero_grad()
        task.loss(params, task.sample_batch(index, step, 0)).sum().backward()
        optimizer.step()
        schedule.step()
    for name, param in params.items():
        # torch's schedule is a recursion; eps and rounding aside the same numbers
        torch.testing.assert_close(ours.params[name], param, rtol=1e-6, atol=1e-9)


def test_cosine_decay_reaches_zero_and_starts_at_the_learning_rate():
    rule, plain = AdamUpdate(0.5, cosine=True), AdamUpdate(0.5)
    grad = torch.tensor([1.0, -2.0])
    factors = []
    for progress in (0.0, 0.5, 1.0):
        update, _ = rule(grad, rule.init_state(grad), progress=torch.tensor(progress))
        factors.append((update / plain(grad, plain.init_state(grad))[0]).tolist())
    torch.testing.assert_close(torch.tensor(factors), torch.tensor([[1.0, 1.0], [0.5, 0.5], [0.0, 0.0]]))


def test_cosine_decay_serves_the_optimizer_and_needs_the_length_of_the_run():
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    with pytest.raises(ValueError, match=r"Parameter `progress` should be the fraction of the run"):
        LearnedOptimizer([param], AdamUpdate(cosine=True)).step()
    with pytest.raises(ValueError, match=r"Parameter `cosine` should be True or False. Found `cosine = 'yes'`"):
        AdamUpdate(cosine="yes")


def test_cosine_decay_is_kept_in_the_file(tmp_path):
    path = tmp_path / "adam.safetensors"
    save(AdamUpdate(0.1, cosine=True), path, trained_for={"horizon": 10, "task": "none"})
    assert odeopt.artifacts.load(path).cosine is True
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["config"])["cosine"] is True


# ------------------------------------------------------------------------------------- scaled tasks


def test_a_scaled_task_multiplies_the_loss_and_the_start():
    plain, index = MLPClassification("digits", (4,), batch_size=8), torch.arange(3)
    task = ScaledTask(plain, loss_scale=8.0, init_scale=0.25)
    start, scaled = plain.init_params(index, 1), task.init_params(index, 1)
    for name in start:
        assert torch.equal(0.25 * start[name], scaled[name])
    assert task.param_shapes == plain.param_shapes
    units, *batch = task.sample_batch(index, 2, 1)
    assert units.eq(1).all()
    assert all(torch.equal(x, y) for x, y in zip(batch, plain.sample_batch(index, 2, 1), strict=True))
    assert torch.equal(task.loss(start, (units, *batch)), 8 * plain.loss(start, batch))
    assert task.describe() == {
        "task": "ScaledTask",
        "loss_scale": 8.0,
        "init_scale": 0.25,
        "log_range": 0.0,
        "of": plain.describe(),
    }
    assert task.to("cpu") is task


@pytest.mark.parametrize("name", ["loss_scale", "init_scale"])
@pytest.mark.parametrize("scale", [0.0, -1.0, math.inf, math.nan])
def test_a_scale_is_positive(name, scale):
    with pytest.raises(ValueError, match=f"Parameter `{name}` should be a positive number. Found `{name} = {scale}`"):
        ScaledTask(RandomQuadratic(2), **{name: scale})


def test_the_shipped_rule_is_no_worse_than_adam_where_it_was_trained_for_it():
    """Digits are not what it was meta-trained on, but a small sigmoid network is."""
    cell = Cell(dataset="digits", horizon=50)
    matrix = evaluate_matrix(
        load_pretrained("port-hamiltonian"), cells_of(cell), n_runs=2, n_tuning_runs=1, progress_bar=False
    )
    assert matrix.ratio(cell.name).mean < 1
    assert matrix.outcomes[cell.name]["rule"].n_diverged == 0


def test_without_a_folder_the_command_makes_one(two_rates, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["matrix", "--quick", "--runs", "1", "--cells", "linear"]) == 0
    assert (tmp_path / "runs" / "matrix" / "matrix.png").exists()
    assert "saved" in capsys.readouterr().out


def test_cells_that_are_committed_are_of_the_rule_that_ships_and_not_run_again(tmp_path, monkeypatch):
    committed = Path(odeopt.__file__).parents[1] / "figs" / "matrix.json"
    path = shutil.copy(committed, tmp_path)
    cells = grid(datasets=("mnist", "digits"))  # those that were to be had
    monkeypatch.setattr(odeopt.evaluation.matrix, "_outcome", None)
    matrix = evaluate_matrix(load_pretrained("port-hamiltonian"), cells, name="port-hamiltonian", path=path)
    assert matrix.outcomes.keys() == json.loads(committed.read_text())["cells"].keys()


def test_comparison_that_is_committed_is_of_the_rule_that_ships():
    committed = Path(odeopt.__file__).parents[1] / "figs" / "generalisation.json"
    rule = json.loads(committed.read_text())["rule"]
    assert rule == {"name": "port-hamiltonian", "sha256": fingerprint(load_pretrained("port-hamiltonian"))}


def test_fields_of_diverged_runs_can_be_read(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(odeopt.report.matrix, "save_figure", lambda figure, path: drawn.append(figure))
    ratios = {"fine": 1.2, "mine": math.inf, "theirs": 0.0, "hundred": 120.0, "small": 0.001}
    plot_ratios({"rule over Adam": {"factor": ratios}}, tmp_path / "heat.png", label="ratio")
    axes = drawn[0].axes[0]
    assert all(patch.get_facecolor()[3] == 1 for patch in axes.patches)
    texts = [text.get_text() for text in axes.texts][1::2]
    assert texts == ["1.20", "diverged", "other diverged", "1e+02", "<0.01"]
