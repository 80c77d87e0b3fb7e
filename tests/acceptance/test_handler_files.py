"""Files of handlers as projects have them: what they import, who else imports them, and what their loggers say."""

from collections.abc import Mapping
from uuid import UUID, uuid4

import httpx
import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, find_only_run, wait_until
from tests.conftest import Connection
from tests.engine import define, get_run, get_state, run_workflow

pytestmark = pytest.mark.once

PROJECT = {
    "__init__": "",
    "shared/__init__": "",
    "shared/db": "def connect():\n    return 'connected'\n",
    "texts": "GREETING = 'hello'\n",
    "absolute": "from flows.shared.db import connect\n",
    "relative": "from .shared.db import connect\n",
    "beside": "from texts import GREETING\n\n\ndef connect():\n    return GREETING\n",
    "statistics": "def connect():\n    return 'handlers that are called as a library is'\n",
    "uses": "import statistics\n\n\ndef connect():\n    return statistics.mean([1, 2, 3])\n",
}
WORKFLOWS = {
    "absolute": "connected",
    "relative": "connected",
    "beside": "hello",
    "statistics": "handlers that are called as a library is",
    "uses": 2,
}
HANDLERS = """
import multiprocessing
import logging

from pgflow_prefect import Workflow

workflow = Workflow({slug!r})
log = logging.getLogger(__name__)


def square(number):
    return number * number


@workflow.step
def step():
    log.info("the module's logger is %s", __name__)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.map(square, range(4)) == [0, 1, 4, 9]
    return connect()


flow = workflow.flow
"""


def write_project(cli: CommandLine, db: Connection) -> dict[str, str]:
    """Write a folder of handlers as people have it; return the slug of each workflow by its file."""
    slugs = {name: f"{name}_{uuid4().hex[:8]}" for name in WORKFLOWS}
    for name, text in PROJECT.items():
        slug = slugs.get(name)
        cli.write(f"flows/{name}.py", text + HANDLERS.format(slug=slug) if slug else text)
        if slug:
            define(db, slug, {"step": []})
    return slugs


def read_messages(prefect: PrefectView, run_id: UUID) -> dict[str, str]:
    """Return what Prefect shows of the log of a run's tasks, with the logger that said it."""
    chosen = {"logs": {"flow_run_id": {"any_": [prefect.find_flow_run(run_id)["id"]]}}}
    found = httpx.post(f"{prefect.url}/logs/filter", json=chosen, timeout=TIMEOUT).raise_for_status().json()
    return {each["message"]: each["name"] for each in found if each["task_run_id"]}


def await_completion(db: Connection, runs: Mapping[str, UUID]) -> None:
    for name, run_id in runs.items():
        wait_until(lambda run_id=run_id: get_run(db, run_id).status != "pending", f"the run of {name} ends")  # type: ignore[misc]
        assert get_run(db, run_id).status == "completed", (name, get_run(db, run_id).error_message)


@pytest.mark.parametrize("service", ["worker", "serve"])
def test_a_folder_of_handlers_works_as_its_files_are_written(
    cli: CommandLine, services: Services, db: Connection, prefect: PrefectView, service: str
) -> None:
    slugs = write_project(cli, db)
    services.start(service)
    runs = {name: run_workflow(db, slug, {}).id for name, slug in slugs.items()}

    await_completion(db, runs)
    assert {name: get_state(db, run_id, "step").step_result for name, run_id in runs.items()} == WORKFLOWS
    for name in ("absolute", "uses"):
        message = f"the module's logger is flows.{name}"
        wait_until(lambda: message in read_messages(prefect, runs[name]), f"Prefect shows {message!r}")  # noqa: B023
        assert read_messages(prefect, runs[name])[message] == f"flows.{name}"


@pytest.mark.parametrize("name", ["relative", "uses", "statistics"])
def test_run_loads_files_as_services_do(cli: CommandLine, db: Connection, name: str) -> None:
    slugs = write_project(cli, db)
    ended = cli("run", slugs[name], "--handlers", f"flows/{name}.py")
    assert ended.code == 0, ended.err
    assert get_state(db, ended.find_run_id(), "step").step_result == WORKFLOWS[name]


