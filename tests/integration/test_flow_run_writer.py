"""Flow runs that are created and ended together: one request for several, and each hears of its own errors only."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any
from uuid import UUID, uuid4

import anyio
import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun
from prefect.exceptions import Abort, ObjectNotFound, PrefectHTTPStatusError, TerminationSignal
from prefect.states import Cancelled, Cancelling, Completed, Failed, Paused, Running, to_state_create

from pgflow_prefect.errors import PrefectUnavailableError
from pgflow_prefect.prefect_api import flow_run_writer
from pgflow_prefect.prefect_api.flow_run_writer import FlowRunWriter
from tests.integration.conftest import make_slug

pytestmark = pytest.mark.anyio

Json = dict[str, Any]

CREATE, CREATE_ALL = "create_flow_run", "create_flow_run/bulk"
END, END_ALL = "set_state", "bulk_set_state"


class Requests:
    """What a client asks, and what it is answered instead of by the server."""

    def __init__(self, client: PrefectClient) -> None:
        self.asked: list[str] = []
        self.answers: dict[str, Callable[[], Any]] = {}
        self._request = client.request

    async def request(self, method: Any, path: str, **options: Any) -> httpx.Response:
        ending = next((each for each in (CREATE_ALL, END_ALL, CREATE, END, "filter") if path.endswith(each)), path)
        self.asked.append(ending)
        if ending in self.answers and (answer := self.answers[ending]()) is not None:
            raise answer
        return await self._request(method, path, **options)  # type: ignore[arg-type]


@pytest.fixture
def requests(client: PrefectClient, monkeypatch: pytest.MonkeyPatch) -> Requests:
    made = Requests(client)
    monkeypatch.setattr(client, "request", made.request)
    return made


@pytest.fixture
async def deployment(client: PrefectClient) -> UUID:
    name = make_slug()

    @flow(name=name)
    def nothing(run_id: str) -> None: ...

    flow_id = await client.create_flow(nothing)
    schema = {"type": "object", "properties": {"run_id": {"type": "string"}}, "required": ["run_id"]}
    return await client.create_deployment(flow_id, name, parameter_openapi_schema=schema, enforce_parameter_schema=True)


@pytest.fixture
async def writer(client: PrefectClient) -> AsyncIterator[FlowRunWriter]:
    with anyio.fail_after(180):
        yield FlowRunWriter(client)


def make_body(**changes: Any) -> Json:
    return {
        "name": f"run-{uuid4().hex[:8]}",
        "parameters": {"run_id": str(uuid4())},
        "state": to_state_create(Running()).model_dump(mode="json", exclude_unset=True),
        "idempotency_key": uuid4().hex,
        "tags": ["ours"],
        "empirical_policy": {"retries": 2, "retry_delay": 0},
        **changes,
    }


def refuse(code: int, detail: str | None = None) -> PrefectHTTPStatusError:
    request = httpx.Request("POST", "http://prefect.example/api")
    response = httpx.Response(code, json={"detail": detail} if detail else {}, request=request)
    return PrefectHTTPStatusError("refused", request=request, response=response)


async def create_all(writer: FlowRunWriter, deployment: UUID, bodies: list[Json]) -> list[FlowRun | BaseException]:
    return await asyncio.gather(*(writer.create(deployment, body) for body in bodies), return_exceptions=True)


async def make_running(writer: FlowRunWriter, deployment: UUID, count: int) -> list[FlowRun]:
    made = await create_all(writer, deployment, [make_body() for _ in range(count)])
    assert all(isinstance(each, FlowRun) for each in made), made
    return [each for each in made if isinstance(each, FlowRun)]


async def test_flow_runs_that_are_wanted_together_are_created_in_one_request(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    bodies = [make_body() for _ in range(20)]
    made = await create_all(writer, deployment, bodies)
    assert requests.asked == [CREATE_ALL, "filter"]
    for body, flow_run in zip(bodies, made, strict=True):
        assert isinstance(flow_run, FlowRun)
        assert (flow_run.name, flow_run.parameters) == (body["name"], body["parameters"])
        assert (flow_run.deployment_id, flow_run.tags) == (deployment, ["ours"])
        assert flow_run.state is not None
        assert (flow_run.state.is_running(), flow_run.run_count) == (True, 1)
        assert flow_run.start_time is not None
        assert flow_run.empirical_policy.retries == 2


async def test_the_first_flow_runs_of_a_burst_do_not_wait_for_the_last(
    writer: FlowRunWriter, deployment: UUID, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_run_writer, "_LATE", 1000.0)
    monkeypatch.setattr(flow_run_writer, "MOST_CREATED", 3)
    asked_for: dict[str, list[str]] = {}

    async def create(body: Json) -> None:
        await writer.create(deployment, body)
        asked_for[body["name"]] = [*requests.asked]

    bodies = [make_body() for _ in range(6)]
    await asyncio.gather(*map(create, bodies))
    assert asked_for[bodies[0]["name"]].count(CREATE_ALL) == 1
    assert asked_for[bodies[-1]["name"]].count(CREATE_ALL) == 2


async def test_a_single_flow_run_is_created_by_a_plain_request(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    [made] = await make_running(writer, deployment, 1)
    assert requests.asked == [CREATE]
    assert made.state is not None
    assert (made.state.is_running(), made.run_count) == (True, 1)


async def test_what_comes_while_a_request_is_answered_goes_with_the_next_one(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    later: list[asyncio.Task[FlowRun]] = []

    def come() -> None:
        requests.answers.clear()
        later.extend(asyncio.ensure_future(writer.create(deployment, make_body())) for _ in range(5))

    requests.answers[CREATE] = come
    await writer.create(deployment, make_body())
    await asyncio.gather(*later)
    assert requests.asked == [CREATE, CREATE_ALL, "filter"]


async def test_a_key_that_is_known_gives_the_flow_run_that_has_it(
    writer: FlowRunWriter, deployment: UUID, client: PrefectClient
) -> None:
    former, other = await make_running(writer, deployment, 2)
    await client.set_flow_run_state(former.id, Cancelled(), force=True)
    bodies = [make_body(idempotency_key=former.idempotency_key), make_body()]
    found, fresh = await create_all(writer, deployment, bodies)
    assert isinstance(found, FlowRun)
    assert isinstance(fresh, FlowRun)
    assert (found.id, found.parameters, found.state_name) == (former.id, former.parameters, "Cancelled")
    assert fresh.id not in (former.id, other.id)


async def test_only_the_flow_run_that_caused_an_error_is_refused(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    made = await create_all(writer, deployment, [make_body(), make_body(parameters={"run_id": 7}), make_body()])
    first, bad, last = made
    assert isinstance(first, FlowRun)
    assert isinstance(last, FlowRun)
    assert isinstance(bad, PrefectHTTPStatusError)
    assert "7 is not of type 'string'" in bad.response.text
    assert requests.asked == [CREATE_ALL, "filter", CREATE]


async def test_a_deployment_that_is_gone_is_no_server_without_routes(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    made = await create_all(writer, uuid4(), [make_body(), make_body()])
    assert [isinstance(each, PrefectHTTPStatusError) and each.response.status_code for each in made] == [404, 404]
    await make_running(writer, deployment, 2)
    assert requests.asked == [CREATE_ALL, CREATE, CREATE, CREATE_ALL, "filter"]


@pytest.mark.parametrize(("code", "detail"), [(404, "Not Found"), (405, "Method Not Allowed"), (404, None)])
async def test_a_server_without_these_routes_is_asked_once(
    code: int, detail: str | None, writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    requests.answers = dict.fromkeys((CREATE_ALL, END_ALL), lambda: refuse(code, detail))
    made = [*await make_running(writer, deployment, 2), *await make_running(writer, deployment, 2)]
    assert requests.asked == [CREATE_ALL, *[CREATE] * 4]
    requests.asked.clear()
    for some in (made[:2], made[2:]):
        ended = await asyncio.gather(*(writer.enter(each.id, Completed()) for each in some))
        assert all(each.is_completed() for each in ended)
    assert requests.asked == [END_ALL, *[END] * 4]


async def test_a_server_that_fails_once_is_asked_for_several_again(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    requests.answers = {CREATE_ALL: lambda: refuse(500)}
    await make_running(writer, deployment, 2)
    requests.answers.clear()
    await make_running(writer, deployment, 2)
    assert requests.asked == [CREATE_ALL, CREATE, CREATE, CREATE_ALL, "filter"]


@pytest.mark.parametrize("code", [401, 429, 503])
async def test_what_no_flow_run_is_to_blame_for_is_told_to_all_without_asking_for_each(
    code: int, writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    requests.answers = {CREATE_ALL: lambda: refuse(code)}
    made = await create_all(writer, deployment, [make_body(), make_body(), make_body()])
    assert [isinstance(each, PrefectHTTPStatusError) and each.response.status_code for each in made] == [code] * 3
    assert requests.asked == [CREATE_ALL]


async def test_only_the_forbidden_flow_run_of_several_is_refused(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    def forbid_first() -> PrefectHTTPStatusError:
        del requests.answers[CREATE]
        return refuse(403)

    requests.answers = {CREATE_ALL: lambda: refuse(403), CREATE: forbid_first}
    forbidden, *made = await create_all(writer, deployment, [make_body() for _ in range(3)])
    assert isinstance(forbidden, PrefectHTTPStatusError)
    assert [isinstance(each, FlowRun) for each in made] == [True, True]

    def forbid_end() -> PrefectHTTPStatusError:
        del requests.answers[END]
        return refuse(403)

    requests.answers = {END_ALL: lambda: refuse(403), END: forbid_end}
    ended = await asyncio.gather(
        *(writer.enter(each.id, Completed()) for each in made if isinstance(each, FlowRun)), return_exceptions=True
    )
    assert [describe(each) for each in ended] == ["PrefectHTTPStatusError", "Completed"]


async def test_a_server_that_does_not_answer_is_waited_for_a_limited_time(
    writer: FlowRunWriter, deployment: UUID, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def wait_for_ever(*_: Any, **__: Any) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(flow_run_writer, "_PATIENCE", 0.01)
    monkeypatch.setattr(requests, "_request", wait_for_ever)
    made = await create_all(writer, deployment, [make_body(), make_body()])
    assert [type(each) for each in made] == [PrefectUnavailableError] * 2


async def test_flow_runs_that_complete_together_are_ended_in_one_request(
    writer: FlowRunWriter, deployment: UUID, requests: Requests, client: PrefectClient
) -> None:
    made = await make_running(writer, deployment, 20)
    requests.asked.clear()
    states = await asyncio.gather(*(writer.enter(each.id, Completed()) for each in made))
    assert requests.asked == [END_ALL]
    for flow_run, state in zip(made, states, strict=True):
        shown = await client.read_flow_run(flow_run.id)
        assert shown.state is not None
        assert (shown.state.id, shown.state.type, shown.end_time is not None) == (state.id, state.type, True)


async def test_each_of_several_hears_what_became_of_it(
    writer: FlowRunWriter, deployment: UUID, client: PrefectClient, requests: Requests
) -> None:
    well, deleted, ended, paused = await make_running(writer, deployment, 4)
    await client.delete_flow_run(deleted.id)
    await client.set_flow_run_state(ended.id, Failed(message="before"), force=True)
    await client.set_flow_run_state(paused.id, Paused(timeout_seconds=600), force=True)
    requests.asked.clear()
    alone = [await client.create_flow_run_from_deployment(deployment, parameters={"run_id": "1"}) for _ in range(2)]
    for each in alone:
        await client.set_flow_run_state(each.id, Running(), force=True)
    answers = await asyncio.gather(
        *(writer.enter(each.id, Completed()) for each in (well, deleted, ended, paused)), return_exceptions=True
    )
    by_itself = await asyncio.gather(
        *(propose_alone(client, each.id) for each in (alone[0], deleted, ended, paused)), return_exceptions=True
    )
    assert [describe(each) for each in answers] == [describe(each) for each in by_itself]
    assert describe(answers[0]) == "Completed"
    assert isinstance(answers[1], ObjectNotFound)


async def propose_alone(client: PrefectClient, flow_run_id: UUID) -> Any:
    from prefect.utilities.engine import propose_state  # noqa: PLC0415

    return await propose_state(client, Completed(), flow_run_id=flow_run_id)


def describe(answer: Any) -> str:
    return type(answer).__name__ if isinstance(answer, BaseException) else str(answer.name)


@pytest.mark.parametrize("state", [Failed(), Cancelled(), Completed(name="Cached"), Completed(message="by hand")])
async def test_other_ends_are_told_alone(
    state: Any, writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    made = await make_running(writer, deployment, 2)
    requests.asked.clear()
    for each in made:
        await writer.enter(each.id, state.model_copy(deep=True))
    assert requests.asked == [END, END]


async def test_a_caller_that_is_cancelled_harms_no_other(writer: FlowRunWriter, deployment: UUID) -> None:
    bodies = [make_body() for _ in range(3)]
    tasks = [asyncio.ensure_future(writer.create(deployment, body)) for body in bodies]
    await asyncio.sleep(0)
    tasks[1].cancel()
    first, cancelled, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, FlowRun)
    assert isinstance(last, FlowRun)
    assert isinstance(cancelled, asyncio.CancelledError)
    assert {first.name, last.name} == {bodies[0]["name"], bodies[2]["name"]}


async def test_a_signal_for_one_flow_run_harms_no_waiting_flow_run(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    aborted, *others = await make_running(writer, deployment, 3)
    later: list[asyncio.Task[Any]] = []

    def abort() -> Abort:
        requests.answers.clear()
        later.extend(asyncio.ensure_future(writer.enter(each.id, Completed())) for each in others)
        return Abort("leave it")

    requests.answers[END] = abort
    with pytest.raises(Abort):
        await writer.enter(aborted.id, Completed())
    assert [each.name for each in await asyncio.gather(*later)] == ["Completed", "Completed"]


async def test_a_signal_for_a_flow_run_that_is_sent_alone_harms_no_other(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    made = await make_running(writer, deployment, 3)

    def abort_first() -> Abort:
        del requests.answers[END]
        return Abort("leave it")

    requests.answers = {END_ALL: lambda: refuse(500), END: abort_first}
    answers = await asyncio.gather(*(writer.enter(each.id, Completed()) for each in made), return_exceptions=True)
    assert [describe(each) for each in answers] == ["Abort", "Completed", "Completed"]


async def test_a_late_answer_keeps_no_later_flow_run_waiting(
    writer: FlowRunWriter, deployment: UUID, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_run_writer, "_PATIENCE", 1000.0)
    begun, answer, ask = anyio.Event(), anyio.Event(), requests._request

    async def be_late(*args: Any, **options: Any) -> httpx.Response:
        if not begun.is_set():
            begun.set()
            await answer.wait()
        return await ask(*args, **options)

    monkeypatch.setattr(requests, "_request", be_late)
    late = asyncio.ensure_future(writer.create(deployment, make_body()))
    await begun.wait()
    await make_running(writer, deployment, 2)
    assert not late.done()
    answer.set()
    assert (await late).deployment_id == deployment


async def test_requests_without_an_answer_are_few(
    writer: FlowRunWriter, deployment: UUID, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_run_writer, "_PATIENCE", 1000.0)
    monkeypatch.setattr(flow_run_writer, "_LATE", 0.0)
    monkeypatch.setattr(flow_run_writer, "MOST_CREATED", 1)
    under_way, most = 0, 0
    answer = anyio.Event()

    async def wait(*args: Any, **options: Any) -> None:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        if under_way == flow_run_writer._MOST_AT_ONCE:
            answer.set()
        await answer.wait()
        under_way -= 1
        raise refuse(503)

    monkeypatch.setattr(requests, "_request", wait)
    made = await create_all(writer, deployment, [make_body() for _ in range(20)])
    assert [type(each) for each in made] == [PrefectHTTPStatusError] * 20
    assert most == flow_run_writer._MOST_AT_ONCE


async def test_few_flow_runs_are_sent_alone_at_the_same_time(
    writer: FlowRunWriter, deployment: UUID, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests.answers = {CREATE_ALL: lambda: refuse(404)}
    under_way, most, ask = 0, 0, requests._request

    async def count(*args: Any, **options: Any) -> httpx.Response:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        try:
            return await ask(*args, **options)
        finally:
            under_way -= 1

    monkeypatch.setattr(requests, "_request", count)
    await make_running(writer, deployment, 20)
    assert most <= flow_run_writer._LANES


async def test_a_server_that_went_away_is_not_asked_for_each(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    requests.answers = {CREATE_ALL: lambda: refuse(404), CREATE: lambda: httpx.ConnectError("refused")}
    made = await create_all(writer, deployment, [make_body() for _ in range(50)])
    assert [type(each) for each in made] == [httpx.ConnectError] * 50
    assert requests.asked.count(CREATE) <= flow_run_writer._LANES


async def test_a_server_without_these_routes_is_asked_again_later(
    writer: FlowRunWriter, deployment: UUID, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(flow_run_writer, "_WITHOUT_ROUTES", 0.0)
    requests.answers = dict.fromkeys((CREATE_ALL, END_ALL), lambda: refuse(404))
    made = await make_running(writer, deployment, 2)
    requests.answers.clear()
    made += await make_running(writer, deployment, 2)
    assert requests.asked == [CREATE_ALL, CREATE, CREATE, CREATE_ALL, "filter"]


ANSWERS = {
    "a page": httpx.Response(200, text="<html>Log in</html>"),
    "nothing": httpx.Response(200, json=None),
    "a list": httpx.Response(200, json=[]),
    "another object": httpx.Response(200, json={"results": [{}, {"flow_run_id": 7}]}),
}


@pytest.mark.parametrize("answered", ANSWERS.values(), ids=ANSWERS.keys())
@pytest.mark.parametrize("count", [1, 2])
async def test_an_answer_that_is_not_prefects_is_told_as_such(
    count: int,
    answered: httpx.Response,
    writer: FlowRunWriter,
    deployment: UUID,
    requests: Requests,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def answer(*_: Any, **__: Any) -> httpx.Response:
        return answered

    monkeypatch.setattr(requests, "_request", answer)
    made = await create_all(writer, deployment, [make_body() for _ in range(count)])
    assert [type(each) for each in made] == [PrefectUnavailableError] * count
    assert "its answer can't be read" in str(made[0])


@pytest.mark.parametrize("state", [Completed(), Failed(), Running()], ids=["Completed", "Failed", "Running"])
async def test_an_end_without_an_answer_is_waited_for_a_limited_time(
    state: Any, writer: FlowRunWriter, deployment: UUID, requests: Requests, monkeypatch: pytest.MonkeyPatch
) -> None:
    [made] = await make_running(writer, deployment, 1)

    async def wait_for_ever(*_: Any, **__: Any) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(flow_run_writer, "_PATIENCE_OF_END", 0.01)
    monkeypatch.setattr(requests, "_request", wait_for_ever)
    with pytest.raises(PrefectUnavailableError):
        await writer.enter(made.id, state)


async def test_a_sender_that_breaks_off_tells_all_waiting_callers(
    writer: FlowRunWriter, deployment: UUID, requests: Requests
) -> None:
    requests.answers = {CREATE_ALL: lambda: TerminationSignal(signal=15)}
    made = await create_all(writer, deployment, [make_body() for _ in range(3)])
    assert [type(each) for each in made] == [TerminationSignal] * 3


async def test_a_cancelling_flow_run_that_completes_is_shown_as_prefect_has_it(
    writer: FlowRunWriter, deployment: UUID, client: PrefectClient
) -> None:
    cancelling, alone, other = await make_running(writer, deployment, 3)
    for each in (cancelling, alone):
        await client.set_flow_run_state(each.id, Cancelling(), force=True)
    together = await asyncio.gather(
        *(writer.enter(each.id, Completed()) for each in (cancelling, other)), return_exceptions=True
    )
    by_itself = await asyncio.gather(propose_alone(client, alone.id), return_exceptions=True)
    assert [describe(each) for each in together] == [describe(by_itself[0]), "Completed"]
    assert describe(together[0]) == (await client.read_flow_run(cancelling.id)).state_name
