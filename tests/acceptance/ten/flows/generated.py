"""Three hundred steps that a loop makes, and one that waits for all."""

from collections.abc import Awaitable, Callable

from pgflow_prefect import Workflow

workflow = Workflow("generated")
COUNT = 300


def make_part(number: int) -> Callable[[dict[str, int]], Awaitable[int]]:
    async def part(payload: dict[str, int]) -> int:
        return number * payload["factor"]

    return part


for number in range(COUNT):
    workflow.step(f"part_{number:03}")(make_part(number))


@workflow.step(after=[f"part_{number:03}" for number in range(COUNT)])
def total(upstream: dict[str, int]) -> int:
    return sum(upstream.values())


flow = workflow.flow
