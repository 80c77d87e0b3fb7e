"""Every function that writes runs or step states, with a call of each and what has to be there before it."""

import re
from typing import LiteralString, NamedTuple
from uuid import UUID

from tests.conftest import Connection
from tests.engine import CHAIN, define, run_workflow

WRITES = re.compile(r"\b(?:INSERT\s+INTO|UPDATE|DELETE\s+FROM|TRUNCATE)\s+(?:ONLY\s+)?pgflow\.(?:runs|step_states)\b")
CALLS = re.compile(r"\b(pgflow(?:_prefect|_api)?\.\w+)\s*\(")
SILENT = re.compile(r"--[^\n]*|'(?:[^']|'')*'")
"""Comments and strings: what looks like a call there is none."""

BY_HAND: LiteralString = """
    DELETE FROM pgflow.step_states WHERE run_id = %(run)s; DELETE FROM pgflow.runs WHERE id = %(run)s;
    INSERT INTO pgflow.runs (workflow_slug, id, payload) VALUES ('chain', %(run)s, '{}')
"""
CLAIMED: LiteralString = "SELECT pgflow.claim_step(%(run)s, 'a')"
CANCELLED: LiteralString = "SELECT pgflow.cancel_run(%(run)s)"
NOT_STARTED: LiteralString = "DELETE FROM pgflow.step_states WHERE run_id = %(run)s"
EXTERNAL: LiteralString = "SELECT pgflow_prefect.bind_step('chain', 'a', 'external')"
ENABLED: LiteralString = "SELECT pgflow_prefect.enable_workflow('chain')"
HELD: LiteralString = "SELECT pgflow_prefect.take_run(%(run)s, NULL, 'me', 60, 3)"
GONE: LiteralString = (
    "DELETE FROM pgflow.step_states WHERE run_id = %(run)s; DELETE FROM pgflow.runs WHERE id = %(run)s"
)
AS_IN_AIRFLOW: LiteralString = """
    jsonb_build_object(
        'run_id', %(run)s, 'workflow_slug', 'chain', 'status', 'pending', 'source_id', 1, 'source_run_id', 'manual',
        'source_mark', 'first', 'placeholder', '00000000-0000-8000-8000-000000000001', 'steps', jsonb_build_array(
            jsonb_build_object('slug', 'a', 'status', 'completed', 'attempts', 1, 'state_name', 'Completed',
                               'started_at', '2026-01-01', 'finished_at', '2026-01-02',
                               'task_run_id', '00000000-0000-4000-8000-000000000002')))
"""
LONG_AGO: LiteralString = "UPDATE pgflow.runs SET status = 'failed', finished_at = 'epoch' WHERE id = %(run)s"

MAPPED: LiteralString = """
    UPDATE pgflow.definition_steps SET step_type = 'map' WHERE slug = 'a';
    UPDATE pgflow.runs SET uses_rules = true, payload = '[1]' WHERE id = %(run)s
"""
BY_HAND_MAP: LiteralString = f"{MAPPED}; UPDATE pgflow.runs SET payload = '[]' WHERE id = %(run)s"  # noqa: S608
ITEMS: LiteralString = f"{MAPPED}; SELECT pgflow.make_items(r, 'a') FROM pgflow.runs r WHERE id = %(run)s"  # noqa: S608
THE_MAP: LiteralString = "FROM pgflow.step_maps m WHERE run_id = %(run)s"

NESTED: LiteralString = """
    INSERT INTO pgflow.workflows (slug) VALUES ('other');
    INSERT INTO pgflow.steps (workflow_slug, slug) VALUES ('other', 'x');
    UPDATE pgflow.definition_steps SET child_workflow = 'other' WHERE slug = 'a';
    UPDATE pgflow.runs SET uses_rules = true WHERE id = %(run)s
"""
NESTED_ITEMS: LiteralString = f"{NESTED}; {ITEMS}"
BEGUN: LiteralString = f"{NESTED}; SELECT pgflow.attempt_child(r, 'a') FROM pgflow.runs r WHERE id = %(run)s"  # noqa: S608
LEFT: LiteralString = f"{BEGUN}; UPDATE pgflow.step_states SET status = 'failed' WHERE run_id = %(run)s"  # noqa: S608
CHILD_ENDED: LiteralString = f"{BEGUN}; UPDATE pgflow.runs SET status = 'failed' WHERE parent_run_id = %(run)s"  # noqa: S608
TAKEN_BACK: LiteralString = f"{BEGUN}; UPDATE pgflow.step_states SET started_at = NULL WHERE run_id = %(run)s"  # noqa: S608
CHILD: LiteralString = "FROM pgflow.runs r WHERE parent_run_id = %(run)s"

