"""Writes results to Prefect's storage blocks, and reads them there."""

import inspect
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import anyio
from prefect.blocks.core import Block
from prefect.filesystems import LocalFileSystem, RemoteFileSystem

from pgflow_prefect.errors import NotRetriableError, StorageError
from pgflow_prefect.execution.result_options import is_storage
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.threads import run_in_thread

T = TypeVar("T")

_PAUSES = (0.2, 1.0, 3.0)  # seconds before another try: the handler's work is done, and should not be lost

ANSWER_TIMEOUT = 300.0
"""Seconds to wait for one object, with all tries: long enough for gigabytes, and an end where a mount hangs."""

_FOR_GOOD = (PermissionError, NotADirectoryError, IsADirectoryError, TypeError, ValueError, ImportError)
"""Errors that another try would only repeat."""

_MISSING_CODES = frozenset({"404", "NoSuchKey"})
"""boto's codes of an object that does not exist."""


class BlockStorage:
    """A storage block of Prefect, or the name of one, which is loaded at the first use.

    A block that was loaded by name is loaded again after an error, because its credentials may have changed.
    """

    def __init__(self, given: object) -> None:
        self._given = given
        self._block: Any = None if isinstance(given, str) else given

    @property
    def name(self) -> str:
        """What people call it, without secrets."""
        return self._given if isinstance(self._given, str) else name_block(self._given)

    async def read(self, key: str) -> bytes:
        """Return the bytes of an object.

        Raises:
            FileNotFoundError: there is none of this key.
            NotRetriableError: there is no such block.
            StorageError: the storage does not answer, or refuses.
        """
        found = await self._ask("can't be read", lambda block: _call(block, "read_path", key))
        return bytes(found)

    async def write(self, key: str, data: bytes) -> None:
        """Write an object.

        Raises:
            NotRetriableError: there is no such block.
            StorageError: the storage does not answer, or refuses.
        """
        await self._ask("can't be written", lambda block: _call(block, "write_path", key, data))

    async def find_block(self) -> Any:  # noqa: ANN401  any storage block
        """Return the block.

        Raises:
            NotRetriableError: there is no such block, or it is no storage.
        """
        if self._block is None:
            self._block = await _load(str(self._given))
        return self._block

    async def _ask(self, what: str, ask: Callable[[Any], Awaitable[T]]) -> T:
        with bound_wait(f"the result {what} in {self.name}", ANSWER_TIMEOUT):
            return await self._try(what, ask)
        raise AssertionError("the wait returns or raises")

    async def _try(self, what: str, ask: Callable[[Any], Awaitable[T]]) -> T:
        for pause in (*_PAUSES, None):
            try:
                return await ask(await self.find_block())
            except NotRetriableError:
                raise
            except Exception as error:  # noqa: BLE001  whatever the library of the storage raises
                if _is_missing(error):
                    raise FileNotFoundError from None
                if isinstance(self._given, str):
                    self._block = None
                if pause is None or isinstance(error, _FOR_GOOD):
                    # Not its cause: a library's traceback may have the credentials.
                    raise StorageError(f"the result {what} in {self.name}: {describe(error)}") from None
            await anyio.sleep(pause)
        raise AssertionError("the last try returns or raises")


@contextmanager
def bound_wait(problem: str, seconds: float) -> Iterator[None]:
    """Bound the wait for a storage in this block.

    Raises:
        StorageError: the time is over; its message begins with `problem`.
    """
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise StorageError(f"{problem}: no answer in {seconds:g} s")


def name_block(block: object) -> str:
    """Return what people call a storage block, without secrets."""
    if isinstance(block, LocalFileSystem):
        return Path(block.basepath or ".").expanduser().resolve().as_uri()
    if isinstance(block, RemoteFileSystem):
        parts = urlsplit(block.basepath)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
    assert isinstance(block, Block)
    name = block._block_document_name or getattr(block, "bucket_name", None)
    return "/".join(filter(None, [block.get_block_type_slug(), name]))


async def _load(name: str) -> object:
    try:
        block = await Block.aload(name)
    except ValueError:
        raise NotRetriableError(
            f"there is no Prefect block {name!r} for results: create it in Prefect's UI under Blocks, or name another "
            "one by result_storage="
        ) from None
    if not is_storage(block):
        raise NotRetriableError(
            f"Prefect's block {name!r} can't store results, because a {type(block).__name__} has no read_path and "
            "write_path: name another one by result_storage="
        )
    return block


async def _call(block: Any, method: str, *arguments: object) -> Any:  # noqa: ANN401
    function = getattr(block, method)
    if inspect.iscoroutinefunction(function):
        return await function(*arguments)
    # Prefect's own methods exist in two forms, and the async one may block the event loop, as RemoteFileSystem's does.
    options = {"_sync": True} if hasattr(function, "aio") else {}
    # A cancelled step does not wait for a storage that hangs. A late write is harmless: no other attempt has its key.
    answer = await run_in_thread(partial(function, *arguments, **options))
    return await answer if inspect.isawaitable(answer) else answer


def _is_missing(error: Exception) -> bool:
    if isinstance(error, FileNotFoundError):
        return True
    if isinstance(error, ValueError) and "does not exist" in str(error):  # of LocalFileSystem
        return True
    answer = getattr(error, "response", None)  # boto's
    return isinstance(answer, dict) and answer.get("Error", {}).get("Code") in _MISSING_CODES
