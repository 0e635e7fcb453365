"""Every example runs, prints its table and writes its figures; bad options are refused before any work."""

import contextlib
import dataclasses
import functools
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import blind
import blind_problems
import pytest
import torch
from variants import validate

import odeopt
from odeopt import systems
from odeopt.evaluation import baselines
from odeopt.meta import MetaConfig, MetaResult
from odeopt.meta import files as meta_config
from odeopt.meta.files import load_config
from odeopt.meta.validation import validation_score
from odeopt.suite.opponents import OPPONENTS

FOLDER = Path(__file__).parents[1] / "examples"
SCRIPTS = {
    path.stem: path
    for folder in (FOLDER, FOLDER / "studies")
    for path in sorted(folder.glob("*.py"))
    if "__main__" in path.read_text(encoding="utf-8")
}
TINY = {
    "ablation": ["--quick", "--steps", "1", "--horizon", "2", "--runs", "2", "--rows", "one mode"],
    "depth": ["--dataset", "digits", "--width", "8", "--depths", "0", "2", "--rates", "1", "4", "--steps", "3"],
    "diagnostics": ["--dataset", "digits", "--steps", "4", "--every", "2"],
    "coordinate_check": ["--widths", "8", "16", "--steps", "1", "2", "--runs", "2"],
    "estimators": ["--quick", "--steps", "20", "--runs", "20"],
    "generalisation": ["--quick", "--runs", "2", "--tuning-runs", "1", "--steps", "60"],
    "general": ["--dataset", "digits", "--steps", "2", "--runs", "2", "--tuning-runs", "1", "--markdown"],
    "guard": ["--dataset", "digits", "--steps", "3", "--runs", "1"],
    "kinetic": ["--dataset", "digits", "--steps", "1", "--runs", "2", "--problems", "perceptron", "--variants",
                "quadratic", "spectral, coherent", "port-hamiltonian, orthogonalised"],
    "meta_seeds": ["--dataset", "digits", "--steps", "2", "--runs", "2", "--problems", "3", "--tuning-runs", "1",
                   *(str(Path(odeopt.__file__).parent / "pretrained" / f"{name}.safetensors")
                     for name in ("hamiltonian-mnist", "port-hamiltonian-mnist", "lstm-quadratic"))],
    "mnist": ["--dataset", "digits", "--steps", "2", "--runs", "2"],
    "physics": ["--quick", "--steps", "1", "--runs", "4", "--systems", "pendulum", "cart-pole", "--rows", "Ham|naive"],
    "quadratic": ["--steps", "2", "--runs", "3"],
    "cheaper": ["--dataset", "digits", "--steps", "9", "--problems", "sigmoid"],
    "equal_loss": ["--dataset", "digits", "--steps", "16", "--runs", "2", "--problems", "recurrent"],
    "taught": ["--dataset", "digits", "--steps", "9", "--problems", "sigmoid"],
    "heads": ["--dataset", "digits", "--steps", "9", "--problems", "sigmoid"],
    "laws": ["--dataset", "digits", "--steps", "2", "--problems", "convnet", "coordinates", "few-examples"],
    "scale": ["--dataset", "digits", "--steps", "1", "--problems", "perceptron-64", "transformer-64", "long-convnet"],
    "seeds": ["--dataset", "digits", "--steps", "9", "--problems", "sigmoid"],
    "trained_energies": ["--dataset", "digits", "--steps", "9", "--problems", "sigmoid", "--meta-steps", "1", "--seeds",
                         "1", "--rows", "^quadratic$"],
    "meta_curves": [str(FOLDER / "studies" / "seeds" / "port-hamiltonian-spectral-seed1.safetensors")],
    "long_runs": ["--dataset", "digits", "--steps", "2", "--runs", "1", "--problems", "vit", "recurrent"],
    "finetuning": ["--dataset", "digits", "--steps", "1", "--runs", "1"],
    "widest": ["--dataset", "digits", "--steps", "1", "--runs", "1", "--problems", "perceptron-2048"],
    "saddle": ["--steps", "3", "--runs", "2", "--dim", "3"],
    "unseen": ["--dataset", "digits", "--steps", "2"],
    "blind": ["--dataset", "digits", "--steps", "2", "--runs", "1", "--problems", "painting", "process"],
    "solvers": ["--dataset", "digits", "--steps", "1", "--horizon", "2", "--runs", "2", "--seeds", "1",
                "--trained", "rk4", "euler", "--solvers", "exponential", "midpoint", "dopri5"],
}  # fmt: skip
WITH_OPTIONS = tuple(name for name in TINY if name not in ("diagnostics", "meta_curves"))  # of one run, and of none
MNIST_RULES = ("port-hamiltonian-mnist", "port-hamiltonian-coordinatewise-mnist", "lstm-mnist", "hamiltonian-mnist")
COLUMNS = ("losses", "all losses", "accuracy", "difference", "diverged", "time", "state", "looks across")
HAND_DESIGNED = ("Adam (lr", "RMSprop (lr", "Momentum (lr", "Nesterov (lr")


