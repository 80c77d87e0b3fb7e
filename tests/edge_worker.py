"""A player of pgflow's unmodified Edge worker, by its contract: it knows nothing of ours.

It does what pgflow's TypeScript worker does, in the same order: it registers, gives a sign of life, reads a batch of
messages, starts their tasks, executes them, reports each, and only then polls again. It stops when it is deprecated.
`EdgeFunction` plays the platform, which starts a new worker where none is alive.
"""

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Self
from uuid import UUID, uuid4

import psycopg
from psycopg.rows import dict_row
from psycopg.types.json import Jsonb
from psycopg_pool import ConnectionPool

BATCH = 10  # messages of one poll, and tasks at the same time
HIDDEN = 5  # seconds for which a message that is read stays hidden, until its task is started
HEARTBEAT = 5.0  # seconds between two signs of life, at least
POLL = 2  # seconds that one poll waits for messages, at most
CONNECTIONS = 4
_PATIENCE = 10.0  # seconds for a connection
_RETRY = 0.05  # seconds before a poll that failed is tried again
_LOOK = 0.05  # seconds between two looks of the platform

_READ = """
    SELECT msg_id FROM pgmq.read_with_poll(queue_name => %s, vt => %s, qty => %s, max_poll_seconds => %s,
                                           poll_interval_ms => 100)
"""
_HAS_TABLE = "SELECT to_regclass('pgflow.worker_functions') IS NOT NULL"
_BEAT = """
    UPDATE pgflow.workers SET last_heartbeat_at = clock_timestamp() WHERE worker_id = %s
    RETURNING deprecated_at IS NOT NULL AS is_deprecated
"""


@dataclass(frozen=True)
class EdgeTask:
    """A task as a handler of an Edge worker sees it.

    Attributes:
        run_id: its run.
        step: its step.
        index: its number in the step.
        given: a map's element, the input of the run for a root, or the outputs of what the step waits for.
    """

    run_id: UUID
    step: str
    index: int
    given: object


EdgeHandler = Callable[[EdgeTask], object]


class FlowMismatchError(Exception):
    """The flow in the database is not the one that the worker has."""


