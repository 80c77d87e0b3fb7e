"""The picture of the rooms in CONTRIBUTING.md, drawn from the imports: `python -m tests.architecture` writes it."""

import re
from pathlib import Path

import grimp
import networkx as nx

PACKAGE = "pgflow_prefect"
PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
_PICTURE = re.compile(r"(?<=<!-- rooms -->\n).*?(?=<!-- /rooms -->)", re.DOTALL)
_NO_ROOM = {"__main__", "by_path"}


def find_rooms(package: str = PACKAGE) -> "nx.DiGraph[str]":
    """Return the folders and files of a package as a graph: an edge leads from one to each that its modules import."""
    imports = grimp.build_graph(PACKAGE)
    prefix = f"{package}."
    rooms: nx.DiGraph[str] = nx.DiGraph()
    rooms.add_nodes_from(room.removeprefix(prefix) for room in imports.find_children(package))
    rooms.remove_nodes_from(_NO_ROOM & set(rooms))
    for importer in imports.modules:
        for imported in imports.find_modules_directly_imported_by(importer):
            pair = [name.removeprefix(prefix).split(".")[0] for name in (importer, imported) if name.startswith(prefix)]
            if len(pair) == 2 and pair[0] != pair[1] and set(pair) <= set(rooms):
                rooms.add_edge(*pair)
    return rooms


def list_packages() -> list[str]:
    """Return the package and the packages within it."""
    imports = grimp.build_graph(PACKAGE)
    return sorted(name for name in imports.modules if imports.find_children(name))


def draw_rooms() -> str:
    """Return the rooms as a Mermaid picture, without the arrows that others imply.

    Raises:
        ValueError: rooms import each other in a circle.
    """
    rooms = find_rooms()
    if not nx.is_directed_acyclic_graph(rooms):
        raise ValueError(f"the rooms import each other in a circle: {nx.find_cycle(rooms)}")
    lines = [f"    {room}" for room in sorted(rooms) if not rooms.degree(room)]
    lines += [f"    {upper} --> {lower}" for upper, lower in sorted(nx.transitive_reduction(rooms).edges)]
    return "```mermaid\nflowchart TD\n" + "\n".join(lines) + "\n```\n"


def read_picture() -> str:
    """Return the picture that the page has."""
    found = _PICTURE.search(PAGE.read_text(encoding="utf-8"))
    assert found is not None, f"{PAGE.name} has no place for the picture of the rooms"
    return found.group()


def write_picture() -> None:
    """Write the picture into the page."""
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(_PICTURE.sub(lambda _: draw_rooms(), text), encoding="utf-8")


if __name__ == "__main__":
    write_picture()
