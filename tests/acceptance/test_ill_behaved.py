"""Handlers that would end their process or keep it: under every command, they end their own attempt and no more."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from uuid import UUID, uuid4

import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, PrefectView, Services, wait_until
from tests.conftest import Connection
from tests.engine import define, get_run, get_state, run_workflow

pytestmark = pytest.mark.once

HANDLERS = """
import asyncio
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

from pgflow_prefect import StepContext, Workflow
from prefect.states import Failed

workflow = Workflow("SLUG")


class ApiError(Exception):
    def __str__(self):
        return f"HTTP {self.args[0].status_code}"


def hang():
    with ThreadPoolExecutor(1) as pool:
        pool.submit(threading.Event().wait).result()


def interrupt():
    raise KeyboardInterrupt


def mute():
    raise ApiError(None)


ACTS = {
    "exit with a text": lambda: sys.exit("config file missing"),
    "exit with 0": lambda: sys.exit(0),
    "interrupt": interrupt,
    "mute": mute,
    "hang": hang,
    "state": lambda: Failed(message="only 3 of 900 rows arrived"),
    "nothing": lambda: None,
}


@workflow.step(timeout_seconds=IN_THREAD)
def in_thread(payload: dict[str, str]):
    return ACTS[payload["act"]]()


@workflow.step(timeout_seconds=ON_LOOP)
async def on_loop(payload: dict[str, str], in_thread: None):
    if payload.get("then") == "hang":
        await asyncio.to_thread(hang)
    elif payload.get("then") == "cancel":
        child = asyncio.create_task(asyncio.sleep(30))
        await asyncio.sleep(0)
        child.cancel()
        await child
    elif "then" in payload:
        await asyncio.create_task(act(payload["then"]))


async def act(name):
    return ACTS[name]()


flow = workflow.flow

if __name__ == "__main__":
    result = asyncio.run(flow({"act": sys.argv[1]}, return_state=True))
    print("the script goes on:", result.name, flush=True)
"""

SAID = {
    "exit with a text": "SystemExit: config file missing",
    "exit with 0": "SystemExit: 0",
    "interrupt": "KeyboardInterrupt",
    "mute": "ApiError: its str() raises",
    "hang": "step 'in_thread' took longer than 2 s",
    "state": "Failed: only 3 of 900 rows arrived",
}
SAID_LATER = {
    "exit with 0": "SystemExit: 0",
    "cancel": "CancelledError: a task or a future",
    "hang": "step 'on_loop' took longer than 2 s",
}


Add = Callable[[str], str]
"""Adds a workflow whose payload says how its two steps behave, and returns its slug; gets the step that is to hang."""


@pytest.fixture
def add(cli: CommandLine, db: Connection) -> Add:
    def add_workflow(hanging: str) -> str:
        name = f"ill_{uuid4().hex[:8]}"
        define(db, name, {"in_thread": [], "on_loop": ["in_thread"]})
        text = HANDLERS.replace("SLUG", name)
        for step in ("in_thread", "on_loop"):  # what does not hang may take its time on any machine
            text = text.replace(f"timeout_seconds={step.upper()}", f"timeout_seconds={2 if step == hanging else 600}")
        cli.write(f"flows/{name}.py", text)
        return name

    return add_workflow


def check(db: Connection, run_id: UUID, step: str, message: str) -> None:
    """Make sure that a step has failed at its first attempt, and why."""
    state = get_state(db, run_id, step)
    assert (state.status, state.attempts) == ("failed", 1)
    assert str(state.error_message).startswith(message)
    assert get_run(db, run_id).status == "failed"


@pytest.mark.parametrize("act", SAID)
def test_run_says_why_and_ends(cli: CommandLine, db: Connection, add: Add, act: str) -> None:
    ended = cli("run", add("in_thread" if act == "hang" else ""), "--payload", f'{{"act": "{act}"}}')

    assert ended.code == 1
    assert SAID[act] in ended.find_error()
    check(db, ended.find_run_id(), "in_thread", SAID[act])


@pytest.mark.parametrize("act", SAID_LATER)
def test_run_says_why_and_ends_where_a_task_of_a_handler_is_to_blame(
    cli: CommandLine, db: Connection, add: Add, act: str
) -> None:
    ended = cli("run", add("on_loop" if act == "hang" else ""), "--payload", f'{{"act": "nothing", "then": "{act}"}}')

    assert ended.code == 1
    check(db, ended.find_run_id(), "on_loop", SAID_LATER[act])


def test_a_worker_works_on_and_drains(services: Services, db: Connection, add: Add, prefect: PrefectView) -> None:
    patient, hanging, hanging_later = add(""), add("in_thread"), add("on_loop")
    worker = services.start("worker")
    failing = {act: run_workflow(db, hanging if act == "hang" else patient, {"act": act}).id for act in SAID}
    later = {
        act: run_workflow(db, hanging_later if act == "hang" else patient, {"act": "nothing", "then": act}).id
        for act in SAID_LATER
    }
    well = run_workflow(db, patient, {"act": "nothing"}).id
    every = [well, *failing.values(), *later.values()]
    wait_until(lambda: all(get_run(db, run_id).status != "pending" for run_id in every), "all runs end")

    assert get_run(db, well).status == "completed"
    for act, run_id in failing.items():
        check(db, run_id, "in_thread", SAID[act])
    for act, run_id in later.items():
        check(db, run_id, "on_loop", SAID_LATER[act])
    prefect.await_state(failing["exit with 0"], "Failed")
    worker.process.send_signal(signal.SIGTERM)
    assert worker.wait() == 0, "threads that hang keep no process"


def test_serve_has_each_end_in_its_own_process(services: Services, db: Connection, add: Add) -> None:
    slugs = {"exit with 0": (patient := add("")), "interrupt": patient, "hang": add("in_thread")}
    serve = services.start("serve")
    failing = {act: run_workflow(db, slug, {"act": act}).id for act, slug in slugs.items()}
    wait_until(lambda: all(get_run(db, run_id).status == "failed" for run_id in failing.values()), "all runs fail")

    for act, run_id in failing.items():
        check(db, run_id, "in_thread", SAID[act])
        if act != "hang":  # its own threads keep the process, and Prefect's engine is what runs in it
            serve.await_line(f"run {run_id} of flow '{patient}': Failed")
    serve.process.send_signal(signal.SIGTERM)
    serve.process.send_signal(signal.SIGTERM)
    assert serve.wait() in (0, 1)


@pytest.mark.parametrize("act", ["exit with 0", "interrupt"])
def test_a_script_of_the_users_own_goes_on(cli: CommandLine, db: Connection, add: Add, act: str) -> None:
    ended = subprocess.run(
        [sys.executable, f"flows/{add('')}.py", act],
        cwd=cli.directory,
        env={**cli.environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=2 * TIMEOUT,
        check=False,
    )
    assert "the script goes on: Failed" in ended.stdout, ended.stderr
    assert ended.returncode == 0
