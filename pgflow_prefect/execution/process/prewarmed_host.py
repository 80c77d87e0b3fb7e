"""The host of a flow that the user calls: opened while Prefect creates the flow run, closed while it stores its end."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar

from anyio import CancelScope
from pydantic import ValidationError

from pgflow_prefect.execution.process.database_block import find_settings, is_settled
from pgflow_prefect.execution.process.host import Host, open_host
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.settings import Settings

_logger = logging.getLogger(__name__)


class PrewarmedHost:
    """A host for one run that is about to begin.

    Attributes:
        settings: where the database is, and the limits.
    """

    def __init__(self, settings: Settings) -> None:
        """Begin to open it."""
        self.settings = settings
        self._is_taken = False
        self._left = asyncio.Event()
        self._opened: asyncio.Future[Host] = asyncio.get_running_loop().create_future()
        self._task: asyncio.Task[None] | None = asyncio.create_task(self._keep())

    async def _keep(self) -> None:
        try:
            async with open_host(self.settings) as host:
                self._opened.set_result(host)
                await self._left.wait()
        except asyncio.CancelledError:
            self._opened.cancel()
            raise
        except BaseException as error:
            if self._opened.done():
                raise
            self._opened.set_exception(error)  # raised in the run, if it comes to that
            self._opened.exception()

    def fits(self, settings: Settings) -> bool:
        """Tell whether a run with these settings may use it: only the first such run may."""
        return not self._is_taken and self.settings == settings

    @asynccontextmanager
    async def take(self) -> AsyncIterator[Host]:
        """Give the host to one block, and only to this one."""
        self._is_taken = True
        try:
            yield await asyncio.shield(self._opened)  # a cancelled caller stops waiting; the host stays
        finally:
            self._left.set()

    async def close(self) -> None:
        """Close it and wait for that, whether it was taken or not."""
        self._left.set()
        # The traceback of a cancelled task keeps a half-open connection alive: drop it.
        task, self._task = self._task, None
        assert task is not None
        if not self._opened.done():
            task.cancel()
        with CancelScope(shield=True):
            await asyncio.wait([task])
        if task.cancelled():
            return
        try:
            task.result()
        except Exception as error:  # noqa: BLE001  the run is over
            _logger.warning("the database was not closed properly: %s", describe_error(error))


_AHEAD: ContextVar[PrewarmedHost | None] = ContextVar("pgflow_host_ahead", default=None)


@asynccontextmanager
async def open_ahead(settings: Settings | None) -> AsyncIterator[None]:
    """Open a host now for the flow run that the block creates and executes.

    Args:
        settings: read from the environment if not given. If they are wrong, the run will say so. If only Prefect knows
            the database, nothing is opened ahead.
    """
    with suppress(ValidationError):
        settings = settings or Settings()
    if settings is None or not is_settled(settings):
        yield
        return
    ahead = PrewarmedHost(settings)
    token = _AHEAD.set(ahead)
    try:
        yield
    finally:
        _AHEAD.reset(token)
        await ahead.close()


@asynccontextmanager
async def open_host_for_run(settings: Settings) -> AsyncIterator[Host]:
    """Open a host for one run, or take the one that was opened ahead for it.

    Raises:
        UsageError: the settings name no database that can be found.
        DatabaseUnavailableError: it can't be reached.
        SchemaMissingError: it has no pgflow schema, or an old one.
    """
    ahead = _AHEAD.get()
    if ahead is not None and ahead.fits(settings):
        async with ahead.take() as host:
            yield host
    else:
        async with open_host(await find_settings(settings)) as host:
            yield host
