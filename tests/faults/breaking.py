"""Breaks on purpose what keeps two owners of a run apart, so that the storm's check has something to find.

Each fence has another one behind it. Those of a map's items open with those of steps. What is to be expected when the
first so many of them are open; the last level is the one that the tests look at:

1. the lease: workers take each other's runs, and their own, while these work on them, all the time. So much that some
   runs never get done, and yet nothing is done twice: claims and reports of a former owner are refused for its epoch.
2. the epoch as well: the former owners go on. Still one report a step is accepted, that of the latest attempt.
3. the attempt as well: now the first report wins, whichever attempt it is of. The check sees rows of an older one.
4. "the first report wins" as well, in `complete_step`: a step is completed twice, and its run counts it twice. Not one
   with rows of its own, though:
5. the look at the state before a completion that commits together with rows. Without it, these are there twice, too.
"""

import re

import psycopg

_QUALIFIED = re.compile(r"OPERATOR\(pg_catalog\.([^)]+)\)")
"""How functions write operators, so that none of another schema takes their place."""

_LEASE = """
CREATE OR REPLACE FUNCTION pgflow_prefect.is_leased(lease_until timestamptz, lease double precision) RETURNS boolean
LANGUAGE sql STABLE AS 'SELECT false'
"""

_STALE = """
CREATE OR REPLACE FUNCTION pgflow_prefect.is_stale(run_id uuid, epoch int) RETURNS boolean
LANGUAGE sql VOLATILE AS 'SELECT false'
"""

_COMPLETE = "pgflow.complete_step(uuid, text, jsonb, int, int)"

_NOTE = "pgflow.note_items(pgflow.step_maps, int[], int[], text[], jsonb[], text[], interval[])"

_FENCES = (
    (3, "pgflow.claim_step(uuid, text, int, text[], boolean)", "claim_step.epoch <> run.epoch", "false"),
    (3, _COMPLETE, "complete_step.epoch = run.epoch", "true"),
    (3, "pgflow.lock_map(uuid, text, int, text)", "lock_map.epoch <> run.epoch", "false"),
    (3, _COMPLETE, "complete_step.attempt = s.attempts AND s.started_at IS NOT NULL", "true"),
    (3, _NOTE, "note_items.attempts[place] = i.attempts AND i.started_at IS NOT NULL", "true"),
    (4, _COMPLETE, "AND s.status = 'pending'", ""),
    (4, _NOTE, "AND i.status = 'pending'", ""),
    # An item that is counted twice must not leave its map pending for good: a storm has few runs at a time.
    (
        4,
        "pgflow.count_items(pgflow.step_maps, int, int)",
        "IF counted.remaining = 0 OR",
        "IF counted.remaining <= 0 OR",
    ),
    (4, "pgflow.end_map(pgflow.step_maps)", "ELSIF map.remaining = 0 THEN", "ELSIF map.remaining <= 0 THEN"),
    (5, "pgflow.start_step(uuid, text)", "IF FOUND THEN", "IF FOUND THEN state.status := 'pending';"),
)
"""From which level on, functions, what to look for in them, and what to put there instead."""

LEVELS = 5
ITEM_SIGNS = ("the item was completed at the attempts [", "the item has rows of the attempts [")
"""What the verdict has to have besides, where there are maps: the same of their items."""


def break_fences(connection: psycopg.Connection[tuple[object, ...]], level: int = LEVELS) -> None:
    """Break the first so many of the fences, in this database only."""
    connection.execute(_LEASE)
    if level > 1:
        connection.execute(_STALE)
    for from_level, function, fence, gap in _FENCES:
        row = connection.execute("SELECT pg_get_functiondef(%s::regprocedure)", [function]).fetchone()
        assert row is not None
        definition = _QUALIFIED.sub(r"\1", str(row[0]))
        assert fence in definition, f"{function} has changed: no longer {fence!r} in it"
        if level >= from_level:
            connection.execute(definition.replace(fence, gap).encode())


_RELEASED = (
    _STALE,
    """
    CREATE OR REPLACE FUNCTION pgflow_prefect.is_claimed(task pgflow.step_tasks, worker uuid, attempt int)
    RETURNS boolean LANGUAGE sql IMMUTABLE AS 'SELECT task.run_id IS NOT NULL'
    """,
)
"""On the released pgflow: the epoch, and the look at the task before a completion that commits with rows."""

_RELEASED_COMPLETE = "pgflow_prefect.complete_task(uuid, text, int, jsonb, int, int, uuid, jsonb)"
_RUN_GOES_ON = "AND run.status = 'started'"


def break_released_fences(connection: psycopg.Connection[tuple[object, ...]]) -> None:
    """Break the fences between two owners of a run in a database of the released pgflow; the lease stays whole."""
    for fence in _RELEASED:
        connection.execute(fence.encode())
    [[definition]] = connection.execute("SELECT pg_get_functiondef(%s::regprocedure)", [_RELEASED_COMPLETE]).fetchall()
    # The run may have ended before the former owner reports.
    assert _RUN_GOES_ON in str(definition), f"{_RELEASED_COMPLETE} has changed: no longer {_RUN_GOES_ON!r} in it"
    connection.execute(str(definition).replace(_RUN_GOES_ON, "").encode())
