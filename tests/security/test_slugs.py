"""A slug is a name in Prefect and a header of HTTP: none has a character that these would obey. The party: `define`."""

from collections.abc import Callable

import pytest
from prefect.client.orchestration import PrefectClient

from pgflow_prefect import Workflow
from pgflow_prefect.errors import InvalidDefinitionError
from pgflow_prefect.shipped import shipped_path
from pgflow_prefect.workflow import to_flow_name
from tests.conftest import Connection
from tests.engine import INVALID, column, refused
from tests.integration.conftest import await_task_runs, insert_workflow, make_slug, read_flow_run, read_run
from tests.security.conftest import Party

CONTROLS = ["\n", "\r", "\t", "\x01", "\x1b", "\x7f", "\x85", "\x9b"]


@pytest.mark.parametrize("control", CONTROLS)
def test_a_new_slug_with_a_control_character_is_refused(kit: Connection, party: Party, control: str) -> None:
    author = party("define")
    for statement in (
        "INSERT INTO pgflow.workflows (slug) VALUES (%s)",
        "INSERT INTO pgflow.steps (workflow_slug, slug) VALUES ('chain', %s)",
        "UPDATE pgflow.steps SET slug = %s WHERE workflow_slug = 'chain' AND slug = 'c'",
        "UPDATE pgflow.workflows SET slug = %s",
    ):
        with refused(INVALID, "has a control character"):
            author.execute(statement.encode(), [f"a{control}b"])


@pytest.mark.parametrize("slug", ["größe 工 🚀", "a b", "it's", "%s\\", "👩\u200d🚀"])
def test_any_other_slug_is_taken(kit: Connection, party: Party, slug: str) -> None:
    party("define").execute("INSERT INTO pgflow.workflows (slug) VALUES (%s)", [slug])
    assert slug in column(kit, "SELECT slug FROM pgflow.workflows")


def test_rows_of_an_older_version_stay_readable_and_editable(
    empty_dsn: str, connect_to: Callable[[str], Connection]
) -> None:
    db = connect_to(empty_dsn)
    script = shipped_path("sql", "pgflow.sql").read_bytes()
    db.execute(script)
    db.execute("DROP TRIGGER refuse_slug ON pgflow.workflows; DROP TRIGGER refuse_slug ON pgflow.steps")
    insert_workflow(db, "two\nlines", ["a\tb", "c"], [("a\tb", "c")])
    db.execute(script)
    assert column(db, "SELECT slug FROM pgflow.steps ORDER BY 1") == ["a\tb", "c"]
    db.execute("DELETE FROM pgflow.deps; INSERT INTO pgflow.deps VALUES ('two\nlines', 'c', 'a\tb')")
    db.execute("SELECT pgflow.run_workflow('two\nlines', '1')")
    with refused(INVALID, "control character"):
        db.execute("INSERT INTO pgflow.steps VALUES ('two\nlines', 'd\te')")


@pytest.mark.anyio
@pytest.mark.usefixtures("pgflow_dsn")
async def test_a_run_of_an_older_slug_ends_and_its_names_in_prefect_are_printable(
    db: Connection, client: PrefectClient
) -> None:
    workflow = Workflow(f"evil\r\nX-Evil: 1\x1b[2J-{make_slug()}")
    db.execute("SET session_replication_role = replica")
    insert_workflow(db, workflow.slug, ["a\nb"])
    db.execute("RESET session_replication_role")
    workflow.step("a\nb")(lambda: 1)
    await workflow.flow(return_state=True)
    assert read_run(db)[0] == "completed"
    assert to_flow_name(workflow.slug).isprintable()
    flow_run = await read_flow_run(client, to_flow_name(workflow.slug))
    assert flow_run.name.isprintable()
    await await_task_runs(client, flow_run, {"a\N{SYMBOL FOR LINE FEED}b": "Completed"})


def test_a_workflow_that_python_defines_is_refused_with_the_slug() -> None:
    workflow = Workflow("wf")
    workflow.step("a\nb")(lambda: 1)
    with pytest.raises(InvalidDefinitionError, match="has a control character: rename it"):
        _ = workflow.definition
