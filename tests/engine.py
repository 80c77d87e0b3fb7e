"""The engine's functions as Python calls, and the looks at its tables that tests of it share."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from time import monotonic
from typing import LiteralString, TypeVar
from uuid import UUID

import psycopg
import pytest
from psycopg.rows import class_row

from tests.conftest import Connection

Row = TypeVar("Row")

UNKNOWN = "P0002"
NOT_READY = "55000"
INVALID = "22023"
LATE = "40001"
IN_USE = "23503"

# Each step with the steps that it waits for.
CHAIN: dict[str, Sequence[str]] = {"a": [], "b": ["a"], "c": ["b"]}
DIAMOND: dict[str, Sequence[str]] = {"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}


@dataclass(frozen=True)
class Run:
    workflow_slug: str
    id: UUID
    status: str
    payload: object
    definition_id: int | None
    remaining: int | None
    epoch: int
    error_message: str | None
    created_at: datetime | None
    finished_at: datetime | None
    ended_as: str | None = None
    taken_in: int | None = None
    uses_rules: bool = False
    continues: bool = False
    logical_date: datetime | None = None
    data_interval: object = None
    backfill_id: int | None = None
    parent_run_id: UUID | None = None
    parent_step_slug: str | None = None
    parent_item: int | None = None
    parent_attempt: int | None = None


@dataclass(frozen=True)
class StepState:
    workflow_slug: str
    run_id: UUID
    step_slug: str
    status: str
    step_result: object
    attempts: int
    error_message: str | None
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    ended_as: str | None = None
    skip_reason: str | None = None
    skip_cascades: bool | None = None
    skipped_by: str | None = None
    skip_note: str | None = None


@dataclass(frozen=True)
class Claim:
    status: str
    attempt: int
    step_result: object
    payload: object
    upstream_results: dict[str, object] | None


def define(db: Connection, workflow: str, steps: Mapping[str, Sequence[str]]) -> None:
    """Insert a workflow; `steps` gives each step with the steps that it waits for."""
    deps = [(upstream, step) for step, upstreams in steps.items() for upstream in upstreams]
    db.execute("INSERT INTO pgflow.workflows VALUES (%s)", [workflow])
    db.execute("INSERT INTO pgflow.steps SELECT %s, unnest(%s::text[])", [workflow, [*steps]])
    db.execute(
        "INSERT INTO pgflow.deps SELECT %s, * FROM unnest(%s::text[], %s::text[])",
        [workflow, [upstream for upstream, _ in deps], [step for _, step in deps]],
    )


def one(db: Connection, row: type[Row], statement: str, *parameters: object) -> Row:
    """Return the statement's only row."""
    with db.cursor(row_factory=class_row(row)) as cursor:
        [found] = cursor.execute(statement, parameters).fetchall()
    return found


def value(db: Connection, statement: str, *parameters: object) -> object:
    """Return the only column of the statement's only row."""
    [[found]] = db.execute(statement, parameters).fetchall()
    return found


def column(db: Connection, statement: str, *parameters: object) -> list[object]:
    """Return the statement's only column."""
    return [found for [found] in db.execute(statement, parameters)]


def run_workflow(db: Connection, workflow: str, payload: object = None, run_id: UUID | None = None) -> Run:
    return one(db, Run, "SELECT * FROM pgflow.run_workflow(%s, %s, %s)", workflow, json.dumps(payload), run_id)


def start_run(db: Connection, workflow: str, steps: Mapping[str, Sequence[str]]) -> UUID:
    """Define a workflow and start a run of it."""
    define(db, workflow, steps)
    return run_workflow(db, workflow).id


def insert_run(db: Connection, workflow: str) -> UUID:
    """Insert a run as a user would who does not know of `run_workflow`."""
    statement = "INSERT INTO pgflow.runs (workflow_slug, id, payload) VALUES (%s, gen_random_uuid(), '{}') RETURNING id"
    inserted = value(db, statement, workflow)
    assert isinstance(inserted, UUID)
    return inserted


def start_step(db: Connection, run_id: UUID, step: str) -> StepState:
    return one(db, StepState, "SELECT * FROM pgflow.start_step(%s, %s)", run_id, step)


