"""What a mapped task is expanded over."""

from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from pgflow_prefect.definitions.airflow.values import Fields, read_text, unwrap, write_value


@dataclass(frozen=True)
class Expansion:
    """What a mapped task is expanded over.

    Attributes:
        arguments: the arguments that get one element each; empty where one list gives them all.
        sources: the tasks whose results are the lists, by argument; a literal list has none.
        is_plain: one list only: no product of several, no list of objects, no `map`, `zip`, `filter` or `concat`.
        text: as it is written, without secrets.
        literal: the list itself, where it stands in the DAG.
    """

    arguments: tuple[str, ...]
    sources: Mapping[str, str]
    is_plain: bool
    text: str
    literal: JsonValue = None

    @property
    def source(self) -> str | None:
        """The task whose whole result is the only list; None where there is no such task."""
        return next(iter(self.sources.values())) if self.is_plain and len(self.sources) == 1 else None


def read_expansion(fields: Fields) -> Expansion:
    """Return what the fields of a mapped task say that it is expanded over."""
    name = read_text(fields.get("_expand_input_attr")) or "expand_input"
    given = unwrap(fields.get(name))
    kind = read_text(given.get("type")) if isinstance(given, dict) else None
    value = unwrap(given.get("value")) if isinstance(given, dict) else None
    text = write_value("", value)
    if kind != "dict-of-lists" or not isinstance(value, dict):
        return Expansion((), {}, is_plain=False, text=text)
    sources = {argument: source for argument, each in value.items() if (source := _find_source(each)) is not None}
    literal = unwrap(next(iter(value.values()))) if len(value) == 1 and not sources else None
    is_plain = len(value) == 1 and (bool(sources) or isinstance(literal, list))
    return Expansion(tuple(value), sources, is_plain, text, literal if is_plain else None)


def _find_source(value: JsonValue) -> str | None:
    """Return the task whose whole result a list is."""
    reference = value.get("__var") if isinstance(value, dict) and value.get("__type") == "xcomref" else None
    if not isinstance(reference, dict) or reference.get("type") not in {None, "simple"}:
        return None
    if reference.get("key") not in {None, "return_value"}:
        return None
    return read_text(reference.get("task_id"))
