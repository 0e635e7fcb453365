"""The house rules: which room may import which, one door per dependency, public names and their words."""

import ast
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import odeopt

PACKAGE = Path(odeopt.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(
    {
        "odeopt",
        *(m.name for m in pkgutil.walk_packages([str(PACKAGE)], "odeopt.") if m.name != "odeopt.__main__"),
    }
)

# Which rooms each room may import; what is not listed is forbidden, the room itself is allowed.
ARROWS = {
    "_version": set(),
    "checks": set(),
    "files": set(),
    "physics": {"checks"},
    "ode": {"checks", "files", "physics", "_version"},
    "systems": {"checks", "physics", "ode"},
    "rules": {"checks", "physics", "ode"},
    "tasks": {"checks"},
    "meta": {"checks", "files", "physics", "ode", "rules", "stepping", "tasks"},
    "stepping": {"checks", "physics", "ode", "rules"},
    "optimizer": {"checks", "physics", "ode", "rules", "stepping", "artifacts"},
    "parameters": {"checks", "rules"},
    "artifacts": {"checks", "physics", "ode", "rules", "_version"},
    "evaluation": {"checks", "physics", "ode", "rules", "stepping", "tasks", "meta"},
    "baselines": {"checks", "files", "physics", "ode", "rules", "tasks", "meta", "evaluation", "_version"},
    "matrix": {"checks", "files", "rules", "tasks", "evaluation", "baselines", "tables", "_version"},
    "generalisation": {"checks", "files", "rules", "tasks", "meta", "evaluation", "tables"},
    "suite": {
        "checks",
        "files",
        "rules",
        "tasks",
        "optimizer",
        "parameters",
        "evaluation",
        "matrix",
        "tables",
        "_version",
    },
    "ablation": {"checks", "rules", "tasks", "meta", "evaluation", "artifacts"},
    "arguments": set(),
    "tables": set(),
    "plots": {"evaluation"},
    "plots_ablation": {"checks", "plots"},
    "plots_estimators": {"plots"},
    "plots_generalisation": {"plots"},
    "plots_solvers": {"plots"},
    "tables_solvers": {"tables"},
    "plots_physics": {"plots"},
    "plots_suite": {"plots"},
}
# Methods that draw and print do so by rooms above their own, which they import when they are called.
LAZY = {
    "evaluation": {"plots", "tables"},
    "matrix": {"plots"},
    "ode": {"plots_solvers", "tables_solvers"},
    "suite": {"plots_suite"},
}
TOP = {"__init__", "__main__"}  # may import everything

DOORS = {
    "torchdiffeq": ["ode/"],
    "matplotlib": ["plots.py"],
    "torchvision": ["tasks/datasets.py"],
    "sklearn": ["tasks/datasets.py"],
    "optuna": ["meta/study.py"],
    "safetensors": ["artifacts.py"],
    "schedulefree": ["suite/opponents.py"],
    "prodigyopt": ["suite/opponents.py"],
    "tensorboard": [],
}


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def imports(path, tree=None):
    """Absolute names that a file imports, and whether each import stands inside a function.

    What stands under ``if TYPE_CHECKING`` is never run and left out.
    """
    tree = ast.parse(path.read_text(encoding="utf-8")) if tree is None else tree
    package = ("odeopt", *path.relative_to(PACKAGE).parts[:-1])
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    is_type_checking = {
        id(inner)
        for outer in ast.walk(tree)
        if isinstance(outer, ast.If) and "TYPE_CHECKING" in ast.unparse(outer.test)
        for statement in outer.body
        for inner in ast.walk(statement)
    }
    is_lazy = {id(inner) for outer in ast.walk(tree) if isinstance(outer, functions) for inner in ast.walk(outer)}
    for node in ast.walk(tree):
        if id(node) in is_type_checking:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            # `from odeopt import tasks` imports a room
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", None) == "import_module":
            names = [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        else:
            continue
        for name in names:
            yield name, id(node) in is_lazy


def rooms_imported(path, tree=None):
    for name, is_lazy in imports(path, tree):
        parts = name.split(".")
        if parts[0] == "odeopt":
            yield parts[1] if len(parts) > 1 else "__init__", is_lazy


def test_every_room_has_its_arrows():
    assert {room_of(path) for path in FILES} - TOP <= ARROWS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_run_one_way(path):
    room = room_of(path)
    if room not in TOP:
        allowed = ARROWS[room] | {room}
        when_called = allowed | LAZY.get(room, set())
        forbidden = {
            other for other, is_lazy in rooms_imported(path) if other not in (when_called if is_lazy else allowed)
        }
        assert not forbidden


def test_arrows_have_no_circle():
    left = dict(ARROWS)
    while left:
        free = [room for room, imported in left.items() if not imported & left.keys()]
        assert free, left
        for room in free:
            del left[room]


def test_reader_of_imports_sees_every_form():
    source = """
import odeopt.meta
from odeopt import tasks
from . import sibling
from .. import rules
from ..ode.integrate import integrate
if TYPE_CHECKING:
    from odeopt import evaluation
def plot():
    import matplotlib.pyplot
    importlib.import_module("odeopt.plots")
"""
    path, tree = PACKAGE / "physics" / "some.py", ast.parse(source)
    now = [("meta", False), ("tasks", False), ("physics", False), ("rules", False), ("ode", False)]
    assert list(rooms_imported(path, tree)) == [*now, ("plots", True)]
    assert ("matplotlib.pyplot", True) in list(imports(path, tree))


@pytest.mark.parametrize("dependency", DOORS)
def test_dependency_has_one_door(dependency):
    for path in FILES:
        name = path.relative_to(PACKAGE).as_posix()
        if not any(name.startswith(door) for door in DOORS[dependency]):
            roots = {imported.split(".")[0] for imported, _ in imports(path)}
            assert dependency not in roots, name


def test_plots_import_matplotlib_inside_functions_only():
    found = [is_lazy for name, is_lazy in imports(PACKAGE / "plots.py") if name.startswith("matplotlib")]
    assert found
    assert all(found)


def test_import_is_light():
    heavy = ["matplotlib", "torchvision", "tensorboard", "torch.utils.tensorboard", "sklearn", "pandas", "optuna"]
    heavy += ["schedulefree", "prodigyopt"]
    code = f"import sys, odeopt; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


@pytest.mark.parametrize("name", MODULES)
def test_public_names_exist_and_are_named_once(name):
    module = importlib.import_module(name)
    names = getattr(module, "__all__", [])
    assert all(hasattr(module, public) for public in names)
    assert len(set(names)) == len(names)


def test_version_is_the_one_of_setup():
    setup = (PACKAGE.parent / "setup.py").read_text(encoding="utf-8")
    assert "_version.py" in setup  # read from there, not written twice
    namespace = {}
    exec((PACKAGE / "_version.py").read_text(encoding="utf-8"), namespace)
    assert odeopt.__version__ == namespace["__version__"]
    assert odeopt.__version__ not in setup


def _public(module):
    """Public classes and functions that a module defines, and the public methods of those classes."""
    for name, value in vars(module).items():
        is_ours = getattr(value, "__module__", None) == module.__name__ and not name.startswith("_")
        if is_ours and (inspect.isclass(value) or inspect.isfunction(value)):
            yield value
            if inspect.isclass(value):
                for key, method in vars(value).items():
                    if not key.startswith("_") and (inspect.isfunction(method) or isinstance(method, property)):
                        yield getattr(value, key) if inspect.isfunction(method) else method


@pytest.mark.parametrize("name", MODULES)
def test_public_classes_and_functions_are_documented(name):
    module = importlib.import_module(name)
    assert module.__doc__
    # inspect.getdoc also finds what a method inherits; a NamedTuple writes its signature there by itself
    bare = [
        value
        for value in _public(module)
        if not (inspect.getdoc(value) or "").strip()
        or (inspect.isclass(value) and value.__doc__.startswith(f"{value.__name__}("))
    ]
    undocumented = [getattr(value, "__qualname__", repr(value)) for value in bare]
    # these say nothing that nn.Module or the base class of the layer has not said
    assert [name for name in undocumented if name.split(".")[-1] not in ("forward", "extra_repr")] == []
