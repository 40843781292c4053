"""Imports point down: DESIGN's table of floors, held."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter

import pytest

from house.source import PACKAGE, Module, imported, modules, resolved

FLOORS = {
    0: ("disk", "errors", "lazy", "streams"),
    1: ("payload", "data", "tracking"),
    2: ("filters", "aggregate"),
    3: ("task",),
    4: ("control", "training", "site"),
    5: ("transport", "ledger"),
    6: ("server", "simulate"),
    7: ("provision", "operate"),
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}

ROOF = ("", "testing", "flare", "flower")
"""What may name every room and is named by none: the package itself, the laws for outsiders, the facades."""

NEIGHBOURS = {
    ("tracking", "payload"): "a run read back gives its model as named arrays",
    ("operate", "provision"): "the command line provisions",
}
"""Who may import a room of its own floor, and why."""

EXTRAS = ("torch", "jax", "tensorflow", "keras", "sklearn", "pyarrow", "PIL", "matplotlib", "ray", "psycopg")
"""What is not installed everywhere, and may therefore be imported inside a function."""

IMPORTERS = ("koinon", "koinon.errors", "koinon.lazy")
"""Who may import by a name in a string: the lazily loaded package and rooms, and `errors.extra`."""


def room(module: str) -> str:
    """The room of a module: `payload` of `koinon.payload.tree`, and the empty word for the package."""
    return module.partition(".")[2].partition(".")[0]


def objection(importer: str, imports: str) -> str | None:
    """Why a module of `importer` may not import one of the room `imports`; None where it may."""
    if importer == imports or importer in ROOF:
        return None
    if imports in ROOF:
        return f"{imports or 'koinon itself'} stands on the roof"
    if FLOOR_OF[importer] == FLOOR_OF[imports] != 0 and (importer, imports) not in NEIGHBOURS:
        return f"both stand on floor {FLOOR_OF[importer]}"
    if FLOOR_OF[importer] < FLOOR_OF[imports]:
        return f"{importer} stands on floor {FLOOR_OF[importer]}, {imports} on floor {FLOOR_OF[imports]}"
    return None


def graph(known: dict[str, Module]) -> dict[str, set[str]]:
    """Which module of the package imports which."""
    edges: dict[str, set[str]] = {name: set() for name in known}
    for name, module in known.items():
        edges[name] |= {found for _, asked in module.imports() if (found := resolved(asked, known)) and found != name}
    return edges


def test_every_room_stands_on_one_floor():
    """A new folder or root module must be given its floor in the table above."""
    homeless = {room(name) for name in modules()} - set(FLOOR_OF) - set(ROOF)
    assert not homeless, f"without a floor: {sorted(homeless)}"


def test_every_room_says_what_it_is():
    """A folder is one idea, and its `__init__.py` opens with it."""
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    rooms = {folder: modules().get(".".join(folder.relative_to(PACKAGE.parent).parts)) for folder in folders}
    silent = [folder.name for folder, module in rooms.items() if module is None or not ast.get_docstring(module.tree)]
    assert not silent, f"rooms without a word about themselves: {', '.join(sorted(silent))}"


def test_imports_point_down():
    """A module imports its own room, a lower floor, or a neighbour named with a reason."""
    known, wrong = modules(), []
    for name, module in known.items():
        for node, asked in module.imports():
            found = resolved(asked, known)
            why = objection(room(name), room(found)) if found else None
            if why:
                wrong.append(f"{module.at(node)} imports {asked}: {why}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("importer", "imports", "allowed"),
    [
        ("filters", "payload", True),
        ("payload", "errors", True),
        ("streams", "errors", True),
        ("tracking", "payload", True),
        ("", "operate", True),
        ("testing", "simulate", True),
        ("payload", "tracking", False),
        ("filters", "aggregate", False),
        ("payload", "filters", False),
        ("site", "control", False),
        ("operate", "", False),
        ("task", "testing", False),
    ],
)
def test_the_rule_itself(importer: str, imports: str, allowed: bool):
    """Down is allowed, up and sideways are not, and nobody imports the roof."""
    assert (objection(importer, imports) is None) is allowed


def test_no_module_imports_itself_through_others():
    """The graph of imports has no cycle, in-function imports included."""
    try:
        TopologicalSorter(graph(modules())).prepare()
    except CycleError as cycle:
        pytest.fail("an import cycle: " + " <- ".join(cycle.args[1]))


def test_imports_inside_functions_are_for_extras_only():
    """Whatever is always there is imported at the top of the file."""
    wrong = {
        f"{module.at(node)} imports {asked} inside a function"
        for module in modules().values()
        for function in module.functions()
        for node in ast.walk(function)
        for asked in imported(node)
        if asked.split(".")[0] not in EXTRAS
    }
    assert not wrong, "\n".join(sorted(wrong))


def test_nothing_is_imported_by_a_string():
    """`import_module` and `__import__` hide an import from the table: optional libraries go through errors.extra."""
    wrong = [
        module.at(call)
        for module in modules().values()
        for called, call in module.calls()
        if called.split(".")[-1] in ("import_module", "__import__") and module.name not in IMPORTERS
    ]
    assert not wrong, f"imports by a string: {', '.join(wrong)}"


def test_contributors_are_told_of_every_room():
    """On its floor, in CONTRIBUTING.md."""
    lines = [line for line in (PACKAGE.parents[1] / "CONTRIBUTING.md").read_text().splitlines() if line[2:3].isdigit()]
    told = {name.rstrip("/").removesuffix(".py"): int(line[2]) for line in lines for name in line.split("`")[1::2]}
    assert told == {name: floor for name, floor in FLOOR_OF.items() if any(PACKAGE.glob(f"{name}*"))}
