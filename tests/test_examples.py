"""Every example runs, prints its table and writes its figures; bad options are refused before any work."""

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import odeopt
from odeopt import baselines
from odeopt.meta import MetaConfig
from odeopt.meta import config as meta_config

FOLDER = Path(__file__).parents[1] / "examples"
TINY = {
    "mnist": ["--dataset", "digits", "--steps", "2", "--runs", "2"],
    "quadratic": ["--steps", "2", "--runs", "3"],
    "saddle": ["--steps", "3", "--runs", "2", "--dim", "3"],
}
WITH_OPTIONS = tuple(TINY)
COLUMNS = ("losses", "all losses", "accuracy", "difference", "diverged", "time", "state", "looks across")
HAND_DESIGNED = ("Adam (lr", "RMSprop (lr", "Momentum (lr", "Nesterov (lr")


@pytest.fixture
def untuned(monkeypatch):
    """Skip the tuning, which takes most of the time."""
    rules = {"Adam (lr 0.1)": odeopt.AdamUpdate(0.1)}
    monkeypatch.setattr(baselines, "baselines_for", lambda *args, **kwargs: (rules, "not tuned"))


def run(name, *argv):
    """Call an example's main, in this process."""
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"](list(argv))


def table_after(text, heading):
    """Title line and rows of the table that follows a line which begins with the heading."""
    block = text[text.index(heading) :].split("\n\n")[1].splitlines()
    return block[0], {row.split("  ")[0]: row for row in block[3:]}


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.py")))
def test_every_example_runs_and_saves_a_figure(name, tmp_path, untuned):
    run(name, *TINY.get(name, []), "--out", str(tmp_path / "new" / "folder"))
    figures = list((tmp_path / "new" / "folder").glob("*.png"))
    assert figures
    assert all(figure.stat().st_size > 5000 for figure in figures)


@pytest.mark.parametrize("name", WITH_OPTIONS)
def test_examples_that_compare_are_short(name):
    assert len((FOLDER / f"{name}.py").read_text().splitlines()) < 150


def test_mnist_compares_all_rules_on_both_activations(tmp_path, capsys):
    run("mnist", *TINY["mnist"], "--out", str(tmp_path))
    text = capsys.readouterr().out
    assert text.index(", sigmoid,") < text.index(", relu,")
    for activation in ("sigmoid", "relu"):
        titles, rows = table_after(text, f"sklearn digits, 64-20-10, {activation}")
        for title in COLUMNS:
            assert title in titles
        assert list(rows)[:3] == ["port-hamiltonian", "lstm", "hamiltonian"]
        assert all(any(row.startswith(label) for row in rows) for label in HAND_DESIGNED)
        assert sum("reference" in row for row in rows.values()) == 1
        assert (tmp_path / f"digits_{activation}.png").exists()
    assert "tuned on the fly" in text


def test_mnist_takes_another_solver_with_the_same_weights(tmp_path, capsys, untuned):
    run("mnist", *TINY["mnist"], "--solver", "euler", "--out", str(tmp_path))
    _, rows = table_after(capsys.readouterr().out, "sklearn digits")
    assert list(rows)[:3] == ["port-hamiltonian, euler", "lstm", "hamiltonian"]


def test_mnist_trains_first_when_asked_to(tmp_path, capsys, monkeypatch, untuned):
    def tiny_config(name):
        rule_class = name.removesuffix("-mnist")
        training = MetaConfig(n_meta_steps=1, n_tasks=1, horizon=2, n_validation_tasks=1)
        task = {"class": "MLPClassification", "dataset": "mnist", "widths": [4]}
        return meta_config.Config(name, {"class": rule_class}, task, training)

    monkeypatch.setattr(meta_config, "load_config", tiny_config)
    monkeypatch.setattr(odeopt, "load_pretrained", None)
    run("mnist", *TINY["mnist"], "--train", "--out", str(tmp_path))
    text = capsys.readouterr().out
    assert re.search(r"hamiltonian: validation loss \d\.\d{4}", text)
    _, rows = table_after(text, "sklearn digits")
    assert list(rows)[:3] == ["port-hamiltonian (new)", "lstm (new)", "hamiltonian (new)"]


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
    assert list(rows)[:3] == ["port-hamiltonian", "lstm", "hamiltonian"]
    assert "committed table" in text
    assert (tmp_path / "quadratic.png").exists()


def test_saddle_reports_quartiles_and_runs_that_stay(tmp_path, capsys):
    run("saddle", *TINY["saddle"], "--out", str(tmp_path))
    text = capsys.readouterr().out
    for landscape in ("monkey saddle", "saddle in 3 dimensions"):
        titles, rows = table_after(text, landscape)
        assert re.split(r" {2,}", titles)[1:] == [
            "lower quartile", "median", "upper quartile", "never left", "not finite", "final loss",
        ]  # fmt: skip
        assert [row.split(" (lr")[0] for row in rows] == [
            "port-hamiltonian (MNIST)", "port-hamiltonian (quadratics)", "Adam", "Momentum", "SGD",
        ]  # fmt: skip
    # momentum takes more than three steps off a saddle where the gradient is 3e-6
    _, rows = table_after(text, "monkey saddle")
    assert next(row for name, row in rows.items() if name.startswith("Momentum")).split()[-7] == ">"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--steps", "0"], "--steps: should be a positive integer; found 0"),
        (["--steps", "1.5"], "--steps: should be a positive integer; found 1.5"),
        (["--runs", "-3"], "--runs: should be a positive integer; found -3"),
        (["--device", "quantum"], "argument --device: quantum is not to be had"),
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
