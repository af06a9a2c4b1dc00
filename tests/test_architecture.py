"""The rooms: arrows point one way, nothing runs in a circle, and files stay small."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("common", "data", "optim", "trainer", "scripts", "examples")
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for room in ROOMS
    for path in [*ROOT.glob(f"{room}.py"), *ROOT.glob(f"{room}/**/*.py")]
}
# From the bottom to the top: a module may import its own layer's room and what is below.
LAYERS = (
    ("common",),
    ("data", "optim"),
    (
        *("trainer.attention", "trainer.config", "trainer.initial", "trainer.language_model", "trainer.mesh"),
        *("trainer.model", "trainer.schedules"),
    ),
    ("trainer.parallel",),
    ("trainer.evaluate", "trainer.guard", "trainer.metrics"),
    ("trainer.run",),
    ("trainer.loop",),
    ("trainer.launch",),
    ("scripts", "examples"),
)


def imports(name: str) -> set[str]:
    """The project's modules that a module imports, inside functions too."""
    found = set()
    package = name if MODULES[name].name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            members = {f"{base}.{alias.name}" for alias in node.names}
            found |= {member if module_of(member) else base for member in members}
    return {known for target in found if (known := module_of(target)) and known != name}


def module_of(target: str) -> str | None:
    return next((name for name in (target, f"{target}.__init__") if name in MODULES), None)


GRAPH = {name: imports(name) for name in MODULES}


def layer(name: str) -> tuple[int, str]:
    """(height, room) of a module."""
    bare = name.removesuffix(".__init__")
    return next((height, room) for height, rooms in enumerate(LAYERS) for room in rooms
                if bare == room or bare.startswith(f"{room}."))  # fmt: skip


def test_the_graph_sees_imports():
    """Or the tests below could not fail."""
    assert "trainer.loop" in MODULES and "optim.exchange" in GRAPH["optim.matrix"] | GRAPH["optim.layout"]
    assert {"common", "data.__init__", "trainer.config"} <= GRAPH["trainer.loop"]


def test_no_circle_anywhere():
    done, path = set(), []

    def visit(name):
        assert name not in path, f"a circle: {' -> '.join([*path[path.index(name) :], name])}"
        if name not in done:
            path.append(name)
            for target in sorted(GRAPH[name]):
                visit(target)
            path.pop()
            done.add(name)

    for name in sorted(MODULES):
        visit(name)


@pytest.mark.parametrize("name", [name for name in sorted(MODULES) if name != "trainer.__init__"])
def test_arrows_point_down(name):
    height, room = layer(name)
    for target in GRAPH[name]:
        below, other = layer(target)
        assert below < height or other == room or {room, other} <= set(LAYERS[2]), f"{name} imports {target}"


def test_the_house_is_as_small_as_it_says():
    assert len(list((ROOT / "trainer").glob("*.py"))) <= 10  # nine subjects and the room's docstring
    lines = {name: len(path.read_text().splitlines()) for name, path in MODULES.items()}
    for name, count in lines.items():
        assert count <= 300 or name.startswith("scripts."), f"{name} has {count} lines"
    assert lines["trainer.loop"] <= 200
    for path in (ROOT / "tests").glob("**/*.py"):
        assert len(path.read_text().splitlines()) <= 350, path
