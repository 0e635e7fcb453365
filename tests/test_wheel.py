"""The built wheel, installed elsewhere, is the whole library: rules, configurations and tables."""

import json
import os
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import odeopt
from odeopt.meta.files import available_configs

ROOT = Path(odeopt.__file__).parents[1]
PROBE = """
import json, pathlib, warnings
warnings.simplefilter("error")
import odeopt
from odeopt.meta.files import available_configs, load_config
print(json.dumps({
    "file": odeopt.__file__,
    "version": odeopt.__version__,
    "native": odeopt.native_status(),
    "rules": {name: type(odeopt.load_pretrained(name)).__name__ for name in odeopt.available_pretrained()},
    "configs": {name: load_config(name).name for name in available_configs()},
    "files": sorted(str(p.relative_to(pathlib.Path(odeopt.__file__).parent)) for p in
                    pathlib.Path(odeopt.__file__).parent.rglob("*") if p.is_file() and p.suffix != ".pyc"),
}))
"""


COMPILED = ("*.so", "*.dll")  # by the build


def call(*command, cwd, **environment):
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def is_compiled(file):
    return any(fnmatch(file, pattern) for pattern in COMPILED)


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Folder that the wheel was unpacked to; nothing is left beside the sources."""
    tmp_path = tmp_path_factory.mktemp("wheel")
    source, target = tmp_path / "source", tmp_path / "site"
    source.mkdir()
    for name in ("setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "odeopt", source / "odeopt", ignore=shutil.ignore_patterns("__pycache__", *COMPILED))
    install = (sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-compile")
    printed = call(*install, "--target", target, source, cwd=tmp_path)  # which builds the wheel first
    assert "Created wheel for odeopt" in printed
    return target


@pytest.fixture(scope="module")
def seen(installed, tmp_path_factory):
    """What a program somewhere else sees of it."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    printed = call(sys.executable, "-c", PROBE, cwd=elsewhere, PYTHONPATH=str(installed))
    return json.loads(printed.splitlines()[-1])


def test_installed_library_is_the_one_that_is_imported(installed, seen):
    assert Path(seen["file"]).parent == installed / "odeopt"
    assert seen["version"] == odeopt.__version__


def test_installed_library_loads_every_rule_of_the_tree(seen):
    expected = {name: type(odeopt.load_pretrained(name)).__name__ for name in odeopt.available_pretrained()}
    assert seen["rules"] == expected


def test_installed_library_has_every_configuration_of_the_tree(seen):
    assert seen["configs"] == {name: name for name in available_configs()}


def test_wheel_holds_every_file_of_the_package_and_nothing_else(seen):
    files = {
        path.relative_to(ROOT / "odeopt").as_posix()
        for path in (ROOT / "odeopt").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and not path.name.startswith(".")
    }
    assert {file for file in seen["files"] if not is_compiled(file)} == {f for f in files if not is_compiled(f)}


def test_wheel_holds_the_compiled_step_where_there_is_a_compiler(seen):
    assert sum(map(is_compiled, seen["files"])) == 1, "no C compiler?"
    assert seen["native"].startswith("native")


def test_wheel_does_not_install_the_tests(installed):
    # the folder `bin`, or `Scripts`, holds the command of that name
    commands = [
        path for path in installed.glob("*/odeopt*") if path.is_file() and path.parent.name in ("bin", "Scripts")
    ]
    others = {path for path in installed.iterdir() if not path.name.endswith(".dist-info")} - {commands[0].parent}
    assert [path.name for path in others] == ["odeopt"]
