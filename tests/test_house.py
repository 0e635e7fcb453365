"""The house rules: which room may import which, one door per dependency, public names and their words."""

import ast
import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
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
if importlib.util.find_spec("triton") is None:  # the one module that is imported only where there is Triton
    MODULES.remove("odeopt.stepping.triton.kernels")

# Which rooms each room is built on; what those are built on may be imported too, and nothing else.
ARROWS = {
    "_version": (),
    "checks": (),
    "files": (),
    "modes": (),
    "progress": (),
    "timing": ("progress",),
    "report": ("checks",),
    "physics": ("checks", "modes"),
    "ode": ("physics", "report"),  # an energy ledger draws itself
    "solvers": ("ode", "report", "files", "progress", "timing", "_version"),
    "systems": ("ode", "files", "progress"),
    "rules": ("ode",),
    "artifacts": ("rules", "files", "_version"),
    "hub": ("artifacts",),
    "parameters": ("rules",),
    "stepping": ("rules",),
    "optimizer": ("stepping", "artifacts"),
    "tasks": ("parameters",),  # what is a table is told in one place
    "meta": ("stepping", "tasks", "files", "progress"),
    "evaluation": ("meta", "artifacts", "report", "timing", "_version"),
    "suite": ("evaluation", "optimizer", "parameters"),
    "cli": ("evaluation", "suite", "solvers", "hub"),
}
TOP = {"__init__", "__main__"}  # may import everything

DOORS = {
    "torchdiffeq": ["ode/torchdiffeq.py"],
    "matplotlib": ["report/"],
    "torchvision": ["tasks/datasets.py"],
    "sklearn": ["tasks/datasets.py"],
    "optuna": ["meta/search_files.py"],
    "safetensors": ["artifacts.py"],
    "schedulefree": ["suite/opponents.py"],
    "prodigyopt": ["suite/opponents.py"],
    "huggingface_hub": ["hub.py"],
    "tensorboard": [],
    "tqdm": ["progress.py"],
    "triton": ["stepping/triton/kernels.py"],
}


def room_of(path):
    first = path.relative_to(PACKAGE).parts[0]
    return first.removesuffix(".py")


def reachable(room):
    """The room and all that it is built on."""
    return {room}.union(*map(reachable, ARROWS[room]))


def circle_of(graph):
    """Nodes that lie on circles, or above them; none if there is no circle."""
    left = {node: set(others) for node, others in graph.items()}
    while free := [node for node, others in left.items() if not others & left.keys()]:
        for node in free:
            del left[node]
    return sorted(left)


@functools.cache
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
    found = []
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
        found += [(name, id(node) in is_lazy) for name in names]
    return found


def rooms_imported(path, tree=None):
    """Rooms that a file imports, inside functions or not."""
    for name, _ in imports(path, tree):
        parts = name.split(".")
        if parts[0] == "odeopt":
            yield parts[1] if len(parts) > 1 else "__init__"


def files_imported(path):
    """Files of the package that a file imports, inside functions or not; a name of a room is taken for its file."""
    for name, _ in imports(path):
        parts = name.split(".")[1:] if name.startswith("odeopt.") else []
        while parts:
            stem = PACKAGE.joinpath(*parts)
            found = [file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.exists()]
            if found:
                yield found[0]
                break
            parts.pop()


def test_nothing_is_installed_by_a_name_that_is_another_projects():
    root = PACKAGE.parent
    texts = [*FILES, *root.glob("docs/**/*.md"), root / "README.md"]
    found = {path: re.findall(r"pip install.{0,9}odeopt", path.read_text(encoding="utf-8")) for path in texts}
    assert not any(found.values()), found


def test_every_room_has_its_arrows():
    assert {room_of(path) for path in FILES} - TOP == ARROWS.keys()


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_follow_the_arrows(path):
    room = room_of(path)
    if room not in TOP:
        assert set(rooms_imported(path)) <= reachable(room)


def test_imports_between_rooms_have_no_circle():
    graph = {}
    for path in FILES:
        graph.setdefault(room_of(path), set()).update(rooms_imported(path))
    assert circle_of({room: others - {room} for room, others in graph.items()}) == []


def test_imports_between_files_have_no_circle():
    assert circle_of({path: set(files_imported(path)) - {path} for path in FILES}) == []


def test_circles_are_found():
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle_of({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]


def test_no_file_imports_an_example():
    examples = PACKAGE.parent / "examples"
    names = {"examples", "studies", "benchmarks", *(path.stem for path in examples.rglob("*.py"))}
    for path in FILES:
        assert not names & {name.split(".")[0] for name, _ in imports(path)}, path


def test_studies_and_their_parts_import_only_the_library_and_each_other():
    studies = PACKAGE.parent / "examples" / "studies"
    names = {path.stem for path in (PACKAGE.parent / "examples").rglob("*.py")} - {p.stem for p in studies.glob("*.py")}
    for path in studies.glob("*.py"):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not names & {name.split(".")[0] for name, _ in imports(PACKAGE / "some.py", tree)}, path


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
    importlib.import_module("odeopt.report")
"""
    path, tree = PACKAGE / "physics" / "some.py", ast.parse(source)
    assert list(rooms_imported(path, tree)) == ["meta", "tasks", "physics", "rules", "ode", "report"]
    assert ("matplotlib.pyplot", True) in list(imports(path, tree))


@pytest.mark.parametrize("dependency", DOORS)
def test_dependency_has_one_door(dependency):
    for path in FILES:
        name = path.relative_to(PACKAGE).as_posix()
        if not any(name.startswith(door) for door in DOORS[dependency]):
            roots = {imported.split(".")[0] for imported, _ in imports(path)}
            assert dependency not in roots, name


def test_matplotlib_is_imported_inside_functions_only():
    names = [found for path in (PACKAGE / "report").glob("*.py") for found in imports(path)]
    is_lazy = [lazy for name, lazy in names if name.startswith("matplotlib")]
    assert is_lazy
    assert all(is_lazy)


def test_import_is_light():
    heavy = ["matplotlib", "torchvision", "tensorboard", "torch.utils.tensorboard", "sklearn", "pandas", "optuna"]
    heavy += ["schedulefree", "prodigyopt", "scipy", "torchdiffeq"]
    use = "odeopt.LearnedOptimizer([torch.nn.Parameter(torch.ones(2, 3))])"
    code = f"import sys, torch, odeopt; {use}; print([name for name in {heavy} if name in sys.modules])"
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


def test_torchdiffeq_may_be_used_first_under_any_mode():
    code = """
import torch, odeopt
from odeopt.ode import available_methods, integrate
from torch._subclasses import FakeTensorMode
with torch.device("meta"), FakeTensorMode():
    available_methods()
print(integrate(lambda t, x: -x, torch.ones(2), torch.tensor([0.0, 1.0]), method="dopri5").states[-1].tolist())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.startswith("[0.3678")
