"""What a look at Airflow reads, keeps and holds up: bounded, and one row's trouble is no other run's."""

import threading
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import SecretStr

from pgflow_prefect.airflow import results, whole_runs
from pgflow_prefect.airflow.mirrored import FollowedRun, find_mirrored_run_id
from pgflow_prefect.airflow.whole_runs import import_history
from pgflow_prefect.cli.reconcile import _compare_with_airflow
from pgflow_prefect.database.airflow import runs as airflow_runs
from pgflow_prefect.database.airflow.reader import AirflowDatabase, open_airflow
from pgflow_prefect.database.airflow.runs import SourceRun
from pgflow_prefect.services import mirror as mirror_module
from tests.airflow.replay import DAG_ID
from tests.airflow.test_mirror import ENDED, LONG_AGO, Site, airflow, site
from tests.conftest import Connection

pytestmark = [pytest.mark.anyio, pytest.mark.thorough]

__all__ = ["airflow", "site"]  # fixtures


@pytest.fixture
def confs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The runs of which a look has read the conf, by Airflow's ids."""
    read: list[int] = []
    original = AirflowDatabase.read_confs

    async def read_confs(self: AirflowDatabase, asked: Sequence[SourceRun]) -> list[SourceRun]:
        found = await original(self, asked)
        read.extend(run.id for run in found)
        return found

    monkeypatch.setattr(AirflowDatabase, "read_confs", read_confs)
    return read


async def test_the_conf_of_a_run_is_read_once(site: Site, confs: list[int]) -> None:
    async with site.mirror() as mirror:
        await mirror.look()
        for run in (1, 2):
            next(site.airflow.replay("run", run=run))
        for _ in range(3):
            await mirror.look()
    assert sorted(confs) == [1, 2]
    async with site.mirror() as mirror:
        await site.store.release_mirrors(mirror.mirror.holder)
        await mirror.look()
    assert sorted(confs) == [1, 2], "also by the next service"


async def test_confs_that_are_too_much_together_come_at_later_looks(
    site: Site, confs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(airflow_runs, "_MOST_TOGETHER", 1)
    async with site.mirror() as mirror:
        await mirror.look()
        for run in (1, 2, 3):
            next(site.airflow.replay("run", run=run))
        for looks in (1, 2, 3):
            await mirror.look()
            assert len(await site.store.list_runs(workflow_slug=DAG_ID)) == looks
    assert sorted(confs) == [1, 2, 3]


async def test_a_run_that_can_not_be_ended_here_keeps_no_other_one_waiting(site: Site, db: Connection) -> None:
    first = find_mirrored_run_id(await site.store.read_installation(), DAG_ID, "run 1")
    db.execute(
        "CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN IF NEW.status = 'failed' THEN RAISE 'not this one'; END IF; RETURN NEW; END $$"
    )
    async with site.mirror() as mirror:
        await mirror.look()
        for run in (1, 2):
            next(site.airflow.replay("run", run=run))
        await mirror.look()
        db.execute(
            f"CREATE TRIGGER refuse BEFORE UPDATE ON pgflow.runs FOR EACH ROW WHEN (OLD.id = '{first}') "
            "EXECUTE FUNCTION refuse()".encode()
        )
        site.airflow.db.execute("DELETE FROM dag_run")
        site.changed.clear()
        await mirror.look()
        statuses = {run.id: run.status for run in await site.store.list_runs(workflow_slug=DAG_ID)}
        [second] = statuses.keys() - {first}
        assert (statuses[first], statuses[second], site.changed) == ("pending", "failed", [second])
        db.execute("DROP TRIGGER refuse ON pgflow.runs")
        await mirror.look()
    assert (await site.store.read_run(first)).is_cancelled, "it is ended later"


async def test_a_run_that_is_as_it_was_is_not_described_again_and_a_big_one_is_in_a_thread(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "_MANY", 0)
    threads: list[int] = []
    original = FollowedRun.describe

    def describe(self: FollowedRun, *given: Any, **named: Any) -> Any:
        threads.append(threading.get_ident())
        return original(self, *given, **named)

    monkeypatch.setattr(FollowedRun, "describe", describe)
    async with site.mirror() as mirror:
        await mirror.look()
        looks = site.airflow.replay("run")
        next(looks)
        next(looks)
        await mirror.look()
        described = len(threads)
        assert described > 0
        assert threading.get_ident() not in threads, "the worker's event loop goes on meanwhile"
        for _ in range(3):
            await mirror.look()
        assert len(threads) == described
        for _ in looks:
            pass
        await mirror.look()
    assert {slug: each.status for slug, each in (await site.read_steps()).items()} == ENDED


async def test_results_of_a_past_run_that_are_too_much_together_are_named(
    site: Site, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_runs, "_RESULTS", 1)
    monkeypatch.setattr(whole_runs, "MOST_TOGETHER", 1)
    site.airflow.play("run")
    async with open_airflow(site.airflow.dsn, timeout=60) as database:
        history = await import_history(site.store, database, DAG_ID, LONG_AGO)
    assert (history.written, history.failures) == (1, {})
    steps = await site.read_steps()
    assert {slug: each.status for slug, each in steps.items()} == ENDED
    copied = [slug for slug, each in steps.items() if each.step_result is not None and slug != "double"]
    assert len(copied) == 1
    [[notes]] = db.execute("SELECT notes FROM pgflow_prefect.mirrored_runs").fetchall()
    assert isinstance(notes, dict)
    assert f"others of its run have {results.MOST_TOGETHER:,} bytes already" in str(notes)


async def test_history_copies_no_results_where_the_settings_say_so(site: Site, db: Connection) -> None:
    site.airflow.play("run")
    async with open_airflow(site.airflow.dsn, timeout=60) as database:
        await import_history(site.store, database, DAG_ID, LONG_AGO, with_results=False)
    copied = "SELECT count(*) FROM pgflow.step_states WHERE step_result IS NOT NULL AND step_slug <> 'double'"
    assert db.execute(copied).fetchone() == (0,)


@pytest.mark.parametrize("source", ["postgresql://reader@127.0.0.1:1/airflow", "not an address", ""])
async def test_prefect_is_compared_though_airflow_can_not_be(source: str, site: Site) -> None:
    settings = site.settings.model_copy(update={"airflow_dsn": SecretStr(source), "connect_timeout": 2.0})
    found, why = await _compare_with_airflow(site.store, settings, apply=True, everything=True)
    assert (found, why is None) == ([], source == "")
    assert (await site.store.list_mirrors())[0].workflow_slug == DAG_ID, "this database still answers"
