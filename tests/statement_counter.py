"""How many statements a database gets from its clients, counted on their way to it.

PostgreSQL's own counts have those of autovacuum in them, and lag behind.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.silent_proxy import silent_proxy

_HEAD = 5
"""Bytes of a message before its body: its type, and a length that counts itself and the body."""
_QUERY, _PARSE, _SYNC = b"Q", b"P", b"S"
"""A simple query, and the text and the end of an extended one. In autocommit, what ends a request is a transaction."""


@dataclass
class StatementCounter:
    """Counts what clients send through a proxy.

    Attributes:
        dsn: by which clients reach the database through it.
        count: statements so far. A client that has its answer has been counted.
        texts: the statements' texts so far; without those that a client prepared before.
    """

    dsn: str = ""
    count: int = field(default=0)
    texts: list[str] = field(default_factory=list)

    def count_calls(self, function: str) -> int:
        """Return how many statements so far call a function of `pgflow_prefect`."""
        return sum(f"pgflow_prefect.{function}(" in text for text in self.texts)

    def listen(self) -> "_Link":
        """Return what hears the bytes of one more client, in any pieces."""
        return _Link(self)


@dataclass
class _Link:
    counter: StatementCounter
    _rest: bytes = b""
    _has_begun: bool = False

    def __call__(self, part: bytes) -> None:
        self._rest += part
        if not self._has_begun:
            self._skip_first()
        while self._has_begun and len(self._rest) >= _HEAD:
            end = 1 + int.from_bytes(self._rest[1:_HEAD], "big")
            if len(self._rest) < end:
                return
            self.counter.count += self._rest[:1] in {_QUERY, _SYNC}
            if self._rest[:1] in {_QUERY, _PARSE}:
                self.counter.texts.append(self._rest[_HEAD:end].decode(errors="replace"))
            self._rest = self._rest[end:]

    def _skip_first(self) -> None:
        """Skip the message that begins a session: it is the only one without a type."""
        length = int.from_bytes(self._rest[:4], "big")
        if 0 < length <= len(self._rest):
            self._rest = self._rest[length:]
            self._has_begun = True


@contextmanager
def count_statements(dsn: str) -> Iterator[StatementCounter]:
    """Count the statements of all clients that use the yielded counter's connection string."""
    counter = StatementCounter()
    with silent_proxy(dsn, hear=counter.listen) as proxy:
        counter.dsn = f"{proxy.dsn} gssencmode=disable"  # or a session begins with a question about encryption
        yield counter