def skip_tuning(monkeypatch):
    rules = {"Adam (lr 0.1)": odeopt.AdamUpdate(0.1)}
    monkeypatch.setattr(baselines, "baselines_for", lambda *args, **kwargs: (rules, "not tuned"))

    def tune_all(task, *, families, **options):
        settings = ({"lr": 0.01} | ({family.other: 0.9} if family.other else {}) for family in families)
        return tuple(baselines.Tuned(f.name, s, 0.0, ()) for f, s in zip(families, settings, strict=True))

    monkeypatch.setattr(baselines, "tune_all", tune_all)
    for name, contender in OPPONENTS.items():
        monkeypatch.setitem(OPPONENTS, name, dataclasses.replace(contender, rates=contender.rates[:1]))


@pytest.fixture
def untuned(monkeypatch):
    """Skip the tuning, which takes most of the time."""
    skip_tuning(monkeypatch)


def skip_substeps(monkeypatch):
    """Let true systems take one step between two observations, not ten: no example tells the difference."""
    monkeypatch.setattr("odeopt.systems.data._N_SUBSTEPS", 1)


def shorten_rises(monkeypatch):
    """Let energies be watched over five steps instead of 39, each of which solves an equation."""
    kept = systems.energy_rises

    def shortened(model, data, **options):
        return kept(model, data._replace(t=data.t[:6], x=data.x[:6], u=None), **options)

    monkeypatch.setattr(systems, "energy_rises", shortened)


def run(name, *argv):
    """Call an example's main, in this process."""
    return runpy.run_path(str(SCRIPTS[name]))["main"](list(argv))


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """Run an example with tiny arguments, untuned, once for all tests: where it ran, its --out, and what it printed."""

    @functools.cache
    def tiny_run(name):
        cwd, text = tmp_path_factory.mktemp(name), io.StringIO()
        out = cwd / "new" / "folder"
        with pytest.MonkeyPatch.context() as monkeypatch, contextlib.redirect_stdout(text):
            monkeypatch.chdir(cwd)  # where runs are kept
            skip_tuning(monkeypatch)
            skip_substeps(monkeypatch)
            shorten_rises(monkeypatch)
            for module in ("studies.variants", "variants"):  # one file, imported by two names
                monkeypatch.setattr(f"{module}._N_TIMINGS", 1)
            run(name, *TINY.get(name, []), "--out", str(out))
        return cwd, out, text.getvalue()

    return tiny_run


def table_after(text, heading):
    """Title line and rows of the table that follows a line which begins with the heading."""
    block = text[text.index(heading) :].split("\n\n")[1].splitlines()
    return block[0], {row.split("  ")[0]: row for row in block[3:]}


@pytest.mark.parametrize("name", sorted(SCRIPTS.keys() - {"reproduce"}))
def test_every_example_runs_and_saves_a_figure(name, tiny_run):
    _, out, _ = tiny_run(name)
    figures = list(out.glob("*.png"))
    assert figures
    assert all(figure.stat().st_size > 5000 for figure in figures)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_examples_that_compare_are_short(name):
    assert len(SCRIPTS[name].read_text().splitlines()) < 150


def test_mnist_compares_all_rules_on_both_activations(tmp_path, capsys):
    run("mnist", *TINY["mnist"], "--out", str(tmp_path))
    text = capsys.readouterr().out
    assert text.index(", sigmoid,") < text.index(", relu,")
    for activation in ("sigmoid", "relu"):
        titles, rows = table_after(text, f"sklearn digits, 64-20-10, {activation}")
        for title in COLUMNS:
            assert title in titles
        assert list(rows)[:5] == ["port-hamiltonian", *MNIST_RULES]
        assert all(any(row.startswith(label) for row in rows) for label in HAND_DESIGNED)
        assert sum("reference" in row for row in rows.values()) == 1
        assert (tmp_path / f"digits_{activation}.png").exists()
    assert "tuned on the fly" in text


