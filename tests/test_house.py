"""The plan of the house holds: imports run down it, no circle, one room that knows Megatron.

Read off the source: every import statement of the package, wherever it stands.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "megatron_direct"
# From the top; a room may import its own and what stands below it. CONTRIBUTING.md says what each
# knows.
ROOMS = ("cli", "commands", "reports", "comparison", "steps", "selection", "curvature", "gradients",
         "evaluation", "plugins", "preprocessing", "mcore", "data", "runtime")
GROUND = ("config", "architecture", "hybrid_pattern", "settings", "errors")
# Outside of mcore, only a plug-in knows the program that it plugs into.
FOREIGN = {"megatron.core": "mcore", "megatron.training": "plugins", "megatron.bridge": "plugins"}


def _modules() -> dict[str, Path]:
    return {".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
            for path in sorted(PACKAGE.rglob("*.py"))}


def _imports(path: Path, *, at_import_time: bool = False) -> Iterator[str]:
    """Full names that a file imports; ``from a import b`` gives a.b."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if at_import_time else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _floor(name: str) -> int:
    """The number of a module's room from the top; the ground floor is the last."""
    parts = name.split(".")
    room = parts[1] if len(parts) > 1 else ""
    return ROOMS.index(room) if room in ROOMS else len(ROOMS)


def test_every_module_has_a_room():
    inside = {name.split(".")[1] for name in _modules() if name.count(".") >= 1}
    assert inside == {*ROOMS, *GROUND, "__init__", "__main__"}


def test_imports_run_down():
    up = [f"{module} imports {name}" for module, path in _modules().items()
          for name in _imports(path)
          if name.startswith("megatron_direct.") and _floor(name) < _floor(module)
          and module != "megatron_direct.__main__"]
    assert not up


def test_one_room_imports_megatron():
    wrong = []
    for module, path in _modules().items():
        for name in _imports(path):
            if name.split(".")[0] == "megatron":
                owner = FOREIGN[".".join(name.split(".")[:2])]
                if not module.startswith(f"megatron_direct.{owner}."):
                    wrong.append(f"{module} imports {name}")
    assert not wrong


def test_there_is_no_circle():
    """Among modules, by what they import as they are imported."""
    modules = _modules()
    edges = {}
    for module, path in modules.items():
        named = set(_imports(path, at_import_time=True))
        edges[module] = {name if name in modules else name.rpartition(".")[0]
                         for name in named} & modules.keys()
    done, path_so_far = set(), []

    def visit(module):
        if module in path_so_far:
            circle = [*path_so_far[path_so_far.index(module):], module]
            pytest.fail(" imports ".join(circle))
        if module not in done:
            path_so_far.append(module)
            for other in sorted(edges[module]):
                visit(other)
            path_so_far.pop()
            done.add(module)

    for module in modules:
        visit(module)


def _public_functions() -> dict[str, set[str]]:
    """name -> rooms that define a public function or class of that name at a module's top level."""
    rooms: dict[str, set[str]] = {}
    for module, path in _modules().items():
        parts = module.split(".")
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                rooms.setdefault(node.name, set()).add(parts[1])
    return rooms


# Names that mean the same wherever they stand: an entry point, a parser.
SHARED_NAMES = {"main", "make_parser"}


def test_no_two_rooms_use_one_name_for_two_things():
    twice = {name: sorted(rooms) for name, rooms in _public_functions().items()
             if len(rooms) > 1 and name not in SHARED_NAMES}
    assert not twice


# Autograd functions, and the two public functions, whose parameters are an interface.
MANY_PARAMETERS = {"forward", "solve_selection", "lanczos"}


def _is_gpu_kernel(node: ast.FunctionDef) -> bool:
    """Whose parameters are addresses, strides and sizes, since it is given no tensors."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def test_no_function_takes_more_than_six_parameters():
    long = []
    for module, path in _modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if (isinstance(node, ast.FunctionDef) and node.name not in MANY_PARAMETERS
                    and not _is_gpu_kernel(node)):
                arguments = [a for a in (*node.args.args, *node.args.kwonlyargs)
                             if a.arg not in ("self", "cls", "ctx")]
                if len(arguments) > 6:
                    long.append(f"{module}.{node.name}: {len(arguments)}")
    assert not long
