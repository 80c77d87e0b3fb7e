"""What users say of the flow itself, its options and its hooks: each works wherever runs execute, or is refused."""

import asyncio
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import anyio
import pytest
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, State
from prefect.task_runners import ThreadPoolTaskRunner

from pgflow_prefect import Workflow
from pgflow_prefect.deployment.deployments import make_entrypoint
from pgflow_prefect.deployment.handler_files import find_workflow, load_module
from pgflow_prefect.errors import UsageError
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import value
from tests.integration import live
from tests.integration.conftest import Define, insert_workflow, make_slug, read_flow_run, read_run, read_steps
from tests.integration.live import Engine, execute_by

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

HANDLERS = """
import anyio
import threading
from prefect.task_runners import ThreadPoolTaskRunner
from pgflow_prefect import AsyncStepContext, Workflow

workflow = Workflow("SLUG")
told = []
begun = []


@workflow.step
async def work(payload: str, context: AsyncStepContext) -> str:
    begun.append(payload)
    print("printed by the handler")
    if payload == "fail" or (payload == "fail once" and context.attempt == 1):
        raise ValueError("no")
    if payload == "wait":
        await anyio.sleep_forever()
    return threading.current_thread().name


def note(event):
    def hook(flow, flow_run, state):
        told.append((event, flow.name, str(flow_run.id), state.name))
    return hook


async def note_async(flow, flow_run, state):
    await anyio.sleep(0)
    told.append(("async", flow.name, str(flow_run.id), state.name))


def break_off(flow, flow_run, state):
    raise RuntimeError("a hook that fails harms nothing")


FLOW
"""


@pytest.fixture
def write(tmp_path: Path, db: Connection, engine: Engine) -> Callable[[str], tuple[ModuleType, Workflow]]:
    """A function that loads a file which says this of its flow."""

    def load(text: str) -> tuple[ModuleType, Workflow]:
        slug = make_slug()
        insert_workflow(db, slug, ["work"])
        file = tmp_path / f"{slug.replace('-', '_')}.py"
        file.write_text(HANDLERS.replace("SLUG", slug).replace("FLOW", text), encoding="utf-8")
        module = load_module(str(file))
        workflow = module.workflow
        assert isinstance(workflow, Workflow)
        return module, workflow

    return load


Write = Callable[[str], tuple[ModuleType, Workflow]]

BY_DECORATOR = """
flow = workflow.flow
flow.on_running(note("running"))
flow.on_completion(note("completion"))
flow.on_failure(note("failure"))
flow.on_cancellation(note("cancellation"))
flow.on_crashed(note("crashed"))
"""
BY_OPTION = """
flow = workflow.flow.with_options(
    on_running=[note("running")], on_completion=[note("completion")], on_failure=[note("failure")],
    on_cancellation=[note("cancellation")], on_crashed=[note("crashed")],
)
"""


async def execute(workflow: Workflow, payload: str, settings: Settings | None = None) -> State[Any]:
    """Execute a run as `run` and `worker` do: with a flow of their own."""
    flow = workflow.make_flow(settings or Settings())
    with anyio.fail_after(180):
        if live.chosen is Engine.OURS:
            return (await execute_by(live.chosen, flow, {"payload": payload}))[0]
        state: State[Any] = await flow(payload, return_state=True)
    return state


@pytest.mark.parametrize("said", [BY_DECORATOR, BY_OPTION], ids=["by decorator", "by option"])
@pytest.mark.parametrize("end", ["completion", "failure", "cancellation", "crashed"])
async def test_each_hook_runs_once_for_the_end_that_it_is_for(
    end: str, said: str, write: Write, db: Connection, client: PrefectClient
) -> None:
    module, workflow = write(said)
    if end in ("completion", "failure"):
        await execute(workflow, "fail" if end == "failure" else "well")
    else:
        executing = asyncio.create_task(execute(workflow, "wait", Settings(lease=1)))
        with anyio.fail_after(180):
            while not module.begun:
                await anyio.sleep(0.01)
        if end == "cancellation":
            value(db, "SELECT pgflow.cancel_run(%s, 'cancelled: enough')", read_run(db)[2])
        else:
            executing.cancel()
        await asyncio.wait([executing], timeout=60)

    flow_run = await read_flow_run(client, workflow.slug)
    states = {"completion": "Completed", "failure": "Failed", "cancellation": "Cancelled", "crashed": "Crashed"}
    assert module.told == [
        ("running", workflow.slug, str(flow_run.id), "Running"),
        (end, workflow.slug, str(flow_run.id), states[end]),
    ]
    assert flow_run.state_name == states[end]


