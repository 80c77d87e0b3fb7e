"""The pages of the site that are generated, and what the guide's pages get beside their text."""

import re
from collections.abc import Iterator
from pathlib import Path

from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.definitions.model import Dep, WorkflowDefinition
from pgflow_prefect.render.svg import draw_svg
from tests.site.api import write_api
from tests.site.commands import write_commands
from tests.site.places import DOCUMENTS, GUIDE, PICTURES, ROOT, find_linked, find_place, lead_links
from tests.site.settings import write_settings

_ABOUT = re.compile(r"\A(?P<title># .*\n)\s*<!-- (?P<about>.*) -->\n")
_FIGURES = re.compile(r"^<!-- figures: (.*) -->$", re.MULTILINE)
_CHART = re.compile(r"^```mermaid\n.*?^```\n", re.MULTILINE | re.DOTALL)
_ARROW = re.compile(r"^ +(\w+) --> (\w+)$", re.MULTILINE)
_LANGUAGES = {".py": "python", ".sql": "sql", ".yml": "yaml", ".jinja": "jinja", ".csv": "text"}

_OVERVIEW = "![A run of an example workflow, as Prefect's UI shows it](pictures/report.png)\n"
_ROOMS = "![The rooms: an arrow leads from a room to each that it imports](../pictures/rooms.svg)\n"
_DRAWINGS = {"README.md": _OVERVIEW, "CONTRIBUTING.md": _ROOMS}
"""What the site has in the place of a document's Mermaid drawing: it would load a program from elsewhere to draw it."""


def list_guide() -> dict[str, str]:
    """Return the texts of the guide's pages, by their names."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / GUIDE).glob("*.md"))}


def find_titles() -> dict[str, str]:
    """Return the titles of the guide's pages, by their names."""
    return {name: text.partition("\n")[0].removeprefix("# ") for name, text in list_guide().items()}


def list_pictures() -> dict[str, Path]:
    """Return the pictures that were taken, by their places."""
    return {f"pictures/{path.name}": path for path in sorted((ROOT / PICTURES).glob("*.png"))}


def draw_rooms() -> dict[str, str]:
    """Return the drawing of the rooms in CONTRIBUTING.md as this package draws a workflow, by its place."""
    arrows = [Dep(upper, lower) for upper, lower in _ARROW.findall((ROOT / "CONTRIBUTING.md").read_text("utf-8"))]
    rooms = tuple(dict.fromkeys(room for arrow in arrows for room in arrow))
    return {
        "pictures/rooms.svg": draw_svg(build_graph(WorkflowDefinition(slug="rooms", steps=rooms, deps=tuple(arrows))))
    }


def make_pages() -> dict[str, str]:
    """Return the pages that are no pages of the guide, in Markdown, by their places."""
    pages = {place: _read_document(path) for path, place in DOCUMENTS.items()}
    pages |= {"reference/cli.md": write_commands(), "reference/api.md": write_api()}
    return pages | {place: _show_source(path) for path, place in _list_sources()}


def finish_page(text: str, page: str) -> tuple[str, str | None]:
    """Return a page's Markdown as the site needs it, and what the page is about.

    Raises:
        LookupError: the page asks for figures that the benchmarks do not have.
    """
    about = _ABOUT.match(text)
    text = _FIGURES.sub(lambda found: find_figures(found[1]), text)
    if page == "settings.md":
        text = f"{text.rstrip()}\n\n{write_settings()}"
    return lead_links(text, page, find_titles()), about["about"] if about else None


def find_figures(heading: str) -> str:
    """Return the table of the benchmarks' results below a heading, without the rows that belong to the row above them.

    Raises:
        LookupError: there is no such heading.
    """
    results = (ROOT / "benchmarks/RESULTS.md").read_text(encoding="utf-8")
    for section in re.split(r"^##+ ", results, flags=re.MULTILINE):
        title, _, rest = section.partition("\n")
        if title == heading:
            return "\n".join(line for line in rest.splitlines() if re.match(r"\|(?!  )", line))
    raise LookupError(f"benchmarks/RESULTS.md has no section {heading!r}")


def complete_nav(nav: list[object]) -> None:
    """Add the pages of the guide that the navigation does not name to its how-tos."""
    named = set(_list_places(nav))
    missing = [f"{name}.md" for name in list_guide() if f"{name}.md" not in named]
    for section in nav:
        if isinstance(section, dict) and "How-tos" in section:
            section["How-tos"] += missing


def _list_places(nav: object) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    elif isinstance(nav, dict):
        for part in nav.values():
            yield from _list_places(part)
    elif isinstance(nav, list):
        for part in nav:
            yield from _list_places(part)


def _read_document(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path in _DRAWINGS:
        return _CHART.sub(_DRAWINGS[path], text, count=1)
    return text if path.endswith(".md") else f"# Licence\n\n```text\n{text}```\n"


def _list_sources() -> list[tuple[str, str]]:
    """Return the files whose text the site has to show because a page links to them, and their places."""
    texts = {f"{GUIDE}/{name}.md": text for name, text in list_guide().items()}
    texts |= {path: (ROOT / path).read_text(encoding="utf-8") for path in DOCUMENTS if path.endswith(".md")}
    linked = {path for origin, text in texts.items() for path in find_linked(text, origin)}
    places = {path: find_place(path) for path in sorted(linked)}
    return [(path, place) for path, place in places.items() if place is not None and place.startswith("source/")]


def _show_source(path: str) -> str:
    language = _LANGUAGES.get(Path(path).suffix, "text")
    shown = ROOT / path
    if shown.is_dir():
        text = "".join(f"{each.name}\n" for each in sorted(shown.iterdir()) if each.is_file())
    else:
        text = shown.read_text(encoding="utf-8")
    return f"---\nsearch:\n  exclude: true\n---\n# {path}\n\n~~~~{language}\n{text}~~~~\n"
