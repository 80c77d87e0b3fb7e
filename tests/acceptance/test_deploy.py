"""`deploy`, `enable`, `disable`, `import --deploy`, and what Prefect's own worker makes of a deployment."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

from tests.acceptance.chain import CHAIN_HANDLERS
from tests.acceptance.conftest import TIMEOUT, CommandLine, wait_until
from tests.conftest import Connection, route
from tests.engine import CHAIN, column, define, value

pytestmark = pytest.mark.once

ENABLED = "SELECT workflow_slug FROM pgflow_prefect.enabled_workflows WHERE enabled ORDER BY 1"
SINCE = "SELECT since FROM pgflow_prefect.enabled_workflows"


def start_run(db: Connection, workflow: str, payload: str = "{}") -> str:
    return str(value(db, "SELECT (pgflow.run_workflow(%s, %s::jsonb)).id", workflow, payload))


def post(url: str, body: dict[str, Any]) -> Any:
    return httpx.post(url, json=body, timeout=TIMEOUT).raise_for_status().json()


def read_deployments(api: str, workflow: str) -> list[dict[str, Any]]:
    return list(post(f"{api}/deployments/filter", {"flows": {"name": {"any_": [workflow]}}}))


@pytest.fixture
def pool(prefect_api: str) -> Iterator[str]:
    name = f"pool-{uuid4().hex[:8]}"
    post(f"{prefect_api}/work_pools/", {"name": name, "type": "process"})
    yield name
    httpx.delete(f"{prefect_api}/work_pools/{name}", timeout=TIMEOUT).raise_for_status()


@contextmanager
def prefect_worker(cli: CommandLine, pool: str, directory: Path) -> Iterator[None]:
    """Run Prefect's own worker in a directory, and end it with all that it has started."""
    directory.mkdir()
    with (cli.directory / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--type", "process"],
            cwd=directory,
            env={**cli.environment, "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        yield
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def test_deploy_creates_a_deployment_and_enables_the_workflow(
    cli: CommandLine, db: Connection, chain: str, prefect_api: str
) -> None:
    deployed = cli("deploy", chain)

    [found] = read_deployments(prefect_api, chain)
    page = f"{prefect_api.removesuffix('/api')}/deployments/deployment/{found['id']}"
    assert (deployed.code, deployed.err) == (0, "")
    assert deployed.lines == [
        f"created deployment {chain}/pgflow (no work pool: `pgflow-prefect worker` runs it): {page}"
    ]
    assert found["entrypoint"] == f"flows/{chain}.py:workflow.flow"
    assert column(db, ENABLED) == [chain]
    assert cli("list").lines[1].endswith("\tyes\t-")


def test_deploying_again_updates_what_has_changed_and_keeps_the_work_pool(
    cli: CommandLine, db: Connection, chain: str, pool: str, prefect_api: str
) -> None:
    [first] = json.loads(cli("deploy", chain, "--work-pool", pool, "--json").out)
    again = cli("deploy", chain)
    db.execute("DELETE FROM pgflow.deps WHERE to_step_slug = 'c'")
    db.execute("DELETE FROM pgflow.steps WHERE slug = 'c'")
    cli.write(
        f"flows/{chain}.py", (cli.directory / f"flows/{chain}.py").read_text().partition("@workflow.step\ndef c")[0]
    )
    edited = cli("deploy", chain)

    [found] = read_deployments(prefect_api, chain)
    assert first == {
        "workflow": chain,
        "deployment": f"{chain}/pgflow",
        "id": found["id"],
        "outcome": "created",
        "changes": [],
        "work_pool": pool,
        "url": f"{prefect_api.removesuffix('/api')}/deployments/deployment/{found['id']}",
        "enabled": True,
        "problems": [],
        "older_runs": [],
    }
    assert again.out.startswith(f"unchanged deployment {chain}/pgflow (work pool '{pool}'): http")
    assert edited.out.startswith(f"updated deployment {chain}/pgflow (work pool '{pool}'): http")
    assert found["work_pool_name"] == pool


def test_deploy_names_the_pending_runs_that_no_process_will_take(cli: CommandLine, db: Connection, chain: str) -> None:
    older = {start_run(db, chain), start_run(db, chain)}

    deployed = cli("deploy", chain)
    [again] = json.loads(cli("deploy", chain, "--json").out)

    assert deployed.lines[1:] == [
        "2 pending runs began before the workflow was enabled: `pgflow-prefect worker --adopt` or "
        "`pgflow-prefect bridge --adopt` takes them"
    ]
    assert {*again["older_runs"]} == older


def test_an_unknown_work_pool_is_refused_and_the_known_ones_are_named(
    cli: CommandLine, db: Connection, chain: str, pool: str, prefect_api: str
) -> None:
    refused = cli("deploy", chain, "--work-pool", "nowhere")

    assert refused.code == 2
    assert refused.find_error().startswith("unknown work pool 'nowhere'")
    assert repr(pool) in refused.find_error()
    assert (read_deployments(prefect_api, chain), column(db, ENABLED)) == ([], [])


def test_nothing_is_deployed_while_one_of_the_workflows_is_invalid(
    cli: CommandLine, db: Connection, chain: str, prefect_api: str
) -> None:
    for slug in ("misfit", "nowhere"):
        define(db, slug, CHAIN)
    cli("import", "misfit")
    db.execute("DELETE FROM pgflow.deps WHERE workflow_slug = 'misfit'")

    refused = cli("deploy", chain, "misfit", "nowhere")

    assert refused.code == 2
    error = refused.find_error()
    assert "workflow 'misfit' has 2 problems:" in error
    assert "the handler of step 'b' takes 'a', which is no upstream step of it" in error
    assert "workflow 'nowhere' has no handlers here: flows/nowhere.py does not exist" in error
    assert (read_deployments(prefect_api, chain), column(db, ENABLED)) == ([], [])


def test_several_workflows_are_deployed_from_one_file(cli: CommandLine, db: Connection, prefect_api: str) -> None:
    slugs = [f"shop-{uuid4().hex[:8]}", f"shop-{uuid4().hex[:8]}"]
    cli.write(
        "shop.py",
        "from pgflow_prefect import Workflow\n"
        + "".join(f"w{n} = Workflow({slug!r})\nw{n}.step('only')(lambda: {n})\n" for n, slug in enumerate(slugs)),
    )
    for slug in slugs:
        define(db, slug, {"only": []})

    deployed = cli("deploy", *slugs, "--handlers", "shop.py")

    assert len(deployed.lines) == 2, deployed
    entrypoints = [read_deployments(prefect_api, slug)[0]["entrypoint"] for slug in slugs]
    assert entrypoints == ["shop.py:w0.flow", "shop.py:w1.flow"]
    assert column(db, ENABLED) == sorted(slugs)


def test_deploy_asks_for_a_server_that_stays(outside: CommandLine, dsn: str) -> None:
    for command in ("deploy", "import"):
        refused = outside(command, "chain", "--dsn", route(dsn), *(["--deploy"] if command == "import" else []))

        assert refused.code == 2
        assert "PREFECT_API_URL is not set, and a deployment needs a Prefect server" in refused.find_error()


def test_an_api_that_does_not_answer_is_named(cli: CommandLine, db: Connection, chain: str) -> None:
    failed = cli("deploy", chain, PREFECT_API_URL="http://127.0.0.1:9/api")

    assert failed.code == 1
    assert "Prefect's API at http://127.0.0.1:9/api can't be used" in failed.find_error()
    assert column(db, ENABLED) == []


def test_import_deploys_what_it_wrote_and_leaves_the_stubs_external(
    cli: CommandLine, db: Connection, pool: str, prefect_api: str
) -> None:
    slug = f"chain_{uuid4().hex[:8]}"
    define(db, slug, CHAIN)

    imported = cli("import", slug, "--deploy", "--work-pool", pool)

    [found] = read_deployments(prefect_api, slug)
    assert (imported.code, len(imported.lines)) == (0, 3)
    assert imported.lines[0] == f"wrote flows/{slug}.py: 3 stubs to fill in"
    assert imported.lines[1].startswith(f"created deployment {slug}/pgflow (work pool '{pool}'): http")
    assert imported.lines[2] == "external until their stubs are filled in: a, b, c"
    assert found["entrypoint"] == f"flows/{slug}.py:flow"
    assert column(db, ENABLED) == [slug]

    cli.write(f"flows/{slug}.py", (cli.directory / f"flows/{slug}.py").read_text().replace("unimplemented=True", ""))
    [again] = json.loads(cli("import", slug, "--deploy", "--json").out)

    assert (again["added"], again["deployed"]["id"], again["deployed"]["outcome"]) == ([], found["id"], "unchanged")
    assert (again["deployed"]["enabled"], again["deployed"]["work_pool"]) == (True, pool)
    assert column(db, ENABLED) == [slug]


def test_import_says_that_an_enabled_workflow_does_not_fit_any_more(
    cli: CommandLine, db: Connection, chain: str
) -> None:
    cli("enable", chain)
    db.execute("DELETE FROM pgflow.deps WHERE workflow_slug = %s", [chain])
    db.execute("INSERT INTO pgflow.steps VALUES (%s, 'd')", [chain])

    imported = cli("import", chain, "--deploy")

    assert imported.lines[0] == f"added to flows/{chain}.py: d"
    assert imported.lines[2] == "external until their stubs are filled in: d"
    assert imported.lines[3] == (
        f"workflow {chain!r} is enabled all the same, and its runs will fail: "
        f"see `pgflow-prefect validate`, then `pgflow-prefect deploy {chain}`"
    )


def test_a_work_pool_without_a_deployment_is_refused(cli: CommandLine) -> None:
    refused = cli("import", "chain", "--work-pool", "local")

    assert (refused.code, refused.find_error()) == (2, "--work-pool goes with --deploy")


def test_enable_and_disable_say_the_new_state(cli: CommandLine, db: Connection) -> None:
    define(db, "chain", CHAIN)
    older = start_run(db, "chain")

    disabled, enabled = cli("disable", "chain"), cli("enable", "chain")
    since = value(db, SINCE)
    shown = json.loads(cli("enable", "chain", "--json").out)
    assert value(db, SINCE) == since, "enabling again changes nothing"
    off = json.loads(cli("disable", "chain", "--json").out)

    assert disabled.lines == [
        "workflow 'chain' is disabled: no worker or bridge takes its runs. Runs that are executing go on"
    ]
    assert enabled.lines[0].startswith("workflow 'chain' is enabled: workers and bridges take its runs begun since 20")
    assert enabled.lines[1].startswith("1 pending run began before the workflow was enabled: `pgflow-prefect worker ")
    assert (shown["workflow_slug"], shown["enabled"], shown["older_runs"]) == ("chain", True, [older])
    assert (off["workflow_slug"], off["enabled"], off["older_runs"]) == ("chain", False, [])
    assert cli("list").lines[1].endswith("\tno\t-")


@pytest.mark.parametrize("command", ["deploy", "enable", "disable"])
def test_an_unknown_workflow_is_refused(cli: CommandLine, db: Connection, command: str) -> None:
    define(db, "chain", CHAIN)

    refused = cli(command, "chian")

    assert refused.code == 2
    assert refused.find_error() == "unknown workflow 'chian' (did you mean 'chain'?)"


def test_prefects_own_worker_executes_runs_by_their_deployments(
    cli: CommandLine, db: Connection, chain: str, pool: str, prefect_api: str, tmp_path: Path
) -> None:
    in_module = f"{chain}_too"
    define(db, in_module, CHAIN)
    cli.write("handlers/shop.py", CHAIN_HANDLERS.replace('Workflow("chain")', f'Workflow("{in_module}")'))
    [of_file] = json.loads(cli("deploy", chain, "--work-pool", pool, "--json").out)
    [of_module] = json.loads(cli("deploy", in_module, "--handlers", "handlers.shop", "--work-pool", pool, "--json").out)
    runs = {start_run(db, each["workflow"], '{"start": 1}'): each["id"] for each in (of_file, of_module)}
    own = tmp_path / "where the worker is"

    with prefect_worker(cli, pool, own):
        flow_runs = [
            post(f"{prefect_api}/deployments/{deployment}/create_flow_run", {"parameters": {"run_id": run_id}})["id"]
            for run_id, deployment in runs.items()
        ]

        def are_completed() -> bool:
            found = post(f"{prefect_api}/flow_runs/filter", {"flow_runs": {"id": {"any_": flow_runs}}})
            states = [each["state_type"] for each in found]
            assert not {"FAILED", "CRASHED"}.intersection(states), (found, (tmp_path / "worker.log").read_text())
            return states == ["COMPLETED"] * 2

        wait_until(are_completed, "Prefect's worker has executed both flow runs")

    assert column(db, "SELECT status FROM pgflow.runs") == ["completed"] * 2
    assert column(db, "SELECT step_result FROM pgflow.step_states WHERE step_slug = 'c'") == [{"sum": 3}] * 2
    assert sorted(cli.executions()) == ["a", "a", "b", "b", "c", "c"], "in the directory that they were deployed in"
    assert [*own.iterdir()] == []
