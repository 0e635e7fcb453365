"""Progress bars in notebooks."""

import subprocess
import sys

import pytest

KERNEL = """
import sys, types
sys.modules["ipykernel.zmqshell"] = types.ModuleType("zmqshell")
sys.modules["IPython"] = types.ModuleType("IPython")
sys.modules["IPython"].get_ipython = lambda: None
sys.modules["ipywidgets"] = sys.modules["IPython.html.widgets"] = sys.modules["IPython.html"] = None
from {door} import tqdm
with tqdm(total=2, desc="shown") as bar:
    bar.update()
"""


@pytest.mark.parametrize(("door", "is_silent"), [("odeopt.progress", True), ("tqdm.auto", False)])
def test_notebook_without_widgets_has_a_bar_as_text_and_no_warning(door, is_silent):
    code = KERNEL.format(door=door)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert "shown" in done.stderr
    assert ("Warning" not in done.stderr) is is_silent  # tqdm's own does warn: the test can fail
