"""`prune`: old runs go, it says how many, and a user who stops it loses nothing that it has done."""

import json
import signal
from pathlib import Path
from uuid import UUID

import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, wait_until
from tests.conftest import Connect, Connection
from tests.engine import CHAIN, column, define, finish, run_workflow, value


@pytest.fixture
def prune(outside: CommandLine, product_dsn: str) -> CommandLine:
    """The command with this test's database, and no Prefect: it needs none."""
    assert isinstance(outside.environment, dict)
    outside.environment["PGFLOW_DSN"] = product_dsn
    return outside


@pytest.fixture
def old_runs(db: Connection) -> list[UUID]:
    """Five runs that completed forty to fifty days ago, the oldest first; beside them, one is pending, one young."""
    define(db, "chain", CHAIN)
    runs = [run_workflow(db, "chain").id for _ in range(7)]
    for run_id in runs[1:]:
        finish(db, run_id)
    for age, run_id in enumerate(runs[2:]):
        db.execute(
            "UPDATE pgflow.runs SET finished_at = now() - make_interval(days => 50 - 2 * %s) WHERE id = %s",
            [age, run_id],
        )
    return runs[2:]


def count_runs(db: Connection) -> object:
    return value(db, "SELECT count(*) FROM pgflow.runs")


@pytest.mark.once
def test_a_dry_run_counts_and_deletes_nothing(prune: CommandLine, db: Connection, old_runs: list[UUID]) -> None:
    ended = prune("prune", "--older-than", "30d", "--dry-run")
    assert (ended.code, ended.err) == (0, "")
    assert ended.lines == ["workflow\tstatus\tto delete\tkept a day longer", "chain\tcompleted\t5\t0"]
    [told] = json.loads(prune("prune", "--older-than", "7w", "--dry-run", "--json").out)
    assert told == {"workflow_slug": "chain", "status": "completed", "runs": 1, "kept": 0}
    assert prune("prune", "--older-than", "9w", "--dry-run").lines == ["nothing is that old"]
    assert count_runs(db) == 7


def test_old_runs_are_deleted_and_counted(prune: CommandLine, db: Connection, old_runs: list[UUID]) -> None:
    assert prune("prune", "--older-than", "30d", "--status", "failed").lines == ["deleted 0 runs"]
    ended = prune("prune", "--older-than", "30d", "--workflow", "chain", "--batch", "2")
    assert (ended.code, ended.err, ended.lines) == (0, "", ["deleted 5 runs"])
    assert json.loads(prune("prune", "--older-than", "30d", "--json").out) == {"runs": 0, "definitions": 0}
    assert count_runs(db) == 2


def test_runs_of_one_workflow_are_deleted_at_any_age(prune: CommandLine, db: Connection, old_runs: list[UUID]) -> None:
    define(db, "other", CHAIN)
    other = finish(db, run_workflow(db, "other").id)
    counted = prune("prune", "--workflow", "chain", "--any-age", "--dry-run")
    assert counted.lines[1:] == ["chain\tcompleted\t6\t0"]
    assert prune("prune", "--workflow", "chain", "--any-age").lines == ["deleted 6 runs"]
    left = column(db, "SELECT workflow_slug FROM pgflow.runs ORDER BY 1")
    assert left == ["chain", "other"], f"what is pending stays, and other workflows {other}"


@pytest.mark.once
def test_one_run_is_deleted_at_any_age_and_a_pending_one_is_not(
    prune: CommandLine, db: Connection, old_runs: list[UUID]
) -> None:
    [pending] = column(db, "SELECT id FROM pgflow.runs WHERE status = 'pending'")
    [young] = column(
        db, "SELECT id FROM pgflow.runs WHERE status = 'completed' AND finished_at > now() - interval '1 hour'"
    )
    told = json.loads(prune("prune", "--run", str(young), "--dry-run", "--json").out)
    assert told == [{"workflow_slug": "chain", "status": "completed", "runs": 1, "kept": 0}]
    assert prune("prune", "--run", str(young), str(old_runs[0])).lines == ["deleted 2 runs"]
    refused = prune("prune", "--run", str(pending))
    assert refused.code == 2
    assert f"run {pending} is pending, and only runs that have ended are deleted. End it first" in refused.find_error()
    assert prune("prune", "--run", str(young)).find_error() == f"unknown run {young}"
    assert count_runs(db) == 5
    assert value(db, "SELECT count(*) FROM pgflow.step_states WHERE run_id = %s", young) == 0


