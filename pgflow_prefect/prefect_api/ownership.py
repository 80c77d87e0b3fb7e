"""Recognises this installation's objects in Prefect: each carries a tag with the installation's id."""

from collections.abc import Iterable
from uuid import UUID

OWNERSHIP_PREFIX = "pgflow-db-"
"""The prefix of every installation's tag."""


def make_ownership_tag(installation: UUID) -> str:
    """Return the tag of a database's objects, among those that share a Prefect server."""
    return f"{OWNERSHIP_PREFIX}{installation.hex[:8]}"


def find_foreign_tags(tags: Iterable[str], installation: UUID) -> list[str]:
    """Return the tags of other installations among these."""
    own = make_ownership_tag(installation)
    return sorted(tag for tag in tags if tag.startswith(OWNERSHIP_PREFIX) and tag != own)


def is_owned(tags: Iterable[str], installation: UUID) -> bool:
    """Tell whether tags name this installation, and no other one."""
    return {tag for tag in tags if tag.startswith(OWNERSHIP_PREFIX)} == {make_ownership_tag(installation)}


def has_owner(tags: Iterable[str]) -> bool:
    """Tell whether tags name an installation."""
    return any(tag.startswith(OWNERSHIP_PREFIX) for tag in tags)
