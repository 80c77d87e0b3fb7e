"""Checks that the built site loads nothing from elsewhere: no script, style, font, picture or frame."""

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

_LOADED = {
    "audio": "src",
    "embed": "src",
    "iframe": "src",
    "image": "href",
    "img": "src",
    "input": "src",
    "link": "href",
    "object": "data",
    "script": "src",
    "source": "src",
    "track": "src",
    "use": "href",
    "video": "src",
}
"""The attributes of elements whose addresses a browser loads by itself."""

_ONLY_NAMED = {"alternate", "author", "canonical", "help", "license", "next", "prev"}
"""Links of a head that no browser loads."""

_ELSEWHERE = re.compile(r"\s*(?:[a-z][a-z+.-]*:)?//", re.IGNORECASE)
_IN_STYLES = re.compile(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')\s;]+)""", re.IGNORECASE)
_DRAWN_BY_PROGRAMS = {"mermaid"}
"""Classes for whose elements the theme's script would load a program from elsewhere."""


def find_foreign(site: Path) -> list[str]:
    """Return what pages and style sheets would load from elsewhere: the file, and the address."""
    found = []
    for path in sorted(site.rglob("*")):
        if path.suffix in {".html", ".svg"}:
            found += [f"{path.relative_to(site)}: {each}" for each in list_foreign(path.read_text(encoding="utf-8"))]
        elif path.suffix == ".css":
            styles = _IN_STYLES.findall(path.read_text(encoding="utf-8"))
            found += [f"{path.relative_to(site)}: {address}" for address in styles]
    return found


def list_foreign(text: str) -> list[str]:
    """Return what a page would load from elsewhere."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    return reader.found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._in_style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = {name.removeprefix("xlink:"): value or "" for name, value in attrs}
        self._in_style = tag == "style"
        self.found += _list_addresses(tag, attributes)
        self.found += _IN_STYLES.findall(attributes.get("style", ""))
        self.found += _DRAWN_BY_PROGRAMS.intersection(attributes.get("class", "").split())

    def handle_endtag(self, tag: str) -> None:
        self._in_style = False

    def handle_data(self, data: str) -> None:
        if self._in_style:
            self.found += _IN_STYLES.findall(data)


def _list_addresses(tag: str, attributes: dict[str, str]) -> Iterator[str]:
    if tag == "link" and _ONLY_NAMED.intersection(attributes.get("rel", "").lower().split()):
        return
    candidates = [attributes.get(_LOADED.get(tag, ""), "")]
    candidates += [each.split()[0] for each in attributes.get("srcset", "").split(",") if each.strip()]
    yield from (address for address in candidates if _ELSEWHERE.match(address))
