"""`deploy --all`, `--plan`, `--prune` and `diff`: many workflows at once, and what has come apart."""

import json
from uuid import UUID, uuid4

import pytest

from tests.acceptance.chain import CHAIN_HANDLERS
from tests.acceptance.conftest import CommandLine
from tests.acceptance.test_deploy import ENABLED, post, read_deployments
from tests.conftest import Connection
from tests.engine import CHAIN, column, define, value

pytestmark = pytest.mark.once

INSTALLATION = "SELECT id FROM pgflow_prefect.installation"


@pytest.fixture(autouse=True)
def installation(db: Connection) -> None:
    """A database of its own id: the others of this session, which share a Prefect server, are copies of one."""
    db.execute("UPDATE pgflow_prefect.installation SET id = gen_random_uuid()")


@pytest.fixture
def several(cli: CommandLine, db: Connection, chain: str) -> tuple[str, str, str]:
    """Three workflows: with a file of handlers, done as rows say, and external."""
    by_rows, nowhere = f"rows_{uuid4().hex[:8]}", f"nowhere_{uuid4().hex[:8]}"
    for slug in (by_rows, nowhere):
        define(db, slug, {"only": []})
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'only', 'external')", [by_rows])
    return chain, by_rows, nowhere


def test_a_plan_writes_nothing_and_says_that_there_is_nothing_to_do_once_it_was_carried_out(
    cli: CommandLine, db: Connection, several: tuple[str, str, str], prefect_api: str
) -> None:
    chain, by_rows, nowhere = several

    plan = cli("deploy", "--all", "--plan")
    assert (plan.code, plan.err) == (2, "")
    skipped = f"skipped workflow {nowhere!r}: it has no handlers here: flows/{nowhere}.py does not exist"
    assert plan.lines == [
        f"would create deployment {chain}/pgflow (no work pool: `pgflow-prefect worker` runs it)",
        f"would enable workflow {chain!r}",
        f"would create deployment {by_rows}/pgflow (no work pool: `pgflow-prefect worker` runs it)",
        f"would enable workflow {by_rows!r}",
        skipped,
    ]
    assert [read_deployments(prefect_api, slug) for slug in several] == [[], [], []]
    assert column(db, ENABLED) == []

    done = cli("deploy", "--all")
    assert [line.split(" (")[0] for line in done.lines] == [
        f"created deployment {chain}/pgflow",
        f"created deployment {by_rows}/pgflow",
        skipped,
    ]
    assert column(db, ENABLED) == sorted([chain, by_rows])
    [found] = read_deployments(prefect_api, by_rows)
    assert f"pgflow-db-{UUID(str(value(db, INSTALLATION))).hex[:8]}" in found["tags"]

    silent = cli("diff")
    assert (silent.code, silent.out, silent.err) == (0, "", "")
    again = cli("deploy", "--all", "--plan", "--json")
    outcomes = {each["workflow"]: each["outcome"] for each in json.loads(again.out)}
    assert again.code == 0
    assert outcomes == {chain: "unchanged", by_rows: "unchanged", nowhere: "skipped"}
    told = cli("deploy", "--all", "--plan")
    assert (told.code, told.lines) == (0, ["nothing to do: 2 deployments are as they would be"])

    db.execute("UPDATE pgflow_prefect.enabled_workflows SET enabled = false WHERE workflow_slug = %s", [chain])
    plan = cli("deploy", chain, "--tag", "late", "--plan")
    assert (plan.code, plan.lines) == (
        2,
        [f"would update deployment {chain}/pgflow", "  tags: + late", f"would enable workflow {chain!r}"],
    )


def test_only_deployments_of_this_database_s_gone_workflows_are_pruned(
    cli: CommandLine, db: Connection, chain: str, prefect_api: str
) -> None:
    gone, theirs, nobodys = (f"{name}_{uuid4().hex[:8]}" for name in ("gone", "theirs", "nobodys"))
    define(db, gone, {"only": []})
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'only', 'external')", [gone])
    assert cli("deploy", gone).code == 0
    for slug, tags in ((theirs, ["pgflow", f"pgflow-db-{uuid4().hex[:8]}"]), (nobodys, ["pgflow"])):
        flow = post(f"{prefect_api}/flows/", {"name": slug})["id"]
        post(f"{prefect_api}/deployments/", {"name": "pgflow", "flow_id": flow, "tags": tags})
    db.execute("DELETE FROM pgflow.steps WHERE workflow_slug = %s", [gone])
    db.execute("DELETE FROM pgflow.workflows WHERE slug = %s", [gone])

    differing = json.loads(cli("diff", "--json").out)
    plan = cli("deploy", "--all", "--prune", "--plan")
    done = cli("deploy", "--all", "--prune")

    assert [(each["workflow"], each["part"]) for each in differing] == [
        (chain, "deployment"), (chain, "enabled"), (gone, "deployment"),
    ]  # fmt: skip
    words = f"deployment {gone}/pgflow: its workflow is gone from the database"
    assert f"would delete {words}" in plan.lines
    assert (done.code, done.lines[-1]) == (0, f"deleted {words}")
    assert [len(read_deployments(prefect_api, slug)) for slug in (chain, gone, theirs, nobodys)] == [1, 0, 1, 1]
    done = cli("deploy", "--all", "--prune", "--plan")
    assert (done.code, done.lines, done.err) == (0, ["nothing to do: 1 deployment is as it would be"], "")


