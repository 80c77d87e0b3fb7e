"""A person approves an offer before it is booked."""

from typing import Any

from pgflow_prefect import External, Workflow

workflow = Workflow("approval")


@workflow.step
def offer(payload: dict[str, int]) -> dict[str, int]:
    return {"price": payload["price"], "discount": payload["price"] // 10}


workflow.bind("approve", External(timeout_seconds=3600), after=["offer"])


@workflow.step
def book(offer: dict[str, int], approve: dict[str, Any]) -> str:
    return f"{approve['by']} approved {offer['price'] - offer['discount']}"


flow = workflow.flow
