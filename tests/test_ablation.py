"""The ablation: variants are trained once and kept, compared in pairs, and what diverges is said to have."""

import dataclasses
import json
import math
import runpy
from pathlib import Path

import pytest
import torch
import variants
from variants import Row, compare_variants, train_variants
from variants_figure import plot_ablation

import odeopt
from odeopt.evaluation import Interval, compare, student_interval
from odeopt.meta import MetaConfig
from odeopt.meta.files import Config, load_config
from odeopt.rules import PortHamiltonianUpdate, SGDUpdate
from odeopt.tasks import RandomQuadratic

EXAMPLE = Path(__file__).parents[1] / "examples" / "studies" / "ablation.py"
TINY = ["--quick", "--steps", "1", "--horizon", "3", "--runs", "2"]
CONFIG = Config(
    "tiny",
    {"class": "port-hamiltonian", "hidden": [3]},
    {"class": "RandomQuadratic", "dim": 3},
    MetaConfig(n_meta_steps=2, n_tasks=2, horizon=4, validate_every=1, n_validation_tasks=2),
)


def main(*argv):
    runpy.run_path(str(EXAMPLE))["main"]([*TINY, *argv])


def train(folder, *names, config=CONFIG, n_seeds=1):
    variants = {name: {"modes": 1} if name == "one mode" else {"solver": name} for name in names}
    return train_variants(config, variants, folder, n_seeds=n_seeds, progress_bar=False)


def weights(rule):
    return torch.nn.utils.parameters_to_vector(rule.parameters())


# -------------------- the example


def test_example_prints_a_table_leaves_figure_and_numbers_and_continues(tmp_path, capsys, monkeypatch):
    options = ["--rows", "^one mode", "--seeds", "2", "--folder", str(tmp_path / "kept"), "--out", str(tmp_path)]
    main(*options)
    text = capsys.readouterr().out
    lines = text.split("\n\n")[2].splitlines()
    assert [title in lines[0] for title in ("sigmoid, 3 steps", "relu, 3 steps", "sigmoid, 9 steps")] == [True] * 3
    assert [line.split("  ")[0] for line in lines[3:]] == ["default", "one mode", "untrained"]
    assert "[" not in lines[3]  # the default does not differ from itself
    assert "±" in lines[4]
    assert "±" not in lines[5]
    numbers = json.loads((tmp_path / "ablation-quick.json").read_text())
    assert (tmp_path / "ablation-quick.png").stat().st_size > 5000
    assert sorted(folder.name for folder in (tmp_path / "kept").iterdir()) == [
        "default-0", "default-1", "one-mode-0", "one-mode-1",
    ]  # fmt: skip
    monkeypatch.setattr(variants, "meta_train", None)  # nothing is left to train
    main(*options, "--markdown")
    assert "| one mode | " in capsys.readouterr().out
    again = json.loads((tmp_path / "ablation-quick.json").read_text())
    for content in (numbers, again):
        for rows in content["columns"].values():
            for row in rows.values():
                assert row.pop("ms_per_step") > 0
    assert again == numbers
    with pytest.raises(SystemExit, match=r"rule.safetensors`, of another t(ask|raining); choose another folder"):
        main(*options, "--steps", "2")