def test_mnist_takes_further_rules(tmp_path, capsys, untuned):
    path = Path(odeopt.__file__).parent / "pretrained" / "port-hamiltonian-quadratic.safetensors"
    named = ["--rule", "port-hamiltonian-spectral", "--rule", str(path)]
    run("mnist", *TINY["mnist"], *named, "--out", str(tmp_path))
    _, rows = table_after(capsys.readouterr().out, "sklearn digits")
    assert list(rows)[5:7] == ["port-hamiltonian-spectral", "port-hamiltonian-quadratic"]


def test_mnist_changes_no_figure_of_the_documentation_unless_asked_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert runpy.run_path(str(SCRIPTS["mnist"]))["parse"]([]).out.as_posix() == "runs/mnist"


def test_mnist_takes_another_solver_with_the_same_weights(tmp_path, capsys, untuned):
    run("mnist", *TINY["mnist"], "--solver", "euler", "--out", str(tmp_path))
    _, rows = table_after(capsys.readouterr().out, "sklearn digits")
    solved = (f"{name}, euler" for name in ("port-hamiltonian", *MNIST_RULES[:2]))
    assert list(rows)[:5] == [*solved, "lstm-mnist", "hamiltonian-mnist"]


def test_mnist_trains_first_when_asked_to(tmp_path, capsys, monkeypatch, untuned):
    def tiny_config(name):
        rule_class = name.removesuffix("-mnist").removesuffix("-coordinatewise")
        training = MetaConfig(n_meta_steps=1, n_tasks=1, horizon=2, n_validation_tasks=1)
        task = {"class": "MLPClassification", "dataset": "mnist", "widths": [4]}
        return meta_config.Config(name, {"class": rule_class}, task, training)

    monkeypatch.setattr(meta_config, "load_config", tiny_config)
    monkeypatch.setattr(odeopt, "load_pretrained", None)
    run("mnist", *TINY["mnist"], "--train", "--out", str(tmp_path))
    text = capsys.readouterr().out
    assert re.search(r"hamiltonian-mnist: validation loss \d\.\d{4}", text)
    _, rows = table_after(text, "sklearn digits")
    assert list(rows)[:4] == [f"{name} (new)" for name in MNIST_RULES]


def test_mnist_falls_back_to_digits_in_one_sentence(tmp_path, capsys, monkeypatch, untuned):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(odeopt.tasks.datasets, "import_torchvision", no_network)
    options = ["--data-dir", str(tmp_path / "nothing"), "--steps", "2", "--runs", "2", "--out", str(tmp_path)]
    run("mnist", *options)
    first = capsys.readouterr().out.splitlines()[0]
    assert str(tmp_path / "nothing") in first
    assert "fetch it with: python -c" in first
    assert first.endswith("using scikit-learn's handwritten digits instead.")
    assert (tmp_path / "digits_relu.png").exists()


def test_general_has_a_column_for_each_network_and_horizon(tiny_run):
    _, out, text = tiny_run("general")
    last = text[text.rindex("\n| rule") :]
    for column in ("64-20-10, sigmoid, 2 steps", "64-20-10, relu, 20 steps", "64-100-100-10, relu, 2 steps"):
        assert column in last
    rows = [line.split(" | ")[0].removeprefix("| ") for line in last.splitlines()[3:8]]
    assert rows == ["port-hamiltonian", "port-hamiltonian-mnist", "Adam", "Nesterov", "Adam, cosine"]
    assert len(list(out.glob("general_*.png"))) == 5


