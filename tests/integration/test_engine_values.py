"""Payloads and results: any JSON, SQL NULL, and what jsonb refuses."""

from uuid import UUID

import pytest

from tests.conftest import Connection
from tests.engine import CHAIN, INVALID, claim, complete, define, fail, get_run, refused, run_workflow, start_run, value

JSON_VALUES: list[object] = [
    None,
    True,
    0,
    -1.5,
    12345678901234567890,
    "",
    'it\'s "quoted" \\ é 🚀',
    [],
    {},
    {"": [None, {"deep": [[]]}], "run_id": 1},
    "x" * 1_000_000,
]


def complete_with(db: Connection, run_id: UUID, result: str | None) -> None:
    """Complete the first step with a result as PostgreSQL gets it: JSON as text, or NULL."""
    db.execute("SELECT pgflow.complete_step(%s, 'a', %s)", [run_id, result])


def test_any_json_value_comes_back_as_payload_and_as_result(db: Connection) -> None:
    define(db, "chain", CHAIN)
    for given in JSON_VALUES:
        run = run_workflow(db, "chain", given)
        assert run.payload == given
        assert complete(db, run.id, "a", given).step_result == given
        claimed = claim(db, run.id, "b")
        assert (claimed.payload, claimed.upstream_results) == (given, {"a": given})


def test_a_result_may_be_null_in_sql_or_in_json(db: Connection) -> None:
    define(db, "chain", CHAIN)
    for result, stored in ((None, None), ("null", "null")):
        run_id = run_workflow(db, "chain").id
        complete_with(db, run_id, result)
        found = "SELECT step_result::text FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'a'"
        assert value(db, found, run_id) == stored
        assert claim(db, run_id, "b").upstream_results == {"a": None}


def test_a_payload_may_be_json_null_but_not_sql_null(db: Connection) -> None:
    define(db, "chain", CHAIN)
    assert value(db, "SELECT payload::text FROM pgflow.run_workflow('chain', 'null')") == "null"
    with refused(INVALID, 'the payload of a run of workflow "chain" is NULL'):
        db.execute("SELECT pgflow.run_workflow('chain', NULL)")


def test_a_null_run_id_means_a_new_one(db: Connection) -> None:
    define(db, "chain", CHAIN)
    assert isinstance(value(db, "SELECT id FROM pgflow.run_workflow('chain', '{}', NULL)"), UUID)


def test_a_null_reason_is_still_a_failure(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    db.execute("SELECT pgflow.fail_step(%s, 'a', NULL)", [run_id])
    assert get_run(db, run_id).error_message == 'step "a" failed: no reason given'


def test_null_slugs_and_ids_are_unknown_not_ignored(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    for call in (
        "run_workflow(NULL, '{}')",
        "start_step(NULL, 'a')",
        f"start_step('{run_id}', NULL)",
        "claim_step(NULL, 'a')",
        f"claim_step('{run_id}', NULL)",
        "complete_step(NULL, 'a', '1')",
        f"complete_step('{run_id}', NULL, '1')",
        "fail_step(NULL, 'a', 'broken')",
        "has_unmet_deps(NULL, 'a')",
        f"has_unmet_deps('{run_id}', NULL)",
        "get_ready_steps(NULL)",
        "get_root_steps(NULL)",
        *(f"{name}_run(NULL)" for name in ("take", "cancel", "reopen", "repair")),
    ):
        with refused("P0002"):
            db.execute(f"SELECT pgflow.{call}".encode())


@pytest.mark.parametrize("result", ['"\\u0000"', "NaN", '"\\ud800"', "{"])
def test_what_jsonb_refuses_changes_nothing_and_the_step_can_be_failed(db: Connection, result: str) -> None:
    run_id = start_run(db, "chain", CHAIN)
    with refused("22P05" if "u0000" in result else "22P02"):
        complete_with(db, run_id, result)
    assert fail(db, run_id, "a").status == "failed"


def test_slugs_are_any_text(db: Connection) -> None:
    odd = "a 'b' \"c\" -> d % é 🚀"
    run_id = start_run(db, odd, {odd: [], "next": [odd]})
    complete(db, run_id, odd, 1)
    assert claim(db, run_id, "next").upstream_results == {odd: 1}
    with refused(INVALID, "has a cycle"):
        db.execute("INSERT INTO pgflow.deps VALUES (%s, 'next', %s)", [odd, odd])


def test_results_keep_numbers_exactly(db: Connection) -> None:
    run_id = start_run(db, "chain", CHAIN)
    exact = '{"n": 0.1000000000000000055511151231257827, "m": 1e400}'
    complete_with(db, run_id, exact)
    stored = value(db, "SELECT step_result = %s::jsonb FROM pgflow.step_states WHERE step_slug = 'a'", exact)
    assert stored is True


def test_no_function_is_strict(db: Connection) -> None:
    assert value(db, "SELECT count(*) FROM pg_proc WHERE pronamespace = 'pgflow'::regnamespace AND proisstrict") == 0
