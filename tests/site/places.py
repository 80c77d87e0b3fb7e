"""Where the site has the files of the repository, and how a page's links lead there."""

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from posixpath import dirname, normpath, relpath

ROOT = Path(__file__).parents[2]

GUIDE = "pgflow_prefect/guide"
"""The folder of the pages that `pgflow-prefect guide` shows."""

PICTURES = "tests/site/pictures"
"""The folder of the pictures that `python -m tests.site.pictures` makes."""

DOCUMENTS = {
    "README.md": "index.md",
    "CHANGELOG.md": "project/changelog.md",
    "CONTRIBUTING.md": "project/contributing.md",
    "SECURITY.md": "project/security.md",
    "LICENSE": "project/licence.md",
    "benchmarks/README.md": "benchmarks/method.md",
    "benchmarks/RESULTS.md": "benchmarks/results.md",
    "flows/README.md": "reference/examples.md",
    "sql/CONTRACT.md": "reference/contract.md",
}
"""Further documents of the repository, and their pages. Folders keep them apart from the guide's pages."""

_ORIGINS = {place: path for path, place in DOCUMENTS.items()}
_FENCE = re.compile(r"\s*(```|~~~)")
_LINK = re.compile(r"(?<=\]\()(?![a-z][a-z+.-]*:|#|/)(?P<path>[^)\s#]+)(?P<anchor>#[^)\s]*)?(?=\))")
_PAGE_OF_GUIDE = re.compile(r"(?<!\[)`pgflow-prefect guide (?P<page>[a-z][a-z0-9_-]*)`")


def find_origin(page: str) -> str | None:
    """Return the file of the repository that a page of the site shows; None for a page that is generated."""
    if page in _ORIGINS:
        return _ORIGINS[page]
    return f"{GUIDE}/{page}" if (ROOT / GUIDE / page).is_file() else None


def find_place(path: str) -> str | None:
    """Return where the site has a file or folder of the repository; None if the repository has no such file.

    A folder is its README. Any other file that is no document has a page with its text, and any other folder one with
    the names of its files.
    """
    if path.startswith("..") or not (ROOT / path).exists():
        return None
    if (ROOT / path / "README.md").is_file():
        path = f"{path}/README.md"
    if path in DOCUMENTS:
        return DOCUMENTS[path]
    if path.startswith(f"{GUIDE}/"):
        return path.removeprefix(f"{GUIDE}/")
    if path.startswith(f"{PICTURES}/"):
        return f"pictures/{PurePosixPath(path).name}"
    return f"source/{path}.md"


def change_prose(text: str, change: Callable[[str], str]) -> str:
    """Return a page whose lines outside of blocks of code are changed."""
    lines, fence = [], None
    for line in text.splitlines(keepends=True):
        found = _FENCE.match(line)
        if found and fence in {None, found[1]}:
            fence = None if fence else found[1]
        lines.append(line if fence or found else change(line))
    return "".join(lines)


def find_linked(text: str, origin: str) -> Iterator[str]:
    """Yield the files and folders of the repository that a page's links name."""
    found: list[str] = []

    def keep(line: str) -> str:
        found.extend(_resolve(origin, link["path"]) for link in _LINK.finditer(line))
        return line

    change_prose(text, keep)
    yield from found


def lead_links(text: str, page: str, titles: dict[str, str]) -> str:
    """Return a page whose links lead to pages of the site.

    `pgflow-prefect guide PAGE` becomes a link, too. What leads nowhere stays as it is, and fails the build.

    Args:
        text: the page, in Markdown.
        page: where the site has it.
        titles: of the guide's pages, by their names.
    """
    origin = find_origin(page)

    def lead(link: re.Match[str]) -> str:
        place = find_place(_resolve(origin or page, link["path"])) if origin else None
        return f"{_lead_from(page, place) if place else link['path']}{link['anchor'] or ''}"

    def name(mention: re.Match[str]) -> str:
        title = titles.get(mention["page"], mention["page"])
        return f"[{title}]({_lead_from(page, mention['page'] + '.md')})"

    return change_prose(text, lambda line: _PAGE_OF_GUIDE.sub(name, _LINK.sub(lead, line)))


def _resolve(origin: str, link: str) -> str:
    return normpath(os.path.join(dirname(origin), link))  # noqa: PTH118  a link, not a path of this machine


def _lead_from(page: str, place: str) -> str:
    return relpath(place, dirname(page) or ".")
