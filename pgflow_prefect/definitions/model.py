"""A workflow's definition, and the Python names of its steps."""

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
"""Argument names of a handler that do not mean an upstream step."""


def to_identifier(slug: str) -> str:
    """Return the Python name of a step in a handler's arguments.

    Characters that no name may have become `_`. A leading digit gets `_` before it, and a keyword or a reserved name
    gets `_` after it: `send-emails` -> `send_emails`, `2nd` -> `_2nd`, `class` -> `class_`, `payload` -> `payload_`.
    """
    name = slug
    if not (slug.isascii() and slug.isidentifier()):
        # Python itself compares names in this form.
        normal = unicodedata.normalize("NFKC", slug)
        name = "".join(character if f"_{character}".isidentifier() else "_" for character in normal)
        if not name[:1].isidentifier():
            name = f"_{name}"
    if keyword.iskeyword(name) or name in RESERVED_NAMES or name == "__debug__":  # no assignment to it is possible
        name = f"{name}_"
    return name


class Dep(NamedTuple):
    """A dependency: `upstream` must complete before `downstream` starts. Both are step slugs."""

    upstream: str
    downstream: str


class WorkflowDefinition(BaseModel):
    """A workflow as the database defines it: its steps and dependencies, in no particular order."""

    model_config = ConfigDict(frozen=True)

    slug: str
    steps: tuple[str, ...]
    deps: tuple[Dep, ...]

    @cached_property
    def definition_hash(self) -> str:
        """A hash of the definition that does not depend on the order of its rows: 16 hexadecimal digits."""
        canonical = json.dumps([self.slug, sorted(self.steps), sorted(self.deps)], ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]