async def test_a_hook_may_be_async_and_one_that_fails_harms_nothing(write: Write, db: Connection) -> None:
    said = "on_failure=[break_off, note_async], on_cancellation=[break_off, note_async]"
    module, workflow = write(f"flow = workflow.flow.with_options({said})")
    await execute(workflow, "fail")
    assert [each[0] for each in module.told] == ["async"]
    assert read_run(db)[0] == "failed"


async def test_a_run_that_had_ended_before_is_not_told_again_as_cancelled(write: Write, db: Connection) -> None:
    module, workflow = write(BY_OPTION)
    run_id = value(db, "SELECT id FROM pgflow.run_workflow(%s, '\"well\"')", workflow.slug)
    value(db, "SELECT pgflow.cancel_run(%s, 'cancelled: enough')", run_id)
    state: State[Any] = await workflow.make_flow()(run_id=run_id, return_state=True)
    assert state.name == "Cancelled"
    assert [each[0] for each in module.told] == ["running"]


# Each option of `with_options`, and what is to be seen of it.

Check = Callable[[State[Any], FlowRun, Connection], None]


def is_completed_at_the_second_attempt(state: State[Any], flow_run: FlowRun, db: Connection) -> None:
    assert state.is_completed()
    assert flow_run.run_count == 2
    assert read_run(db)[0] == "completed"
    assert read_steps(db)["work"][:2] == ("completed", 2)


def has_timed_out(state: State[Any], flow_run: FlowRun, db: Connection) -> None:
    assert flow_run.state_name == "TimedOut"
    assert read_run(db)[:2] == ("failed", "the flow took longer than 0.5 s")


def is_called_nightly(state: State[Any], flow_run: FlowRun, db: Connection) -> None:
    assert flow_run.name == "nightly"


def is_called_after_its_run(state: State[Any], flow_run: FlowRun, db: Connection) -> None:
    assert flow_run.name.startswith("run ")


def has_version(state: State[Any], flow_run: FlowRun, db: Connection) -> None:
    assert flow_run.flow_version == "7"


def is_done_elsewhere(state: State[Any], flow_run: FlowRun, db: Connection) -> None:
    assert read_steps(db)["work"][2] != "MainThread"


def is_persisted(state: State[Any], flow_run: FlowRun, db: Connection) -> None:
    assert flow_run.state is not None
    assert flow_run.state.data is not None


def is_completed(state: State[Any], flow_run: FlowRun, db: Connection) -> None:
    assert state.is_completed()


OPTIONS: dict[str, tuple[str, Check]] = {
    "retries=1": ("fail once", is_completed_at_the_second_attempt),
    "retries=1, retry_delay_seconds=0.1": ("fail once", is_completed_at_the_second_attempt),
    "timeout_seconds=0.5": ("wait", has_timed_out),
    "flow_run_name='nightly'": ("well", is_called_nightly),
    "flow_run_name=lambda: 'nightly'": ("well", is_called_nightly),
    "flow_run_name='run {run_id}'": ("well", is_called_after_its_run),
    "version='7'": ("well", has_version),
    "description='At night'": ("well", is_completed),
    "task_runner=ThreadPoolTaskRunner()": ("well", is_done_elsewhere),
    "persist_result=True": ("well", is_persisted),
    "persist_result=True, result_serializer='json'": ("well", is_persisted),
    "cache_result_in_memory=False": ("well", is_completed),
}


@pytest.mark.parametrize("option", OPTIONS)
async def test_an_option_does_what_it_does_in_prefect(
    option: str, write: Write, db: Connection, client: PrefectClient
) -> None:
    payload, check = OPTIONS[option]
    _, workflow = write(f"flow = workflow.flow.with_options({option})")
    state = await execute(workflow, payload)
    flow_run = await read_flow_run(client, workflow.slug)
    with anyio.fail_after(180):
        while check is is_called_after_its_run and not flow_run.name.startswith("run "):  # Prefect hears of it later
            await anyio.sleep(0.05)
            flow_run = await read_flow_run(client, workflow.slug)
    check(state, flow_run, db)


NAMES = {
    "lambda: 1 / 0": "ZeroDivisionError: division by zero",
    "lambda: 7": "TypeError: it returned int, not a text",
    "lambda: exit(3)": "SystemExit: 3",
    "'of {run_id.day}'": "LookupError: there is no run_id[day]",
    "'of {payload[day]}'": "LookupError: there is no payload[day]",
}


