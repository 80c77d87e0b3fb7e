"""Ask a service for today's rate. If it does not answer, go on with yesterday's."""

from pgflow_prefect import StepContext, Workflow

workflow = Workflow("exchange_rate")


@workflow.step(retries=1, when_exhausted="skip")
def ask_service(context: StepContext) -> float:
    raise ConnectionError(f"no answer to attempt {context.attempt}")


@workflow.step
def read_yesterday() -> float:
    return 1.5


@workflow.step
def convert(read_yesterday: float, payload: dict[str, int], ask_service: float | None = None) -> float:
    return payload["amount"] * (ask_service or read_yesterday)


flow = workflow.flow