def test_two_files_of_one_name_outside_the_working_directory_have_child_processes_of_their_own(
    cli: CommandLine, services: Services, db: Connection
) -> None:
    slugs = {folder: f"{folder}_{uuid4().hex[:8]}" for folder in ("north", "south")}
    (cli.directory / "here").mkdir()
    for folder, slug in slugs.items():
        text = f"def connect():\n    return {folder!r}\n{HANDLERS.format(slug=slug)}"
        cli.write(f"{folder}/orders.py", text.replace("number * number", f"number * number * (1, {folder!r})[0]"))
        define(db, slug, {"step": []})
    here = Services(CommandLine(cli.directory / "here", cli.environment, cli.forker), services.started)
    here.start("worker", "../north/orders.py", "../south/orders.py")
    runs = {folder: run_workflow(db, slug, {}).id for folder, slug in slugs.items()}

    await_completion(db, runs)
    assert {folder: get_state(db, run_id, "step").step_result for folder, run_id in runs.items()} == {
        "north": "north",
        "south": "south",
    }


@pytest.mark.parametrize("command", ["worker", "serve", "push"])
def test_two_modules_of_one_name_are_refused_with_both_paths(cli: CommandLine, command: str) -> None:
    for team in ("team_a", "team_b"):
        cli.write(f"{team}/tables.py", f"TABLE = {team!r}\n")
        cli.write(
            f"{team}/{team}.py",
            f"from tables import TABLE\nfrom pgflow_prefect import Workflow\nw = Workflow({team!r})\n",
        )
    ended = cli(command, "team_a/team_a.py", "team_b/team_b.py")
    assert ended.code == 2
    for team in ("team_a", "team_b"):
        assert f"{cli.directory}/{team}/{team}.py" in ended.find_error()
        assert f"{cli.directory}/{team}/tables.py" in ended.find_error()


WITH_BLOCK = """
from prefect.blocks.system import Secret
from pgflow_prefect import Workflow

TOKEN = Secret.load({block!r}).get()
workflow = Workflow({slug!r})


@workflow.step
def measure():
    return len(TOKEN)


flow = workflow.flow
"""


def test_a_block_at_the_top_of_a_file_is_loaded_by_every_command(
    cli: CommandLine, db: Connection, prefect_api: str
) -> None:
    block = f"key-{uuid4().hex[:8]}"
    slug = f"secret_{uuid4().hex[:8]}"
    define(db, slug, {"measure": []})
    cli.write(f"flows/{slug}.py", WITH_BLOCK.format(block=block, slug=slug))
    save_secret(prefect_api, block, "sesame")

    for command in ("validate", "run", "deploy"):
        ended = cli(command, slug)
        assert ended.code == 0, (command, ended.err)
    assert get_state(db, find_only_run(db), "measure").step_result == len("sesame")


def save_secret(prefect_api: str, name: str, text: str) -> None:
    """Save a Secret block, as Prefect's UI does."""
    ask = httpx.Client(base_url=prefect_api, timeout=TIMEOUT)
    kind = ask.get("/block_types/slug/secret").raise_for_status().json()
    chosen = {"block_schemas": {"block_type_id": {"any_": [kind["id"]]}}}
    [schema, *_] = ask.post("/block_schemas/filter", json=chosen).raise_for_status().json()
    wish = {"name": name, "data": {"value": text}, "block_type_id": kind["id"], "block_schema_id": schema["id"]}
    ask.post("/block_documents/", json=wish).raise_for_status()


CHILD = """
from pgflow_prefect import Workflow

workflow = Workflow({child!r})


@workflow.step
async def double(payload: dict) -> int:
    return payload["n"] * 2


flow = workflow.flow
"""
PARENT = """
from child import workflow as child
from pgflow_prefect import Workflow

workflow = Workflow({parent!r})


@workflow.step
async def call(payload: dict) -> dict:
    return await child.flow(payload={{"n": 3}})


flow = workflow.flow
"""


@pytest.mark.parametrize("package", [False, True])
def test_a_workflow_that_another_file_imports_belongs_to_the_file_that_makes_it(
    cli: CommandLine, services: Services, db: Connection, prefect: PrefectView, package: bool
) -> None:
    slugs = {name: f"{name}_{uuid4().hex[:8]}" for name in ("child", "parent")}
    cli.write("flows/child.py", CHILD.format(**slugs))
    cli.write("flows/parent.py", PARENT.format(**slugs))
    if package:
        cli.write("flows/__init__.py")
    define(db, slugs["child"], {"double": []})
    define(db, slugs["parent"], {"call": []})
    services.start("worker", "flows/parent.py", "flows/child.py")
    run_id = run_workflow(db, slugs["parent"], {}).id

    await_completion(db, {"parent": run_id})
    assert get_state(db, run_id, "call").step_result == {"double": 6}
    assert prefect.find_deployment(slugs["child"])["entrypoint"] == "flows/child.py:flow"
    assert prefect.find_deployment(slugs["parent"])["entrypoint"] == "flows/parent.py:flow"
