"""The last day of a DAG in Airflow: its schedule, its missed dates and its ledger move here."""

from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import SecretStr

from pgflow_prefect.airflow.left import describe_left, replace_left
from pgflow_prefect.cli.airflow import ledger
from pgflow_prefect.cli.deploy import _take_over
from pgflow_prefect.cli.deploy_options import NO_FLAGS, DeployFlags
from pgflow_prefect.cli.missed import MissedDates, find_missed
from pgflow_prefect.definitions.airflow.params import read_params
from pgflow_prefect.errors import UsageError
from pgflow_prefect.settings import Settings
from tests.airflow.recorded import RECORDED, VERSIONS, load, load_document
from tests.conftest import Connection
from tests.engine import define
from tests.integration.test_external_claims import bind

DAGS = RECORDED / "3.3" / "dags.json"


@pytest.fixture
def settings(dsn: str) -> Settings:
    return Settings(dsn=SecretStr(dsn))


def take_over(settings: Settings, dag: str, flags: DeployFlags = NO_FLAGS, version: str = "3.3") -> DeployFlags:
    return _take_over(settings, [dag], flags, None, RECORDED / version / "dags.json")


@pytest.mark.parametrize("version", VERSIONS)
def test_a_deployment_takes_over_the_schedule_of_the_dag(version: str, settings: Settings) -> None:
    schedule = load(version, "etl").schedule
    taken = take_over(settings, "etl", version=version)
    assert (taken.cron, taken.interval, taken.timezone) == ("0 6 * * *", None, schedule.timezone)
    assert take_over(settings, "maps").cron == "0 * * * *"
    assert take_over(settings, "images").interval == "4h"
    assert taken.parse().schedule is not None


def test_a_dag_without_a_schedule_takes_none_over_and_one_by_assets_is_refused(settings: Settings) -> None:
    assert take_over(settings, "rules") == NO_FLAGS
    for dag in ("uploads", "databases"):
        with pytest.raises(UsageError, match=f"the schedule of DAG '{dag}' can't be taken over"):
            take_over(settings, dag)
    with pytest.raises(UsageError, match="has no DAG 'nothing'"):
        take_over(settings, "nothing")
    with pytest.raises(UsageError, match="leave out --cron"):
        take_over(settings, "etl", DeployFlags(cron="0 1 * * *"))
    with pytest.raises(UsageError, match="name one workflow"):
        _take_over(settings, ["etl", "maps"], NO_FLAGS, None, DAGS)


@pytest.mark.parametrize("version", VERSIONS)
def test_the_params_of_a_dag_are_read_with_their_defaults(version: str) -> None:
    found = read_params(load(version, "triggers").said.get("params"))
    assert [(each.name, each.default) for each in found] == [("region", "eu"), ("limit", 10)]
    assert load_document(version, "triggers")


def add_run(db: Connection, date: datetime, airflow_run_id: str | None = None) -> None:
    """Add a run of the workflow `etl` for a date."""
    db.execute(
        "INSERT INTO pgflow.runs (id, workflow_slug, payload, logical_date) VALUES (gen_random_uuid(), 'etl', "
        "jsonb_strip_nulls(jsonb_build_object('airflow_run_id', %s::text)), %s)",
        [airflow_run_id, date],
    )


def find_today() -> datetime:
    """Return the latest moment at which `etl` was due: six o'clock in UTC."""
    now = datetime.now(UTC)
    today = now.replace(hour=6, minute=0, second=0, microsecond=0)
    return today if today <= now else today - timedelta(days=1)


async def look(settings: Settings, **given: object) -> list[datetime]:
    """Return the missed dates of `etl`."""
    wanted = MissedDates("etl", **{"cron": None, "every": None, "timezone": "UTC", "airflow_dsn": None, **given})  # type: ignore[arg-type]
    found = await find_missed(settings, wanted)
    return [] if found is None else [*found.dates]


@pytest.mark.anyio
async def test_missed_dates_are_those_since_the_latest_run(settings: Settings, db: Connection) -> None:
    define(db, "etl", {"extract": []})
    latest = find_today()
    with pytest.raises(UsageError, match="nothing says since when"):
        await look(settings, cron="0 6 * * *", dag_file=None)
    add_run(db, latest - timedelta(days=3), "scheduled__x")
    add_run(db, latest - timedelta(hours=1), "manual__x")
    days = [latest - timedelta(days=2), latest - timedelta(days=1), latest]
    assert await look(settings, cron="0 6 * * *", dag_file=None) == days, "a run by hand makes up for no date"
    assert await look(settings, every="1d", dag_file=None) == days
    assert await look(settings, dag_file=DAGS) == [latest], "the DAG has catchup=False"
    add_run(db, latest)
    assert await look(settings, cron="0 6 * * *", dag_file=None) == []
    with pytest.raises(UsageError, match="leave out --airflow-dsn"):
        await look(settings, cron="0 6 * * *", dag_file=DAGS)


def test_the_ledger_says_what_is_left_and_keeps_all_else(
    db: Connection, dsn: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    define(db, "etl", {"a": [], "b": ["a"]})
    with pytest.raises(UsageError, match=r"etl.ledger.md can't be read.*import --from airflow etl"):
        ledger("etl", directory=tmp_path, dsn=dsn)
    page = tmp_path / "etl.ledger.md"
    page.write_text("# etl\n\n- [x] `a` **retries**: two\n- [ ] a note of mine\n", "utf-8")
    db.execute("SELECT pgflow_prefect.observe_workflow('etl')")
    bind(db, "etl", "a", "python")
    ledger("etl", directory=tmp_path, dsn=dsn)
    assert "Airflow executes 1 of 2 tasks: `b`" in capsys.readouterr().out
    bind(db, "etl", "b", "python")
    ledger("etl", directory=tmp_path, dsn=dsn)
    written = page.read_text("utf-8")
    assert written.startswith("# etl\n\n- [x] `a` **retries**: two\n- [ ] a note of mine\n")
    assert written.count("## Left in Airflow") == 1
    assert "Airflow executes no task" in written
    assert "deploy etl --as-in-airflow" in written
    ledger("etl", directory=tmp_path, dsn=dsn)
    assert page.read_text("utf-8") == written

    db.execute("SELECT pgflow_prefect.name_airflow_dags('{etl}')")
    db.execute("INSERT INTO pgflow.steps (workflow_slug, slug) VALUES ('etl', 'new')")
    ledger("etl", directory=tmp_path, dsn=dsn)
    assert "Airflow executes 1 of 3 tasks: `new`" in page.read_text("utf-8"), "no row has moved it"


def test_lines_behind_the_part_on_what_is_left_stay() -> None:
    first = replace_left("# etl\n", "command", describe_left("etl", {"a": "external"}, asks=True, is_followed=True))
    more = f"{first}\n## Added by a later import\n\n- [ ] `b`\n"
    again = replace_left(more, "command", describe_left("etl", {"a": "python"}, asks=True, is_followed=True))
    assert again.endswith("\n\n## Added by a later import\n\n- [ ] `b`\n")
    assert again == replace_left(again, "command", describe_left("etl", {"a": "python"}, asks=True, is_followed=True))
