"""Extract rows from an API, transform them, load them into a table: exactly once."""

import datetime as dt
from typing import Any

import httpx
from pydantic import BaseModel

from pgflow_prefect import StepContext, Workflow

workflow = Workflow("etl", description="Orders of a day, from the shop's API into PostgreSQL.")


class Source(BaseModel):
    url: str
    day: dt.date


class Order(BaseModel):
    sku: str
    price: float
    amount: int


@workflow.step(retries=2, retry_delay_seconds=1, timeout_seconds=60)
async def extract(payload: Source) -> list[Order]:
    async with httpx.AsyncClient() as client:
        response = await client.get(f"{payload.url}/orders", params={"day": payload.day.isoformat()})
        response.raise_for_status()
        return [Order.model_validate(each) for each in response.json()]


@workflow.step
def transform(extract: list[Order]) -> dict[str, float]:
    turnover: dict[str, float] = {}
    for order in extract:
        turnover[order.sku] = turnover.get(order.sku, 0.0) + order.price * order.amount
    return turnover


@workflow.step
def load(transform: dict[str, float], payload: Source, context: StepContext) -> int:
    rows = [(payload.day, sku, value) for sku, value in transform.items()]
    context.connection.execute(
        "CREATE TABLE IF NOT EXISTS turnover (day date, sku text, value float, PRIMARY KEY (day, sku))"
    )
    cursor: Any = context.connection.cursor()
    cursor.executemany("INSERT INTO turnover VALUES (%s, %s, %s)", rows)
    return len(rows)


flow = workflow.flow