def claim(db: Connection, run_id: UUID, step: str, epoch: int | None = None) -> Claim:
    return one(db, Claim, "SELECT * FROM pgflow.claim_step(%s, %s, %s)", run_id, step, epoch)


def complete(
    db: Connection,
    run_id: UUID,
    step: str,
    result: object = None,
    *,
    epoch: int | None = None,
    attempt: int | None = None,
) -> StepState:
    statement: LiteralString = "SELECT * FROM pgflow.complete_step(%s, %s, %s, %s, %s)"
    return one(db, StepState, statement, run_id, step, json.dumps(result), epoch, attempt)


def fail(
    db: Connection,
    run_id: UUID,
    step: str,
    error: str = "broken",
    *,
    epoch: int | None = None,
    attempt: int | None = None,
) -> StepState:
    statement: LiteralString = "SELECT * FROM pgflow.fail_step(%s, %s, %s, %s, %s)"
    return one(db, StepState, statement, run_id, step, error, epoch, attempt)


def take(db: Connection, run_id: UUID) -> int:
    epoch = value(db, "SELECT pgflow.take_run(%s)", run_id)
    assert isinstance(epoch, int)
    return epoch


def cancel(db: Connection, run_id: UUID, reason: str = "cancelled") -> Run:
    return one(db, Run, "SELECT * FROM pgflow.cancel_run(%s, %s)", run_id, reason)


def fail_run(db: Connection, run_id: UUID, reason: str = "failed") -> Run:
    return one(db, Run, "SELECT * FROM pgflow.fail_run(%s, %s)", run_id, reason)


def reopen(db: Connection, run_id: UUID) -> Run:
    return one(db, Run, "SELECT * FROM pgflow.reopen_run(%s)", run_id)


def repair(db: Connection, run_id: UUID) -> Run:
    return one(db, Run, "SELECT * FROM pgflow.repair_run(%s)", run_id)


def get_run(db: Connection, run_id: UUID) -> Run:
    return one(db, Run, "SELECT * FROM pgflow.runs WHERE id = %s", run_id)


def get_state(db: Connection, run_id: UUID, step: str) -> StepState:
    return one(db, StepState, "SELECT * FROM pgflow.step_states WHERE run_id = %s AND step_slug = %s", run_id, step)


def statuses(db: Connection, run_id: UUID) -> dict[str, str]:
    """Return each started step's status."""
    found = db.execute("SELECT step_slug, status FROM pgflow.step_states WHERE run_id = %s ORDER BY 1", [run_id])
    return {str(step): str(status) for step, status in found}


def waiting(db: Connection, run_id: UUID) -> dict[str, object]:
    """Return how many upstream steps each half-met join still waits for."""
    found = db.execute("SELECT step_slug, unmet FROM pgflow.waiting_steps WHERE run_id = %s ORDER BY 1", [run_id])
    return {str(step): unmet for step, unmet in found}


def finish(db: Connection, run_id: UUID) -> list[str]:
    """Complete whatever is pending until nothing is; return the steps in that order."""
    done: list[str] = []
    while pending := [step for step, status in statuses(db, run_id).items() if status == "pending"]:
        for step in pending:
            complete(db, run_id, step)
        done += pending
    return done


@contextmanager
def refused(sqlstate: str, message: str | None = None) -> Iterator[pytest.ExceptionInfo[psycopg.Error]]:
    """Expect PostgreSQL to refuse what happens inside, with this SQLSTATE and a message that matches."""
    with pytest.raises(psycopg.Error, match=message) as caught:
        yield caught
    assert caught.value.sqlstate == sqlstate, caught.value


def wait_until_true(db: Connection, condition: LiteralString, *parameters: object) -> None:
    """Return once this statement returns true: what PostgreSQL's clock or another session makes true."""
    deadline = monotonic() + 180
    while not value(db, condition, *parameters):
        assert monotonic() < deadline, f"never true: {condition.strip()}"


def wait_until_blocked(db: Connection, backend: int) -> None:
    """Return once this backend waits for a lock that another one holds."""
    wait_until_true(db, "SELECT cardinality(pg_blocking_pids(%s)) > 0", backend)
