"""Airflow's metadata database: the newest document of a DAG, from the tables of Airflow 2 and of Airflow 3."""

import json
import zlib

import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgflow_prefect.database.airflow.reader import DagRow, open_airflow
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError, UsageError
from tests.conftest import Connection

OF_AIRFLOW_2 = """
CREATE TABLE serialized_dag (
    dag_id varchar(250) PRIMARY KEY, fileloc varchar(2000) NOT NULL DEFAULT '', data json, data_compressed bytea,
    last_updated timestamptz NOT NULL DEFAULT now(), dag_hash varchar(32) NOT NULL DEFAULT ''
)
"""
OF_AIRFLOW_3 = """
CREATE TABLE serialized_dag (
    id uuid PRIMARY KEY DEFAULT gen_random_uuid(), dag_id varchar(250) NOT NULL, data jsonb, data_compressed bytea,
    created_at timestamptz NOT NULL DEFAULT now(), last_updated timestamptz NOT NULL DEFAULT now(),
    dag_hash varchar(32) NOT NULL DEFAULT '', dag_version_id uuid NOT NULL DEFAULT gen_random_uuid()
)
"""
pytestmark = pytest.mark.anyio

TIMEOUT = 60.0
MOST = 1_000


async def load(dsn: str, *dag_ids: str) -> dict[str, DagRow]:
    async with open_airflow(dsn, timeout=TIMEOUT) as database:
        return await database.load_dags(dag_ids, MOST)


@pytest.mark.parametrize("table", [OF_AIRFLOW_2, OF_AIRFLOW_3], ids=["2", "3"])
async def test_a_document_is_read_as_json_or_compressed(table: str, product_dsn: str, db: Connection) -> None:
    db.execute(table.encode())
    packed = zlib.compress(b'{"a": 2}')
    db.execute(
        "INSERT INTO serialized_dag (dag_id, data) VALUES ('plain', '{\"a\": 1}'), ('big', %s)",
        ['["' + "x" * MOST + '"]'],
    )
    db.execute("INSERT INTO serialized_dag (dag_id, data, data_compressed) VALUES ('packed', 'null', %s)", [packed])
    db.execute("INSERT INTO serialized_dag (dag_id, data_compressed) VALUES ('packed too', %s)", [packed])

    found = await load(product_dsn, "plain", "packed", "packed too", "big", "unknown")

    assert json.loads(found["plain"].data or b"") == {"a": 1}
    assert found["packed"] == DagRow("packed", len(packed), None, packed)
    assert found["packed too"].compressed == packed
    assert (found["big"].data, found["big"].compressed) == (None, None)
    assert found["big"].size > MOST
    assert "unknown" not in found


async def test_the_newest_version_of_a_dag_is_read(product_dsn: str, db: Connection) -> None:
    db.execute(OF_AIRFLOW_3.encode())
    for day in (2, 3, 1):
        db.execute(
            "INSERT INTO serialized_dag (dag_id, data, last_updated) VALUES ('etl', %s, make_date(2026, 1, %s))",
            [str(day), day],
        )
    async with open_airflow(product_dsn, timeout=TIMEOUT) as database:
        assert await database.list_dags() == ["etl"]
        assert (await database.load_dags(["etl"], MOST))["etl"].data == b"3"


async def test_a_database_that_is_not_airflows_is_refused(product_dsn: str) -> None:
    with pytest.raises(UsageError, match=r"has no table of Airflow that fits.*search_path"):
        await load(product_dsn, "etl")


async def test_a_role_without_the_right_is_told_which_it_needs(product_dsn: str, db: Connection) -> None:
    db.execute(OF_AIRFLOW_3.encode())
    role = f"reader_{db.info.dbname}"
    db.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD 'reads'").format(sql.Identifier(role)))
    try:
        dsn = make_conninfo(product_dsn, options=f"-c role={role}")
        with pytest.raises(PgflowPrefectError, match="GRANT SELECT ON serialized_dag, dag_run, task_instance, xcom TO"):
            await load(dsn, "etl")
        db.execute(sql.SQL("GRANT SELECT ON serialized_dag TO {}").format(sql.Identifier(role)))
        assert await load(dsn, "etl") == {}
    finally:
        db.execute(sql.SQL("DROP OWNED BY {}").format(sql.Identifier(role)))
        db.execute(sql.SQL("DROP ROLE {}").format(sql.Identifier(role)))


async def test_the_database_is_only_read(product_dsn: str, db: Connection) -> None:
    db.execute(OF_AIRFLOW_3.encode())
    async with open_airflow(product_dsn, timeout=TIMEOUT) as database:
        with pytest.raises(DatabaseUnavailableError, match="read-only transaction"):
            await database._fetch("DELETE FROM serialized_dag")


@pytest.mark.parametrize(
    ("dsn", "why"),
    [
        ("postgresql+psycopg2://airflow:airflow@db/airflow", "is SQLAlchemy's: write postgresql://"),
        ("mysql://airflow:airflow@db/airflow", "is not PostgreSQL's"),
        ("sqlite:////opt/airflow/airflow.db", "is not PostgreSQL's"),
        ("dbname=airflow user=", "--airflow-dsn or PGFLOW_AIRFLOW_DSN"),
        ("x", "--airflow-dsn or PGFLOW_AIRFLOW_DSN"),
    ],
)
async def test_an_address_that_can_not_be_right_is_refused_without_its_password(dsn: str, why: str) -> None:
    with pytest.raises((UsageError, DatabaseUnavailableError), match=why) as refused:
        async with open_airflow(dsn, timeout=2):
            pass
    assert "airflow:airflow" not in str(refused.value)


async def test_a_server_that_does_not_answer_is_called_airflows() -> None:
    with pytest.raises(DatabaseUnavailableError, match="can't connect to Airflow's database") as refused:
        async with open_airflow("postgresql://reader:S3cret@127.0.0.1:1/airflow", timeout=2):
            pass
    assert "S3cret" not in str(refused.value)
    assert "PGFLOW_DSN" not in str(refused.value)
