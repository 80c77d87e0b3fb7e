"""What `sql/CONTRACT.md` says, and what Python calls."""

import re
from collections.abc import Iterator
from typing import NamedTuple

from pgflow_prefect.database import step_transaction
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.shipped import shipped_path

_ROW = re.compile(r"\| `(?P<name>\w+)\((?P<arguments>.*?)\)` \|")
_CALL = re.compile(r"\bpgflow_prefect\.(\w+)\s*\(")
OWNERS_SCRIPTS = ("new_installation.sql", "moved_installation.sql")


class Described(NamedTuple):
    """A function as the page describes it.

    Attributes:
        name: without its schema.
        arguments: names and types, as the page writes them.
        who: the roles that may call it; `owner` for the owner alone.
        is_hot: whether it is called for each step, or all the time.
        locks: the rows that it locks, in words.
        only_released: the released schema alone has it.
    """

    name: str
    arguments: tuple[str, ...]
    who: frozenset[str]
    is_hot: bool
    locks: str
    only_released: bool = False


def read_document() -> list[Described]:
    """Return the functions of `sql/CONTRACT.md`, in its order."""
    return list(_parse(shipped_path("sql", "CONTRACT.md").read_text(encoding="utf-8")))


def _parse(text: str) -> Iterator[Described]:
    header: list[str] = []
    only_released = False
    for line in text.splitlines():
        if line.startswith("## "):
            only_released = line == "## Only on `released/`"
        cells = [cell.strip() for cell in line.strip()[1:-1].split("|")]
        if line.startswith("| function |"):
            header = cells
        elif row := _ROW.match(line):
            cell = dict(zip(header, cells, strict=True))
            arguments = [each.strip() for each in row["arguments"].split(",") if each.strip()]
            yield Described(
                row["name"],
                tuple(arguments),
                frozenset(cell["who"].split()),
                cell.get("hot") == "yes",
                cell.get("rows locked, in this order", ""),
                only_released,
            )


def list_called() -> frozenset[str]:
    """Return the functions of schema `pgflow_prefect` that Python calls."""
    return frozenset(name for statement in list_statements().values() for name in _CALL.findall(statement))


def list_statements() -> dict[str, str]:
    """Return the statements that Python sends, by a name for each."""
    scripts = {name: shipped_path("sql", name).read_text(encoding="utf-8") for name in OWNERS_SCRIPTS}
    return {**QUERIES, **scripts, "the result of an SQL function": step_transaction._CHECKED.as_string()}