class EdgeWorker:
    """One worker of one flow, in threads of its own.

    Attributes:
        worker_id: of its row.
        executed: the tasks that it has begun, in their order.
        errors: of statements, such as while PostgreSQL restarts; the worker goes on after each.
    """

    def __init__(
        self,
        dsn: str,
        flow: str,
        handler: EdgeHandler,
        *,
        function: str = "edge",
        shape: object = None,
        heartbeat: float = HEARTBEAT,
        poll: int = POLL,
    ) -> None:
        """Prepare it.

        Args:
            dsn: of the database.
            flow: that it works on.
            handler: executes every step; what it raises is the task's failure.
            function: the name of the Edge Function.
            shape: what the worker's code says of the flow; as the database has it, where not given.
            heartbeat: seconds between two signs of life.
            poll: seconds that a poll waits.
        """
        self.worker_id = uuid4()
        self.executed: list[EdgeTask] = []
        self.errors: list[psycopg.Error] = []
        self._flow, self._handler, self._function, self._shape = flow, handler, function, shape
        self._heartbeat, self._poll = heartbeat, poll
        self._pool = ConnectionPool(
            dsn,
            min_size=1,
            max_size=CONNECTIONS,
            open=False,
            timeout=_PATIENCE,
            check=ConnectionPool.check_connection,
            kwargs={"autocommit": True, "prepare_threshold": None},
        )
        self._maps: set[str] = set()
        self._can_stop = False
        self._next_beat = 0.0
        self._stopping, self._killed = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"edge worker of {flow}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def is_alive(self) -> bool:
        """Whether it takes tasks; one that was deprecated has stopped by itself."""
        return self._thread.is_alive()

    @property
    def is_killed(self) -> bool:
        """Whether it has been killed: from now on it reports nothing."""
        return self._killed.is_set()

    def start(self) -> None:
        """Register and begin to work.

        Raises:
            FlowMismatchError: the database has another flow.
        """
        self._pool.open()
        try:
            self._register()
        except BaseException:
            self._pool.close()
            raise
        self._thread.start()

    def stop(self) -> None:
        """Stop as the platform ends it: what it executes is reported, what it has just read is not executed."""
        self._stopping.set()
        self._thread.join()

    def kill(self) -> None:
        """End without a word: nothing that it executes is reported any more."""
        self._killed.set()
        self.stop()

    def await_end(self) -> None:
        """Wait until it has stopped by itself, as it does when it is deprecated."""
        self._thread.join()

    def _ask(self, statement: str, *values: object) -> list[dict[str, object]]:
        with self._pool.connection() as connection:
            cursor = connection.cursor(row_factory=dict_row)
            return [dict(row) for row in cursor.execute(statement.encode(), values or None)]

    def _has(self, function: str) -> bool:
        [found] = self._ask("SELECT to_regprocedure(%s) IS NOT NULL AS is_there", f"pgflow.{function}")
        return bool(found["is_there"])

    def _register(self) -> None:
        if self._has("track_worker_function(text)"):
            self._ask("SELECT pgflow.track_worker_function(%s)", self._function)
        self._can_stop = self._has("mark_worker_stopped(uuid)")
        self._compile()
        steps = self._ask("SELECT step_slug FROM pgflow.steps WHERE flow_slug = %s AND step_type = 'map'", self._flow)
        self._maps = {str(step["step_slug"]) for step in steps}
        register = "INSERT INTO pgflow.workers (queue_name, worker_id, function_name) VALUES (%s, %s, %s) RETURNING 1"
        self._ask(register, self._flow, self.worker_id, self._function)

    def _compile(self) -> None:
        for arguments, more in (("text, jsonb, boolean", ", false"), ("text, jsonb", "")):
            if not self._has(f"ensure_flow_compiled({arguments})"):
                continue
            shape = self._shape
            if shape is None:
                [found] = self._ask("SELECT pgflow._get_flow_shape(%s) AS shape", self._flow)
                shape = found["shape"]
            call = f"SELECT pgflow.ensure_flow_compiled(%s, %s{more}) ->> 'status' AS status"
            [answer] = self._ask(call, self._flow, Jsonb(shape))
            if answer["status"] == "mismatch":
                raise FlowMismatchError(self._flow)
            return

    def _live(self) -> None:
        try:
            with ThreadPoolExecutor(BATCH) as at_work:
                while not self._stopping.is_set() and not self._is_deprecated():
                    [*at_work.map(self._execute, self._take())]
            if not self._killed.is_set() and self._can_stop:
                self._try("SELECT pgflow.mark_worker_stopped(%s)", self.worker_id)
        finally:
            self._pool.close()  # where flows move often, there are many that have ended by themselves

    def _try(self, statement: str, *values: object) -> list[dict[str, object]]:
        """Return the rows; none where the statement fails, which is noted."""
        try:
            return self._ask(statement, *values)
        except psycopg.Error as error:
            self.errors.append(error)
            return []

    def _is_deprecated(self) -> bool:
        if time.monotonic() < self._next_beat:
            return False
        answer = self._try(_BEAT, self.worker_id)
        self._next_beat = time.monotonic() + (self._heartbeat if answer else 0)
        return bool(answer and answer[0]["is_deprecated"])

    def _take(self) -> list[EdgeTask]:
        before = len(self.errors)
        found = self._try(_READ, self._flow, HIDDEN, BATCH, self._poll)
        if len(self.errors) > before:
            self._stopping.wait(_RETRY)
        if not found:
            return []
        start = "SELECT * FROM pgflow.start_tasks(%s, %s::bigint[], %s)"
        tasks = self._try(start, self._flow, [each["msg_id"] for each in found], self.worker_id)
        # As in pgflow's worker: what was started while it stops is left for a requeue.
        return [] if self._stopping.is_set() else [self._read_task(each) for each in tasks]

    def _read_task(self, row: dict[str, object]) -> EdgeTask:
        step, given = str(row["step_slug"]), row["input"]
        if step not in self._maps and row.get("flow_input") is not None:
            given = row["flow_input"]
        return EdgeTask(UUID(str(row["run_id"])), step, int(str(row["task_index"])), given)

    def _execute(self, task: EdgeTask) -> None:
        self.executed.append(task)
        key = (task.run_id, task.step, task.index)
        try:
            output = self._handler(task)
            if not self._killed.is_set():
                self._ask("SELECT pgflow.complete_task(%s, %s, %s, %s)", *key, Jsonb(output))
        except Exception as error:  # noqa: BLE001  whatever a handler raises, and a report that failed, as in pgflow's worker
            if isinstance(error, psycopg.Error):
                self.errors.append(error)
            if not self._killed.is_set():
                self._try("SELECT pgflow.fail_task(%s, %s, %s, %s)", *key, str(error))


class EdgeFunction:
    """The platform's side of an Edge Function: starts a worker where it is switched on and none is alive.

    The switch is `pgflow.worker_functions.enabled` where this version of pgflow has the table, else `enabled`.
    A worker that is deprecated ends by itself; the next one begins once the function is switched on.

    Attributes:
        enabled: may be set where pgflow has no such table.
        workers: those so far, in their order.
    """

    def __init__(self, make: Callable[[], EdgeWorker], dsn: str, name: str = "edge") -> None:
        """Prepare it.

        Args:
            make: returns a worker that has not begun.
            dsn: of the database.
            name: of the function, as the worker registers it.
        """
        self.enabled = True
        self.workers: list[EdgeWorker] = []
        self._make, self._dsn, self._name = make, dsn, name
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"edge function {name}")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopping.set()
        self._thread.join()
        for worker in self.workers:
            worker.stop()

    @property
    def executed(self) -> list[EdgeTask]:
        """The tasks that its workers have begun."""
        return [task for worker in [*self.workers] for task in worker.executed]

    def _watch(self) -> None:
        while not self._stopping.wait(_LOOK):
            with suppress(psycopg.OperationalError):  # PostgreSQL restarts: the next look finds it again
                if not any(worker.is_alive for worker in self.workers) and self._is_switched_on():
                    worker = self._make()
                    worker.start()
                    self.workers.append(worker)

    def _is_switched_on(self) -> bool:
        with psycopg.connect(self._dsn, autocommit=True) as connection:
            if connection.execute(_HAS_TABLE).fetchone() == (False,):
                return self.enabled
            find = "SELECT enabled FROM pgflow.worker_functions WHERE function_name = %s"
            found = connection.execute(find, [self._name]).fetchone()
            return found is None or bool(found[0])
