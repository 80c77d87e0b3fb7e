"""One pool of connections for all threads of a process, whichever event loop they run."""

import asyncio
import atexit
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from typing import Any, NamedTuple, TypeVar, cast

from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.execution.watch import Watch
from pgflow_prefect.settings import Settings

T = TypeVar("T")


class Shared(NamedTuple):
    """What threads share, each to be used like the thing itself, from any event loop."""

    store: Store
    watch: Watch


_shared: dict[str, Shared] = {}  # by connection string
_lock = threading.Lock()

_PATIENCE = 2.0  # seconds for closing connections when the process ends


@contextmanager
def share(dsn: str, store: Store, watch: Watch) -> Iterator[None]:
    """Lend what this event loop has opened to the threads of the process, for as long as the block takes."""
    loop = asyncio.get_running_loop()
    with _lock:
        lent = _shared.setdefault(dsn, Shared(_lend(store, loop), _lend(watch, loop)))
    try:
        yield
    finally:
        with _lock:
            if _shared.get(dsn) is lent:
                del _shared[dsn]


def borrow(dsn: str, settings: Settings) -> Shared:
    """Return what the process has for a database; what it has not is opened, in a thread of its own, until it ends.

    Blocks until it is open: call it from a thread that may wait.

    Raises:
        DatabaseUnavailableError: the database can't be reached.
        SchemaMissingError: it has no pgflow schema, or an old one.
    """
    with _lock:
        if dsn not in _shared:
            _shared[dsn] = _open(settings)
        return _shared[dsn]


def _open(settings: Settings) -> Shared:
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="pgflow-store", daemon=True)
    thread.start()
    opened = AsyncExitStack()

    async def enter() -> Shared:
        store = await opened.enter_async_context(open_store(settings))
        watch = Watch(store)
        opened.callback(watch.close)
        return Shared(_lend(store, loop), _lend(watch, loop))

    def close() -> None:
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(opened.aclose(), loop).result(_PATIENCE)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(_PATIENCE)

    try:
        shared = asyncio.run_coroutine_threadsafe(enter(), loop).result()
    except BaseException:
        close()
        raise
    atexit.register(close)  # before the interpreter ends: it would wait for a thread that waits
    return shared


def _lend(thing: T, loop: asyncio.AbstractEventLoop) -> T:
    """Return something whose async methods do their work in another event loop."""
    return cast("T", _Lent(thing, loop))


class _Lent:
    def __init__(self, thing: object, loop: asyncio.AbstractEventLoop) -> None:
        self._thing = thing
        self._loop = loop

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        method = getattr(self._thing, name)

        async def call(*arguments: object, **options: object) -> Any:  # noqa: ANN401  what the method returns
            there = asyncio.run_coroutine_threadsafe(method(*arguments, **options), self._loop)
            return await asyncio.wrap_future(there)

        return call
