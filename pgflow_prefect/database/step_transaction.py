"""Commits a handler's writes through `context.connection` together with its step's completion, or not at all."""

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from types import TracebackType
from typing import Any
from uuid import UUID

import anyio.to_thread
import psycopg
from anyio import CancelScope, CapacityLimiter
from psycopg import sql
from psycopg.pq import TransactionStatus
from pydantic_core import to_json

from pgflow_prefect.database.connection import Row
from pgflow_prefect.database.link import cut
from pgflow_prefect.database.open_transaction import HELD_UP, LoopTransaction, ThreadTransaction
from pgflow_prefect.database.sqlstates import Verdict, Whose, is_link_loss, judge
from pgflow_prefect.database.statements import Statements
from pgflow_prefect.database.step_connection import AsyncConnection, Connector, LazyConnection, SyncConnection
from pgflow_prefect.database.step_link import StepLink
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.errors import NoConnectionError, NotRetriableError, ResultInvalidError, TransientError, UsageError
from pgflow_prefect.models import AnyOutcome, Report, TaskKey
from pgflow_prefect.waiting import make_pauses

OPEN_TOO_LONG = 60.0
"""Seconds after which an open transaction causes a warning, because its locks stay and vacuum waits for it."""

_CANCEL_TIMEOUT = 2.0  # seconds to reach the server with a cancel request, and again to hear its answer

_CHECKED = sql.SQL("SELECT pgflow_prefect.check_result({}::text::jsonb)::text")
"""Calls a function and bounds its result before the server sends any of it."""

_REFUSALS = {"bindings_function": NotRetriableError, "json_limits": ResultInvalidError}
"""The errors of our own checks around a call, by name; any other error is the function's."""

Logger = logging.Logger | logging.LoggerAdapter[Any]


