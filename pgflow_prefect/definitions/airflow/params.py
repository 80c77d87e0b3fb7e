"""The parameters of a DAG: their names, defaults and schemas, as the document has them."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from pydantic import JsonValue

from pgflow_prefect.definitions.airflow.values import read_text, unwrap

MOST_PARAMS = 100


@dataclass(frozen=True)
class Param:
    """A parameter of a DAG.

    Attributes:
        name: as `conf` has it.
        default: JSON; None where there is none.
        description: for people.
        schema: a JSON schema, perhaps an empty one.
    """

    name: str
    default: JsonValue
    description: str | None
    schema: Mapping[str, JsonValue]


def read_params(value: JsonValue) -> list[Param]:
    """Return the parameters of a DAG's document: older ones have an object, later ones a list of pairs."""
    return list(_list_params(unwrap(value)))[:MOST_PARAMS]


def _list_params(value: JsonValue) -> Iterator[Param]:
    pairs = list(value.items()) if isinstance(value, dict) else value
    for pair in pairs if isinstance(pairs, list) else []:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not isinstance(pair[0], str):  # noqa: PLR2004  a pair
            continue
        name, given = pair[0], unwrap(pair[1])
        if not isinstance(given, dict) or "__class" not in given:
            yield Param(name, given, None, {})  # a plain default
            continue
        schema = unwrap(given.get("schema"))
        yield Param(
            name,
            unwrap(given.get("default")),
            read_text(given.get("description")) or None,
            schema if isinstance(schema, dict) else {},
        )
