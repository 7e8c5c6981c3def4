"""The rooms of the package import in one direction, and no two files import each other."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "prefix_adapter"
# From bottom to top, as docs/architecture.md has it. A room imports from itself and from rooms before it.
ROOMS = [
    "version",
    "private",
    "messages",
    "templates",
    "files",
    "backbone",
    "tuner",
    "config",
    "prefix",
    "ptuning",
    "model",
    "methods",
    "adapters",
    "api",
    "training",
    "cli",
    "__main__",
]


def modules() -> dict[str, Path]:
    """The files of the package by module name; the package's own `__init__`, which only names `api`, is left out."""
    found = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in PACKAGE.rglob("*.py")}
    return {name.removesuffix(".__init__"): path for name, path in found.items() if name != "__init__"}


def imports_of(name: str, path: Path, known: set[str]) -> set[str]:
    """The modules of the package that a file imports, also in functions and for type checkers."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = ".".join([*base, *(node.module.split(".") if node.module else [])])
            for alias in node.names:
                inner = ".".join(part for part in (target, alias.name) if part)
                found.add(inner if inner in known else target)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("prefix_adapter"):
            found.add((node.module or "").removeprefix("prefix_adapter").removeprefix("."))
        elif isinstance(node, ast.Import):
            found |= {
                a.name.removeprefix("prefix_adapter.") for a in node.names if a.name.startswith("prefix_adapter")
            }
    return (found & known) - {name}


def graph() -> dict[str, set[str]]:
    """The imports of each module of the package."""
    known = modules()
    return {name: imports_of(name, path, set(known)) for name, path in known.items()}


def room_of(name: str) -> str:
    """The folder, or the file beside the folders, that a module is in."""
    return name.partition(".")[0]


def test_every_module_is_in_a_known_room():
    assert {room_of(name) for name in modules()} == set(ROOMS)


def test_rooms_import_in_one_direction():
    wrong = [
        f"{name} imports {target}"
        for name, targets in graph().items()
        for target in targets
        if ROOMS.index(room_of(target)) > ROOMS.index(room_of(name))
    ]
    assert not wrong


def test_no_files_import_each_other():
    # A room's `__init__` exports names of its files, which may import from the room.
    files = {name: {t for t in targets if (PACKAGE / t.replace(".", "/")).with_suffix(".py").exists()}
             for name, targets in graph().items()}  # fmt: skip
    try:
        TopologicalSorter(files).prepare()
    except CycleError as error:
        pytest.fail(f"imports in a circle: {' -> '.join(error.args[1])}")


def test_the_map_names_every_file():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    known = modules()
    names = [known[name].name for name in known if "training.tasks." not in name]
    missing = [name for name in names if name not in page and name != "__init__.py"]
    assert not missing
