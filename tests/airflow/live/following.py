"""Where a run of Airflow is in the database here."""

from uuid import UUID

from tests.acceptance.conftest import wait_until
from tests.conftest import Connection


def find_run(db: Connection, airflow_run_id: str) -> UUID | None:
    """Return the id of the run that shows a run of Airflow; None where there is none."""
    found = db.execute(
        "SELECT id FROM pgflow.runs WHERE payload ->> 'airflow_run_id' = %s", [airflow_run_id]
    ).fetchall()
    return UUID(str(found[0][0])) if found else None


def await_found(db: Connection, airflow_run_id: str) -> UUID:
    """Return the id of the run that shows a run of Airflow, once there is one."""
    wait_until(lambda: find_run(db, airflow_run_id) is not None, f"the run {airflow_run_id!r} is here")
    found = find_run(db, airflow_run_id)
    assert found is not None
    return found
