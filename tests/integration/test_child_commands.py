"""What commands say of children and do to them: `doctor`, `skip` and `status`."""

from contextlib import AsyncExitStack

import pytest
from pydantic import SecretStr

from pgflow_prefect.cli.skip import _skip
from pgflow_prefect.cli.snapshot import Snapshot
from pgflow_prefect.database.connection import open_pool
from pgflow_prefect.database.diagnosis import DiagnosisStatements
from pgflow_prefect.database.run_names import parse_run_name
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.diagnosis.findings import Outcome, Patient
from pgflow_prefect.deployment.diagnosis.workflows import WORKFLOW_CHECKS
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import get_run, get_state
from tests.integration.conftest import TENURE
from tests.integration.test_engine_child_maps import begin as begin_map
from tests.integration.test_engine_children import begin, define_both, list_children

pytestmark = pytest.mark.anyio

[CHECK_RUNS] = [each for each in WORKFLOW_CHECKS if each.name == "runs"]


async def test_doctor_names_the_workflow_of_children_that_no_process_takes(db: Connection, dsn: str) -> None:
    define_both(db)
    _, child = begin(db)
    db.execute("UPDATE pgflow.runs SET created_at = now() - interval '2 minutes' WHERE id = %s", [child.id])
    settings = Settings(dsn=SecretStr(dsn))
    async with open_pool(dsn, size=1, timeout=10) as pool, AsyncExitStack() as resources:
        patient = Patient(settings, "by PGFLOW_DSN", resources, dsn, DiagnosisStatements(pool, TENURE))
        found = await CHECK_RUNS.examine(patient)
        db.execute("SELECT pgflow.cancel_run(%s)", [child.id])
        later = await CHECK_RUNS.examine(patient)
    assert found.outcome is Outcome.WARNING
    assert found.message == "no process has taken these runs for more than a minute: 1 of settlement"
    assert "pgflow-prefect worker" in str(found.advice)
    assert later.outcome is Outcome.OK


@pytest.mark.parametrize("is_map", [False, True])
async def test_the_command_that_skips_a_step_cancels_its_children(db: Connection, dsn: str, is_map: bool) -> None:
    if is_map:
        run_id, step = begin_map(db, [1, 2]), "price"
    else:
        define_both(db)
        (run_id, _), step = begin(db), "settle"
    settings = Settings(dsn=SecretStr(dsn))
    _, report = await _skip(settings, parse_run_name(str(run_id)), step, "not today", True)
    assert report.skip_message == "not today"
    assert get_state(db, run_id, step).skip_reason == "requested"
    children = list_children(db, run_id)
    assert len(children) == 1 + is_map
    assert {each.ended_as for each in children} == {"cancelled"}
    assert {each.error_message for each in children} == {
        f'step "{step}" of its parent run {run_id} does not wait for it any more'
    }
    assert get_run(db, run_id).status == "completed"  # all below is skipped with it


async def test_status_names_the_children_of_a_run_and_the_parent_of_a_child(db: Connection, store: Store) -> None:
    run_id = begin_map(db, [1, 2])
    first, second = list_children(db, run_id)
    said = await _describe(store, str(run_id))
    assert said[-2:] == [
        f"step price[{item}] is run {child.id} of workflow 'pricing': pending"
        for item, child in ((1, second), (0, first))
    ]
    assert (await _describe(store, str(first.id)))[-1] == (
        f"it is step price[0] of run {run_id} of workflow 'orders', which is pending"
    )


async def _describe(store: Store, run: str) -> list[str]:
    run_id = await store.find_run_id(parse_run_name(run))
    relatives = tuple(await store.list_relatives(run_id, 10))
    return Snapshot(await store.read_run(run_id), {}, [], relatives=relatives).describe()