def test_diff_names_what_has_come_apart(cli: CommandLine, db: Connection, chain: str) -> None:
    assert cli("deploy", chain, "--tag", "x").code == 0
    db.execute("DELETE FROM pgflow.deps WHERE workflow_slug = %s AND to_step_slug = 'c'", [chain])
    db.execute("DELETE FROM pgflow.steps WHERE workflow_slug = %s AND slug = 'c'", [chain])
    db.execute("INSERT INTO pgflow.steps VALUES (%s, 'd')", [chain])
    db.execute("SELECT pgflow_prefect.bind_step(%s, 'd', 'python')", [chain])
    db.execute("UPDATE pgflow_prefect.enabled_workflows SET enabled = false")

    shown, found = cli("diff", chain), json.loads(cli("diff", chain, "--json").out)

    assert shown.code == 2
    assert shown.lines[0] == "workflow\tpart\tdifference"
    assert [(each["part"], each["field"]) for each in found] == [
        ("handlers", None),
        ("handlers", None),
        ("deployment", "version"),
        ("enabled", None),
    ]
    messages = [line.split("\t")[2] for line in shown.lines[1:]]
    assert messages == [each["message"] for each in found]
    assert "'c'" in messages[0]
    assert "step 'd' is bound to python, and has no handler there" in messages[1]
    assert f"its deployment differs, version: {found[2]['from']} -> {found[2]['to']}" in messages[2]
    assert f"`pgflow-prefect enable {chain}`" in messages[3]


def test_every_file_that_can_not_be_loaded_is_named_at_once(
    cli: CommandLine, db: Connection, chain: str, prefect_api: str
) -> None:
    for slug, text in (("broken", "import nowhere_at_all"), ("odd", "1 +")):
        define(db, slug, {"only": []})
        cli.write(f"flows/{slug}.py", text)

    refused = cli("deploy", "--all")
    debugged = cli("--debug", "deploy", "broken", debug=True)

    assert refused.code == 2
    error = refused.find_error()
    assert "flows/broken.py can't be imported: ModuleNotFoundError: No module named 'nowhere_at_all'" in error
    assert "flows/odd.py can't be imported: SyntaxError" in error
    assert "Traceback" in debugged.err
    assert (read_deployments(prefect_api, chain), column(db, ENABLED)) == ([], [])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["chain", "--source", "https://u:secret@host/a"], "--source has credentials"),
        (["--all"], "no workflow of the database can be deployed from here: it has none"),
    ],
)
def test_a_wrong_argument_gets_one_message(cli: CommandLine, arguments: list[str], message: str) -> None:
    refused = cli("deploy", *arguments)

    assert refused.code == 2
    assert refused.find_error().startswith(message)
    assert "secret" not in refused.err.replace("secrets", "")


def test_workflows_of_one_file_are_all_deployed(cli: CommandLine, db: Connection, chain: str, prefect_api: str) -> None:
    slug = f"shop_{uuid4().hex[:8]}"
    define(db, slug, CHAIN)
    cli.write("shop.py", CHAIN_HANDLERS.replace('Workflow("chain")', f'Workflow("{slug}")'))

    done = cli("deploy", "--all", "--handlers", "shop.py", "--interval", "1d", "--timezone", "Europe/Berlin")

    assert done.code == 0
    assert done.lines[-1] == f"skipped workflow {chain!r}: shop.py has no handlers of it"
    [found] = read_deployments(prefect_api, slug)
    [schedule] = found["schedules"]
    assert (schedule["slug"], schedule["schedule"]["timezone"]) == (
        "pgflow: every 1 day, 0:00:00 (Europe/Berlin)",
        "Europe/Berlin",
    )
    assert read_deployments(prefect_api, chain) == []
