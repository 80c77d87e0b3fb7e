"""Count the stock. If the count fails, raise an alarm, archive what there is, and do not publish."""

from pgflow_prefect import NotRetriableError, StepContext, Workflow

workflow = Workflow("night_shift")


@workflow.step
def count() -> int:
    raise NotRetriableError("the scanner is off")


@workflow.step
def publish(count: int) -> int:
    return count


@workflow.step(rule="one_failed", after=["count"], fails_run=False)
def alarm(context: StepContext) -> list[str]:
    return [f"{slug}: {message}" for slug, message in context.failed_steps]


@workflow.step(rule="all_done", after=["publish"], fails_run=False)
def archive() -> str:
    return "archived"


flow = workflow.flow
