"""The front page and the pages behind it: their code runs, their links lead somewhere, their tables are current."""

import functools
import importlib
import json
import operator
import pkgutil
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import odeopt
from odeopt.rules import SGDUpdate
from odeopt.suite import evaluate_suite, learned, make_problem
from odeopt.suite.opponents import OPPONENTS
from odeopt.tasks.datasets import import_torchvision

ROOT = Path(__file__).resolve().parents[1]
MATRICES = ("matrix", "port-hamiltonian-spectral/matrix", "port-hamiltonian-spectral-untrained/matrix")
FOLDERS = ("docs", "docs/api", "docs/clients")
PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in [ROOT / "README.md", *(path for folder in FOLDERS for path in sorted((ROOT / folder).glob("*.md")))]
}
# what a page says, and what is as good for a test
QUICKER = {
    "docs/getting-started.md": [("n_steps=100, n_runs=5", "n_steps=5, n_runs=2")],
    "docs/own-task.md": [
        ("n_meta_steps=200, n_tasks=8, horizon=100", "n_meta_steps=2, n_tasks=2, horizon=5"),
        ("task, n_steps=100)", "task, n_steps=5, n_tasks=2)"),
        ("n_steps=100, n_runs=10", "n_steps=5, n_runs=2"),
    ],
    "docs/write-a-rule.md": [("n_meta_steps=300,\n    n_tasks=64", "n_meta_steps=40,\n    n_tasks=16")],
    "docs/physical-systems.md": [
        ("make_data(mechanism)", "make_data(mechanism, n=4)"),
        ("n_passes=1000", "n_passes=1"),
        ("n_passes=200", "n_passes=20"),
    ],
}


def blocks(page):
    return re.findall(r"```python\n(.*?)```", PAGES[page], flags=re.DOTALL)


def prose(page):
    """A page without its blocks of code and its formulas."""
    return re.sub(r"```.*?```|\$\$.*?\$\$|`[^`]*`", "", PAGES[page], flags=re.DOTALL)


def anchors(page):
    titles = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", PAGES[page], flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("tables")


# ----------------------------------------------------------------------------------------- code


# what the trainers of others warn of is theirs
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore:.*workers:UserWarning")
@pytest.mark.parametrize("page", [page for page in PAGES if page != "README.md" and blocks(page)])
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if Path(page).parent.name == "clients":
        import_torchvision()  # which torchmetrics imports, also where its operators do not fit
        pytest.importorskip(Path(page).stem, reason="the extra `clients` is not installed")
    code = "\n".join(blocks(page))
    for said, quick in QUICKER.get(page, []):
        assert said in code
        code = code.replace(said, quick)
    exec(code, {"__name__": page})


@pytest.mark.parametrize("page", [page for page in PAGES if page.startswith("docs/clients/")])
def test_page_of_a_client_tells_the_version_that_is_tested(page):
    [(name, version)] = re.findall(r"Tested\s+with\s+(\w+)\s+(\d+\.\d+)", PAGES[page])
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert re.search(rf"^{name.lower()}=={re.escape(version)}\.", constraints, flags=re.MULTILINE)


def test_own_measurements_are_learned_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    used, *own = blocks("docs/physical-systems.md")
    names = {}
    exec("\n".join([used.splitlines()[0], *own]).replace("n_passes=200", "n_passes=20"), names)
    assert names["result"].losses[-1] < 0.5 * names["result"].losses[0]
    assert f"`{names['model'].observation}`" in PAGES["docs/physical-systems.md"]
    assert names["data"].x.shape[-1] == names["model"].n_observed


def test_rule_of_ones_own_learns(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(blocks("docs/write-a-rule.md")[:2])
    names = {}
    exec(code.replace(*QUICKER["docs/write-a-rule.md"][0]), names)
    (_, first), *_, (_, last) = names["result"].validation
    assert last < first
    assert Path("sign-momentum.safetensors").exists()


def test_optimizer_is_used_as_the_readme_says():
    model = torch.nn.Linear(3, 1)
    torch.nn.init.zeros_(model.weight)
    x = torch.eye(3)
    names = {"model": model, "loss_fn": torch.nn.functional.mse_loss, "batches": [(x, x.sum(1, keepdim=True))] * 50}
    before = torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).item()
    [use] = blocks("README.md")
    exec(use, names)
    assert torch.nn.functional.mse_loss(model(x), x.sum(1, keepdim=True)).item() < 0.5 * before


