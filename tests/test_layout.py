"""Imports go down: no file imports from a room above its own, and none from one that imports it.

``python tests/test_layout.py`` prints the floors, with the lines of each room, and the largest files.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import ramp_fast

ROOT = Path(ramp_fast.__file__).parent

# Rooms from the ground up. A room is a file at the top or a package; rooms on one floor do not know each other.
FLOORS = [
    {"errors", "_ranges"},
    {"_checks", "_files", "_native", "params", "specs"},
    {"graph"},
    {"kernels"},
    {"ops"},
    {"gemm", "capture", "results"},
    {"rules", "data", "demo"},
    {"plan", "models"},
    {"runtime"},
    {"explainer"},
    {"methods", "pipeline"},
    {"metrics", "report"},
    {"evaluation"},
    {"engine"},
    {"integrations", "cli"},
    {"", "__main__"},  # the package itself names what it offers
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Modules of the package that a file imports, also within functions and for types alone, with lines."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name.startswith("ramp_fast"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("ramp_fast"):
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                yield (name if is_module(name) else str(node.module)), node.lineno


def is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(("ramp_fast", *(parts[:-1] if parts[-1] == "__init__" else parts)))


def room(name: str) -> str:
    return (*name.split("."), "")[1]


FILES = [p for p in sorted(ROOT.rglob("*.py")) if "kernels" not in p.relative_to(ROOT).parts[:1]]


def test_every_room_has_a_floor() -> None:
    assert {room(module(path)) for path in FILES} <= set(FLOOR)


def test_imports_go_down() -> None:
    up = []
    for path in FILES:
        own = room(module(path))
        for name, line in imports(path):
            other = room(name)
            # The package's own name and its version are on no floor; what it offers is imported when it is asked for.
            if other not in ("", own) and FLOOR[other] >= FLOOR[own]:
                up.append(f"{path.relative_to(ROOT)}:{line}: {own} imports {name}")
    assert not up, "\n".join(up)


def test_no_file_imports_one_that_imports_it() -> None:
    apart = {"ramp_fast"}  # which names what it offers, and has the extension in it
    graph = {module(path): {name for name, _ in imports(path)} - {module(path)} - apart for path in FILES}
    done: set[str] = set()

    def walk(name: str, way: tuple[str, ...]) -> None:
        assert name not in way, f"imports in a circle: {' -> '.join((*way[way.index(name) :], name))}"
        if name not in done:
            for other in sorted(graph.get(name, ())):
                walk(other, (*way, name))
            done.add(name)

    for name in graph:
        walk(name, ())


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


if __name__ == "__main__":
    of_room: dict[str, list[Path]] = {}
    for file in FILES:
        of_room.setdefault(room(module(file)), []).append(file)
    for number, rooms in enumerate(FLOORS):
        shown = (f"{name or 'ramp_fast'} {lines(of_room[name])}" for name in sorted(rooms) if name in of_room)
        print(f"{number:2}  {', '.join(shown)}")
    print()
    for file in sorted(FILES, key=lambda path: -lines([path]))[:10]:
        print(f"{lines([file]):5}  {file.relative_to(ROOT)}")