RULES: LiteralString = "UPDATE pgflow.runs SET uses_rules = true, continues = true WHERE id = %(run)s"
RULES_NOT_STARTED: LiteralString = f"{RULES}; {NOT_STARTED}"
A_FAILED: LiteralString = f"{RULES}; SELECT pgflow.fail_step(%(run)s, 'a', 'broken')"
RUN: LiteralString = "FROM pgflow.runs r WHERE id = %(run)s"

PLANNED: LiteralString = """
    INSERT INTO pgflow.backfills (workflow_slug, max_active) VALUES ('chain', 2);
    INSERT INTO pgflow.backfill_dates (backfill_id, logical_date) SELECT id, '2026-01-01' FROM pgflow.backfills
"""
PAUSED: LiteralString = "UPDATE pgflow.backfills SET status = 'paused'"
ENDED: LiteralString = "UPDATE pgflow.runs SET status = 'completed' WHERE id = %(run)s"
AWAITED: LiteralString = """
    UPDATE pgflow.runs SET backfill_id = b.id FROM pgflow.backfills b WHERE runs.id = %(run)s;
    INSERT INTO pgflow.backfill_dates (backfill_id, logical_date, state, run_id)
    SELECT id, '2025-12-31', 'started', %(run)s FROM pgflow.backfills
"""


class Transition(NamedTuple):
    """A call that writes runs or step states.

    Attributes:
        call: the statement; `%(run)s` is a run of the workflow `chain` whose step `a` is pending.
        before: what makes it possible.
    """

    call: LiteralString
    before: LiteralString = ""


