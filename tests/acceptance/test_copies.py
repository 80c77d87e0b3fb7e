"""A copy of a database, and two databases on one Prefect server: what one of them shows is not the other's."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import UUID, uuid4

import psycopg
import pytest

from pgflow_prefect.workflow import to_flow_name
from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.copying import copy_database
from tests.engine import define, get_run, run_workflow, statuses, value
from tests.engine import finish as execute_to_end

FAST = {"PGFLOW_LEASE": "600", "PGFLOW_RECONCILE_INTERVAL": "1"}
ID = "SELECT id FROM pgflow_prefect.installation"


@pytest.fixture
def copy(copy_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(copy_dsn, autocommit=True) as connection:
        yield connection


@pytest.fixture
def live_run(services: Services, db: Connection, cli: CommandLine, chain: str) -> UUID:
    """A run whose step b a worker executes until the file `gate` is gone."""
    cli.write("gate")
    services.start("worker", **FAST)
    run_id = run_workflow(db, chain, {}).id
    wait_until(lambda: "b" in cli.executions(), "b executes")
    return run_id


@pytest.fixture
def copied(live_run: UUID, dsn: str, copy_dsn: str, copy: Connection) -> UUID:
    """The live run, in the original and in a copy whose rows say that its owner has vanished."""
    copy_database(dsn, copy_dsn)
    copy.execute("UPDATE pgflow_prefect.owners SET lease_until = 'epoch'")
    return live_run


def finish(cli: CommandLine, db: Connection, prefect: PrefectView, run_id: UUID) -> None:
    """Let the original's run come to its end, and check that nothing of it was disturbed."""
    prefect.await_state(run_id, "Running")
    cli.remove("gate")
    wait_until(lambda: get_run(db, run_id).status == "completed", "the run completes")
    prefect.await_state(run_id, "Completed")
    assert cli.executions() == ["a", "b", "c"]


def test_services_and_commands_that_write_to_prefect_refuse_a_copy(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str, copied: UUID, copy_dsn: str, copy: Connection
) -> None:
    for command in (
        ["worker"],
        ["bridge"],
        ["serve"],
        ["deploy", "--all", "--prune"],
        ["reconcile", "--apply"],
        ["run", "--resume", str(copied)],
    ):
        refused = cli(*command, PGFLOW_DSN=copy_dsn)
        assert refused.code == 1, (command, refused)
        assert "this database is a copy" in refused.err
        assert "pgflow-prefect init --new-installation" in refused.err
    assert "workers refuse it" in cli("init", PGFLOW_DSN=copy_dsn).err
    doctor = cli("doctor", "--no-flow-run", PGFLOW_DSN=copy_dsn)
    assert doctor.code == 1
    assert "workers refuse it" in doctor.out
    assert statuses(copy, copied) == {"a": "completed", "b": "pending"}
    assert cli("status", str(copied), PGFLOW_DSN=copy_dsn).code == 0, "a look at it does no harm"
    finish(cli, db, prefect, copied)


def test_commands_that_change_runs_refuse_a_copy_before_they_change_it(
    cli: CommandLine, db: Connection, chain: str, tmp_path: Path
) -> None:
    ended, pending = run_workflow(db, chain).id, run_workflow(db, chain).id
    execute_to_end(db, ended)
    # What a copy of a database has that was used with Prefect.
    db.execute("INSERT INTO pgflow_prefect.heartbeats DEFAULT VALUES")
    db.execute("UPDATE pgflow_prefect.installation SET stamp = '1/1'")
    rows = "SELECT jsonb_agg(to_jsonb(r) ORDER BY r.id) FROM pgflow.runs r"
    before = value(db, rows)
    for command in (
        ["cancel", str(pending)],
        ["record", str(ended)],
        ["prune", "--workflow", chain, "--any-age", "--results"],
        ["run", chain],
    ):
        refused = cli(*command, PGFLOW_RESULT_STORAGE=tmp_path.as_uri())
        assert refused.code == 1, (command, refused)
        assert "this database is a copy" in refused.err
        assert value(db, rows) == before, command
    assert statuses(db, pending) == {"a": "pending"}


