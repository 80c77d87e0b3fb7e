"""Reads what people type for a run: its id, the beginning of its id, or `latest`."""

import re
from dataclasses import dataclass
from uuid import UUID

from pgflow_prefect.errors import UsageError

LATEST = "latest"
"""Stands for the run that began last."""

_HEX_DIGITS = 32
_DIGITS = re.compile(r"[0-9a-f]{1,32}", re.ASCII)


@dataclass(frozen=True)
class RunName:
    """A run as a person typed it.

    Attributes:
        text: the text that was typed.
        first: the smallest id that it may mean.
        last: the greatest one; None for `latest`, which is compared with no id.
    """

    text: str
    first: UUID | None = None
    last: UUID | None = None

    @property
    def run_id(self) -> UUID | None:
        """The id, if the whole of it was typed."""
        return self.first if self.first == self.last else None


def parse_run_name(text: str) -> RunName:
    """Return the meaning of a text.

    Raises:
        UsageError: it can't be a run's id, nor the beginning of one.
    """
    if text == LATEST:
        return RunName(text)
    try:
        whole = UUID(text)  # also with braces, or as urn:uuid:…
    except ValueError:
        digits = _read_digits(text)
    else:
        return RunName(text, whole, whole)
    return RunName(text, UUID(digits.ljust(_HEX_DIGITS, "0")), UUID(digits.ljust(_HEX_DIGITS, "f")))


def _read_digits(text: str) -> str:
    """Return the digits of the beginning of an id, with its dashes in the right places or without them."""
    lower = text.lower()
    digits = lower.replace("-", "")
    if _DIGITS.fullmatch(digits):
        whole = str(UUID(digits.ljust(_HEX_DIGITS, "0")))
        if lower in {digits, whole[: len(lower)]}:
            return digits
    raise UsageError(f"RUN_ID {text!r} is no run's id: give the id, the beginning of it, or {LATEST!r}")
