"""What the steps of the chain do that most of these tests run."""

CHAIN_HANDLERS = '''
"""Handlers of a chain a -> b -> c: files in the working directory say how `b` behaves."""

import asyncio
from pathlib import Path

from pgflow_prefect import Workflow

workflow = Workflow("chain")


def note(step: str) -> None:
    with Path("executions").open("a") as file:
        file.write(f"{step}\\n")


@workflow.step
def a(payload: dict[str, int]) -> int:
    note("a")
    return payload.get("start", 0) + 1


@workflow.step
async def b(a: int) -> int:
    note("b")
    while Path("gate").exists():
        await asyncio.sleep(0.02)
    if Path("broken").exists():
        raise RuntimeError("the disk is full")
    return a + 1


@workflow.step
def c(b: int) -> dict[str, int]:
    note("c")
    return {"sum": b}
'''