def test_meta_seeds_stand_together_and_the_best_validation_first(tmp_path, capsys, untuned):
    files = []
    for seed, validation in ((0, 0.3), (1, 0.2), (2, 0.4)):
        rule = odeopt.PortHamiltonianUpdate()
        torch.nn.init.constant_(rule.coefficient_network[-1].bias[-1:], -0.5 * seed)  # log of the step size
        made = {"horizon": 2, "task": {"class": "MLPClassification"}, "config": "mine", "training": {"seed": seed}}
        files.append(tmp_path / f"{seed}.safetensors")
        odeopt.save(rule, files[-1], trained_for=made | {"validation_loss": validation, "seconds": 1.0})
    options = [*map(str, files), *TINY["meta_seeds"][:8], "--out", str(tmp_path)]
    run("meta_seeds", *options, "--markdown")
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| mine |")).split(" | ")
    assert row[-2] == "0.200 (seed 1), 0.300 (seed 0), 0.400 (seed 2)"
    assert all(" ± " in cell for cell in row[1:5])
    content = json.loads((tmp_path / "meta_seeds.json").read_text())
    assert [each["seed"] for each in content["meta-trainings"]["mine"]] == [1, 0, 2]
    by_seed = content["mnist"]["64-20-10, sigmoid, 2 steps"]["mine"]["by_seed"]
    assert len(set(by_seed)) == 3  # each its own step size
    with pytest.raises(SystemExit, match=r"`rules` should be of different meta-seeds.* of mine .*\[1, 1, 0\]"):
        run("meta_seeds", str(files[1]), *options[:2], *options[3:])
    other = odeopt.PortHamiltonianUpdate(modes=1)
    made |= {"training": {"seed": 3}, "validation_loss": 0.1, "seconds": 1.0}
    odeopt.save(other, tmp_path / "other.safetensors", trained_for=made)
    with pytest.raises(SystemExit, match=r"trained alike: those of mine are not.*\[3, 1, 0, 2\]"):
        run("meta_seeds", str(tmp_path / "other.safetensors"), *options)
    del made["seconds"]  # which the table shows
    odeopt.save(other, tmp_path / "untimed.safetensors", trained_for=made)
    with pytest.raises(SystemExit, match=r"`rules` should be made by `python -m odeopt train`, which notes seconds"):
        run("meta_seeds", str(tmp_path / "untimed.safetensors"), *options)


def test_shipped_rules_that_have_company_stand_with_it(tmp_path, monkeypatch):
    program = runpy.run_path(str(SCRIPTS["meta_seeds"]))
    grouped = program["grouped"]
    monkeypatch.setitem(grouped.__globals__, "FOLDER", tmp_path)
    with pytest.raises(ValueError, match=r"`rules` should be given, or lie in .*. Found `rules = \[\]`"):
        grouped([])
    # one with an alias, which may not count twice
    shipped = odeopt.load_pretrained("hamiltonian-mnist")
    seeds = [shipped.trained_for["training"]["seed"], 7]
    made = shipped.trained_for | {"training": shipped.trained_for["training"] | {"seed": 7}}
    odeopt.save(shipped, tmp_path / "hamiltonian-mnist-seed7.safetensors", trained_for=made)
    groups = grouped([])
    found = {name: sorted(rule.trained_for["training"]["seed"] for rule in rules) for name, rules in groups.items()}
    assert found == {"hamiltonian-mnist": sorted(seeds)}


def test_rules_are_validated_anew_on_common_tasks(tmp_path, capsys, untuned):
    config = load_config("lstm-quadratic")
    settings = dataclasses.replace(config.training, n_validation_tasks=3, horizon=4)
    files, scores = [], []
    for seed in (0, 1):
        config = dataclasses.replace(config, training=dataclasses.replace(settings, seed=seed))
        rule = config.build_rule()
        result = MetaResult(rule, best_score=99.0 + seed)
        files.append(tmp_path / f"{seed}.safetensors")
        odeopt.save(rule, files[-1], trained_for=config.trained_for(result))
        options = {"indices": torch.arange(6), "horizon": 4, "seed": 1_000_003}
        with torch.no_grad():
            scores.append(validation_score(rule, config.build_task(), **options))
    run("meta_seeds", *map(str, files), *TINY["meta_seeds"][:8], "--out", str(tmp_path), "--validate", "2")
    found = json.loads((tmp_path / "meta_seeds.json").read_text())["meta-trainings"]["lstm-quadratic"]
    assert {each["seed"]: each["validation"] for each in found} == dict(enumerate(scores))
    assert found == sorted(found, key=lambda each: each["validation"])


