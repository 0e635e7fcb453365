"""Ctrl-C ends every long command with one line on how to go on, and loses nothing that was kept."""

import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from rank_toys import PRELOADED

from odeopt.__main__ import main
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


class Forked:
    """A command as a process that is forked from one which has imported torch: it begins at once."""

    def __init__(self, command, folder, output):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOADED))
        self._process = context.Process(target=_as_interpreter, args=(command, folder, output.name))
        self._process.start()
        self.kill = self._process.kill

    def poll(self):
        return self._process.exitcode

    def wait(self, timeout=None):
        self._process.join(timeout)
        return self._process.exitcode

    def send_signal(self, number):
        os.kill(self._process.pid, number)


def _as_interpreter(command, folder, output):
    """Run ``-m module ...`` or ``script ...`` as the interpreter does, to the hook for what nothing caught."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    with open(output, "a") as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
    is_module = command[0] == "-m"
    sys.argv = command[is_module:]
    try:
        if is_module:
            runpy.run_module(command[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(command[0], run_name="__main__")
    except (Exception, KeyboardInterrupt):
        sys.excepthook(*sys.exc_info())
        sys.exit(130 if sys.exc_info()[0] is KeyboardInterrupt else 1)


def real(command, folder, output):
    return subprocess.Popen([sys.executable, *command], cwd=folder, stdout=output, stderr=subprocess.STDOUT)


def interrupted(command, folder, begun, begin=Forked):
    """Send SIGINT to a process once ``begun()`` is true; its exit status and the end of what it wrote."""
    with (folder / "output").open("w") as output:
        process = begin(command, folder, output)
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


def last_words(output):
    """The last line, less the error that a library made of the interrupt (torch.asarray does, where it comes)."""
    return re.sub(r" \(then \w+: .*\)$", "", output.splitlines()[-1])


def test_training_is_kept_and_continued(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.toml").write_text(CONFIG)
    command = ["-m", "odeopt", "train", "--config", "tiny.toml", "--stop-after"]
    checkpoint = tmp_path / "runs" / "tiny" / "checkpoint.pt"
    status, output = interrupted([*command, "1000"], tmp_path, checkpoint.exists)
    assert status == 130, output
    assert last_words(output) == f"python -m odeopt train: {arguments.FROM_VALIDATION}"
    assert "Traceback" not in output
    monkeypatch.chdir(tmp_path)
    assert main([*command[2:], "0"]) == 0
    assert int(re.search(r"(\d+) of 100000 meta-steps", capsys.readouterr().out)[1]) >= 1


@pytest.mark.parametrize(
    ("start", "kept", "message"),
    [
        ("", None, arguments.BEGINS_ANEW),
        ("", "checkpoint.pt", arguments.FROM_VALIDATION),
        ("[start]\n", "checkpoint.pt", arguments.BEGINS_ANEW),  # of the training without a start
        ("[start]\n", "start/checkpoint.pt", arguments.FROM_VALIDATION),
    ],
)
def test_training_without_a_checkpoint_begins_anew(tmp_path, monkeypatch, capsys, start, kept, message):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("odeopt.cli.train.meta_train", interrupted)
    (tmp_path / "tiny.toml").write_text(CONFIG + start)
    monkeypatch.chdir(tmp_path)
    if kept is not None:
        path = tmp_path / "runs" / "tiny" / kept
        path.parent.mkdir(parents=True)
        path.touch()
    assert main(["train", "--config", "tiny.toml"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m odeopt train: {message}"


def test_suite_is_kept(tmp_path):  # and continued: tests/test_suite.py
    command = ["-m", "odeopt", "suite", "--quick", "--problems", "perceptron"]
    path = tmp_path / "runs" / "suite" / "suite.json"
    status, output = interrupted(command, tmp_path, path.exists)
    assert status == 130, output
    assert last_words(output) == f"python -m odeopt suite: {arguments.RESUMES}"
    assert "Traceback" not in output
    assert json.loads(path.read_text())["runs"]


@pytest.mark.parametrize(
    ("script", "message", "begin"),
    [
        ("saddle.py", arguments.BEGINS_ANEW, real),
        ("studies/kinetic.py", arguments.RESUMES, Forked),
        ("reproduce.py", arguments.RESUMES, Forked),
    ],
)
def test_scripts_say_how_to_go_on(tmp_path, script, message, begin):
    out = tmp_path / "out"  # made once the arguments are read
    status, output = interrupted([str(EXAMPLES / script), "--out", str(out)], tmp_path, out.exists, begin)
    assert status in (130, -signal.SIGINT), output
    assert last_words(output) == f"{Path(script).name}: {message}"
    assert "Traceback" not in output


REPLACED = """
try:
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(10)
except KeyboardInterrupt:  # as torch.asarray does
    raise ValueError("could not determine the shape") from None
"""


THEN = "(then ValueError: could not determine the shape)"


def test_an_interrupt_that_a_library_made_an_error_of_ends_a_script_alike(tmp_path):
    (tmp_path / "script.py").write_text(
        f"import os, signal, time\nfrom odeopt.cli import arguments\narguments.parser('', '').parse_args()\n{REPLACED}"
    )
    with (tmp_path / "output").open("w") as output:
        assert Forked(["script.py"], tmp_path, output).wait(120) == 130
    assert (tmp_path / "output").read_text() == f"\nscript.py: {arguments.BEGINS_ANEW} {THEN}\n"


def test_an_interrupt_that_a_library_made_an_error_of_ends_a_command_alike(monkeypatch, capsys):
    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(
        "odeopt.cli.rules.run_rules", lambda args: exec(REPLACED, {"os": os, "signal": signal, "time": time})
    )
    assert main(["rules"]) == 130
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m odeopt rules: {arguments.BEGINS_ANEW} {THEN}"
    assert signal.getsignal(signal.SIGINT) is before


def test_other_errors_keep_their_traceback(tmp_path):
    (tmp_path / "script.py").write_text(
        "from odeopt.cli import arguments\narguments.parser('', '').parse_args()\nraise ZeroDivisionError('of it')"
    )
    with (tmp_path / "output").open("w") as output:
        assert Forked(["script.py"], tmp_path, output).wait(120) == 1
    lines = (tmp_path / "output").read_text().strip().splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == "ZeroDivisionError: of it"


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
