"""Writes the texts of pictures: slugs with any characters, cut to a width, and durations."""

import unicodedata
from math import floor, log10

from pgflow_prefect.wording import clean

__all__ = ["clean", "cut", "format_seconds", "measure"]


def measure(text: str) -> int:
    """Return how many columns a text takes in a font whose characters have one or two columns."""
    return len(text) if text.isascii() else sum(map(_measure_character, text))


def _measure_character(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in {"Cf", "Mn", "Me"}:
        return 0
    return 2 if unicodedata.east_asian_width(character) in {"W", "F"} else 1


def cut(text: str, columns: int) -> str:
    """Return a text cut to this number of columns, with `…` in place of its missing end."""
    if measure(text) <= columns:
        return text
    kept, used = 0, 1
    for character in text:
        used += _measure_character(character)
        if used > columns:
            break
        kept += 1
    return f"{text[:kept]}…"


def format_seconds(seconds: float) -> str:
    """Return a duration as people write it: `0.52 s`, or `1:02:03`."""
    if round(seconds, 2) < 60:  # noqa: PLR2004  a minute
        return f"{seconds:.2f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"


def format_instant(seconds: float, apart: float) -> str:
    """Return seconds since a beginning, exact enough to distinguish instants: `12.25 s`, or `0:05:00.5`.

    Args:
        seconds: since the beginning.
        apart: the seconds between two instants that must read differently.
    """
    decimals = max(0, -floor(log10(apart))) if apart > 0 else 0
    if round(seconds, decimals) < 60:  # noqa: PLR2004  a minute
        return f"{seconds:.{decimals}f} s"
    minutes, rest = divmod(round(seconds, decimals), 60)
    hours, minutes = divmod(int(minutes), 60)
    return f"{hours}:{minutes:02}:{rest:0{3 + decimals if decimals else 2}.{decimals}f}"