@pytest.mark.once
def test_a_copy_that_is_a_new_installation_leaves_the_original_alone(
    cli: CommandLine,
    services: Services,
    db: Connection,
    prefect: PrefectView,
    chain: str,
    copied: UUID,
    copy_dsn: str,
    copy: Connection,
) -> None:
    told = cli("init", "--new-installation", PGFLOW_DSN=copy_dsn)
    assert told.code == 0, told
    assert value(copy, ID) != value(db, ID)

    assert cli("reconcile", "--apply", PGFLOW_DSN=copy_dsn).out == "PostgreSQL and Prefect agree\n"
    refused = cli("worker", PGFLOW_DSN=copy_dsn)
    assert (refused.code, "--take-over" in refused.err) == (2, True), refused
    assert cli("deploy", chain, PGFLOW_DSN=copy_dsn).code == 2
    services.start("bridge", PGFLOW_DSN=copy_dsn, **FAST)
    mine = run_workflow(copy, chain, {}).id
    finish(cli, db, prefect, copied)
    assert statuses(copy, copied) == {"a": "completed", "b": "pending"}, "the original's run is not the copy's"
    assert statuses(copy, mine) == {"a": "pending"}, "the original's deployment does not execute it"


@pytest.mark.once
def test_a_deployment_that_is_taken_over_is_left_by_the_worker_that_had_it(
    cli: CommandLine,
    services: Services,
    db: Connection,
    prefect: PrefectView,
    chain: str,
    copied: UUID,
    copy_dsn: str,
    copy: Connection,
) -> None:
    assert cli("init", "--new-installation", PGFLOW_DSN=copy_dsn).code == 0
    taken = cli("deploy", chain, "--take-over", PGFLOW_DSN=copy_dsn)
    assert taken.code == 0, taken
    flow_run = prefect.press_run(chain, {"start": 10})
    services.started[0].await_line("another installation has taken its deployment over")
    services.start("worker", PGFLOW_DSN=copy_dsn, **FAST)
    cli.remove("gate")
    wait_until(lambda: prefect.read_flow_run(flow_run)["state_name"] == "Completed", "the new owner executes it")
    assert value(db, "SELECT count(*) FROM pgflow.runs") == 1
    assert value(copy, "SELECT count(*) FROM pgflow.runs WHERE status = 'completed'") == 1


@pytest.mark.once
def test_a_database_that_was_moved_goes_on_with_its_runs(
    cli: CommandLine,
    services: Services,
    prefect: PrefectView,
    copied: UUID,
    copy_dsn: str,
    copy: Connection,
    db: Connection,
) -> None:
    services.stop()
    assert cli("init", "--moved", PGFLOW_DSN=copy_dsn).code == 0
    assert value(copy, ID) == value(db, ID)
    assert "has not moved: nothing to do" in cli("init", "--moved", PGFLOW_DSN=copy_dsn).out
    cli.remove("gate")
    services.start("worker", PGFLOW_DSN=copy_dsn, **FAST)
    wait_until(lambda: get_run(copy, copied).status == "completed", "the run completes")
    assert cli.executions() == ["a", "b", "b", "c"]

    refused = cli("worker")
    assert refused.code == 1
    assert "is registered in Prefect for database" in refused.err


def test_a_copy_of_a_database_that_was_never_used_is_ready_at_once(
    cli: CommandLine, make_database: Callable[[str | None], str], template: str, chain: str, db: Connection
) -> None:
    ids = set()
    for _ in range(2):
        dsn = make_database(template)
        assert cli("reconcile", "--apply", PGFLOW_DSN=dsn).code == 0
        with psycopg.connect(dsn) as connection:
            ids.add(value(connection, ID))
    assert len(ids) == 2, "each has an id of its own"


@pytest.mark.once
def test_slugs_that_prefect_would_spell_alike_have_a_deployment_each(cli: CommandLine, db: Connection) -> None:
    stem = f"orders_{uuid4().hex[:8]}"
    slugs = [f"{stem}/eu", f"{stem}_eu", f"{stem}%eu"]
    for slug in slugs:
        define(db, slug, {"a": []})
        db.execute("SELECT pgflow_prefect.observe_workflow(%s)", [slug])
    deployed = cli("deploy", "--all", "--json")
    assert deployed.code == 0, deployed
    assert len({each["deployment"] for each in json.loads(deployed.out)}) == len(slugs)
    assert cli("deploy", "--all", "--plan").code == 0, "nothing differs"
    assert f"its flow in Prefect is called '{stem}_eu-" in cli("validate", slugs[0]).out

    twin = to_flow_name(slugs[0])
    define(db, twin, {"a": []})
    db.execute("SELECT pgflow_prefect.observe_workflow(%s)", [twin])
    told = cli("validate", twin)
    assert (told.code, f"workflow '{slugs[0]}' has the same flow in Prefect" in told.out) == (1, True), told


@pytest.mark.parametrize("flags", [("--new-installation", "--moved"), ("--dry-run", "--moved")])
def test_init_does_one_thing_at_a_time(cli: CommandLine, flags: tuple[str, str]) -> None:
    assert cli("init", *flags).code == 2