def test_rules_that_learned_from_held_out_losses_are_validated_on_them_anew():
    config = load_config("port-hamiltonian-mnist")
    family = config.task["families"][0] | {"dataset": "digits", "has_own_examples": True, "n_examples": 0.5}
    objective = dataclasses.replace(config.training.objective, held_out=0.5)
    training = dataclasses.replace(config.training, n_validation_tasks=1, objective=objective)
    task = config.task | {"families": [family], "horizons": [3, 3]}
    config = dataclasses.replace(config, training=training, task=task)
    rule = config.build_rule()
    rule.trained_for = config.trained_for(MetaResult(rule))
    task, options = config.build_task(), {"indices": torch.arange(2), "horizon": 100, "seed": 1_000_003}
    with torch.no_grad():
        scores = [validation_score(rule, task, held_out=share, **options) for share in (0.0, 0.5)]
    assert validate(rule, 2) == scores[1] != scores[0]


def test_one_kind_of_outputs_is_back_at_its_initial_value():
    program, rule = runpy.run_path(str(SCRIPTS["taught"])), odeopt.load_pretrained("port-hamiltonian-spectral")
    inputs = torch.randn(5, rule.coefficient_network[0].in_features)
    outputs = rule.coefficient_network(inputs).split(rule.output_sizes, -1)
    untaught = program["untaught"](rule, "log_coherence").coefficient_network(inputs).split(rule.output_sizes, -1)
    for name, before, after in zip(rule.output_sizes._fields, outputs, untaught, strict=True):
        torch.testing.assert_close(after, torch.zeros_like(before) if name == "log_coherence" else before)
    assert set(program["OUTPUTS"].values()) == {name for name, n in rule.output_sizes._asdict().items() if n > 0}


def test_losses_are_read_where_a_run_comes_down_to_the_level():
    program = runpy.run_path(str(SCRIPTS["equal_loss"]))
    shares = torch.tensor(program["SHARES"], dtype=torch.float64)
    # training losses that fall in proportion to the steps, held-out ones as their square root; the last run stays above
    train = shares.reciprocal().unsqueeze(1) * torch.tensor([1.0, 1.0, 1.0, 1000.0], dtype=torch.float64)
    level = torch.tensor([3.0, 20.0, 0.9, 50.0], dtype=torch.float64)
    share, at_train, held_out = (x.exp() for x in program["crossing"](train, train.sqrt(), level))
    wanted = torch.tensor([3.0, 16.0, 1.0, 1000.0], dtype=torch.float64)  # of the shortest, or the longest, at the ends
    torch.testing.assert_close(at_train, wanted)
    torch.testing.assert_close(held_out, wanted.sqrt())
    torch.testing.assert_close(share, torch.tensor([1 / 3, 1 / 16, 1.0, 1.0], dtype=torch.float64))
    train[-1, 3] = 2 * train[-2, 3]  # the longest run counts, whatever its loss
    assert program["crossing"](train, train.sqrt(), level)[1][3].exp() == pytest.approx(train[-1, 3].item())


@pytest.mark.parametrize(
    "path",
    sorted([*Path(odeopt.__file__).parent.glob("pretrained/*.safetensors"), *FOLDER.rglob("*.safetensors")]),
    ids=lambda path: path.stem,
)
def test_artefacts_say_what_their_configuration_trains_today(path):
    rule = odeopt.load(path)
    found = rule.trained_for
    config = load_config(found["config"]).with_seed(found["training"]["seed"])
    wanted = {"task": config.task, "training": config.training.describe(), "use": config.use or None}
    wanted["start"] = None if config.start is None else config.start.describe()
    wanted = json.loads(json.dumps(wanted))
    assert {name: found.get(name) for name in wanted} == wanted
    assert rule.config == config.in_use(config.build_rule()).config


def test_a_corrupt_file_is_named(tmp_path):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file in odeopt.tasks.datasets._FILES:
        (raw / file).write_bytes(b"\x00")
    with pytest.raises(SystemExit, match="train-images-idx3-ubyte is corrupt"):
        run("mnist", "--data-dir", str(tmp_path), "--out", str(tmp_path))


def test_quadratic_reports_mean_and_median_of_the_final_loss(tmp_path, capsys):
    run("quadratic", "--runs", "5", "--out", str(tmp_path))
    text = capsys.readouterr().out
    titles, rows = table_after(text, "Random quadratics, 10 dimensions, 5 problems")
    assert "final loss  median  all losses" in re.sub(" {2,}", "  ", titles)
    assert "accuracy" not in titles
    rules = ("port-hamiltonian", "port-hamiltonian-coordinatewise", "lstm", "hamiltonian")
    assert list(rows)[:5] == ["port-hamiltonian", *(f"{name}-quadratic" for name in rules)]
    assert "committed table" in text
    assert (tmp_path / "quadratic.png").exists()


