"""Start a cluster, compute on it, and stop it whatever happens."""

from pgflow_prefect import Workflow

workflow = Workflow("cluster")


@workflow.step(is_setup=True)
async def start() -> str:
    return "cluster 7"


@workflow.step(when_exhausted="skip-cascade")
async def compute(start: str) -> int:
    raise ArithmeticError("out of memory")


@workflow.step
async def store(compute: int) -> int:
    return compute


@workflow.step(rule="all_done_setup_success", after=["store"], fails_run=False)
async def stop(start: str = "no cluster") -> str:
    return f"{start} is stopped"


flow = workflow.flow