class StepTransaction:
    """The transaction of one execution of a step, if its handler asks for one; leaving the block ends it.

    A call on the event loop's thread gets an async connection, a call on another thread a sync one: async and sync
    handlers are executed there.

    Attributes:
        committed: PostgreSQL has accepted the step's completion, with all writes.
        lost: after the block: PostgreSQL ended the transaction for a reason of the moment, and the step may be
            executed again.
        is_cut_off: after the block: the reason was a lost link. This never counts as a failure of the handler.
    """

    def __init__(
        self,
        connector: Connector | None,
        run_id: UUID,
        task: TaskKey,
        logger: Logger,
        statements: Statements | None = None,
    ) -> None:
        """Prepare a transaction, which begins when the handler asks for it.

        Args:
            connector: opens its connection; None if the handler gets none.
            run_id: the run.
            task: the task.
            logger: for warnings of long waits.
            statements: the pool that asks whether the connection's link is dead; without it, nothing asks.
        """
        self._connector = connector
        self._statements = statements
        self._run_id = run_id
        self._task = task
        self._logger = logger
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._in_thread: ThreadTransaction | None = None
        self._on_loop: LoopTransaction | None = None
        self._opening_in_thread = threading.Lock()
        self._opening_on_loop = asyncio.Lock()
        self._asked = self._ended = self._abandoned = self.committed = self.lost = self.is_cut_off = False
        self._over = threading.Event()
        self._alarm: asyncio.TimerHandle | None = None
        self._link: StepLink | None = None
        self._watch: asyncio.Task[None] | None = None

    @property
    def connection(self) -> SyncConnection | LazyConnection:
        """The connection: a sync one, opened now, or an async one that is opened when it is used.

        Raises:
            UsageError: the step's execution has ended, or the step can have no connection.
            NoConnectionError: the server had none in all the time that a step waits.
        """
        if threading.get_ident() == self._loop_thread:
            return LazyConnection(self._open_on_loop)
        with self._opening_in_thread:
            return self._open_in_thread()

    @property
    def is_open(self) -> bool:
        """Whether the handler has asked for the connection, and got it."""
        return self._opened is not None

    @property
    def _opened(self) -> ThreadTransaction | LoopTransaction | None:
        return self._in_thread or self._on_loop

    def _open_in_thread(self) -> SyncConnection:
        connector = self._prepare(other=self._on_loop)
        pauses = make_pauses(connector.patience)
        while self._in_thread is None:
            try:
                with translate_errors(self._run_id):
                    self._in_thread = ThreadTransaction(connector.open(), connector.bound)
                self._link = self._make_link(connector, self._in_thread.connection)
            except TransientError as error:
                if (pause := self._find_pause(pauses, error)) is None:
                    raise self._refuse(error) from error
                if self._over.wait(pause):  # the step's time is up: it waits no longer
                    self._prepare(other=self._on_loop)
            else:
                self._loop.call_soon_threadsafe(self._set_alarm)
        return self._in_thread.connection

    async def _open_on_loop(self) -> AsyncConnection:
        async with self._opening_on_loop:
            connector = self._prepare(other=self._in_thread)
            pauses = make_pauses(connector.patience)
            while self._on_loop is None:
                try:
                    with translate_errors(self._run_id):
                        self._on_loop = await self._begin_on_loop(connector)
                    self._link = self._make_link(connector, self._on_loop.connection)
                except TransientError as error:
                    if (pause := self._find_pause(pauses, error)) is None:
                        raise self._refuse(error) from error
                    await asyncio.sleep(pause)
                else:
                    self._set_alarm()
            return self._on_loop.connection

    async def _begin_on_loop(self, connector: Connector) -> LoopTransaction:
        transaction = LoopTransaction(await connector.open_async())
        try:
            with self._bounded(transaction.connection):
                await transaction.begin()
        except BaseException:
            await transaction.connection.close()
            raise
        return transaction

    def _find_pause(
        self, pauses: Iterator[float], error: TransientError, what: str = "context.connection"
    ) -> float | None:
        """Return the seconds until the next try; None for no further try."""
        pause = next(pauses, None)
        if pause is not None:
            self._logger.warning(
                "run %s, step %s: %s has to wait: %s; trying again in about %.1f s",
                self._run_id,
                self._task,
                what,
                error,
                pause,
            )
        return pause

    def _refuse(self, error: TransientError) -> NoConnectionError:
        assert self._connector is not None
        return NoConnectionError(
            f"step {self._task}: no connection for context.connection within {self._connector.patience:g} s: {error}"
        )

    @contextmanager
    def _bounded(self, connection: SyncConnection | AsyncConnection) -> Iterator[None]:
        """Bound a statement of ours on the handler's connection: cancel it, and cut the link if no answer comes."""
        assert self._connector is not None
        giving_up: list[asyncio.Task[None]] = []
        timer = self._loop.call_later(
            self._connector.bound, lambda: giving_up.append(self._loop.create_task(_interrupt(connection)))
        )
        try:
            yield
        finally:
            timer.cancel()
            for task in giving_up:
                task.cancel()

    def _prepare(self, other: object) -> Connector:
        if self._connector is None:
            raise UsageError(f"step {self._task}: context.connection is not available here")
        if self._ended:
            raise UsageError(f"step {self._task}: context.connection is gone, for this execution of the step has ended")
        if other is not None:
            raise UsageError(
                f"step {self._task}: context.connection is open, and belongs to "
                f"{'the event loop' if other is self._on_loop else 'a thread'}: one step has one connection"
            )
        self._asked = True
        return self._connector

    def _make_link(self, connector: Connector, connection: SyncConnection | AsyncConnection) -> StepLink | None:
        """Return the link of a connection before the handler gets it, because the handler may close it at once."""
        if self._statements is None:
            return None
        return StepLink(connection, connector, self._statements, self._tell_dead)

    def _set_alarm(self) -> None:
        if self._ended:
            return
        self._alarm = self._loop.call_later(OPEN_TOO_LONG, self._warn)
        if self._link is not None:
            self._watch = self._loop.create_task(self._link.keep_watch())

    def _tell_dead(self, reason: str, seconds: float) -> None:
        self._logger.warning(
            "run %s, step %r: the link of context.connection is dead: its handler has waited for %.0f s, and %s",
            self._run_id,
            self._task.step_slug,
            seconds,
            reason,
        )

    def _warn(self) -> None:
        self._logger.warning(
            "run %s, step %s: the transaction of context.connection has been open for %g s: it keeps its locks and "
            "holds back vacuum; ask for the connection after the slow part of the work",
            self._run_id,
            self._task,
            OPEN_TOO_LONG,
        )

    async def complete(self, result: str, outcome: AnyOutcome | None = None, **fence: object) -> Report:
        """Store the step's result and commit if PostgreSQL accepts it; otherwise the block's end rolls back.

        Args:
            result: JSON text.
            outcome: that the step is skipped, or which branches it takes; None for what its function has said, if any.
            fence: `epoch`, `attempt` and `task_run_id` of the claim; of items of a map `epoch`, `item_indexes` and
                `attempts`, and the result is an array of theirs.

        Raises:
            UsageError: the handler has ended the transaction.
            TransientError: nothing was committed, or the answer to the COMMIT was lost.
            PgflowPrefectError: PostgreSQL refuses the result, or the handler's writes.
        """
        opened = self._opened
        assert opened is not None
        self._check(opened.connection)
        said = None if outcome is None else to_json(outcome).decode()
        parameters = {
            "run_id": self._run_id,
            "result": result,
            "outcome": said,
            **self._task.as_parameters(),
            **fence,
        }
        assert self._connector is not None
        pauses = make_pauses(self._connector.patience)
        while True:
            try:
                with translate_errors(self._run_id):
                    row = await self._complete_once(opened, parameters)
            except TransientError as error:
                # If only the completion had to wait, the handler's work is still there. Its wait has the same limit.
                held_up = isinstance(error.__cause__, psycopg.Error) and error.__cause__.sqlstate in HELD_UP
                if not held_up or (pause := self._find_pause(pauses, error, "the completion")) is None:
                    raise
                await asyncio.sleep(pause)
                with translate_errors(self._run_id):
                    await self._go_back(opened)
            else:
                self.committed = row is not None and bool(row["accepted"])
                return Report.model_validate(row)

    async def _complete_once(
        self, opened: ThreadTransaction | LoopTransaction, parameters: Mapping[str, object]
    ) -> Row | None:
        with self._bounded(opened.connection):
            if isinstance(opened, LoopTransaction):
                return await opened.complete(parameters)
            completed: Row | None = await _run_in_thread(partial(opened.complete, parameters))
            return completed

    async def _go_back(self, opened: ThreadTransaction | LoopTransaction) -> None:
        """Make the transaction what it was before the completion."""
        with self._bounded(opened.connection):
            if isinstance(opened, LoopTransaction):
                await opened.go_back()
            else:
                await _run_in_thread(opened.go_back)

    async def call_function(self, path: tuple[str, str], argument: str) -> str:
        """Call a function of one jsonb in this transaction and return its result as JSON text.

        Args:
            path: its schema and its name.
            argument: JSON text.

        Raises:
            psycopg.Error: whatever the function raises.
            TransientError: PostgreSQL can't be reached at this moment.
        """
        call = _CHECKED.format(sql.SQL("{}(%(input)s::jsonb)").format(sql.Identifier(*path)))
        return await self._call(call, {"input": argument})

    async def call_bound_function(
        self, path: tuple[str, str], argument: str, *, workflow_slug: str, trusted_owners: Sequence[str]
    ) -> str:
        """Call a function that a row has bound the step to, as `call_function` does.

        Args:
            path: its schema and its name.
            argument: JSON text.
            workflow_slug: the run's workflow.
            trusted_owners: the roles whose functions a row may name, beside superusers and the owner of `pgflow`.

        Raises:
            NotRetriableError: another role owns the function, or the role that bound the step may not execute it.
            psycopg.Error: whatever the function raises.
            TransientError: PostgreSQL can't be reached at this moment.
        """
        # The check is the function's argument, so the planner can't evaluate it after the call.
        call = _CHECKED.format(
            sql.SQL(
                "{}(pgflow_prefect.check_function(%(workflow_slug)s, %(step_slug)s, %(schema)s, %(function)s, "
                "%(trusted_owners)s, %(input)s::jsonb))"
            ).format(sql.Identifier(*path))
        )
        parameters = {
            "workflow_slug": workflow_slug,
            "step_slug": self._task.step_slug,
            "schema": path[0],
            "function": path[1],
            "trusted_owners": list(trusted_owners),
            "input": argument,
        }
        return await self._call(call, parameters)

    async def _call(self, call: sql.Composed, parameters: Mapping[str, object]) -> str:
        connection = await self._open_on_loop()
        try:
            row = await (await connection.execute(call, parameters)).fetchone()
        except psycopg.Error as error:
            refusal = _REFUSALS.get(error.diag.constraint_name or "")
            if refusal is None:
                raise
            raise refusal(f"step {self._task}: {error.diag.message_primary}. {error.diag.message_hint}") from None
        return "null" if row is None or row[0] is None else str(row[0])

    async def defer_items(self, step_slug: str, epoch: int, reports: str) -> None:
        """Note that another program will report items of a map, and commit that with the handler's writes.

        Args:
            step_slug: the map.
            epoch: from `take_run`.
            reports: as a JSON array.
        """
        assert isinstance(self._on_loop, LoopTransaction)
        self._check(self._on_loop.connection)
        given = {"run_id": self._run_id, "step_slug": step_slug, "epoch": epoch, "reports": reports}
        with translate_errors(self._run_id), self._bounded(self._on_loop.connection):
            await self._on_loop.commit("defer_items", given)
        self.committed = True

    async def defer(self, **note: object) -> None:
        """Note that another program will report the step, and commit that with the handler's writes.

        Args:
            note: `task_run_id`, `state_name` and `message`.
        """
        assert isinstance(self._on_loop, LoopTransaction)
        self._check(self._on_loop.connection)
        with translate_errors(self._run_id), self._bounded(self._on_loop.connection):
            await self._on_loop.commit("note_state", {"run_id": self._run_id, **self._task.as_parameters(), **note})
        self.committed = True

    def _check(self, connection: SyncConnection | AsyncConnection) -> None:
        """Refuse a transaction that the handler has ended or spoiled, before the completion commits without it."""
        status = connection.info.transaction_status
        if (connection.closed and not connection.broken) or status is TransactionStatus.IDLE:
            raise UsageError(
                f"step {self._task}: the handler has ended the transaction of context.connection; leave that to "
                "pgflow-prefect, which commits it with the step's completion"
            )
        if status is TransactionStatus.INERROR:
            raise UsageError(
                f"step {self._task}: a statement on context.connection has failed, and PostgreSQL will not "
                "commit the others; put one that may fail into a block of `connection.transaction()`"
            )

    def abandon(self) -> None:
        """Note that the handler's thread goes on without the step, so that its writes do not count."""
        self._abandoned = self._ended = True
        self._over.set()

    async def __aenter__(self) -> "StepTransaction":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._ended = True
        self._over.set()
        self.is_cut_off = self._is_cut_off_by(error)
        self.lost = self._is_lost_to(error)
        if self._alarm is not None:
            self._alarm.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if self._asked:
            is_broken = self._abandoned or (self._opened is not None and self._opened.connection.broken)
            with CancelScope(shield=True):
                if self._on_loop is not None:
                    await self._on_loop.connection.close()
                await _run_in_thread(self._end_in_thread)
                if self._link is not None and is_broken:
                    await self._link.end_session()

    def _is_lost_to(self, error: BaseException | None) -> bool:
        if self._opened is None:
            return False  # nothing was lost, so the work must not be repeated
        if isinstance(error, TransientError):  # of the completion
            return True
        if self.is_cut_off:
            return True
        if not isinstance(error, psycopg.Error):
            return False
        return judge(error, Whose.HANDLER, is_cut=self._opened.connection.broken) is Verdict.LOST

    def _is_cut_off_by(self, error: BaseException | None) -> bool:
        """Tell whether the lost link caused an error, also if the handler raised an error of its own from it."""
        if self._opened is None or not self._opened.connection.broken:
            return False
        return any(isinstance(each, psycopg.Error) and is_link_loss(each) for each in _list_causes(error))

    def _end_in_thread(self) -> None:
        with self._opening_in_thread:  # an abandoned thread may be opening it now
            if self._in_thread is None:
                return
            if self._abandoned:
                self._in_thread.cut()
            else:
                self._in_thread.connection.close()


def _list_causes(error: BaseException | None) -> list[BaseException]:
    """Return an error and its causes."""
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


async def _interrupt(connection: SyncConnection | AsyncConnection) -> None:
    with suppress(psycopg.Error, OSError, TimeoutError):
        async with asyncio.timeout(_CANCEL_TIMEOUT):
            if isinstance(connection, psycopg.AsyncConnection):
                await connection.cancel_safe(timeout=_CANCEL_TIMEOUT)
            else:
                await asyncio.to_thread(connection.cancel_safe, timeout=_CANCEL_TIMEOUT)
    await asyncio.sleep(_CANCEL_TIMEOUT)
    cut(connection)


async def _run_in_thread(function: Callable[[], Any]) -> Any:  # noqa: ANN401
    """Run a blocking function, with a limiter of its own, because it must not wait for the handlers of users."""
    return await anyio.to_thread.run_sync(function, limiter=CapacityLimiter(1))