def test_kinetic_compares_energies_with_tuned_adamw(tmp_path, capsys):
    run("kinetic", *TINY["kinetic"], "--out", str(tmp_path))
    table = capsys.readouterr().out
    assert all(name in table for name in ("AdamW", "quadratic", "spectral, coherent"))
    assert (tmp_path / "kinetic.png").is_file()
    assert (tmp_path / "kinetic.json").is_file()


def test_diagnostics_draws_a_run_and_feeds_tensorboard(tmp_path, capsys):
    run("diagnostics", *TINY["diagnostics"], "--out", str(tmp_path), "--log-dir", str(tmp_path / "board"))
    assert f"Figure: {tmp_path / 'diagnostics.png'}" in capsys.readouterr().out
    assert (tmp_path / "diagnostics.png").is_file()
    (events,) = (tmp_path / "board").iterdir()
    content = events.read_bytes()
    assert all(tag in content for tag in (b"loss", b"energy/0.weight", b"friction/4.bias/mode 2"))


def test_saddle_reports_quartiles_and_runs_that_stay(tmp_path, capsys):
    run("saddle", *TINY["saddle"], "--out", str(tmp_path))
    text = capsys.readouterr().out
    for landscape in ("monkey saddle", "saddle in 3 dimensions"):
        titles, rows = table_after(text, landscape)
        assert re.split(r" {2,}", titles)[1:] == [
            "lower quartile", "median", "upper quartile", "never left", "not finite", "final loss",
        ]  # fmt: skip
        assert [row.split(" (lr")[0] for row in rows] == [
            "port-hamiltonian", "port-hamiltonian-mnist", "port-hamiltonian-quadratic", "Adam", "Momentum", "SGD",
        ]  # fmt: skip
    # momentum takes more than three steps off a saddle where the gradient is 3e-6
    _, rows = table_after(text, "monkey saddle")
    assert next(row for name, row in rows.items() if name.startswith("Momentum")).split()[-7] == ">"


def test_estimators_are_measured_against_the_exact_gradient(tiny_run):
    *_, text = tiny_run("estimators")
    for stage in ("untrained", "after 1 exact", "after 2 exact"):
        titles, rows = table_after(text, f"Meta-gradients {stage}")
        assert re.split(r" {2,}", titles)[1:] == ["bias", "known to", "std. deviation", "cosine", "time"]
        assert list(rows)[:5] == ["backpropagation", "detached", "truncated", "truncated, detached", "damped"]
        assert {name.split(",")[0] for name in list(rows)[5:]} == {"ES", "PES"}
        numbers = {name: [float(cell) for cell in row.split("  ")[1:] if cell] for name, row in rows.items()}
        assert numbers["backpropagation"][:4] == [0.0, 0.0, 0.0, 1.0]
        assert numbers["truncated, detached"][0] > 0.3
        assert 0 < numbers["damped"][0] < numbers["truncated, detached"][0]
    trained = ("backpropagation", "detached", "damped", "PES, sigma 1e-2")
    assert all(f"\n{name}: best validation loss" in text for name in trained)


def test_solvers_are_trained_with_and_run_with(tiny_run):
    _, out, text = tiny_run("solvers")
    _, rows = table_after(text, "digits, 64-20-10, sigmoid, 2 steps")
    assert list(rows) == ["rk4", "euler", "exponential", "midpoint", "dopri5"]
    cells = {name: re.split(r" {2,}", row)[1:] for name, row in rows.items()}
    assert [["[" in cell for cell in row] for row in cells.values()] == [
        [False, True],
        [True, False],
        *[[True, True]] * 3,
    ]
    losses = {name: float(row[0].split()[0]) for name, row in cells.items()}
    assert losses["dopri5"] == pytest.approx(losses["exponential"], abs=2e-3)  # both solve the same equations
    _, rows = table_after(text, "of the paired difference to it].")
    evaluations = {name: row.split()[1] for name, row in rows.items()}
    assert [evaluations[name] for name in ("rk4", "euler", "midpoint")] == ["4", "1", "2"]
    assert float(evaluations["dopri5"]) > 4
    content = json.loads((out / "optimizers_view.json").read_text())
    assert content["costs"]["rk4"]["ms"] > 0
    assert content["rules"]["euler"]["rk4"]["n_runs"] == 2


