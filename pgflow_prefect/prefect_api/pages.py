"""Finds the pages of Prefect's UI."""

from uuid import UUID

from pgflow_prefect.prefect_api.internals import url_for


def find_flow_run_page(flow_run_id: UUID) -> str | None:
    """Return the address of a flow run's page; None if neither the UI's nor the API's address is set."""
    return url_for("flow-run", flow_run_id)


def find_task_run_page(task_run_id: UUID) -> str | None:
    """Return the address of a task run's page; None as for a flow run."""
    return url_for("task-run", task_run_id)