def test_example_goes_on_with_digits_where_there_is_nothing_else(tmp_path, capsys, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(odeopt.tasks.datasets, "import_torchvision", no_network)
    options = ["--dataset", "mnist/4", "--data-dir", str(tmp_path / "nothing"), "--rows", "Adam"]
    main(*options, "--folder", str(tmp_path / "kept"), "--out", str(tmp_path))
    printed = capsys.readouterr().out
    assert printed.splitlines()[0].endswith("using scikit-learn's handwritten digits instead.")
    assert "\ndigits, 64-20-10" in printed
    assert "\nAdam, tuned  " in printed
    assert "Nesterov" not in printed


def test_every_variant_can_be_built_and_is_not_the_default():
    rule, variants = load_config(EXAMPLE.with_suffix(".toml")).rule, runpy.run_path(str(EXAMPLE))["VARIANTS"]
    assert rule["class"] == "port-hamiltonian"
    options = {name: value for name, value in rule.items() if name != "class"}
    configs = [PortHamiltonianUpdate(**options | own).config for own in ({}, *variants.values())]
    texts = [json.dumps(config, sort_keys=True) for config in configs]
    assert len(set(texts)) == len(texts)


def test_example_refuses_what_is_no_expression(capsys):
    with pytest.raises(SystemExit, match="2"):
        main("--rows", "(")
    assert "argument --rows: should be a regular expression; found (" in capsys.readouterr().err


# -------------------- training


def test_interrupted_training_continues_to_the_same_rules(tmp_path, monkeypatch):
    whole = train(tmp_path / "whole", "one mode", "euler", n_seeds=2)
    meta_train, calls = variants.meta_train, []

    def interrupted(*args, **options):
        calls.append(options["folder"].name)
        if len(calls) == 3:
            raise KeyboardInterrupt("in the third training")
        return meta_train(*args, **options)

    monkeypatch.setattr(variants, "meta_train", interrupted)
    with pytest.raises(KeyboardInterrupt, match="in the third"):
        train(tmp_path / "parts", "one mode", "euler", n_seeds=2)
    parts = train(tmp_path / "parts", "one mode", "euler", n_seeds=2)
    # one meta-seed after the other, and nothing twice
    assert calls == ["one-mode-0", "euler-0", "one-mode-1", "one-mode-1", "euler-1"]
    for name, rules in whole.items():
        for a, b in zip(rules, parts[name], strict=True):
            assert torch.equal(weights(a), weights(b))
    assert not torch.equal(*(weights(rule) for rule in whole["euler"]))  # meta-seeds differ
    kept = whole["one mode"][1].trained_for
    assert (whole["one mode"][1].modes, kept["training"]["seed"], kept["horizon"]) == (1, 1, 4)
    assert "cpu_seconds" in kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": CONFIG.rule | {"decay": 0.9}}, "rule"),
        ({"task": CONFIG.task | {"dim": 4}}, "task"),
        ({"training": dataclasses.replace(CONFIG.training, lr=1e-2)}, "training"),
    ],
)
def test_rules_that_were_trained_otherwise_are_refused_and_kept(tmp_path, change, message):
    train(tmp_path, "euler")
    path = tmp_path / "euler-0" / "rule.safetensors"
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"Parameter `folder` should be empty or.*safetensors`, of another {message};"):
        train(tmp_path, "euler", config=dataclasses.replace(CONFIG, **change))
    assert path.read_bytes() == before


def test_arguments_of_a_training_are_checked(tmp_path):
    with pytest.raises(ValueError, match=r"Parameter `n_seeds` should be at least 1. Found `n_seeds = 0`"):
        train(tmp_path, "euler", n_seeds=0)
    with pytest.raises(ValueError, match="Parameter `variants` should be named apart by letters and digits"):
        train_variants(CONFIG, {"a b": {}, "a-b": {}}, tmp_path)


# -------------------- comparison


@pytest.fixture(scope="module")
def rows():
    rules = {
        "reference": [SGDUpdate(0.02), SGDUpdate(0.03)],
        "slow": [SGDUpdate(0.001), SGDUpdate(0.002), SGDUpdate(0.003)],
        "diverging": [SGDUpdate(0.02), SGDUpdate(1e30)],
        "single": [SGDUpdate(0.02)],
    }
    options = {"n_steps": 12, "n_runs": 5, "progress_bar": False}
    return compare_variants(rules, RandomQuadratic(3), reference="reference", **options), rules, options


def test_differences_are_paired_over_runs_and_averaged_over_meta_seeds(rows):
    rows, rules, options = rows
    single = {f"{name} {k}": rule for name in ("reference", "slow") for k, rule in enumerate(rules[name])}
    comparison = compare(single, RandomQuadratic(3), **options)
    reference = (comparison.scores("reference 0") + comparison.scores("reference 1")) / 2
    slow = [comparison.scores(f"slow {k}") for k in range(3)]
    assert rows["slow"].difference == pytest.approx(student_interval(sum(slow) / 3 - reference))
    assert rows["slow"].by_seed == pytest.approx([(x - reference).mean().item() for x in slow])
    assert rows["slow"].score == pytest.approx(torch.stack(slow).mean().item())
    assert rows["slow"].n_runs == 15
    assert rows["slow"].difference.low > 0
    assert rows["reference"].difference == (0, 0, 0)
    assert sum(rows["reference"].by_seed) == pytest.approx(0, abs=1e-12)


