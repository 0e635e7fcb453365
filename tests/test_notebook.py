"""The notebook runs with small settings; its outputs are committed, in order, without errors, fit for any machine."""

import ast
import base64
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

FILE = Path(__file__).parents[1] / "examples" / "main.ipynb"
NOTEBOOK = json.loads(FILE.read_text(encoding="utf-8"))
CODE = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
PNG = b"\x89PNG\r\n\x1a\n"
SMALL = {
    "N_META_STEPS": 2,
    "N_QUADRATICS": 3,
    "END_TIME": 0.6,
    "DATASET": "digits",
    "N_MNIST_STEPS": 3,
    "N_MNIST_RUNS": 2,
    "N_SORTING_STEPS": 12,
}
ABSOLUTE_PATH = re.compile(r"(?<![\w.:/)}\]])/(?:[\w.@+-]+/)+[\w.@+-]+|\b[A-Za-z]:\\|\\\\\w+\\|file://|~/\w")


def source(cell):
    return "".join(cell["source"])


def is_settings(cell):
    return "parameters" in cell["metadata"].get("tags", ())


def outputs(kind):
    """Data of all outputs of a MIME type."""
    return [
        "".join(output["data"][kind]) for cell in CODE for output in cell["outputs"] if kind in output.get("data", ())
    ]


def without_pictures():
    """The file as text, but for what is base64."""
    text = FILE.read_text(encoding="utf-8")
    for picture in outputs("image/png"):
        text = text.replace(json.dumps(picture)[1:-1], "")
    return text


@pytest.fixture
def shown(monkeypatch):
    """What the cells display, in place of IPython, which the tests can do without."""
    shown = {"figures": [], "tables": []}
    display = ModuleType("IPython.display")
    display.Image = lambda filename, width: shown["figures"].append(Path(filename).read_bytes())
    display.Markdown = shown["tables"].append
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return shown


# -------------------------------------------------------------------------------------------- code


def test_settings_are_in_one_cell():
    [cell] = [cell for cell in CODE if is_settings(cell)]
    names = [target.id for statement in ast.parse(source(cell)).body for target in statement.targets]
    assert names == [*SMALL]


def test_cells_run_in_order_with_small_settings(shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "notebook"}
    for i, cell in enumerate(CODE):
        code = "\n".join(f"{name} = {value!r}" for name, value in SMALL.items()) if is_settings(cell) else source(cell)
        exec(compile(code, f"{FILE.name}, code cell {i}", "exec"), names)
    assert len(shown["figures"]) == len(outputs("image/png"))
    assert all(figure.startswith(PNG) for figure in shown["figures"])
    assert len(shown["tables"]) == len(outputs("text/markdown"))
    flow = names["flow"]
    # the solver's tolerance is 1e-7 of the loss, and the sum falls by more in each interval
    assert (flow.energy.diff(dim=0) < 0).all()
    assert (flow.losses.diff(dim=0) > 0).any()
    assert "0 of 300 intervals in which loss plus stored energy rises" in capsys.readouterr().out
    assert len(names["losses"]["learned (default)"]) == SMALL["N_SORTING_STEPS"]


# ------------------------------------------------------------------------------ what is committed


def test_cells_were_executed_in_order_without_errors_and_warnings():
    assert [cell["execution_count"] for cell in CODE] == [*range(1, len(CODE) + 1)]
    all_outputs = [output for cell in CODE for output in cell["outputs"]]
    assert {output["output_type"] for output in all_outputs} <= {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in all_outputs if output["output_type"] == "stream"} == {"stdout"}


def test_every_figure_and_table_is_committed():
    """A cell whose last expression shows something has it beneath."""
    for kind, last in (("image/png", "show("), ("text/markdown", "Markdown(")):
        for cell in CODE:
            shows = source(cell).splitlines()[-1].startswith(last)
            assert shows == any(kind in output.get("data", ()) for output in cell["outputs"]), source(cell)
    pictures = [base64.b64decode(picture) for picture in outputs("image/png")]
    assert len(pictures) == 5
    assert all(picture.startswith(PNG) for picture in pictures)
    assert all(re.search(r"^\| :-- \|( --: \|)+$", table, flags=re.MULTILINE) for table in outputs("text/markdown"))


def test_committed_outputs_are_those_of_the_full_settings():
    [settings] = [source(cell) for cell in CODE if is_settings(cell)]
    full = {}
    exec(settings, full)
    tables = "\n".join(outputs("text/markdown"))
    assert f"{full['N_QUADRATICS']} runs of 100 steps" in tables
    assert f"{full['N_MNIST_RUNS']} runs of {full['N_MNIST_STEPS']} steps" in tables
    text = "".join("".join(output["text"]) for cell in CODE for output in cell["outputs"] if "text" in output)
    assert "0 of 300 intervals in which loss plus stored energy rises" in text


def test_nothing_names_the_machine_it_was_run_on():
    assert set(NOTEBOOK["metadata"]) <= {"kernelspec", "language_info"}
    assert NOTEBOOK["metadata"]["kernelspec"]["name"] == "python3"
    assert NOTEBOOK["metadata"]["kernelspec"]["display_name"] == "Python 3"
    assert all(set(cell["metadata"]) <= {"tags"} for cell in NOTEBOOK["cells"])
    assert ABSOLUTE_PATH.findall(without_pictures()) == []


@pytest.mark.parametrize(
    ("text", "names_a_path"),
    [
        ('"/home/me/data/MNIST"', True),
        ("in /usr/lib/python3/tqdm.py:21: Warning", True),
        (r"C:\\Users\\me", True),
        ("file:///data", True),
        ("~/data", True),
        ("runs/notebook, ms/step, [theory](../docs/theory.md), https://example.org/a/b, image/png, 2 / 3", False),
    ],
)
def test_paths_of_a_machine_are_told_from_others(text, names_a_path):
    assert bool(ABSOLUTE_PATH.search(text)) == names_a_path


def test_file_is_small():
    assert FILE.stat().st_size < 1_000_000


def test_links_lead_to_files():
    targets = [
        target
        for cell in NOTEBOOK["cells"]
        if cell["cell_type"] == "markdown"
        for target in re.findall(r"\]\(([^)\s]+)\)", source(cell))
    ]
    assert targets
    assert [target for target in targets if not (FILE.parent / target).is_file()] == []
