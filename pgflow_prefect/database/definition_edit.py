"""Replaces a stored definition by another one, and writes only the rows that differ."""

import re
from collections.abc import Iterator
from shlex import quote

from psycopg import errors
from pydantic_core import to_json

from pgflow_prefect.database.connection import Connection
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.definitions.difference import Difference, compare_definitions
from pgflow_prefect.definitions.model import Dep, WorkflowDefinition
from pgflow_prefect.errors import DefinitionChangedError, PgflowPrefectError, UsageError

_CHILD_KEY = "steps_child_workflow_fkey"
"""The constraint that a step can only be a run of a workflow that exists."""

_PENDING_RUN = re.compile(r"run ([0-9a-f-]{36}) is pending")


async def replace_definition(connection: Connection, old: WorkflowDefinition | None, new: WorkflowDefinition) -> None:
    """Replace a workflow's definition in one transaction; send nothing if the two are the same.

    Args:
        connection: in autocommit.
        old: the definition that the caller read; None if there was no such workflow.
        new: the definition to write.

    Raises:
        DefinitionChangedError: the database no longer has `old`.
        UsageError: a step is a run of a workflow that the database does not have.
        PgflowPrefectError: a run still needs a removed step, or another transaction keeps the workflow locked.
        psycopg.Error: PostgreSQL refuses the change for another reason.
    """
    if old is not None and old.definition_hash == new.definition_hash:
        return
    difference = compare_definitions(old, new)
    try:
        async with connection.transaction():
            await connection.execute(QUERIES["limit_waiting"])
            await _lock(connection, old, new.slug)
            for query, parameters in [*_list_statements(difference), *_list_rules(difference, new)]:
                await connection.execute(QUERIES[query], {"workflow_slug": new.slug} | parameters)
    except errors.LockNotAvailable as error:
        raise PgflowPrefectError(
            f"workflow {new.slug!r} is locked by another transaction: nothing was written; "
            "try again when that one has ended"
        ) from error
    except errors.ObjectNotInPrerequisiteState as error:
        pending = _PENDING_RUN.search(error.diag.message_primary or "")
        if pending is None:
            raise
        raise PgflowPrefectError(
            f"{error.diag.message_primary}: nothing was written. Let the run finish, or end it with "
            f"`pgflow-prefect cancel {pending[1]}`"
        ) from error
    except errors.ForeignKeyViolation as error:
        if error.diag.constraint_name == _CHILD_KEY:
            raise UsageError(
                f"a step of workflow {new.slug!r} is a run of a workflow that the database does not have: "
                f"{error.diag.message_detail} Nothing was written. Push that workflow first"
            ) from error
        raise PgflowPrefectError(
            f"a step of workflow {new.slug!r} can't be removed, for there are rows that refer to it: "
            f"{error.diag.message_detail} Nothing was written. Keep the step, or "
            f"{await _find_help(connection, error, new.slug, difference)}"
        ) from error


async def _find_help(
    connection: Connection, error: errors.ForeignKeyViolation, workflow_slug: str, difference: Difference
) -> str:
    """Return the advice for a step that can't be removed because rows refer to it."""
    if error.diag.table_name != "step_states":
        return "delete those rows first"
    named = {"workflow_slug": workflow_slug, "steps": [*difference.steps_removed]}
    row = await (await connection.execute(QUERIES["find_pending_user"], named)).fetchone()
    prune = f"delete the runs that have ended: `pgflow-prefect prune --workflow {quote(workflow_slug)} --any-age`"
    if row is None:
        return prune
    return f"end run {row['id']} first, `pgflow-prefect cancel {row['id']}`, and {prune}"


async def _lock(connection: Connection, old: WorkflowDefinition | None, workflow_slug: str) -> None:
    """Lock the workflow against edits, and check that no session has edited it since `old` was read."""
    named = {"workflow_slug": workflow_slug}
    if old is None:
        inserted = await (await connection.execute(QUERIES["insert_workflow"], named)).fetchone()
        is_as_read = inserted is not None and inserted["is_new"] is True
    else:
        await connection.execute(QUERIES["lock_workflow"], named)
        row = await (await connection.execute(QUERIES["load_definition"], named)).fetchone()
        is_as_read = row is not None and WorkflowDefinition.model_validate(row).definition_hash == old.definition_hash
    if not is_as_read:
        raise DefinitionChangedError(
            f"workflow {workflow_slug!r} was edited by another session in the meantime: nothing was written; "
            "push again to see what differs now"
        )


def _list_statements(difference: Difference) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield queries and their parameters, in an order that keeps foreign keys and never makes a cycle."""
    if difference.deps_removed:
        yield "delete_deps", _split(difference.deps_removed)
    if difference.steps_removed:
        yield "delete_steps", {"steps": [*difference.steps_removed]}
    if difference.steps_added:
        yield "insert_steps", {"steps": [*difference.steps_added]}
    if difference.deps_added:
        yield "insert_deps", _split(difference.deps_added)


def _list_rules(difference: Difference, new: WorkflowDefinition) -> Iterator[tuple[str, dict[str, object]]]:
    if difference.rules_changed or difference.workflow_changed:
        rules = {slug: new.find_rules(slug).said for slug in difference.rules_changed}
        yield (
            "set_rules",
            {"rules": to_json(rules).decode(), "when_failed": new.when_failed, "failed_by": new.failed_by},
        )


def _split(deps: tuple[Dep, ...]) -> dict[str, object]:
    return {"upstream": [dep.upstream for dep in deps], "downstream": [dep.downstream for dep in deps]}