@pytest.mark.once
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "which runs? give one of --older-than 30d, --workflow NAME --any-age and --run RUN_ID"),
        (["--older-than", "30d", "--any-age", "--workflow", "chain"], "give one of --older-than 30d"),
        (["--run", "latest", "--older-than", "30d"], "give one of --older-than 30d"),
        (["--any-age"], "--any-age goes with --workflow"),
        (["--run", "latest", "--status", "failed"], "--run names the run"),
        (["--workflow", "chian", "--any-age"], "unknown workflow 'chian' (did you mean 'chain'?)"),
        (["--older-than", "soon"], "--older-than 'soon' is not a time like 90m, 12h, 30d or 2w"),
        (["--older-than", "30d", "--workflow", "chian"], "unknown workflow 'chian' (did you mean 'chain'?)"),
        (["--older-than", "30d", "--status", "pending"], "pending"),
    ],
)
def test_options_that_contradict_each_other_are_refused_in_one_message(
    prune: CommandLine, db: Connection, old_runs: list[UUID], arguments: list[str], message: str
) -> None:
    ended = prune("prune", *arguments)
    assert (ended.code, ended.out) == (2, "")
    assert message in ended.find_error()
    assert count_runs(db) == 7


def test_a_user_who_stops_it_is_told_what_is_gone(
    prune: CommandLine, connect: Connect, db: Connection, old_runs: list[UUID]
) -> None:
    *others, youngest = old_runs
    holder = connect()
    with holder.transaction():
        holder.execute("SELECT FROM pgflow.step_states WHERE run_id = %s FOR UPDATE", [youngest])
        process = prune.start("prune", "--older-than", "30d", "--batch", "1")
        waiting = (
            "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        )
        wait_until(lambda: count_runs(db) == 7 - len(others) and value(db, waiting) == 1, "it waits for the last one")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (130, "")
    assert "deleted 4 runs before the interruption" in err
    assert value(db, "SELECT status FROM pgflow.runs WHERE id = %s", youngest) == "completed"
    assert value(db, "SELECT count(*) FROM pgflow.step_states WHERE run_id = %s", youngest) == len(CHAIN)


@pytest.mark.once
def test_stored_results_of_deleted_runs_are_deleted_too(
    prune: CommandLine, db: Connection, old_runs: list[UUID], tmp_path: Path
) -> None:
    assert isinstance(prune.environment, dict)
    nowhere = prune("prune", "--results")
    assert nowhere.code == 2
    assert "neither PGFLOW_RESULT_STORAGE nor flows/*.py names a storage" in nowhere.find_error()
    prune.environment["PGFLOW_RESULT_STORAGE"] = tmp_path.as_uri()
    installation = value(db, "SELECT id FROM pgflow_prefect.installation")
    folder = tmp_path / "pgflow" / str(installation)
    for run_id in old_runs[:2]:
        (folder / str(run_id)).mkdir(parents=True)
        (folder / str(run_id) / "step-0-1").write_text("1")
    assert prune("prune", "--results", "--dry-run").lines == ["0 runs that are gone left stored results"]
    ended = prune("prune", "--run", str(old_runs[0]), "--results")
    assert ended.lines == ["deleted 1 run, and 1 stored result of runs that are gone"]
    assert [each.name for each in folder.iterdir()] == [str(old_runs[1])]
    refused = prune("prune", "--results", "--workflow", "chain")
    assert "which runs? give one of --older-than 30d" in refused.find_error()