# ---------------------------------------------------------------------------------------- links


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files_and_headings(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            found = (ROOT / page).parent / path if path else ROOT / page
            assert found.is_file(), target
            assert not anchor or anchor in anchors(found.resolve().relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_short_enough_to_be_read_as_they_are(tables, page):
    lines = tables.MARKED.sub("", PAGES[page]).splitlines()
    assert not [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))]


def test_readme_is_a_front_page():
    """A newcomer reads it once; what is more goes behind it."""
    assert len(PAGES["README.md"].splitlines()) < 150
    assert len(PAGES["README.md"].encode()) < 12_000
    assert len(re.findall(r"^!\[", PAGES["README.md"], flags=re.MULTILINE)) == 1


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_a_page_name_files_that_there_are(page):
    for path in re.findall(r"(?:python|nproc-per-node \d) ((?:examples|docs)/[\w/]+\.py)", PAGES[page]):
        assert (ROOT / path).is_file(), path


def test_every_package_has_its_page_of_the_api():
    packages = {module.name for module in pkgutil.iter_modules(odeopt.__path__) if module.ispkg}
    public = {name for name in packages if getattr(importlib.import_module(f"odeopt.{name}"), "__all__", ())}
    assert "rules" in public
    assert public <= {name for page in PAGES for name in re.findall(r"automodule:: odeopt\.(\w+)\n", PAGES[page])}


# --------------------------------------------------------------------------------------- tables


def test_pages_have_every_table_once(tables):
    used = [name for page in PAGES for name in re.findall(r"<!-- table: (\w+) -->\n", PAGES[page])]
    assert sorted(used) == sorted(tables.TABLES)


@pytest.mark.parametrize(
    ("name", "file", "place", "value", "shown"),
    [
        ("coordinate_check", "coordinate_check", "steps", [1, 10, 7891], "| 7891 |"),
        ("depth", "depth", "rates", [0.25, 0.5, 1, 2, 4, 7891], "| 7891 |"),
        ("guard", "guard", "cases/random weights, network/status", [["rule", 7891, 1, 1]], "7891 |"),
        ("guard_cost", "guard_cost", "machine", "An abacus", "An abacus:"),
        ("ablation", "ablation", "columns/relu, 100 steps/one mode/score", 7.8912, "7.891 ±"),
        ("matrix", "matrix", "cells/mnist linear, 100 steps/rule/scores", [7.0] * 5, "mnist linear, 100 steps | 2"),
        ("matrix", "port-hamiltonian-spectral/matrix", "cells/mnist linear, 100 steps/rule/scores", [7.0] * 5,
         "[0.938, 0.967] | 2"),
        ("matrix", "port-hamiltonian-spectral-untrained/matrix", "cells/mnist linear, 100 steps/rule/scores", [7.0] * 5,
         "[0.981, 1.044] | 2"),
        ("general", "general", "784-20-10, relu, 100 steps/Adam/score", 7.8912, "| 7.891 ["),
        ("own_tasks", "quadratic", "lstm-quadratic/difference", [0.0, -7.8912, 7.8912], "[-7.891, +7.891]"),
        ("saddles", "saddle", "monkey saddle/Adam", "7891", "| 7891 |"),
        ("solver_step", "solver_step", "machine", "An abacus", "An abacus:"),
        ("meta", "meta", "machine", "An abacus", "An abacus:"),
        ("meta_seeds", "meta_seeds", "mnist/784-20-10, relu, 100 steps/lstm-mnist/score", 7.8912, "7.891 ±"),
        ("optimizers_view", "optimizers_view", "rules/rk4/heun3/difference", [1, -7.8912, 8], "[-7.891, +8.000]"),
        ("physics", "physics", "systems/acrobot/naive/prediction/text", "7.8912", "| 7.8912 |"),
        ("physics_parts", "physics", "systems/acrobot/port-Hamiltonian/parts/g", 0.7891, ", 78.9 |"),
        ("physics_rises", "physics", "systems/pendulum/port-Hamiltonian/rises/rk4, 10 x/n", 789, "789"),
        ("generalisation", "generalisation", "columns/784-20-10, relu, 1,000 steps/SGD (lr 0.63)/held_out_loss",
         [[-7.0] * 41] * 20, "+7."),
    ],
)  # fmt: skip
def test_tables_show_the_numbers_of_the_files(tables, monkeypatch, tmp_path, name, file, place, value, shown):
    together = {"matrix": MATRICES, "own_tasks": ("quadratic", "mnist")}
    for each in together.get(name, (file,)):
        (tmp_path / each).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "figs" / f"{each}.json", tmp_path / f"{each}.json")
    content = json.loads((tmp_path / f"{file}.json").read_text())
    *folders, last = place.split("/")
    functools.reduce(operator.getitem, folders, content)[last] = value
    (tmp_path / f"{file}.json").write_text(json.dumps(content))
    before = tables.TABLES[name]()
    monkeypatch.setattr(tables, "FIGS", tmp_path)
    after = tables.TABLES[name]()
    assert shown in after
    assert shown not in before
    for block in after.split("\n\n"):
        assert len({line.count(" | ") for line in block.splitlines()}) == 1


