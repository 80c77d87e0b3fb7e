"""The implementations of `sql/CONTRACT.md`, and which of them a database has."""

from typing import NamedTuple

from pgflow_prefect.database.connection import Connection
from pgflow_prefect.database.implementations.capabilities import Implementation
from pgflow_prefect.database.implementations.classic import CLASSIC
from pgflow_prefect.database.implementations.released import describe_released
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.translation import translate_errors


class FoundSchema(NamedTuple):
    """What a database has in its schema `pgflow`.

    Attributes:
        implementation: the one that fits; None if there is no schema, or if it is another program's.
        foreign_table: a table that shows that the schema is another program's.
        unknown: what a later version of the released pgflow has, and this program does not know, by name.
    """

    implementation: Implementation | None
    foreign_table: str | None
    unknown: tuple[str, ...] = ()


async def find_schema(connection: Connection) -> FoundSchema:
    """Return what a database has in its schema `pgflow`, by its columns: versions of pgflow have no number there."""
    with translate_errors():
        row = await (await connection.execute(QUERIES["find_schema"])).fetchone()
    assert row is not None
    return read_schema(row)


def read_schema(row: dict[str, object]) -> FoundSchema:
    """Return the schema that a row of the statement `find_schema` describes."""
    if row["is_classic"]:
        return FoundSchema(CLASSIC, None)
    if row["is_released"]:
        unknown = row["unknown"]
        assert isinstance(unknown, list)
        return FoundSchema(describe_released(skips=bool(row["has_skips"])), None, tuple(map(str, unknown)))
    return FoundSchema(None, None if row["some_table"] is None else str(row["some_table"]))


__all__ = ["CLASSIC", "FoundSchema", "Implementation", "find_schema", "read_schema"]
