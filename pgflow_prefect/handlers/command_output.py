"""What a program writes: lines for the step's log, bounded and cleaned, and the last line as its result."""

import os
import re
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from anyio.lowlevel import checkpoint

from pgflow_prefect.database.step_transaction import Logger
from pgflow_prefect.wording import clean_lines

LINE_LIMIT = 2_000
"""Bytes of a line that the log shows."""

LOG_LIMIT = 1_000_000
"""Bytes of one attempt's output that are logged."""

TAIL = 20
"""The last lines in the message of a failure."""

_TAIL_LINE = 500  # bytes of each of them
_LINE_COST = 80  # bytes that count for a line beside its text: an empty one is a record in Prefect, too
_LINES_AT_ONCE = 50  # lines after which the rest of this process has its turn
_SHORTEST_SECRET = 4  # characters: a shorter value would blacken ordinary text

_OURS = re.compile(r"PGFLOW_(TOKEN_\w+|QUEUE_KEY|DSN)|PGPASSWORD|PREFECT_API_(KEY|AUTH_STRING)", re.ASCII)
_SECRET = re.compile(r"key|token|secret|passw|pwd|credential|signature|auth|dsn|login|jwt", re.IGNORECASE)
_HARMLESS = re.compile(r"PATH|HOME|PWD|USER|LOGNAME|SHELL|TERM|TZ|LANG|LANGUAGE|LC_[A-Z]+|TMPDIR|HOSTNAME", re.ASCII)


def find_secrets(
    env: Mapping[str, str], passed: Collection[str], environ: Mapping[str, str], others: Iterable[str] = ()
) -> tuple[bytes, ...]:
    """Return what no line may show, the longest first.

    These are the values that a program gets from the worker's environment, except those of variables such as `PATH`;
    the values of its other variables whose names look like a secret; and the worker's own secrets.

    Args:
        env: variables with their values.
        passed: names of variables of the worker.
        environ: the worker's environment.
        others: more secrets of the worker.
    """
    values = [value for name, value in env.items() if _SECRET.search(name)]
    values += [environ.get(name, "") for name in passed if not _HARMLESS.fullmatch(name)]
    values += [value for name, value in environ.items() if _OURS.fullmatch(name)]
    parts = {part.strip() for value in (*values, *others) for part in value.splitlines()}
    return tuple(sorted((os.fsencode(each) for each in parts if len(each) >= _SHORTEST_SECRET), key=len, reverse=True))


@dataclass(frozen=True)
class Line:
    """A line of output.

    Attributes:
        text: as much of it as was kept, without the line break.
        is_cut: whether it was longer.
    """

    text: bytes
    is_cut: bool = False


@dataclass
class LineSplitter:
    """Splits output into lines, of which each takes a bounded memory.

    Attributes:
        most: bytes of a line that are kept.
    """

    most: int
    _begun: bytearray = field(default_factory=bytearray, init=False)
    _is_cut: bool = field(default=False, init=False)

    def feed(self, chunk: bytes) -> Iterator[Line]:
        """Yield the lines that a chunk completes."""
        first, *others = chunk.split(b"\n")
        self._keep(first)
        for each in others:
            yield self._take()
            self._keep(each)

    def end(self) -> Iterator[Line]:
        """Yield the line that has no line break, if there is one."""
        if self._begun:
            yield self._take()

    def _keep(self, part: bytes) -> None:
        room = self.most - len(self._begun)
        self._begun += part[:room]
        self._is_cut = self._is_cut or len(part) > room

    def _take(self) -> Line:
        line = Line(bytes(self._begun), self._is_cut)
        self._begun.clear()
        self._is_cut = False
        return line


@dataclass
class OutputLog:
    """Logs lines without secrets and control characters, up to a limit.

    Attributes:
        logger: of the step.
        secrets: from `find_secrets`.
    """

    logger: Logger
    secrets: tuple[bytes, ...]
    _left: int = field(default=LOG_LIMIT, init=False)
    _hidden: int = field(default=0, init=False)
    _tail: deque[Line] = field(default_factory=lambda: deque(maxlen=TAIL), init=False)

    @property
    def kept(self) -> int:
        """Bytes of a line that are needed here: with those at the end, a secret that the cut would hide is found."""
        return LINE_LIMIT + max(map(len, self.secrets), default=0)

    async def show(self, lines: Iterable[Line]) -> None:
        """Log these lines, and let the rest of this process go on meanwhile."""
        for number, line in enumerate(lines):
            if line.text.strip():
                self._tail.append(Line(line.text[: self.kept], line.is_cut or len(line.text) > self.kept))
            self._log(line)
            if number % _LINES_AT_ONCE == _LINES_AT_ONCE - 1:
                await checkpoint()

    def _log(self, line: Line) -> None:
        if self._left <= 0:
            self._hidden += 1
            return
        text = self.write(line, LINE_LIMIT)
        self._left -= len(text) + _LINE_COST
        self.logger.info("%s", text)
        if self._left <= 0:
            self.logger.warning(
                "the output is longer than %s bytes: its further lines are not logged", f"{LOG_LIMIT:,}"
            )

    def end(self) -> None:
        """Say how many lines were not logged."""
        if self._hidden:
            self.logger.warning("%s further lines of output were not logged", f"{self._hidden:,}")

    def describe_tail(self) -> str:
        """Return the last lines that are not empty, indented; empty if there are none."""
        return "".join(f"\n    {self.write(line, _TAIL_LINE)}" for line in self._tail)

    def write(self, line: Line, limit: int) -> str:
        """Return a line as text that any log, page and terminal can show."""
        text = line.text[: self.kept]
        for secret in self.secrets:
            text = text.replace(secret, b"*" * len(secret))  # as long as before, so that the cut stays where it is
        shown = clean_lines(text[:limit].rstrip(b"\r").decode("utf-8", "replace"))
        return f"{shown} …" if line.is_cut or len(line.text) > limit else shown
