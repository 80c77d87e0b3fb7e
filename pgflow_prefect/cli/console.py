"""Prints tables and lines for people, JSON for scripts, and errors for both."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.markup import escape
from rich.segment import Segment

from pgflow_prefect.render.labels import format_seconds, measure
from pgflow_prefect.wording import CleanFormatter, clean, clean_lines, escape_json

if TYPE_CHECKING:
    from rich.table import Table

    from pgflow_prefect.raw_json import ExactNumbers

STYLES = {
    "completed": "green",
    "failed": "red",
    "pending": "yellow",
    "running": "cyan",
    "waiting": "dim",
    "cached": "green",
    "retrying": "yellow",
    "elsewhere": "magenta",
    "skipped": "dim",
    "not run": "dim red",
    "notready": "dim red",
    "cancelled": "red",
}
"""By status, in lower case."""

_GAP = 2
"""Characters between two columns."""


class CleanConsole(Console):
    """A console that cleans its texts and leaves wrapping to the terminal.

    It writes no escape sequences but its own. A long command, URL or id can be copied in one piece.
    """

    def print(self, *objects: Any, soft_wrap: bool | None = None, **options: Any) -> None:  # noqa: ANN401  as of rich
        """Print as `rich` does, but do not break long lines of text. Tables are as wide as the terminal."""
        if soft_wrap is None and objects and all(isinstance(each, str) for each in objects):
            soft_wrap = True
        super().print(*objects, soft_wrap=soft_wrap, **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """Yield the output, with control characters replaced."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else clean_lines(text), style, control)


# Outside a terminal, nothing is wrapped: scripts expect one line for each thing.
out = CleanConsole(soft_wrap=not sys.stdout.isatty(), highlight=False)
err = CleanConsole(stderr=True, soft_wrap=True, highlight=False)


def is_debugging() -> bool:
    """Tell whether the user asked for tracebacks."""
    return bool(os.environ.get("PGFLOW_DEBUG"))


def log_to_console() -> None:
    """Write this package's log records to standard error, a line each, with the time."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(CleanFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("pgflow_prefect")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


@dataclass
class _Scripts:
    """The state of JSON output.

    Attributes:
        wanted: the user asked for JSON.
        printed: a value was printed. A script expects no second one.
    """

    wanted: bool = False
    printed: bool = False


_scripts = _Scripts()


def print_errors_as_json() -> None:
    """Print errors on standard output too, as `{"error": …, "hint": …, "exit_code": …}`.

    An error without a hint has no `hint`. If the command has printed its JSON already, nothing is added.
    """
    _scripts.wanted = True
    _scripts.printed = False


def print_error(message: str, *, hint: str | None = None, code: int) -> int:
    """Print an error as one message on standard error, and return the exit code."""
    if _scripts.wanted and not _scripts.printed:
        print_json({"error": message, **({"hint": hint} if hint else {}), "exit_code": code})
    if is_debugging() and sys.exception():
        import traceback

        traceback.print_exc()
    err.print(f"[red]error:[/red] {escape(message)}")
    if hint:
        err.print(escape(hint))
    return code


def print_json(value: object) -> None:
    """Print a value as JSON, models included."""
    _scripts.printed = True
    from pgflow_prefect.raw_json import ExactNumbers

    numbers = ExactNumbers()
    printed = json.dumps(_to_plain(value, numbers), indent=2, ensure_ascii=False)
    sys.stdout.write(escape_json(numbers.restore(printed)) + "\n")


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], *, whole: Collection[str] = (), spare: Sequence[str] = ()
) -> None:
    """Print rows under their columns' names; on a pipe, as lines with tabs between the columns.

    Args:
        columns: the names.
        rows: a cell for each column.
        whole: the columns whose cells are never cut or wrapped, such as ids.
        spare: the columns to leave out, in this order, if the terminal is too narrow for one line a row.
    """
    if not out.is_terminal:
        for row in [columns, *rows]:
            print_cells(row)
        return
    cells = [[*map(clean, row)] for row in rows]
    out.print(make_table(*leave_out(columns, cells, out.width, spare), whole=whole))


def print_cells(cells: Iterable[str]) -> None:
    """Print a line with tabs between its cells, for scripts. rich would turn tabs into spaces."""
    sys.stdout.write("\t".join(map(clean, cells)) + "\n")


def leave_out(
    columns: Sequence[str], rows: Sequence[Sequence[str]], width: int, spare: Sequence[str]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """Return a table without the spare columns that do not fit into so many characters."""
    widths = {
        name: max(map(measure, (name, *(row[place] for row in rows)))) + _GAP for place, name in enumerate(columns)
    }
    left = dict(widths)
    for name in spare:
        if sum(left.values()) - _GAP > width:
            del left[name]
    kept = [place for place, name in enumerate(columns) if name in left]
    return [columns[place] for place in kept], [[row[place] for place in kept] for row in rows]


def make_table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, whole: Collection[str] = ()) -> Table:
    """Return rows under their columns' names, for a terminal; `whole` as of `print_table`."""
    from rich.table import Table

    cells = [*rows]
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
    for place, name in enumerate(columns):
        if name in whole:
            longest = max(map(measure, (name, *(row[place] for row in cells))))
            table.add_column(name, no_wrap=True, min_width=longest)
        else:
            table.add_column(name, overflow="fold")
    for row in cells:
        table.add_row(*map(style_status, row))
    return table


def style_status(text: str) -> str:
    """Return a table's cell, coloured where it begins with the name of a status."""
    style = STYLES.get(text.lower().partition(" (")[0])
    return f"[{style}]{escape(text)}[/{style}]" if style else escape(text)


def format_time(time: datetime | None) -> str:
    """Return a moment in the user's time zone, to the second."""
    return time.astimezone().strftime("%Y-%m-%d %H:%M:%S") if time else "-"


def format_duration(start: datetime | None, end: datetime | None) -> str:
    """Return how long something took, or has taken so far."""
    if start is None:
        return "-"
    return format_seconds(((end or datetime.now(UTC)) - start).total_seconds())


def shorten(text: str, width: int = 100) -> str:
    """Return the first line of a text, at most `width` characters of it."""
    line = text.splitlines()[0] if text else ""
    return line if len(line) <= width else f"{line[: width - 1]}…"


def _to_plain(value: object, numbers: ExactNumbers) -> object:
    from pydantic import BaseModel

    if isinstance(value, BaseModel):
        return value.model_dump(mode="json", context=numbers)
    if isinstance(value, list | tuple):
        return [_to_plain(each, numbers) for each in value]
    if isinstance(value, dict):
        return {str(name): _to_plain(each, numbers) for name, each in value.items()}
    return value
