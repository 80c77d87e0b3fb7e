"""Workflows that rows bind from the first step to the last: no file is needed."""

import json
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.acceptance.test_deploy import pool, post, prefect_worker, read_deployments
from tests.conftest import Connection
from tests.engine import column, define, get_run, run_workflow, value

__all__ = ["pool"]


@pytest.fixture
def bound(db: Connection) -> str:
    """A workflow add -> double whose steps are functions in the database."""
    slug = f"bound_{uuid4().hex[:8]}"
    define(db, slug, {"add": [], "double": ["add"]})
    db.execute("CREATE SCHEMA app")
    db.execute("CREATE FUNCTION app.add(input jsonb) RETURNS jsonb LANGUAGE sql "
               "AS $$ SELECT to_jsonb((input #>> '{payload,n}')::int + 1) $$")  # fmt: skip
    db.execute("CREATE FUNCTION app.double(input jsonb) RETURNS jsonb LANGUAGE sql "
               "AS $$ SELECT to_jsonb((input ->> 'add')::int * 2) $$")  # fmt: skip
    for step in ("add", "double"):
        db.execute("SELECT pgflow_prefect.bind_step(%s, %s, 'sql', %s)", [slug, step, f"app.{step}"])
    return slug


def read_results(db: Connection) -> list[object]:
    return column(db, "SELECT step_result FROM pgflow.step_states WHERE step_slug = 'double' ORDER BY 1")


@pytest.mark.once
def test_run_needs_no_file(cli: CommandLine, db: Connection, bound: str) -> None:
    ran = cli("run", bound, "--payload", '{"n": 20}')
    assert (ran.code, ran.lines[0]) == (0, "handlers: rows of pgflow_prefect.bindings"), ran
    assert read_results(db) == [42]
    assert f"workflow '{bound}' is valid" in cli("validate", bound).out


@pytest.mark.parametrize("how", ["bare", "named"])
def test_a_worker_needs_no_file(
    cli: CommandLine, services: Services, db: Connection, prefect: PrefectView, bound: str, how: str
) -> None:
    if how == "bare":
        assert cli("enable", bound).code == 0
    services.start("worker", *(["--workflow", bound] if how == "named" else []))
    run_id = run_workflow(db, bound, {"n": 20}).id
    wait_until(lambda: get_run(db, run_id).status == "completed", "the run completes")
    assert read_results(db) == [42]
    prefect.await_task_states(run_id, {"add": "Completed", "double": "Completed"})
    prefect.press_run(bound, {"n": 1})
    wait_until(lambda: read_results(db) == [4, 42], "the run of Prefect's button completes")


@pytest.mark.once
def test_a_worker_with_nothing_to_do_says_what_it_takes(cli: CommandLine, db: Connection, bound: str) -> None:
    refused = cli("worker")
    assert refused.code == 2
    assert "name a workflow of which rows say who does its steps, with --workflow" in refused.find_error()


@pytest.mark.once
def test_prefects_own_worker_needs_no_file(
    cli: CommandLine, db: Connection, bound: str, pool: str, prefect_api: str, tmp_path: Path
) -> None:
    [deployed] = json.loads(cli("deploy", bound, "--work-pool", pool, "--json").out)
    [found] = read_deployments(prefect_api, bound)
    assert found["entrypoint"] == "pgflow_prefect.deployment.bound.flow"
    run_id = run_workflow(db, bound, {"n": 20}).id

    def press(**parameters: object) -> Any:
        return post(f"{prefect_api}/deployments/{deployed['id']}/create_flow_run", {"parameters": parameters})["id"]

    pressed = [press(run_id=str(run_id)), press(payload={"n": 1})]
    with prefect_worker(cli, pool, tmp_path / "elsewhere"):

        def are_completed() -> bool:
            ended = post(f"{prefect_api}/flow_runs/filter", {"flow_runs": {"id": {"any_": pressed}}})
            states = [each["state_type"] for each in ended]
            assert not {"FAILED", "CRASHED"}.intersection(states), (ended, (tmp_path / "worker.log").read_text())
            return states == ["COMPLETED"] * 2

        wait_until(are_completed, "Prefect's worker has executed both flow runs")
    assert read_results(db) == [4, 42]
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 2
