"""Ctrl-C ends every long command with one line on how to go on, and loses nothing that was kept."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from odeopt.cli import arguments
from odeopt.progress import tqdm

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CONFIG = """
[rule]
class = "lstm"
[task]
class = "RandomQuadratic"
[training]
n_meta_steps = 100000
n_tasks = 2
horizon = 3
validate_every = 1
n_validation_tasks = 2
"""


@pytest.fixture(autouse=True)
def heard():
    """Have processes hear SIGINT: what a shell begins in the background ignores it, and so do its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(command, folder, begun):
    """Send SIGINT to a process once ``begun()`` is true; its exit status and the end of what it wrote."""
    with (folder / "output").open("w") as output:
        process = subprocess.Popen([sys.executable, *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 120
            while not begun() and process.poll() is None and time.monotonic() < deadline:
                time.sleep(0.05)
            assert process.poll() is None, (folder / "output").read_text()
            process.send_signal(signal.SIGINT)
            status = process.wait(60)
        finally:
            process.kill()
            process.wait()
    return status, (folder / "output").read_text()


def test_training_is_kept_and_continued(tmp_path):
    (tmp_path / "tiny.toml").write_text(CONFIG)
    command = ["-m", "odeopt", "train", "--config", "tiny.toml", "--stop-after"]
    checkpoint = tmp_path / "runs" / "tiny" / "checkpoint.pt"
    status, output = interrupted([*command, "1000"], tmp_path, checkpoint.exists)
    assert status == 130, output
    assert output.splitlines()[-1] == f"python -m odeopt train: {arguments.RESUMES}"
    assert "Traceback" not in output
    done = subprocess.run([sys.executable, *command, "0"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(re.search(r"(\d+) of 100000 meta-steps", done.stdout)[1]) >= 1


def test_suite_is_kept(tmp_path):  # and continued: tests/test_suite.py
    command = ["-m", "odeopt", "suite", "--quick", "--problems", "perceptron"]
    path = tmp_path / "runs" / "suite" / "suite.json"
    status, output = interrupted(command, tmp_path, path.exists)
    assert status == 130, output
    assert output.splitlines()[-1] == f"python -m odeopt suite: {arguments.RESUMES}"
    assert "Traceback" not in output
    assert json.loads(path.read_text())["runs"]


@pytest.mark.parametrize(
    ("script", "message"),
    [("saddle.py", arguments.BEGINS_ANEW), ("kinetic.py", arguments.RESUMES), ("reproduce.py", arguments.RESUMES)],
)
def test_scripts_say_how_to_go_on(tmp_path, script, message):
    out = tmp_path / "out"  # made once the arguments are read
    status, output = interrupted([str(EXAMPLES / script), "--out", str(out)], tmp_path, out.exists)
    assert status in (130, -signal.SIGINT), output
    assert output.splitlines()[-1] == f"{script}: {message}"
    assert "Traceback" not in output


def test_other_errors_keep_their_traceback(tmp_path):
    (tmp_path / "script.py").write_text(
        "from odeopt.cli import arguments\narguments.parser('', '').parse_args()\nraise ZeroDivisionError('of it')"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert done.stderr.strip().endswith("ZeroDivisionError: of it")


def test_reading_a_list_of_arguments_leaves_the_hooks_alone():
    before = sys.excepthook
    arguments.parser("", "").parse_args([])
    assert sys.excepthook is before


def test_bar_that_was_interrupted_as_it_began_leaves_no_error_behind():
    bar = tqdm.__new__(tqdm)
    bar.disable = False  # the first attribute that tqdm sets
    assert bar.__del__() is None
    with tqdm(range(2), disable=True) as bar:
        assert list(bar) == [0, 1]
