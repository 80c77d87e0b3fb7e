"""What handlers log: shown by `run`, and afterwards by `logs`; and the pages of Prefect's UI."""

import json
from uuid import UUID, uuid4

import httpx
import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, wait_until
from tests.acceptance.test_terminal import watch
from tests.conftest import Connection
from tests.engine import define, get_run, insert_run, run_workflow

pytestmark = pytest.mark.once

HANDLERS = """
import logging
from pgflow_prefect import Workflow

workflow = Workflow("talking")
log = logging.getLogger(__name__)

@workflow.step
def first(context):
    print("printed")
    log.warning("from a logger of the file")
    context.logger.info("two lines:\\n2026-01-01 00:00:00 ERROR second: forged \\x1b[31m")

@workflow.step(retries=1)
async def second(first, context):
    if context.attempt == 1:
        raise ValueError("not yet")
    context.logger.info("at last")
"""
STEPS = {"first": [], "second": ["first"]}


@pytest.fixture
def talking(cli: CommandLine, db: Connection) -> str:
    """A workflow whose handlers log."""
    define(db, "talking", STEPS)
    cli.write("flows/talking.py", HANDLERS)
    return "talking"


def _without_time(line: str) -> str:
    return line.split(" ", 2)[2]


def test_run_shows_what_handlers_log_and_print(cli: CommandLine, talking: str) -> None:
    ran = cli("run", talking)

    assert ran.code == 0
    assert [_without_time(line) for line in ran.err.splitlines() if not line.startswith(" ")] == [
        "INFO first: printed",
        "WARNING first: from a logger of the file",
        "INFO first: two lines:",
        "INFO second: Task run failed with exception: ValueError('not yet') - Retry 1/1 will start immediately",
        "INFO second: at last",
    ]
    assert "    2026-01-01 00:00:00 ERROR second: forged \N{SYMBOL FOR ESCAPE}[31m" in ran.err
    assert cli("run", talking, "--json").err == "", "a script gets one value"


def _read_logs(cli: CommandLine, run_id: UUID, *options: str) -> list[list[str]]:
    shown = cli("logs", str(run_id), *options, debug=True)  # it shows handlers' tracebacks
    assert (shown.code, shown.err) == (0, "")
    return [line.split("\t")[1:] for line in shown.lines]


def test_logs_shows_the_lines_of_all_processes_that_had_the_run(
    cli: CommandLine, prefect: PrefectView, talking: str
) -> None:
    cli.write("flows/talking.py", HANDLERS.replace("context.attempt == 1", "True"))
    run_id = cli("run", talking).find_run_id()
    cli.write("flows/talking.py", HANDLERS)
    cli("run", "--resume", str(run_id))
    wait_until(lambda: ["INFO", "second", "at last"] in _read_logs(cli, run_id), "the lines are in Prefect")

    lines = _read_logs(cli, run_id)

    assert lines.count(["INFO", "first", "printed"]) == 1
    assert lines.index(["INFO", "first", "printed"]) < lines.index(["INFO", "second", "at last"])
    assert sum(step == "second" and "not yet" in message for _, step, message in lines) > 1
    only = _read_logs(cli, run_id, "first")
    assert only[:2] == [["INFO", "first", "printed"], ["WARNING", "first", "from a logger of the file"]]
    assert {step for _, step, _ in only} == {"first"}


def test_logs_follows_a_run_from_before_its_start_to_its_end(cli: CommandLine, db: Connection, talking: str) -> None:
    run_id = insert_run(db, talking)
    following = cli.start("logs", str(run_id), "--follow", "--json")

    cli("run", "--resume", str(run_id))

    shown, err = following.communicate(timeout=TIMEOUT)
    assert (following.returncode, err) == (0, "")
    lines = [json.loads(line) for line in shown.splitlines()]
    assert [line["message"] for line in lines if line["step"] == "second"][-1] == "at last"
    assert {"time", "level", "step", "message"} == set(lines[0])
    assert len({(line["time"], line["message"]) for line in lines}) == len(lines), "none twice"


def test_logs_and_open_say_what_they_can_not_show(cli: CommandLine, db: Connection, talking: str) -> None:
    run_id = insert_run(db, talking)

    for command in ("logs", "open"):
        waiting = cli(command, str(run_id))
        assert waiting.code == 1
        assert f"run {run_id} has no flow run in Prefect" in waiting.find_error()
        unknown = cli(command, str(uuid4()))
        assert unknown.code in {1, 2}
        assert "unknown run" in unknown.find_error()
        misspelt = cli(command, str(run_id), "frist")
        assert misspelt.code == 2
        assert "has no step 'frist': its steps are first, second" in misspelt.find_error()


def test_open_prints_a_run_s_page_and_a_step_s(cli: CommandLine, prefect: PrefectView, talking: str) -> None:
    run_id = cli("run", talking).find_run_id()
    base = prefect.url.removesuffix("/api")
    flow_run = prefect.find_flow_run(run_id)["id"]

    assert cli("open", str(run_id)).lines == [f"{base}/runs/flow-run/{flow_run}"]
    assert json.loads(cli("open", str(run_id), "--json").out) == {"url": f"{base}/runs/flow-run/{flow_run}"}
    [page] = cli("open", str(run_id), "first").lines
    task_run = f"{prefect.url}/task_runs/{page.rpartition('/')[2]}"
    wait_until(lambda: httpx.get(task_run, timeout=TIMEOUT).is_success, "the page is that of a task run")


def test_open_opens_the_page_in_the_user_s_browser(cli: CommandLine, prefect: PrefectView, talking: str) -> None:
    run_id = cli("run", talking).find_run_id()
    browser = cli.write("browser", '#!/bin/sh\necho "$1" > opened\n')
    browser.chmod(0o755)

    watch(cli, "open", str(run_id), BROWSER=f"{browser} %s")

    page = f"{prefect.url.removesuffix('/api')}/runs/flow-run/{prefect.find_flow_run(run_id)['id']}"
    wait_until((cli.directory / "opened").exists, "the browser was started")
    assert (cli.directory / "opened").read_text(encoding="utf-8").strip() == page


def test_logs_and_open_of_a_run_that_prefect_was_not_told_of_name_the_command_that_shows_it(
    cli: CommandLine, services: Services, db: Connection, talking: str
) -> None:
    cli.write(
        "flows/talking.py",
        HANDLERS.replace('("talking")', '("talking", record=RecordLater())').replace(
            "import Workflow", "import RecordLater, Workflow"
        ),
    )
    services.start("worker")
    run_id = run_workflow(db, talking, {}).id
    wait_until(lambda: get_run(db, run_id).status == "completed", "the run has ended")

    for command in ("logs", "open"):
        assert f"`pgflow-prefect record {run_id}` shows it" in cli(command, str(run_id)).find_error()

    assert cli("record", str(run_id)).code == 0
    assert cli("open", str(run_id)).code == 0
    [page] = cli("open", str(run_id), "second").lines
    task_run = f"{cli.environment['PREFECT_API_URL']}/task_runs/{page.rpartition('/')[2]}"
    wait_until(lambda: httpx.get(task_run, timeout=TIMEOUT).is_success, "the page is that of a task run")
