"""Text that people read and write: without characters that a terminal, a log or a page would obey; durations."""

import copy
import logging
import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from difflib import get_close_matches

_FORBIDDEN = frozenset("\ufffe\uffff")
"""XML has no way to write these."""

_DIRECTIONS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
"""They would turn round what stands after them."""

_COMMANDS = frozenset({"Cc", "Cs", "Zl", "Zp"})
"""Unicode's categories of controls, surrogates, and separators of lines and paragraphs."""


def clean(text: str) -> str:
    """Return a text on one line, with a visible stand-in for each character that a terminal or a picture would obey."""
    return text if text.isprintable() else "".join(map(_show, text))


def clean_lines(text: str) -> str:
    """Return a text of several lines, each cleaned; tabs stay."""
    return text if text.isprintable() else "".join(each if each in "\n\t" else _show(each) for each in text)


def clean_block(text: str) -> str:
    """Return a text of several lines, each cleaned; those after the first are indented, and look like no record."""
    return clean_lines(text).replace("\n", "\n    ")


def write_code(text: str) -> str:
    """Return a text as a code span of Markdown, in which no link, picture or tag is one."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * (longest + 1)
    return f"{fence} {clean(text)} {fence}" if longest else f"{fence}{clean(text)}{fence}"


def escape_json(text: str) -> str:
    r"""Return a JSON document with `\uXXXX` for each character that a terminal would obey: the same value."""
    if text.isprintable():
        return text
    return "".join(each if each in "\n\t" or _show(each) == each else _escape(each) for each in text)


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
_PART = re.compile(r"(\d{1,12}(?:\.\d{1,12})?)([smhdw])", re.ASCII)


def parse_duration(text: str, units: str = "smhdw", *, is_exact: bool = False) -> timedelta | None:
    """Return how long `90m`, `2h`, `1.5d` or `1h30m` is; None where a text is no duration, or is longer than any.

    Args:
        text: numbers, each with its unit.
        units: those that may be used: seconds, minutes, hours, days, weeks.
        is_exact: one whole number with one unit, and nothing else.
    """
    parts = _PART.findall(text)
    if (
        not parts
        or "".join(number + unit for number, unit in parts) != text
        or not {unit for _, unit in parts} <= {*units}
    ):
        return None
    if is_exact and (len(parts) > 1 or "." in text):
        return None
    try:
        return sum((timedelta(**{_UNITS[unit]: float(number)}) for number, unit in parts), timedelta())
    except OverflowError:
        return None


def write_moment(moment: datetime) -> str:
    """Return a moment in UTC as ISO 8601 has it; without a time zone, it counts as local time."""
    return moment.astimezone(UTC).isoformat()


def _escape(character: str) -> str:
    units = character.encode("utf-16-be", "surrogatepass")
    return "".join(f"\\u{units[place]:02x}{units[place + 1]:02x}" for place in range(0, len(units), 2))


def _show(character: str) -> str:
    code = ord(character)
    if code < ord(" "):
        return chr(0x2400 + code)  # Unicode's pictures of control characters
    if character in _FORBIDDEN | _DIRECTIONS or unicodedata.category(character) in _COMMANDS:
        return "\N{REPLACEMENT CHARACTER}"
    return character


class CleanFormatter(logging.Formatter):
    """Writes each record as one line, and a traceback indented below it: no message can forge another record."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  the standard library's name
        """Return the line, with the message cleaned."""
        record.message = clean(record.message)
        return super().formatMessage(record)

    def formatException(self, ei: object) -> str:  # noqa: N802  the standard library's name
        """Return the traceback, cleaned and indented."""
        lines = clean_lines(super().formatException(ei)).split("\n")  # type: ignore[arg-type]
        return "\n".join(f"    {line}" for line in lines)


class CleanBlockFormatter(logging.Formatter):
    """Writes a record as its base class does; the lines of a message after the first are indented, and forge none."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the lines of the record; the record itself stays as it is, for other handlers."""
        return super().format(self.clean(record))

    def clean(self, record: logging.LogRecord) -> logging.LogRecord:
        """Return a record that says the same, with the texts cleaned that others have written."""
        cleaned = copy.copy(record)
        cleaned.msg, cleaned.args = clean_block(record.getMessage()), ()
        if isinstance(record.exc_info, tuple) and record.exc_info[0] is not None:
            cleaned.exc_text = f"    {clean_block(self.formatException(record.exc_info))}"
        if record.stack_info:
            cleaned.stack_info = clean_block(record.stack_info)
        return cleaned


COMPARISONS_MADE = 10_000
"""Comparing all mistyped names with all known ones is quadratic: after these many, about a second, names go without."""


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean 'x'?)` for the known name nearest to a mistyped one, or nothing."""
    nearest = get_close_matches(name, list(known), n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def suggest_each(names: Iterable[str], known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Yield each mistyped name with what `suggest` says of it, as long as that stays affordable."""
    for made, name in enumerate(names, 1):
        yield name, suggest(name, known) if made * len(known) <= COMPARISONS_MADE else ""
