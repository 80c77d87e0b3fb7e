"""One pool of connections for all threads and event loops of a process."""

import asyncio
import atexit
import threading
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar, cast
from uuid import UUID, uuid4

from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.execution.process.external_steps import Watch
from pgflow_prefect.settings import Settings

T = TypeVar("T")


class Shared(NamedTuple):
    """What threads share; each object works from any event loop like the original."""

    store: Store
    watch: Watch


_lent: dict[UUID, Shared] = {}  # by the token that `lend` returned
_own: dict[str, Shared] = {}  # by connection string
_opening = threading.Lock()

_PATIENCE = 2.0  # seconds for closing connections when the process ends


@contextmanager
def lend(store: Store, watch: Watch) -> Iterator[UUID]:
    """Lend this event loop's connections to the threads of the process, until the block ends.

    Returns:
        The token by which a thread borrows them. It means nothing in another process.
    """
    loop, token = asyncio.get_running_loop(), uuid4()
    _lent[token] = Shared(_make_usable(store, loop), _make_usable(watch, loop))
    try:
        yield token
    finally:
        del _lent[token]


def borrow(token: UUID, dsn: str, settings: Settings) -> Shared:
    """Return the lent store; in another process, the store that this process opened for all its threads.

    Blocks until it is open: call it from a thread that may wait. It stays open until the process ends.

    Raises:
        DatabaseUnavailableError: the database can't be reached.
        SchemaMissingError: it has no pgflow schema, or an old one.
    """
    if lent := _lent.get(token):
        return lent
    with _opening:
        if dsn not in _own:
            _own[dsn] = _open(settings)
        return _own[dsn]


def _open(settings: Settings) -> Shared:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="pgflow-store", daemon=True)
    thread.start()
    opened = AsyncExitStack()

    async def enter() -> Shared:
        store = await opened.enter_async_context(open_store(settings, executes_moved=True))
        watch = Watch(store)
        opened.callback(watch.close)
        return Shared(_make_usable(store, loop), _make_usable(watch, loop))

    def close() -> None:
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(opened.aclose(), loop).result(_PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_PATIENCE)
        if not thread.is_alive():
            loop.close()

    try:
        shared = asyncio.run_coroutine_threadsafe(enter(), loop).result()
    except BaseException:
        close()
        raise
    atexit.register(close)  # before the interpreter ends, which would wait for this thread for ever
    return shared


def _make_usable(thing: T, loop: asyncio.AbstractEventLoop) -> T:
    """Return a stand-in whose async methods do their work in another event loop."""
    return cast("T", _Usable(thing, loop))


class _Usable:
    def __init__(self, thing: object, loop: asyncio.AbstractEventLoop) -> None:
        self._thing = thing
        self._loop = loop

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  what the thing has by this name
        method = getattr(self._thing, name)
        if not callable(method):
            return method  # such as what the database can do, which never changes

        async def call(*arguments: object, **options: object) -> Any:  # noqa: ANN401  what the method returns
            there = asyncio.run_coroutine_threadsafe(method(*arguments, **options), self._loop)
            return await asyncio.wrap_future(there)

        return call
