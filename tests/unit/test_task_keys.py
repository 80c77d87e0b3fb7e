"""What addresses a task: index 0 keeps the ids, keys, headers and messages that a step had before there were tasks."""

import itertools
import json
import logging
from uuid import UUID

import pytest

from pgflow_prefect.bindings import Queue
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers import queue as queues
from pgflow_prefect.handlers.base import StepContext, StepExecution, Toolbox
from pgflow_prefect.handlers.http_endpoint import make_headers
from pgflow_prefect.handlers.queue import QueueHandler, parse_message
from pgflow_prefect.models import Claim, Status, TaskKey
from pgflow_prefect.prefect_api.ids import find_task_run_id
from pgflow_prefect.raw_json import RawJson

pytestmark = pytest.mark.anyio

RUN = UUID("6f1c2a52-6f0e-4f7e-9f0a-3a2b1c0d9e8f")

TRICKY = ["a", "a/1", "1/a", "a[1]", "a.1", ".1/a", "[1]/a", "1"]
"""Slugs that look like an address of a task."""


def make_context(task: TaskKey) -> StepContext:
    return StepContext(RUN, "mails", task.step_slug, 2, logging.getLogger(__name__), index=task.index)


async def publish(task: TaskKey, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """Return the message that a queue gets for a task."""
    published: list[bytes] = []

    async def keep(order: queues._Order) -> str:
        published.append(order.body)
        return "here"

    scheme = queues._find_scheme("redis://host/0?queue=mails")
    monkeypatch.setattr(queues, "_find_scheme", lambda url: scheme._replace(publish=keep))
    handler = QueueHandler(task.step_slug, Queue("redis://host/0?queue=mails"), make_toolbox())
    claim = Claim(status=Status.PENDING, attempt=2, payload=RawJson('{"n":1}'), upstream_results=RawJson('{"a":[1]}'))
    await handler.execute(claim, ["a"], StepExecution(make_context(task)))
    return published[0]


def make_toolbox() -> Toolbox:
    async def find_secret(name: str) -> str:
        raise UsageError(name)

    def make_client() -> object:
        raise UsageError("no requests here")

    return Toolbox(make_client, find_secret, 1000)  # type: ignore[arg-type]


def test_the_first_task_keeps_the_id_of_the_step_s_task_run() -> None:
    ids = [find_task_run_id(UUID(int=5), TaskKey(slug)) for slug in ("send-emails", "Pr\u00fcfung/1")]
    assert ids == [UUID("cad56e50-efa8-588a-b038-bf0e86afb4f6"), UUID("93fb769c-2a40-5b4f-9d93-0bed05c640c6")]


def test_the_first_task_keeps_the_idempotency_key() -> None:
    assert make_context(TaskKey("a/1")).idempotency_key == "6f1c2a52-6f0e-4f7e-9f0a-3a2b1c0d9e8f/a/1"


def test_the_first_task_keeps_the_headers_of_its_request() -> None:
    assert make_headers(make_context(TaskKey("send/\u00fc"))) == {
        "Content-Type": "application/json",
        "Accept": "application/json",
        "Accept-Encoding": "gzip",
        "Idempotency-Key": "6f1c2a52-6f0e-4f7e-9f0a-3a2b1c0d9e8f/send/%C3%BC",
        "Pgflow-Run-Id": "6f1c2a52-6f0e-4f7e-9f0a-3a2b1c0d9e8f",
        "Pgflow-Workflow": "mails",
        "Pgflow-Step": "send/%C3%BC",
        "Pgflow-Attempt": "2",
    }


async def test_the_first_task_keeps_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    assert await publish(TaskKey("send"), monkeypatch) == (
        b'{"run_id":"6f1c2a52-6f0e-4f7e-9f0a-3a2b1c0d9e8f","workflow_slug":"mails","step_slug":"send","attempt":2,'
        b'"idempotency_key":"6f1c2a52-6f0e-4f7e-9f0a-3a2b1c0d9e8f/send","input":{"payload":{"n":1},"a":[1]}}'
    )


async def test_a_message_names_the_index_of_a_further_task(monkeypatch: pytest.MonkeyPatch) -> None:
    body = await publish(TaskKey("send", 3), monkeypatch)
    assert json.loads(body)["task_index"] == 3
    assert parse_message(body).task == TaskKey("send", 3)


async def test_a_message_without_an_index_is_of_the_first_task(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_message(await publish(TaskKey("send"), monkeypatch)).task == TaskKey("send", 0)


@pytest.mark.parametrize("index", ["-1", "1.5", '"x"', "null"])
def test_a_message_with_an_index_that_can_t_be_is_refused(index: str) -> None:
    message = (
        f'{{"run_id": "{RUN}", "workflow_slug": "w", "step_slug": "a", "attempt": 1, "idempotency_key": "k", '
        f'"input": {{}}, "task_index": {index}}}'
    )
    with pytest.raises(UsageError, match="task_index"):
        parse_message(message)


def test_a_request_names_the_index_of_a_further_task() -> None:
    headers = make_headers(make_context(TaskKey("send", 3)))
    assert headers["Pgflow-Task-Index"] == "3"
    assert headers["Idempotency-Key"] == f"{RUN}.3/send"


def test_no_two_tasks_have_the_same_key_or_task_run() -> None:
    tasks = [TaskKey(slug, index) for slug, index in itertools.product(TRICKY, [0, 1, 2, 11])]
    assert len({make_context(task).idempotency_key for task in tasks}) == len(tasks)
    assert len({find_task_run_id(UUID(int=5), task) for task in tasks}) == len(tasks)


def test_people_read_a_plain_step_s_task_as_the_step() -> None:
    assert (str(TaskKey("a")), str(TaskKey("a", 2))) == ("'a'", "'a'[2]")
