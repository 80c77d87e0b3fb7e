"""Groups of steps whose slugs begin alike: `load.big` and `load.small` are in the group `load`."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

DEEPEST = 12
"""Groups inside each other that get boxes of their own."""


@dataclass(frozen=True)
class Group:
    """Steps that are drawn in one box.

    Attributes:
        name: the beginning of their slugs, without the dot after it; empty for the whole workflow.
        slugs: of the steps in it that are in none of its groups, in the order given.
        groups: in it, each with two steps or more.
    """

    name: str
    slugs: list[str] = field(default_factory=list)
    groups: list["Group"] = field(default_factory=list)

    def list_slugs(self) -> Iterator[str]:
        """Yield the slugs of all steps in it, and in its groups."""
        yield from self.slugs
        for group in self.groups:
            yield from group.list_slugs()


def find_groups(slugs: Iterable[str]) -> Group:
    """Return all steps as one group, with the groups in it.

    A group has two steps or more. A group that has nothing but another group is left out.
    """
    return _split("", list(slugs), 0)


def _split(name: str, slugs: list[str], depth: int) -> Group:
    beneath: dict[str, list[str]] = {}
    skipped = len(name) + 1 if name else 0
    for slug in slugs:
        head, dot, rest = slug[skipped:].partition(".")
        if dot and head and rest:
            beneath.setdefault(f"{name}.{head}" if name else head, []).append(slug)
    inner = {prefix: each for prefix, each in beneath.items() if len(each) > 1}
    if depth >= DEEPEST or not inner:
        return Group(name, slugs)
    if name and len(inner) == 1 and len(next(iter(inner.values()))) == len(slugs):
        return _split(next(iter(inner)), slugs, depth)  # one box is enough
    grouped = {slug for each in inner.values() for slug in each}
    return Group(
        name,
        [slug for slug in slugs if slug not in grouped],
        [_split(prefix, each, depth + 1) for prefix, each in inner.items()],
    )
