"""Load what is new. If nothing is, skip the load, and report all the same."""

from pydantic import BaseModel

from pgflow_prefect import Skip, Workflow

workflow = Workflow("delta_load")


class Source(BaseModel):
    rows: list[int]


@workflow.step
def look(payload: Source) -> list[int]:
    return payload.rows


@workflow.step
def load(look: list[int]) -> int:
    if not look:
        raise Skip("nothing new since yesterday", cascade=False)
    return len(look)


@workflow.step
def report(load: int = 0) -> str:
    return f"{load} rows"


flow = workflow.flow