TRANSITIONS = {
    "pgflow.run_workflow": Transition("SELECT pgflow.run_workflow('chain', '{}')"),
    "pgflow.begin_run": Transition(
        """
        SELECT pgflow.begin_run(jsonb_populate_record(NULL::pgflow.runs, '{"workflow_slug": "chain", "payload": {}}'))
        """
    ),
    "pgflow.start_backfill": Transition(
        "SELECT pgflow.start_backfill('chain', ARRAY['2026-01-01'::pg_catalog.timestamptz])"
    ),
    "pgflow.advance_backfill": Transition("SELECT pgflow.advance_backfill(max(id)) FROM pgflow.backfills", PLANNED),
    "pgflow.start_date": Transition(
        "SELECT pgflow.start_date(b, d) FROM pgflow.backfills b JOIN pgflow.backfill_dates d ON d.backfill_id = b.id",
        PLANNED,
    ),
    "pgflow.continue_backfills": Transition(
        "SELECT pgflow.continue_backfills(%(run)s)", f"{PLANNED}; {AWAITED}; {ENDED}"
    ),
    "pgflow.resume_backfill": Transition(
        "SELECT pgflow.resume_backfill(max(id)) FROM pgflow.backfills",
        f"{PLANNED}; {PAUSED}",
    ),
    "pgflow.cancel_backfill": Transition(
        "SELECT pgflow.cancel_backfill(max(id), true) FROM pgflow.backfills", f"{PLANNED}; {AWAITED}"
    ),
    "pgflow_prefect.start_backfill": Transition(
        "SELECT pgflow_prefect.start_backfill('chain', ARRAY['2026-01-01'::pg_catalog.timestamptz], NULL, '{}', 1, "
        "'none', false, false, NULL)"
    ),
    "pgflow_prefect.resume_backfill": Transition(
        "SELECT pgflow_prefect.resume_backfill(max(id)) FROM pgflow.backfills",
        f"{PLANNED}; {PAUSED}",
    ),
    "pgflow_prefect.cancel_backfill": Transition(
        "SELECT pgflow_prefect.cancel_backfill(max(id), true, 'enough') FROM pgflow.backfills", f"{PLANNED}; {AWAITED}"
    ),
    "pgflow_prefect.advance_backfills": Transition("SELECT pgflow_prefect.advance_backfills(10)", PLANNED),
    "pgflow.start_step": Transition("SELECT pgflow.start_step(%(run)s, 'a')", NOT_STARTED),
    "pgflow.claim_step": Transition("SELECT pgflow.claim_step(%(run)s, 'a')"),
    "pgflow.complete_step": Transition("SELECT pgflow.complete_step(%(run)s, 'a', '1')"),
    "pgflow.fail_step": Transition("SELECT pgflow.fail_step(%(run)s, 'a', 'broken')"),
    "pgflow.fail_run": Transition("SELECT pgflow.fail_run(%(run)s, 'broken')"),
    "pgflow.break_off_run": Transition("SELECT pgflow.break_off_run(%(run)s, 'broken', NULL)"),
    "pgflow.end_run": Transition("SELECT pgflow.end_run(r, 'broken') FROM pgflow.runs r WHERE id = %(run)s"),
    "pgflow.take_run": Transition("SELECT pgflow.take_run(%(run)s)"),
    "pgflow.set_epoch": Transition("SELECT pgflow.set_epoch(r, 7, NULL) FROM pgflow.runs r WHERE id = %(run)s"),
    "pgflow.cancel_run": Transition("SELECT pgflow.cancel_run(%(run)s)"),
    "pgflow.reopen_run": Transition("SELECT pgflow.reopen_run(%(run)s)", CANCELLED),
    "pgflow.lock_run": Transition("SELECT pgflow.lock_run(%(run)s)", BY_HAND),
    "pgflow.recompute_run": Transition(
        "SELECT pgflow.recompute_run(r) FROM pgflow.runs r WHERE id = %(run)s", NOT_STARTED
    ),
    "pgflow.repair_run": Transition("SELECT pgflow.repair_run(%(run)s)", NOT_STARTED),
    "pgflow.skip_step": Transition("SELECT pgflow.skip_step(%(run)s, 'a')"),
    "pgflow.take_branches": Transition("SELECT pgflow.take_branches(%(run)s, 'a', '{}')"),
    "pgflow.fail_by_rules": Transition(f"SELECT pgflow.fail_by_rules(r, 'a', 'broken', 0, NULL) {RUN}", RULES),
    "pgflow.begin_by_rules": Transition(f"SELECT pgflow.begin_by_rules(r) {RUN}", RULES_NOT_STARTED),
    "pgflow.start_by_rules": Transition(f"SELECT pgflow.start_by_rules(r, 'a') {RUN}", RULES_NOT_STARTED),
    "pgflow.insert_decided": Transition(
        f"SELECT pgflow.insert_decided(r, ARRAY['a', 'b'], ARRAY['run', 'skip']) {RUN}", RULES_NOT_STARTED
    ),
    "pgflow.settle": Transition(f"SELECT pgflow.settle(r, ARRAY['a'], ARRAY['failed']) {RUN}", RULES),
    "pgflow.count_down": Transition(f"SELECT pgflow.count_down(r, 1) {RUN}", RULES),
    "pgflow.conclude_run": Transition(f"SELECT pgflow.conclude_run(r) {RUN}", RULES),
    "pgflow.use_rules": Transition(f"SELECT pgflow.use_rules(r) {RUN}"),
    "pgflow.take_back": Transition(f"SELECT pgflow.take_back(r) {RUN}", A_FAILED),
    "pgflow.undo_steps": Transition(f"SELECT pgflow.undo_steps(r, ARRAY['a']) {RUN}", f"{RULES}; {CLAIMED}"),
    "pgflow.recompute_rules": Transition(
        "SELECT pgflow.recompute_rules(r, d) FROM pgflow.runs r JOIN pgflow.definitions d ON d.id = definition_id",
        RULES_NOT_STARTED,
    ),
    "pgflow.resume_maps": Transition(f"SELECT pgflow.resume_maps(r) {RUN}", BY_HAND_MAP),
    "pgflow.lock_map": Transition("SELECT pgflow.lock_map(%(run)s, 'a', 0, 'claimed')", BY_HAND_MAP),
    "pgflow.claim_items": Transition("SELECT pgflow.claim_items(%(run)s, 'a', 1)", ITEMS),
    "pgflow.count_items": Transition(f"SELECT pgflow.count_items(m, 1, 0) {THE_MAP}", ITEMS),
    "pgflow.end_map": Transition(
        f"SELECT pgflow.end_map(m) {THE_MAP}",
        f"{ITEMS}; UPDATE pgflow.step_maps SET remaining = 0",  # noqa: S608
    ),
    "pgflow.report_items": Transition(
        "SELECT pgflow.report_items(%(run)s, 'a', '{0}', 0, NULL, 'complete', '{1}', NULL, NULL)", ITEMS
    ),
    "pgflow.complete_items": Transition("SELECT pgflow.complete_items(%(run)s, 'a', '{0}', '[1]')", ITEMS),
    "pgflow.fail_items": Transition("SELECT pgflow.fail_items(%(run)s, 'a', '{0}', '{broken}')", ITEMS),
    "pgflow.skip_items": Transition("SELECT pgflow.skip_items(%(run)s, 'a', '{0}')", ITEMS),
    "pgflow.attempt_child": Transition(f"SELECT pgflow.attempt_child(r, 'a') {RUN}", NESTED),
    "pgflow.begin_child": Transition(
        f"SELECT pgflow.begin_child(r, pgflow.find_step(r.definition_id, 'a'), NULL, 1, NULL) {RUN}", NESTED
    ),
    "pgflow.begin_children": Transition(f"SELECT pgflow.begin_children(r, ARRAY['a']) {RUN}", NESTED),
    "pgflow.begin_items": Transition("SELECT pgflow.begin_items(%(run)s, 'a', 1)", NESTED_ITEMS),
    "pgflow.end_by_child": Transition(f"SELECT pgflow.end_by_child(r) {CHILD}", CHILD_ENDED),
    "pgflow.report_to_parent": Transition(f"SELECT pgflow.report_to_parent(r) {CHILD}", CHILD_ENDED),
    "pgflow.await_child_again": Transition(f"SELECT pgflow.await_child_again(r) {CHILD}", TAKEN_BACK),
    "pgflow.leave_children": Transition("SELECT pgflow.leave_children(%(run)s, 'a')", LEFT),
    "pgflow.move_child": Transition(f"SELECT pgflow.move_child(r.id) {CHILD}", LEFT),
    "pgflow.look_at_child": Transition(f"SELECT pgflow.look_at_child(r.id) {CHILD}", LEFT),
    "pgflow.move_children": Transition(
        "SELECT pgflow.move_children()",
        f"{LEFT}; INSERT INTO pgflow.child_requests (run_id) SELECT id {CHILD}",
    ),
    "pgflow.resume_children": Transition(f"SELECT pgflow.resume_children(r) {RUN}", NESTED),
    "pgflow.resume_item_children": Transition(f"SELECT pgflow.resume_item_children(r, 'a') {RUN}", NESTED_ITEMS),
    "pgflow_prefect.move_children": Transition(
        "SELECT pgflow_prefect.move_children(1)",
        f"{LEFT}; INSERT INTO pgflow.child_requests (run_id) SELECT id {CHILD}",
    ),
    "pgflow_prefect.take_children": Transition(
        "SELECT pgflow_prefect.take_children(ARRAY[%(run)s::pg_catalog.uuid], ARRAY['other'], 5, 'me', 60, 3, NULL)",
        BEGUN,
    ),
    "pgflow_prefect.wake_child": Transition(f"SELECT pgflow_prefect.wake_child(r, 'a') {RUN}", NESTED),
    "pgflow_prefect.work_items": Transition(
        'SELECT pgflow_prefect.work_items(%(run)s, \'a\', 0, \'[{"do": "complete", "item_index": 0}]\', 1, NULL)', ITEMS
    ),
    "pgflow_prefect.complete_pending_items": Transition(
        "SELECT pgflow_prefect.complete_pending_items(%(run)s, 'a', '{0}', '[1]', 0, NULL)", ITEMS
    ),
    "pgflow_prefect.report_item": Transition(
        "SELECT pgflow_prefect.report_item(%(run)s, 'a', 0, 1, '1', NULL, 'broken')",
        f"{ITEMS}; SELECT pgflow.claim_items(%(run)s, 'a', 1)",
    ),
    "pgflow_prefect.begin_pool_step": Transition(
        "SELECT pgflow_prefect.begin_pool_step(%(run)s, 'a', 0, 1, gen_random_uuid(), 60)", BY_HAND
    ),
    "pgflow_prefect.take_items": Transition("SELECT pgflow_prefect.take_items('chain')", f"{ITEMS}; {EXTERNAL}"),
    "pgflow_prefect.skip_step": Transition("SELECT pgflow_prefect.skip_step(%(run)s, 'a', 'why', true)"),
    "pgflow_prefect.report_outcome": Transition(
        "SELECT pgflow_prefect.report_outcome(%(run)s, 'a', '1', 0, 1, '{\"skip\": true}')", CLAIMED
    ),
    "pgflow_prefect.create_run": Transition(
        "SELECT pgflow_prefect.create_run('chain', '{}', gen_random_uuid(), gen_random_uuid(), 'me', 60, 3)"
    ),
    "pgflow_prefect.take_run": Transition("SELECT pgflow_prefect.take_run(%(run)s, gen_random_uuid(), 'me', 60, 3)"),
    "pgflow_prefect.take_runs": Transition(
        "SELECT pgflow_prefect.take_runs(ARRAY['chain'], 5, true, 'me', 60, 3)", ENABLED
    ),
    "pgflow_prefect.give_up_run": Transition("SELECT pgflow_prefect.give_up_run(%(run)s, 'given up')"),
    "pgflow_prefect.release_run": Transition("SELECT pgflow_prefect.release_run(%(run)s, 0)", BY_HAND),
    "pgflow_prefect.release_reservation": Transition(
        "SELECT pgflow_prefect.release_reservation(%(run)s, 0, 'me')", BY_HAND
    ),
    "pgflow_prefect.put_off_held_run": Transition(
        "SELECT pgflow_prefect.put_off_held_run(%(run)s, 1, 'a', 'no')", HELD
    ),
    "pgflow_prefect.rehearse_refused": Transition(
        "SELECT pgflow_prefect.rehearse_refused(%(run)s)",
        f"{HELD}; SELECT pgflow_prefect.put_off_held_run(%(run)s, 1, 'a', 'no')",
    ),
    "pgflow_prefect.put_off_run": Transition("SELECT pgflow_prefect.put_off_run(%(run)s, 0, 'me', 'no')", BY_HAND),
    "pgflow_prefect.claim_step": Transition(
        "SELECT pgflow_prefect.claim_step(%(run)s, 'a', 0, 0, gen_random_uuid(), '{}', true, 'python', true, 'here')"
    ),
    "pgflow_prefect.complete_step": Transition(
        "SELECT pgflow_prefect.complete_step(%(run)s, 'a', 0, '1', 0, 1, gen_random_uuid())", CLAIMED
    ),
    "pgflow_prefect.complete_pending_step": Transition(
        "SELECT pgflow_prefect.complete_pending_step(%(run)s, 'a', 0, '1', 0, 1, gen_random_uuid())", CLAIMED
    ),
    "pgflow_prefect.complete_and_claim": Transition(
        """
        SELECT pgflow_prefect.complete_and_claim(
            %(run)s, 0,
            jsonb_build_array(jsonb_build_object('step_slug', 'a', 'result', 1, 'attempt', 1,
                                                 'task_run_id', gen_random_uuid())),
            jsonb_build_array(jsonb_build_object('step_slug', 'b', 'task_run_id', gen_random_uuid(), 'bound', 'python',
                                                 'has_function', true, 'handler', 'here')))
        """,
        CLAIMED,
    ),
    "pgflow_prefect.perform_tasks": Transition(
        """
        SELECT pgflow_prefect.perform_tasks(jsonb_build_array(
            jsonb_build_object('do', 'complete', 'run_id', %(run)s, 'epoch', 0, 'step_slug', 'a', 'task_index', 0,
                               'task_run_id', gen_random_uuid(), 'attempt', 1, 'result', 1),
            jsonb_build_object('do', 'claim', 'run_id', %(run)s, 'epoch', 0, 'step_slug', 'b', 'task_index', 0,
                               'task_run_id', gen_random_uuid(), 'bound', 'python', 'has_function', true,
                               'handler', 'here')))
        """,
        CLAIMED,
    ),
    "pgflow_prefect.begin_airflow_run": Transition(
        "SELECT pgflow_prefect.begin_airflow_run('chain', %(run)s, '{}', NULL, NULL, NULL)", GONE
    ),
    "pgflow_prefect.take_for_airflow": Transition(f"SELECT pgflow_prefect.take_for_airflow(r, 'a', 1) {RUN}"),
    "pgflow_prefect.end_unseen_airflow_task": Transition(
        "SELECT pgflow_prefect.end_unseen_airflow_task(%(run)s, 'a', 1, 'completed', '1', NULL)"
    ),
    "pgflow_prefect.mirror_run": Transition(
        f"SELECT pgflow_prefect.mirror_run(NULL, {AS_IN_AIRFLOW}, '{{}}')",
        GONE,
    ),
    "pgflow_prefect.begin_mirrored_run": Transition(
        f"SELECT pgflow_prefect.begin_mirrored_run(pgflow_prefect.parse_mirrored_run(d), d) FROM {AS_IN_AIRFLOW} AS d",  # noqa: S608
        GONE,
    ),
    "pgflow_prefect.move_mirrored_run": Transition(
        f"""
        SELECT pgflow_prefect.move_mirrored_run(
            r, pgflow_prefect.parse_mirrored_run(jsonb_build_object('status', 'failed')), false) {RUN}
        """
    ),
    "pgflow_prefect.find_refusal": Transition(
        "SELECT pgflow_prefect.find_refusal(%(run)s, 'a', 0, 0, gen_random_uuid(), 'python', true)"
    ),
    "pgflow_prefect.fail_step": Transition(
        "SELECT pgflow_prefect.fail_step(%(run)s, 'a', 0, 'broken', 0, 1, gen_random_uuid(), 'Failed')", CLAIMED
    ),
    "pgflow_prefect.report_completion": Transition(
        "SELECT pgflow_prefect.report_completion(%(run)s, 'a', 0, '1', 1)", CLAIMED
    ),
    "pgflow_prefect.report_failure": Transition(
        "SELECT pgflow_prefect.report_failure(%(run)s, 'a', 0, 'broken', 1)", CLAIMED
    ),
    "pgflow_prefect.claim_external_step": Transition(
        "SELECT pgflow_prefect.claim_external_step(%(run)s, 'a', '1 minute')", EXTERNAL
    ),
    "pgflow_prefect.take_external_steps": Transition("SELECT pgflow_prefect.take_external_steps('chain')", EXTERNAL),
    "pgflow_prefect.lock_run": Transition("SELECT pgflow_prefect.lock_run(%(run)s)", BY_HAND),
    "pgflow_prefect.fail_run": Transition("SELECT pgflow_prefect.fail_run(%(run)s, 1, 'me', 'broken')", HELD),
    "pgflow_prefect.cancel_run": Transition("SELECT pgflow_prefect.cancel_run(%(run)s, 'enough')"),
    "pgflow_prefect.reopen_run": Transition("SELECT pgflow_prefect.reopen_run(%(run)s)", CANCELLED),
    "pgflow_prefect.repair_run": Transition("SELECT pgflow_prefect.repair_run(%(run)s)", NOT_STARTED),
    "pgflow_prefect.prune_runs": Transition("SELECT pgflow_prefect.prune_runs('1 day')", LONG_AGO),
    "pgflow_prefect.prune_run": Transition("SELECT pgflow_prefect.prune_run(%(run)s)", CANCELLED),
}
"""Each function that writes runs or step states, by its name: a test holds this to be all of them."""

