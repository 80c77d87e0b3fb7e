"""A Python function as a handler: what its arguments get, and which functions can't be one."""

import logging
import pickle
import threading
from collections.abc import Callable, Mapping
from copy import copy, deepcopy
from dataclasses import replace
from functools import wraps
from typing import Any
from uuid import UUID

import pytest
from pydantic import JsonValue

from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.base import AsyncStepContext, StepContext, StepExecution
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.models import Claim, Status
from pgflow_prefect.raw_json import RawJson

pytestmark = pytest.mark.anyio

CONTEXT = StepContext(
    run_id=UUID(int=1), workflow_slug="campaign", step_slug="send", attempt=2, logger=logging.getLogger(__name__)
)


async def execute(
    function: Callable[..., Any], payload: JsonValue = None, upstream_results: Mapping[str, JsonValue] | None = None
) -> str:
    """Execute a function as the handler of a step whose upstream steps have these results."""
    results = dict(upstream_results or {})
    claim = Claim(status=Status.PENDING, attempt=2, payload=RawJson.of(payload), upstream_results=RawJson.of(results))
    result = await PythonHandler("send", function).execute(claim, tuple(results), StepExecution(CONTEXT))
    assert isinstance(result, str)
    return result


async def test_an_argument_gets_the_result_of_the_upstream_step_of_its_name() -> None:
    async def send(second: JsonValue, first: JsonValue) -> JsonValue:
        return [first, second]

    assert await execute(send, upstream_results={"first": 1, "second": {"two": 2}}) == '[1,{"two":2}]'


async def test_a_slug_that_is_no_name_is_taken_by_its_python_name() -> None:
    def send(fetch_all: int, class_: int, _2nd: int, payload_: int) -> JsonValue:
        return [fetch_all, class_, _2nd, payload_]

    upstream = {"fetch-all": 1, "class": 2, "2nd": 3, "payload": 4}
    assert await execute(send, "the run's", upstream) == "[1,2,3,4]"


async def test_payload_and_upstream_and_context_are_what_they_are_called() -> None:
    async def send(payload: JsonValue, upstream: Mapping[str, int], context: AsyncStepContext) -> JsonValue:
        return [payload, dict(upstream), context.step_slug, context.attempt, context.idempotency_key]

    assert await execute(send, {"n": 1}, {"a-b": 1, "c": 2}) == (
        '[{"n":1},{"a-b":1,"c":2},"send",2,"00000000-0000-0000-0000-000000000001/send"]'
    )


@pytest.mark.parametrize("duplicate", [copy, deepcopy, lambda context: pickle.loads(pickle.dumps(context))])  # noqa: S301
def test_a_context_can_be_copied_and_sent_to_another_process(duplicate: Callable[[Any], Any]) -> None:
    class Transaction:
        connection = threading.Lock()  # which can't be pickled, as no connection can

    transaction: Any = Transaction()
    context = StepExecution.of(CONTEXT, transaction).context
    duplicated = duplicate(context)
    assert duplicated == context == CONTEXT
    assert duplicated.idempotency_key == CONTEXT.idempotency_key
    assert duplicated.logger.name == CONTEXT.logger.name
    if duplicate in (copy, deepcopy):
        assert duplicated.connection is context.connection
    else:
        with pytest.raises(UsageError, match=r"context\.connection is not available here"):
            _ = duplicated.connection


def test_a_context_has_nothing_that_is_only_the_executor_s() -> None:
    public = {name for name in dir(CONTEXT) if not name.startswith("_")}
    assert public == {
        "attempt",
        "connection",
        "data_interval_end",
        "data_interval_start",
        "failed_steps",
        "idempotency_key",
        "index",
        "logger",
        "logical_date",
        "run_id",
        "shadow",
        "step_slug",
        "workflow_slug",
    }


async def test_an_idempotency_key_is_the_same_for_every_attempt_and_for_no_other_step() -> None:
    assert replace(CONTEXT, attempt=3).idempotency_key == CONTEXT.idempotency_key
    assert replace(CONTEXT, step_slug="other").idempotency_key != CONTEXT.idempotency_key
    assert replace(CONTEXT, run_id=UUID(int=2)).idempotency_key != CONTEXT.idempotency_key


async def test_arguments_may_be_keyword_only_and_have_defaults() -> None:
    async def send(first: int, *, payload: JsonValue = "unused") -> JsonValue:
        return [first, payload]

    assert await execute(send, None, {"first": 1}) == "[1,null]"


async def test_nothing_need_be_taken() -> None:
    async def send() -> None: ...

    assert await execute(send, {"n": 1}, {"first": 1}) == "null"


def test_only_results_that_an_argument_takes_are_fetched() -> None:
    def send(first: int, payload: JsonValue, context: StepContext) -> None: ...

    handler = PythonHandler("send", send)
    assert handler.choose_upstream(["second", "first"]) == ["first"]
    assert handler.wants_payload
    assert handler.arguments == ("first", "payload", "context")

    handler = PythonHandler("send", lambda: None)
    assert handler.choose_upstream(["first", "second"]) == []
    assert not handler.wants_payload


def test_a_handler_that_takes_upstream_gets_the_results_of_all() -> None:
    assert PythonHandler("send", lambda upstream, first: upstream).choose_upstream(["first", "second"]) is None


async def test_a_sync_function_works_in_a_thread_and_an_async_one_on_the_loop() -> None:
    def in_a_thread() -> bool:
        return threading.current_thread() is threading.main_thread()

    async def on_the_loop() -> bool:
        return threading.current_thread() is threading.main_thread()

    assert await execute(in_a_thread) == "false"
    assert await execute(on_the_loop) == "true"


async def test_what_the_function_raises_is_raised_as_it_is() -> None:
    def sync() -> None:
        raise KeyError("no such recipient")

    async def on_the_loop() -> None:
        raise KeyError("no such recipient")

    for function in (sync, on_the_loop):
        with pytest.raises(KeyError, match="no such recipient"):
            await execute(function)


async def test_an_async_function_behind_a_plain_decorator_is_awaited() -> None:
    def logged(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return call

    @logged
    async def send(payload: int) -> int:
        return payload + 1

    assert await execute(send, 1) == "2"


@pytest.mark.parametrize(
    ("function", "parameter"),
    [
        (lambda *args: None, "*args"),
        (lambda **kwargs: None, "**kwargs"),
        (lambda first, /: None, "first"),
    ],
)
def test_what_can_t_be_bound_by_name_is_refused(function: Callable[..., Any], parameter: str) -> None:
    with pytest.raises(UsageError) as refused:
        PythonHandler("send", function)
    assert str(refused.value).startswith(f"the handler of step 'send' takes {parameter}: ")
    assert "`upstream`" in str(refused.value)


def test_the_docstring_describes_the_step() -> None:
    def send() -> None:
        """Send a mail.

        To all recipients.
        """

    assert PythonHandler("send", send).description == "Send a mail.\n\nTo all recipients."
    assert PythonHandler("send", lambda: None).description is None
