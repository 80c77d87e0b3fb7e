"""pgqueuer: a job a step; a step that is done counts down those that wait for it, and enqueues those at zero.

Its worker deletes finished jobs in batches, later: timed is until the last step has counted, which flatters it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import asyncpg
from anyio.from_thread import start_blocking_portal
from pgqueuer.adapters.drivers.asyncpg import AsyncpgDriver
from pgqueuer.models import Job as QueueJob
from pgqueuer.qm import QueueManager
from pgqueuer.queries import Queries
from psycopg.conninfo import conninfo_to_dict

from benchmarks.engine import Graph
from benchmarks.shapes import Trace, find_downstream
from benchmarks.sides import Job, Prepare

ENTRYPOINT = "step"
BATCH = 100  # jobs taken at once; its default is ten

TABLE = "CREATE TABLE unmet (run text, step text, steps int, PRIMARY KEY (run, step)) WITH (fillfactor = 50)"
BEGIN = "INSERT INTO unmet SELECT $1, * FROM unnest($2::text[], $3::int[])"
COUNT_DOWN = "UPDATE unmet SET steps = steps - 1 WHERE run = $1 AND step = ANY($2) RETURNING step, steps"
LEFT = "SELECT count(*) FROM pgqueuer"

TIMEOUT = 60.0  # seconds


@dataclass
class Run:
    """One execution of a graph.

    Attributes:
        key: in the table of counters.
        downstream: the steps that wait for each step.
        handlers: by step.
        left: how many steps have yet to end.
        ended: set when none has.
    """

    key: str
    downstream: Graph
    handlers: dict[str, Callable[[], Coroutine[Any, Any, int]]]
    left: int
    ended: asyncio.Event


@dataclass
class Worker:
    """The worker of the queue, and the process that gives it work.

    Attributes:
        db: a connection of our own: with asyncpg, which hears of new jobs at once; with psycopg a chain is slow.
        queries: pgqueuer's.
        run: the one under way.
    """

    db: asyncpg.Connection
    queries: Queries
    run: Run | None = None
    counting: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def execute(self, graph: Graph, handlers: dict[str, Callable[[], Coroutine[Any, Any, int]]]) -> None:
        """Execute a graph to its end."""
        downstream = find_downstream(graph)
        self.run = Run(uuid4().hex, downstream, handlers, len(graph), asyncio.Event())
        await self.db.execute(BEGIN, self.run.key, [*graph], [len(upstream) for upstream in graph.values()])
        await self.enqueue([step for step, upstream in graph.items() if not upstream])
        await asyncio.wait_for(self.run.ended.wait(), TIMEOUT)

    async def enqueue(self, steps: list[str]) -> None:
        """Put steps on the queue."""
        await self.queries.enqueue([ENTRYPOINT] * len(steps), [step.encode() for step in steps], [0] * len(steps))

    async def perform(self, job: QueueJob) -> None:
        """Do a step, and start what waited for it alone."""
        run = self.run
        assert run is not None
        assert job.payload is not None
        step = job.payload.decode()
        await run.handlers[step]()
        if below := run.downstream[step]:
            async with self.counting:
                counted = await self.db.fetch(COUNT_DOWN, run.key, below)
            if ready := [each for each, unmet in counted if not unmet]:
                await self.enqueue(ready)
        run.left -= 1
        if not run.left:
            run.ended.set()

    async def wait_until_empty(self) -> None:
        """Return once no job is left."""
        async with asyncio.timeout(TIMEOUT):
            while await self.db.fetchval(LEFT):  # noqa: ASYNC110  the database can only be asked
                await asyncio.sleep(0.05)


@asynccontextmanager
async def open_worker(dsn: str) -> AsyncIterator[Worker]:
    """Create the tables, and have a worker wait for jobs."""
    parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    place = {"host": parts["host"], "user": parts["user"], "database": parts["dbname"]}
    db, listening = await asyncpg.connect(**place), await asyncpg.connect(**place)
    queries = Queries(AsyncpgDriver(listening))
    await queries.install()
    await db.execute(TABLE)
    worker = Worker(db, queries)
    manager = QueueManager(queries)
    manager.entrypoint(ENTRYPOINT)(worker.perform)
    running = asyncio.create_task(manager.run(batch_size=BATCH))
    yield worker
    manager.shutdown.set()
    await running
    await asyncio.gather(db.close(), listening.close())


@contextmanager
def open_side(dsn: str) -> Iterator[Prepare]:
    """Keep a worker, in a thread with an event loop of its own."""
    with start_blocking_portal() as portal, portal.wrap_async_context_manager(open_worker(dsn)) as worker:

        def prepare(name: str, graph: Graph, pause: float, trace: Trace) -> Job:
            handlers = {step: trace.make_async(step, pause) for step in graph}
            return Job(
                lambda: portal.call(worker.execute, graph, handlers), lambda: portal.call(worker.wait_until_empty)
            )

        yield prepare
