"""All checks, in a useful order."""

from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack

from pgflow_prefect.deployment.diagnosis.database import DATABASE_CHECKS
from pgflow_prefect.deployment.diagnosis.findings import Check, Finding, Patient, carry_out
from pgflow_prefect.deployment.diagnosis.lag import LAG_CHECK
from pgflow_prefect.deployment.diagnosis.prefect import PREFECT_CHECKS
from pgflow_prefect.deployment.diagnosis.released import RELEASED_CHECKS
from pgflow_prefect.deployment.diagnosis.workflows import WORKFLOW_CHECKS
from pgflow_prefect.settings import Settings


def list_checks(*, with_flow_run: bool) -> list[Check]:
    """Return the checks, with or without the one that makes a flow run."""
    measured = (LAG_CHECK,) if with_flow_run else ()
    return [*DATABASE_CHECKS, *RELEASED_CHECKS, *PREFECT_CHECKS, *measured, *WORKFLOW_CHECKS]


async def examine(
    settings: Settings, source: str, *, with_flow_run: bool, begin: Callable[[str], None]
) -> AsyncGenerator[Finding]:
    """Check the database, Prefect, and the links between them.

    Args:
        settings: of this process.
        source: where the connection string comes from, for people.
        with_flow_run: measure how long Prefect takes to show a task run, with a flow run that is deleted again.
        begin: called with the name of each check before it runs.
    """
    async with AsyncExitStack() as resources:
        patient = Patient(settings, source, resources)
        async for finding in carry_out(list_checks(with_flow_run=with_flow_run), patient, begin):
            yield finding