ROLLED_BACK = {"pgflow_prefect.rehearse_refused"}
"""Functions that take back all that they do."""

WITH_OWNERS_RIGHTS = {"pgflow_prefect.claim_airflow_task", "pgflow_prefect.end_airflow_task"}
"""These write, too. A role of Airflow calls them that has no other right, so they set `search_path`: a trigger that
executes with the owner's rights must not look names up where that role says. `test_airflow_tasks.py` tries them."""


def find_writers(db: Connection) -> set[str]:
    """Return the functions that write runs or step states, themselves or through one that they call."""
    bodies: dict[str, str] = {}
    for name, body in db.execute("""
        SELECT pronamespace::regnamespace || '.' || proname, string_agg(prosrc, ' ') FROM pg_proc
        WHERE pronamespace IN ('pgflow'::regnamespace, 'pgflow_prefect'::regnamespace) GROUP BY 1
    """):
        bodies[str(name)] = SILENT.sub("''", str(body))
    called = {name: set(CALLS.findall(body)) for name, body in bodies.items()}
    writers = {name for name, body in bodies.items() if WRITES.search(body)}
    while further := {name for name, calls in called.items() if calls & writers} - writers:
        writers |= further
    return writers


def prepare(db: Connection, transition: Transition) -> UUID:
    """Make a transition possible, and return the run that it is about."""
    define(db, "chain", CHAIN)
    run_id = run_workflow(db, "chain").id
    for statement in filter(str.strip, transition.before.split(";")):
        db.execute(statement.encode(), {"run": run_id})
    return run_id


def make(connection: Connection, transition: Transition, run_id: UUID) -> None:
    """Let a connection make a transition."""
    connection.execute(transition.call, {"run": run_id})