@pytest.mark.parametrize("name", NAMES)
async def test_a_name_that_can_not_be_made_keeps_no_run_from_being_executed(
    name: str, write: Write, client: PrefectClient
) -> None:
    _, workflow = write(f"flow = workflow.flow.with_options(flow_run_name={name})")
    state = await execute(workflow, "well")
    assert state.is_completed()
    flow_run = await read_flow_run(client, workflow.slug)
    shown: list[str] = []
    with anyio.fail_after(180):
        while not any("`flow_run_name` failed" in message for message in shown):
            logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
            shown = [log.message for log in logs]
            await anyio.sleep(0.1)
    [said] = [message for message in shown if "`flow_run_name` failed" in message]
    assert said.startswith("The flow run is called ")
    assert NAMES[name] in said


@pytest.mark.parametrize("is_shown", [True, False])
async def test_log_prints_decides_whether_what_a_handler_prints_is_logged(
    is_shown: bool, write: Write, client: PrefectClient, capfd: pytest.CaptureFixture[str]
) -> None:
    _, workflow = write(f"flow = workflow.flow.with_options(log_prints={is_shown})")
    await execute(workflow, "fail")
    flow_run = await read_flow_run(client, workflow.slug)
    shown: list[str] = []
    with anyio.fail_after(180):
        while not any("failed with exception" in message for message in shown):  # which comes after it
            logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run.id])))
            shown = [log.message for log in logs]
            await anyio.sleep(0.1)
    assert ("printed by the handler" in shown) is is_shown


@pytest.mark.parametrize(
    ("option", "problem"),
    [
        ("name='mine'", "its flow is called 'mine': leave out `name`"),
        ("validate_parameters=True", "its flow has `validate_parameters=True`: leave it out"),
        ("flow_run_name='of {payload[day]} and {flow}'", "its flow has a `flow_run_name` that needs flow: there is"),
        ("flow_run_name=lambda flow: 'x'", "its flow has a `flow_run_name` that needs flow: there is"),
        ("flow_run_name='of {'", "its flow has a `flow_run_name` that is 'of {', which is no template"),
    ],
)
async def test_what_cannot_be_done_is_refused_before_a_run(
    option: str, problem: str, write: Write, define: Define
) -> None:
    _, workflow = write(f"flow = workflow.flow.with_options({option})")
    [found] = workflow.find_problems(workflow.definition)
    assert problem in found


def test_options_of_the_flow_that_is_called_flow_count(write: Write) -> None:
    _, workflow = write("nightly = workflow.flow.with_options(retries=3)\nflow = workflow.flow.with_options(retries=1)")
    assert workflow.make_flow().retries == 1
    _, workflow = write("nightly = workflow.flow.with_options(retries=3, task_runner=ThreadPoolTaskRunner())")
    assert workflow.make_flow().retries == 3
    assert isinstance(workflow.make_flow().task_runner, ThreadPoolTaskRunner)
    _, workflow = write("")
    assert workflow.make_flow().retries == 0


TWO = """
hourly = workflow.flow.with_options(retries=1)
nightly = workflow.flow.with_options(retries=3)
"""


@pytest.mark.parametrize("said", [TWO, "main = workflow.flow\nnightly = main.with_options(retries=3)"])
def test_of_two_flows_of_which_none_is_called_flow_neither_is_chosen(said: str, write: Write) -> None:
    _, workflow = write(said)
    first = "hourly" if "hourly" in said else "main"
    [found] = workflow.find_problems(workflow.definition)
    assert f"its file has several flows, {first} and nightly: give the name `flow`" in found
    with pytest.raises(UsageError, match=f"{first} and nightly"):
        workflow.make_flow()


def test_two_names_of_one_flow_are_one_flow(write: Write) -> None:
    _, workflow = write("nightly = workflow.flow.with_options(retries=3)\nagain = nightly")
    assert workflow.find_problems(workflow.definition) == []
    assert workflow.make_flow().retries == 3


FACTORY = """
from pgflow_prefect import Workflow


def make_workflow(slug):
    return Workflow(slug)
"""
MADE = """
from factory_of_flows import make_workflow

workflow = make_workflow("SLUG")


@workflow.step
def work():
    pass


nightly = workflow.flow.with_options(retries=3)
"""


def test_the_flow_of_a_workflow_that_a_factory_has_made_has_its_options(tmp_path: Path, db: Connection) -> None:
    slug = make_slug()
    (tmp_path / "factory_of_flows.py").write_text(FACTORY, encoding="utf-8")
    file = tmp_path / "made.py"
    file.write_text(MADE.replace("SLUG", slug), encoding="utf-8")
    workflow = find_workflow(load_module(str(file)), slug, str(file))
    assert workflow.make_flow().retries == 3
    assert make_entrypoint(slug, str(file), tmp_path) == "made.py:nightly"
