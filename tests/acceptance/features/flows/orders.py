"""Take orders in: a full or a small intake, an invoice for each order, and a clean desk at the end."""

from typing import Any

from pgflow_prefect import Branch, Workflow

workflow = Workflow("orders", failed_by="steps")


@workflow.step
def look(payload: dict[str, Any]) -> Branch[list[int]]:
    return Branch("full" if payload["is_monday"] else "small", result=payload["orders"])


@workflow.step
def full(look: list[int]) -> list[int]:
    return look


@workflow.step
def small(look: list[int]) -> list[int]:
    return look[:1]


@workflow.step(rule="none_failed_min_one_success")
def choose(full: list[int] | None = None, small: list[int] | None = None) -> list[int]:
    return full or small or []


@workflow.map(over="choose", when_item_fails="continue", retries=0)
async def invoice(item: int) -> str:
    if item < 0:
        raise ValueError("no such order")
    return f"invoice {item}"


@workflow.step
async def send(invoice: list[str]) -> int:
    return len(invoice)


@workflow.step(rule="all_done", after=["send"], fails_run=False)
async def clear_desk() -> str:
    return "clear"


flow = workflow.flow
