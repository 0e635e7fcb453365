"""examples/reproduce.py: stages run, are remembered, and run again when something has changed."""

import json
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def program(monkeypatch, tmp_path):
    """The example's globals, its stages replaced by small programs."""
    names = runpy.run_path(str(ROOT / "examples" / "reproduce.py"))
    for name, code in (("good", "print('a table')"), ("bad", "raise SystemExit('no data')")):
        (tmp_path / f"{name}.py").write_text(code)
    stages = (("good", 1, f"{tmp_path}/good.py --out {{out}}", "--few"), ("bad", 2, f"{tmp_path}/bad.py", ""))
    names["main"].__globals__["STAGES"] = stages
    monkeypatch.chdir(tmp_path)
    return names["main"].__globals__


def test_stages_run_and_a_failure_does_not_stop_the_others(program, capsys):
    assert program["main"](["--quick"]) == 1
    logs = Path("runs/reproduce-quick")
    assert (logs / "good.log").read_text() == "a table\n"
    assert "no data" in (logs / "bad.log").read_text()
    assert set(json.loads((logs / "done.json").read_text())) == {"good"}
    assert re.search(r"bad +failed", capsys.readouterr().out)


def test_what_is_done_is_not_run_again_unless_something_changed(program):
    program["main"](["--only", "good"])
    log = Path("runs/reproduce/good.log")
    log.write_text("kept")
    assert program["main"](["--only", "good"]) == 0
    assert log.read_text() == "kept"
    program["main"](["--only", "good", "--out", "elsewhere"])
    assert log.read_text() == "a table\n"


def test_quick_figures_stay_away_from_the_real_ones(program):
    words = program["parse"](["--quick"])
    assert words.out == Path("runs/quick-figs")
    named = program["command_of"]("mnist.py --out {out}", "--few", words.out)
    assert named[-3:] == ["--out", "runs/quick-figs", "--few"]


def test_all_stages_find_the_images_of_the_folder_that_is_named(program, tmp_path):
    (tmp_path / "good.py").write_text("import os; print(os.environ['ODEOPT_DATA'])")
    for name in ("here", "there"):  # the second one is no stage that is done
        program["main"](["--only", "good", "--data-dir", name])
        assert Path("runs/reproduce/good.log").read_text() == f"{tmp_path / name}\n"


def test_every_example_with_a_figure_is_a_stage():
    stages = runpy.run_path(str(ROOT / "examples" / "reproduce.py"))["STAGES"]
    named = {ROOT / "examples" / command.split()[0] for _, _, command, _ in stages}
    folders = (ROOT / "examples", ROOT / "examples" / "studies")
    scripts = {path for folder in folders for path in folder.glob("*.py") if "__main__" in path.read_text("utf-8")}
    assert scripts - {ROOT / "examples" / "reproduce.py"} <= named
