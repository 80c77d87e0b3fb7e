"""Stored and cached results, from the command line: a process reads and takes over what a former one has stored."""

from uuid import uuid4

import pytest

from tests.acceptance.conftest import CommandLine, Services, wait_until
from tests.conftest import Connection
from tests.engine import define, run_workflow, value

pytestmark = pytest.mark.once

HANDLERS = """
from pathlib import Path

from pgflow_prefect import Workflow

workflow = Workflow({slug!r}, result_storage=Path("stored").absolute(), result_serializer="pickle")


class Frame:
    def __init__(self, rows):
        self.rows = rows


@workflow.step(cache_key_fn=lambda context, arguments: str(arguments["payload"]))
def load(payload: int) -> Frame:
    print("loading", payload)
    return Frame([payload] * 3)


@workflow.step(result_serializer="json")
def count(load: Frame) -> int:
    if not Path("ready").exists():
        raise ValueError("not yet")
    return sum(load.rows)
"""
PROBLEM = "step 'load' has result_serializer='pickle' and no storage: name one by result_storage=, or by PGFLOW_RESULT"


def test_processes_pass_values_through_a_storage_and_take_over_results(
    cli: CommandLine, services: Services, db: Connection
) -> None:
    slug = f"stored_{uuid4().hex[:8]}"
    define(db, slug, {"load": [], "count": ["load"]})
    handlers = HANDLERS.format(slug=slug)
    cli.write(f"flows/{slug}.py", handlers.replace('result_storage=Path("stored").absolute(), ', ""))
    refused = cli("validate", slug)
    assert refused.code == 1
    assert PROBLEM in refused.out

    path = cli.write(f"flows/{slug}.py", handlers)
    first = cli("run", slug, "--payload", "7")
    assert first.code == 1
    cli.write("ready")
    first_id = first.find_run_id()
    assert cli("run", "--resume", str(first_id)).code == 0
    shown = cli("status", str(first_id)).out
    assert "bytes of pickle in file://" in shown
    assert "bytes of json in file://" in shown

    services.start("worker", str(path))
    second = run_workflow(db, slug, 7).id
    ended = "SELECT status <> 'pending' FROM pgflow.runs WHERE id = %s"
    wait_until(lambda: bool(value(db, ended, second)), "the worker ends the run")
    states = "SELECT string_agg(state_name, ' ' ORDER BY step_slug) FROM pgflow_prefect.task_runs WHERE run_id = %s"
    assert value(db, states, second) == "Completed Cached"
    assert value(db, "SELECT count(*) FROM pgflow_prefect.cached_results") == 1
