"""`python -m benchmarks.sides.small_runs by_hand|dbos DSN STEPS AT_ONCE`: numbers of runs in, lines out when done.

By hand: the fastest flow that there is for this, all flow runs in one event loop and with one client.
"""

import asyncio
import sys
from collections.abc import Awaitable, Callable
from typing import Any

Execute = Callable[[], Awaitable[Any]]


def make_flow(steps: int) -> Execute:
    """Return what executes a chain as a flow of Prefect's."""
    from prefect import flow, task  # noqa: PLC0415  no side loads the other's

    @task(persist_result=False)
    async def handle(upstream: int) -> int:
        return upstream + 1

    @flow(persist_result=False)
    async def by_hand() -> int:
        result = 0
        for _ in range(steps):
            result = await handle(result)
        return result

    return by_hand


def make_workflow(steps: int) -> Execute:
    """Return what executes a chain as a workflow of DBOS."""
    from dbos import DBOS  # noqa: PLC0415  no side loads the other's

    async def add_one(upstream: int) -> int:
        return upstream + 1

    handle: Callable[[int], Awaitable[int]] = DBOS.step()(add_one)

    async def chain() -> int:
        result = 0
        for _ in range(steps):
            result = await handle(result)
        return result

    workflow: Execute = DBOS.workflow()(chain)
    return workflow


async def execute_all(execute: Execute, at_once: int) -> None:
    """Execute as many runs as each line of standard input says."""
    slots = asyncio.Semaphore(at_once)

    async def execute_one() -> None:
        async with slots:
            await execute()

    while line := await asyncio.to_thread(sys.stdin.readline):
        await asyncio.gather(*(execute_one() for _ in range(int(line))))
        print("done", flush=True)


async def work_by_hand(steps: int, at_once: int) -> None:
    """Execute flow runs with a client that all of them share."""
    from prefect.context import AsyncClientContext  # noqa: PLC0415  no side loads the other's

    async with AsyncClientContext():
        await execute_all(make_flow(steps), at_once)


def work_with_dbos(dsn: str, steps: int, at_once: int) -> None:
    """Execute workflows of DBOS."""
    from dbos import DBOS  # noqa: PLC0415  no side loads the other's

    from benchmarks.sides.dbos_steps import to_url  # noqa: PLC0415  no side loads the other's

    DBOS(config={"name": "benchmark", "system_database_url": to_url(dsn)})
    workflow = make_workflow(steps)
    DBOS.launch()
    try:
        asyncio.run(execute_all(workflow, at_once))
    finally:
        DBOS.destroy()


if __name__ == "__main__":
    side, dsn, steps, at_once = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    if side == "dbos":
        work_with_dbos(dsn, steps, at_once)
    else:
        asyncio.run(work_by_hand(steps, at_once))