def test_physics_continues_and_judges_parts_and_circles(tiny_run, capsys, monkeypatch):
    cwd, out, first = tiny_run("physics")
    titles, rows = table_after(first, "\ncart-pole\n")
    for title in ("parameters", "training", "test", "prediction", "off circle", "V", "1/M", "D", "g"):
        assert title in titles
    learned = ["port-Hamiltonian", "naive", "port-Hamiltonian, 1 % noise", "port-Hamiltonian, sampled inputs"]
    assert list(rows) == learned
    assert len(table_after(first, "\npendulum\n")[1]) == 5  # and one that is told of the angle
    results = json.loads((out / "physics-quick.json").read_text())["systems"]["cart-pole"]
    assert results["port-Hamiltonian"]["prediction"]["drift"] < 1e-6 < results["naive"]["prediction"]["drift"]
    assert set(results["port-Hamiltonian"]["parts"]) == {"V", "inverse_mass", "D", "g"}
    folder = cwd / "runs" / "physics-quick"
    kept = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(kept) == 9
    monkeypatch.chdir(cwd)
    skip_substeps(monkeypatch)
    options = [*TINY["physics"], "--systems", "cart-pole", "--rows", "naive", "--out", str(cwd / "again")]
    run("physics", *options)
    again = table_after(capsys.readouterr().out, "\ncart-pole\n")[1]["naive"]
    assert again.split() == rows["naive"].split()
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == kept
    with pytest.raises(SystemExit, match=r"hold a fit of the same settings.*which differs in n_passes; choose another"):
        run("physics", *options, "--steps", "2")


@pytest.mark.parametrize("name", blind.NAMES)
def test_blind_problems_reach_every_parameter_and_fall(name):
    draws = torch.Generator().manual_seed(0)
    images, labels = torch.rand(300, 64, generator=draws), torch.randint(10, (300,), generator=draws)
    problem = blind_problems.problems(images, labels, "noise")[name]
    model, batch = problem.make_model(0), problem.batch(0, 0)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=1e-3), []
    for _ in range(4):
        optimizer.zero_grad()
        loss = problem.loss(model, batch)
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert all(param.grad is not None and param.grad.isfinite().all() for param in model.parameters())
    assert losses[-1] < losses[0]
    assert problem.held_out_loss(model, 0, "cpu") > 0


def test_physics_refuses_an_odd_number(capsys):
    with pytest.raises(SystemExit, match="2"):
        run("physics", "--runs", "3")
    assert "argument --runs: should be even; found 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps: should be a positive integer; found 0"),
        (["--steps", "1.5"], "--steps: should be a positive integer; found 1.5"),
        (["--runs", "-3"], "--runs: should be a positive integer; found -3"),
        (["--device", "quantum"], "argument --device: quantum is not available"),
        (["--out", __file__], "argument --out: should be a folder that can be written to"),
    ],
)
@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_bad_options_are_refused_in_one_line(name, argv, message, capsys, monkeypatch):
    monkeypatch.setattr(odeopt, "load_pretrained", None)  # no work before the options are checked
    with pytest.raises(SystemExit, match="2"):
        run(name, *argv)
    error = capsys.readouterr().err.splitlines()[-1]
    assert message in error


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--solver", "rk5"], "--solver should be one of .*rk4.*; found rk5"),
        (["--dataset", "cifar"], "argument --dataset: invalid choice: 'cifar'"),
        (["--rule", "mine"], "--rule: Parameter `name` should be one of .* Found `name = 'mine'`"),
        (["--rule", "mine.safetensors"], "--rule: Parameter `path` should be a file. Found `path = 'mine.safe"),
    ],
)
def test_mnist_refuses_unknown_names(argv, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        run("mnist", *argv)
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_help_explains_every_option_and_its_default(name, capsys):
    with pytest.raises(SystemExit, match="0"):
        run(name, "--help")
    _, options = re.sub(r"\s+", " ", capsys.readouterr().out).split("-h, --help")
    for option in re.split(r" (?=--[a-z])", options)[1:]:
        assert re.search(r"\(default: .+\)", option), option


def test_an_example_is_a_command():
    command = [sys.executable, str(FOLDER / "quadratic.py"), "--steps", "none"]
    environment = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    process = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1].endswith("should be a positive integer; found none")
