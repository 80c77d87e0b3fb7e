"""Sum up the sales of a day: which day, says the date of the run, also where it is executed much later."""

from typing import Any

from pgflow_prefect import AsyncStepContext, Workflow

workflow = Workflow("daily_sales")


@workflow.step
async def find_days(context: AsyncStepContext) -> list[str]:
    assert context.logical_date is not None
    assert context.data_interval_start is not None
    return [f"{context.data_interval_start:%Y-%m-%d}", f"{context.logical_date:%Y-%m-%d}"]


@workflow.map(over="payload.shops")
async def add_up(item: str, find_days: list[str]) -> str:
    return f"{item} from {find_days[0]}"


@workflow.step(only_if={"payload": {"shops": ["north"]}})
async def publish(add_up: list[str], payload: dict[str, Any]) -> list[str]:
    return add_up


flow = workflow.flow