def test_what_diverges_is_said_to_and_spoils_no_other_row(rows, tmp_path):
    rows, _, _ = rows
    assert rows["diverging"].text() == "diverged (5 of 10 runs)"
    assert all(math.isnan(x) for x in (rows["diverging"].score, *rows["diverging"].difference))
    as_json = json.loads(json.dumps(rows["diverging"].as_json(), allow_nan=False))
    assert (as_json["score"], as_json["difference"]) == (None, [None] * 3)
    assert as_json["by_seed"][0] == pytest.approx(rows["diverging"].by_seed[0])
    assert as_json["by_seed"][1] is None
    assert all(math.isfinite(x) for name in ("reference", "slow", "single") for x in rows[name].difference)
    path = plot_ablation({"a": rows, "b": rows}, tmp_path / "figure.png", reference="reference", label="x", title="t")
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "0.250 ± 0.020 [-0.030, +0.050]"),
        ({"by_seed": (0.01,)}, "0.250 [-0.030, +0.050]"),
        ({"difference": Interval(0.01, -math.inf, math.inf)}, "0.250 ± 0.020"),  # one run
        ({"n_diverged": 2}, "0.250 ± 0.020 [-0.030, +0.050] (2 of 20 runs diverged)"),
        ({"score": math.nan, "n_diverged": 3}, "diverged (3 of 20 runs)"),
    ],
)
def test_text_of_a_row(change, words):
    row = Row(0.25, Interval(0.01, -0.03, 0.05), (-0.01, 0.03), 0, 20, 1.0, 5)._replace(**change)
    assert row.text() == words


def test_one_run_and_rows_beyond_both_edges_can_be_drawn(tmp_path):
    one = Row(0.25, Interval(0.01, -math.inf, math.inf), (0.01,), 0, 1, 1.0, 5)
    rows = {"reference": one._replace(difference=Interval(0.0, 0.0, 0.0), by_seed=(0.0,)), "one": one}
    rows |= {f"row {k}": one._replace(difference=Interval(0.01 * k, 0.0, 0.02 * k)) for k in range(6)}
    rows |= {f"far {x}": one._replace(difference=Interval(x, x - 0.1, x + 0.1), by_seed=(x, x)) for x in (-9.0, 9.0)}
    path = plot_ablation({"a": rows}, tmp_path / "figure.png", reference="reference", label="x", title="t")
    assert path.stat().st_size > 5000


@pytest.mark.parametrize(
    ("columns", "reference", "match"),
    [
        ({}, "a", r"`columns` should be a mapping of titles to rows by name\. Found `columns = \{\}`"),
        ([1], "a", r"Found `columns = \[1\]`"),
        ({"one": {}}, "a", r"`columns\['one'\]` should be the rows of the first column, \[\], at least one"),
        ({"one": "ab", "two": "ba"}, "a", r"`columns\['two'\]` should be the rows of .*\['a', 'b'\].* = \['b', 'a'\]`"),
        ({"one": "ab", "two": "a"}, "a", r"`columns\['two'\]` should be"),
        (
            {"one": {"a": 1.0}},
            "a",
            r"`columns\['one'\]\['a'\]` should be a row of at least one .* = 1.0`",
        ),
        ({"one": "ab"}, "c", "`reference` should be one of a, b, for one. Found `reference = 'c'`"),
        ({"one": "ab", "two": "ab"}, {"one": "a"}, "`reference` should be one of a, b, for two. Found"),
        ({"one": "an"}, "n", r"`reference` should be a row that stayed finite; for one it is at \(nan,\)"),
    ],
)
def test_arguments_of_the_figure_are_checked(tmp_path, columns, reference, match):
    row = Row(0.25, Interval(0.01, -0.03, 0.05), (-0.01, 0.03), 0, 20, 1.0, 5)
    rows = {"a": row, "b": row, "n": row._replace(by_seed=(math.nan,))}
    if isinstance(columns, dict):
        columns = {title: {n: rows[n] for n in of} if isinstance(of, str) else of for title, of in columns.items()}
    with pytest.raises(ValueError, match=match):
        plot_ablation(columns, tmp_path / "figure.png", reference=reference, label="x", title="t")


def test_arguments_of_a_comparison_are_checked():
    task = RandomQuadratic(2)
    with pytest.raises(ValueError, match=r"Parameter `reference` should be one of a. Found `reference = 'b'`"):
        compare_variants({"a": [SGDUpdate()]}, task, reference="b", n_steps=1)
    with pytest.raises(ValueError, match="Parameter `rules` should be one rule or more by each name"):
        compare_variants({"a": [SGDUpdate()], "c": []}, task, reference="a", n_steps=1)
