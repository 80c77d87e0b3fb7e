"""A workflow as the database defines it, and the names that stand for its steps in Python."""

import hashlib
import json
import keyword
import unicodedata
from functools import cached_property
from typing import NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
)

RESERVED_NAMES = frozenset({"payload", "context", "upstream"})
"""Argument names of a handler that mean something else than an upstream step."""


def to_identifier(slug: str) -> str:
    """Return the Python name that stands for a step's slug in a handler's arguments.

    Characters that no name may have become `_`, a leading digit gets `_` before it, a keyword or a reserved name `_`
    after it: `send-emails` -> `send_emails`, `2nd` -> `_2nd`, `class` -> `class_`, `payload` -> `payload_`.
    """
    name = slug
    if not (slug.isascii() and slug.isidentifier()):
        # Python itself compares names in this form.
        normal = unicodedata.normalize("NFKC", slug)
        name = "".join(character if f"_{character}".isidentifier() else "_" for character in normal)
        if not name[:1].isidentifier():
            name = f"_{name}"
    if keyword.iskeyword(name) or name in RESERVED_NAMES or name == "__debug__":  # which can't be assigned to
        name = f"{name}_"
    return name


class Dep(NamedTuple):
    """A dependency: `upstream` must complete before `downstream` starts. Both are step slugs."""

    upstream: str
    downstream: str


class WorkflowDefinition(BaseModel):
    """A workflow as the database defines it: its steps and what they wait for, in no particular order."""

    model_config = ConfigDict(frozen=True)

    slug: str
    steps: tuple[str, ...]
    deps: tuple[Dep, ...]

    @cached_property
    def definition_hash(self) -> str:
        """A name for exactly this definition, whatever the order of its rows: 16 hexadecimal digits."""
        canonical = json.dumps([self.slug, sorted(self.steps), sorted(self.deps)], ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]
