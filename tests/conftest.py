"""Fixtures that several files of tests use."""

import importlib
import os
import sys
from pathlib import Path

import pytest

# The tensors of the tests are small: a second thread costs more than it gives, and many times more beside other work.
# Set before torch is imported, and inherited by the processes that tests start; those that ask for two wait asleep.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a file of the benchmark, and forget it after the test."""
    monkeypatch.syspath_prepend(str(FOLDER))
    for path in FOLDER.glob("*.py"):
        monkeypatch.delitem(sys.modules, path.stem, raising=False)
    yield importlib.import_module
    for path in FOLDER.glob("*.py"):
        sys.modules.pop(path.stem, None)


@pytest.fixture(autouse=True, scope="session")
def one_timing():
    """Take the time of a step, which comparisons show, once instead of fifteen times: with slow solvers it is most."""
    from odeopt.evaluation import time_step

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(time_step, "__kwdefaults__", {"n_steps": 1, "n_warmup": 0})
        yield
