"""The picture of a run that pgflow's own worker executes, beside `pgflow-prefect observe`: for the page `released`.

The database has the tests' stand-in for pgflow 0.14, and the worker is the tests' player of pgflow's Edge worker.
"""

import signal
from dataclasses import replace
from time import monotonic, sleep
from uuid import UUID

import psycopg
from psycopg.conninfo import make_conninfo

from tests.acceptance.browser import PATIENCE
from tests.edge_worker import EdgeTask, EdgeWorker
from tests.released_lab import FAKE, ReleasedFlows, install_released, open_flows
from tests.site.session import Session

_FLOW = "photos"
_STEPS = {"list_photos": [], "resize": ["list_photos"], "watermark": ["list_photos"], "report": ["resize", "watermark"]}
_SECONDS = {"list_photos": 0.6, "resize": 1.0, "report": 0.5}  # what a step takes, so that its bar is seen


def take_observed(session: Session) -> None:
    """Let the player execute a run with a map, a failed attempt and a condition that is not met, and observe it."""
    server = session.environment["PGFLOW_DSN"]
    with psycopg.connect(server, autocommit=True) as admin:
        admin.execute("CREATE DATABASE supabase")
    dsn = make_conninfo(server, dbname="supabase")
    install_released(dsn, FAKE)
    session = replace(session, environment={**session.environment, "PGFLOW_DSN": dsn, "PGFLOW_ARTIFACTS": "all"})
    session.run("pgflow-prefect init")
    with open_flows(dsn) as flows:
        condition = """required_input_pattern => '{"list_photos": ["holiday.jpg"]}'"""
        flows.define(_FLOW, _STEPS, maps=["resize"], attempts=2, watermark=condition)
        observing = session.start(f"pgflow-prefect observe {_FLOW}")
        try:
            with EdgeWorker(dsn, _FLOW, _execute, function="photos-worker"):
                run_id = flows.start(_FLOW, {"album": 7})
                address = f"{session.environment['PREFECT_API_URL'].removesuffix('/api')}/runs/flow-run/"
                session.take_page("observed", address + str(_await_shown(flows, run_id)), awaited=["Completed"])
        finally:
            observing.send_signal(signal.SIGINT)
            observing.communicate()


def _execute(task: EdgeTask) -> object:
    sleep(_SECONDS[task.step])
    return ["ada.jpg", "bob.jpg", "eve.jpg"] if task.step == "list_photos" else f"done: {task.given}"


def _await_shown(flows: ReleasedFlows, run_id: UUID) -> UUID:
    """Return the flow run that shows a run, once it shows its end."""
    deadline = monotonic() + PATIENCE / 1000
    read = "SELECT flow_run_id FROM pgflow_prefect.flow_runs WHERE run_id = %s AND settled"
    while (found := flows.db.execute(read, [run_id]).fetchone()) is None:
        assert monotonic() < deadline, "observe does not show the run"
        sleep(0.1)
    return UUID(str(found[0]))