@pytest.fixture
def tiny_suite(tables, monkeypatch, tmp_path):
    """Runs of three steps of a rule and of two opponents, as the suite writes them."""
    monkeypatch.setattr(tables, "FIGS", tmp_path)
    contenders = {name: replace(OPPONENTS[name], rates=OPPONENTS[name].rates[:2]) for name in ("adamw", "nesterov")}
    contenders["sgd"] = learned(SGDUpdate(lr=0.1), "sgd")
    problems = {name: make_problem(name, dataset="digits", n_steps=3) for name in ("perceptron", "coordinates")}
    settings = {"n_runs": 2, "n_extensions": 0, "progress_bar": False}
    return evaluate_suite(problems, contenders, path=tmp_path / "suite.json", **settings)


def test_table_of_the_readme_is_that_of_the_suite(tables, tiny_suite):
    found = tables.read_suite()
    for problem in tiny_suite.problems:
        for contender in tiny_suite.contenders:
            assert found.ratio(problem, contender) == pytest.approx(tiny_suite.ratio(problem, contender), rel=1e-4)
    readme = tables.filled(PAGES["README.md"])
    assert "| network | sgd | Nesterov, cosine |" in readme
    for problem in tiny_suite.problems:
        train, held_out = (tiny_suite.ratio(problem, "sgd", of).mean for of in ("train", "held_out"))
        row = next(line for line in readme.splitlines() if line.startswith(f"| {problem} | "))
        assert row.replace("**", "").startswith(f"| {problem} | {train:.2f} / {held_out:.2f} | ")
        *cells, time = row.strip("| ").split(" | ")[1:]
        seconds = [tiny_suite.outcomes[problem][name].seconds.median() for name in ("sgd", "adamw")]
        assert float(time) == pytest.approx((seconds[0] / seconds[1]).item(), abs=0.06, rel=0.01)
        for of in zip(*(cell.split(" / ") for cell in cells), strict=True):
            numbers = [float(x.strip("*")) for x in of]
            assert [x.startswith("**") for x in of] == [x == min(numbers) for x in numbers]
    assert tiny_suite.summary("sgd").split(";")[0] in tables.suite()
    assert tables.MARKED.sub("", readme) == tables.MARKED.sub("", PAGES["README.md"])
    assert tables.filled(readme) == readme


def test_runs_of_an_older_suite_are_refused(tables, tiny_suite, tmp_path):
    path = tmp_path / "suite.json"
    runs = json.loads(path.read_text())["runs"]
    key = next(iter(runs))
    path.write_text(json.dumps({"runs": runs | {key[:-4] + "beef": runs[key]}}))
    with pytest.raises(ValueError, match="one is older"):
        tables.suite()


def test_unfinished_suite_leaves_the_readme_alone(tables, tiny_suite, tmp_path):
    path = tmp_path / "suite.json"
    runs = json.loads(path.read_text())["runs"]
    path.write_text(
        json.dumps({"runs": {key: run for key, run in runs.items() if "seed 1 |" not in key or "sgd" in key}})
    )
    assert tables.filled(PAGES["README.md"]) == PAGES["README.md"]


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- table: " in PAGES[page]])
def test_tables_of_a_page_are_up_to_date(tables, page):
    assert tables.filled(PAGES[page]) == PAGES[page], "python docs/tables.py writes them anew"


def test_the_front_page_counts_what_is_within_the_noise(tables):
    suite, rule = tables.read_suite(), "port-hamiltonian-spectral"
    ratios = [suite.ratio(p, rule, of, reference=reference) for p in suite.problems
              for reference, of in (("adamw", "train"), ("adamw", "held_out"), ("muon", "held_out"))]  # fmt: skip
    assert len(ratios) == 27
    assert all(ratio.mean < 1 for ratio in ratios)
    assert sum(ratio.high >= 1 for ratio in ratios) == 3
    assert "three of these 27 differences are within the noise" in PAGES["README.md"]
