"""`import --from airflow`: rows, stubs and a ledger from a DAG of Airflow; and again, which only adds."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.acceptance.conftest import CommandLine
from tests.airflow.recorded import load_document, read_file
from tests.conftest import Connection
from tests.integration.test_airflow_database import OF_AIRFLOW_3

STEPS = "SELECT slug, rule FROM pgflow.steps WHERE workflow_slug = 'etl' ORDER BY slug"


def write_dag(cli: CommandLine, document: dict[str, Any], name: str = "etl.json") -> None:
    cli.write(name, json.dumps(document))


@pytest.mark.once
def test_a_dag_becomes_rows_stubs_and_a_ledger_and_again_only_adds(cli: CommandLine, db: Connection) -> None:
    cli.write("dags.json", read_file("3.3").decode())

    imported = cli("import", "--from", "airflow", "etl", "--json", "dags.json")
    assert imported.lines == [
        "wrote workflow 'etl' into the database: 7 steps, 8 dependencies",
        "wrote flows/etl.py: 7 stubs to fill in",
        "wrote flows/etl.ledger.md: 25 lines, of which 15 are for you to deal with",
    ]
    assert {str(slug): rule for slug, rule in db.execute(STEPS)} == {
        "choose": "all_success",
        "done": "none_failed_min_one_success",
        "extract": "all_success",
        "load.big": "all_success",
        "load.small": "all_success",
        "stamp": "all_success",
        "transform": "all_success",
    }
    source = (cli.directory / "flows/etl.py").read_text(encoding="utf-8")
    assert 'workflow = Workflow("etl", when_failed="continue", failed_by="leaves")' in source
    assert "    In Airflow: BashOperator of airflow.providers.standard.operators.bash.\n" in source
    assert "    bash_command = 'echo {{ ds }}'\n" in source
    drawn = cli("graph", "etl", "--format", "mermaid").out
    assert 'subgraph group0["load"]' in drawn
    assert cli("validate", "etl").code == 0

    unchanged = cli("import", "--from", "airflow", "etl", "--json=dags.json")
    assert unchanged.lines == [
        "workflow 'etl' in the database has every step: nothing added",
        "flows/etl.py has a handler for every step: nothing added",
        "flows/etl.ledger.md has every line: nothing added",
    ]
    assert (cli.directory / "flows/etl.py").read_text(encoding="utf-8") == source

    # A person has worked here, and the DAG has changed there.
    written = source.replace(
        "async def extract(payload: JsonValue)", "async def extract(payload: JsonValue, mine: int = 1)"
    )
    cli.write("flows/etl.py", written)
    page = (cli.directory / "flows/etl.ledger.md").read_text(encoding="utf-8").replace(
        "- [ ]", "- [x]", 3
    ) + "My note.\n"
    cli.write("flows/etl.ledger.md", page)
    document = load_document("3.3", "etl")
    tasks = {task["__var"]["task_id"]: task["__var"] for task in document["dag"]["tasks"]}
    tasks["done"] |= {"downstream_task_ids": ["archive"], "trigger_rule": "all_done"}
    new = {
        "task_id": "archive",
        "task_type": "BashOperator",
        "_task_module": "ops",
        "template_fields": [],
        "retries": 1,
    }
    document["dag"]["tasks"] = [
        {"__type": "operator", "__var": each} for each in [*tasks.values(), new] if each["task_id"] != "stamp"
    ]
    tasks["extract"]["downstream_task_ids"] = ["transform"]
    write_dag(cli, document)

    again = cli("import", "--from", "airflow", "--json", "etl.json")
    assert again.lines == [
        "added to workflow 'etl' in the database: 'archive', 'done' -> 'archive'",
        "left as it is: step 'stamp' is no longer in Airflow",
        "left as it is: step 'done' has other rules in Airflow: "
        "rule is 'none_failed_min_one_success' here and 'all_done' there",
        "added to flows/etl.py: archive",
        "wrote flows/etl.ledger.md: 3 lines, of which 1 are for you to deal with",
        "lines of flows/etl.ledger.md that Airflow no longer says:",
        *again.lines[6:],
    ]
    assert any("`stamp` **shell**" in line for line in again.lines[6:])
    after = (cli.directory / "flows/etl.py").read_text(encoding="utf-8")
    assert "mine: int = 1" in after
    assert "    retries=1,\n    retry_delay_seconds=300,\n    unimplemented=True,\n)\nasync def archive(" in after
    assert (cli.directory / "flows/etl.ledger.md").read_text(encoding="utf-8").startswith(page)
    assert ("done", "none_failed_min_one_success") in db.execute(STEPS).fetchall()


@pytest.mark.once
def test_a_dag_is_read_from_airflows_database(cli: CommandLine, db: Connection) -> None:
    db.execute(OF_AIRFLOW_3.encode())
    for dag_id in ("billing", "odd"):
        document = json.dumps(load_document("3.3", dag_id))
        db.execute("INSERT INTO serialized_dag (dag_id, data) VALUES (%s, %s)", [dag_id, document])
    address = cli.environment["PGFLOW_DSN"]

    imported = cli("import", "--from", "airflow", "--all", "--json", PGFLOW_AIRFLOW_DSN=address)
    found = json.loads(imported.out)
    assert [(each["workflow"], each["new"], each["ledger"]) for each in found] == [
        ("billing", True, "flows/billing.ledger.md"),
        ("odd", True, "flows/odd.ledger.md"),
    ]
    assert all(each["ledger_added"] for each in found)

    mistyped = cli("import", "--from", "airflow", "biling", "--airflow-dsn", address)
    assert mistyped.code == 2
    assert mistyped.find_error() == "Airflow's database has no DAG 'biling' (did you mean 'billing'?)"


@pytest.mark.once
def test_what_can_not_be_imported_is_named_and_nothing_is_written(cli: CommandLine, db: Connection) -> None:
    good, bad, newer = (load_document("3.3", "etl") for _ in range(3))
    bad["dag"]["dag_id"], newer["dag"]["dag_id"], newer["__version"] = "bad", "newer", 4
    bad["dag"]["tasks"][0]["__var"]["trigger_rule"] = "sometimes"
    write_dag(cli, {"dags": [good, bad, newer]}, "dags.json")
    refusals = {
        ("bad", "--json", "dags.json"): "trigger rule 'sometimes'",
        ("etl", "newer", "--json", "dags.json"): "DAG 'newer' of dags.json has version 4",
        ("etl", "other", "--json", "dags.json"): "dags.json has no DAG 'other'",
        ("--json", "dags.json"): "which DAG? name it, or say --all: dags.json has 'etl', 'bad', 'newer'",
        ("etl", "--json", "missing.json"): "missing.json can't be read: No such file",
        ("etl",): "where are the DAGs?",
        ("etl", "--json", "dags.json", "--airflow-dsn", "postgresql://db"): "exclude each other",
        ("etl", "--json", "dags.json", "--deploy"): "--deploy does not go with --from",
    }
    for arguments, why in refusals.items():
        refused = cli("import", "--from", "airflow", *arguments)
        assert refused.code == 2, arguments
        assert why in refused.find_error()
    db.execute("INSERT INTO pgflow.workflows (slug) VALUES ('etl')")
    db.execute("INSERT INTO pgflow.steps (workflow_slug, slug) VALUES ('etl', 'mine')")
    other = cli("import", "--from", "airflow", "etl", "--json", "dags.json")
    assert other.code == 2
    assert "the database has a workflow 'etl' with none of the steps that it has in Airflow" in other.find_error()
    db.execute("DELETE FROM pgflow.steps")
    db.execute("DELETE FROM pgflow.workflows")
    assert "go with --from airflow" in cli("import", "etl", "--airflow-dsn", "postgresql://db").find_error()
    assert db.execute("SELECT count(*) FROM pgflow.workflows").fetchone() == (0,)
    assert not (cli.directory / "flows").exists()


@pytest.mark.once
def test_the_script_that_dumps_dags_needs_no_more_than_python_and_airflow(cli: CommandLine, tmp_path: Path) -> None:
    printed = cli("airflow", "dump")
    script = tmp_path / "dump.py"
    script.write_text(printed.out, encoding="utf-8")
    helped = subprocess.run(
        [sys.executable, "-I", str(script), "--help"], capture_output=True, text=True, check=False, env={**os.environ}
    )
    assert helped.returncode == 0
    assert "--parse FOLDER" in helped.stdout


@pytest.mark.once
def test_a_project_of_dbt_becomes_a_workflow_through_the_same_command(cli: CommandLine, db: Connection) -> None:
    cli.write("target/manifest.json", (Path(__file__).parents[1] / "dbt" / "manifest.json").read_text(encoding="utf-8"))

    imported = cli("import", "--from", "dbt", "target/manifest.json")
    assert imported.lines == [
        "wrote workflow 'jaffle' into the database: 12 steps, 10 dependencies",
        "wrote flows/jaffle.py: 12 stubs to fill in",
        "wrote flows/jaffle.ledger.md: 28 lines, of which 23 are for you to deal with",
    ]
    assert cli("validate", "jaffle").code == 0
    assert "which manifest?" in cli("import", "--from", "dbt").find_error()
    assert "takes the file only" in cli("import", "--from", "dbt", "--all").find_error()
