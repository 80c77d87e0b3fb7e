"""Events on their way to Prefect: in their order, once it can be reached, and to the last one."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from datetime import UTC, datetime
from functools import partial
from types import SimpleNamespace, TracebackType
from typing import Self
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import PrefectClient
from prefect.events import Event, RelatedResource
from prefect.events.clients import EventsClient
from prefect.exceptions import ObjectNotFound

from pgflow_prefect.prefect_api import event_sender
from pgflow_prefect.prefect_api.event_sender import EventSender, Related


class Server:
    """What Prefect would hear, and how often it refuses to."""

    def __init__(self) -> None:
        self.heard: list[Event] = []
        self.unreachable = 0
        self.refuses: Callable[[Event], Exception | None] = lambda event: None
        self.is_away = self.is_gone_unnoticed = False
        self.entered = self.left = 0

    @property
    def names(self) -> list[str]:
        """Of the events, the first time that each was heard."""
        return list(dict.fromkeys(event.event for event in self.heard))


class Client(EventsClient):
    """A client of it: the real one needs a server that goes away at just the right moment."""

    def __init__(self, server: Server) -> None:
        self._server = server

    async def __aenter__(self) -> Self:
        if self._server.is_away:
            raise OSError("no server there")
        if self._server.unreachable:
            self._server.unreachable -= 1
            raise OSError("no server there")
        self._server.entered += 1
        return await super().__aenter__()

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc_val: BaseException | None, exc_tb: TracebackType | None
    ) -> None:
        self._server.left += 1
        await super().__aexit__(exc_type, exc_val, exc_tb)

    async def _emit(self, event: Event) -> None:
        if error := self._server.refuses(event):
            raise error
        event.model_dump_json()
        if self._server.is_gone_unnoticed:
            return
        self._server.heard.append(event)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server()
    monkeypatch.setattr(event_sender, "get_events_client", lambda: Client(server))
    monkeypatch.setattr(event_sender, "_SHORTEST_WAIT", 0.01)
    return server


@pytest.fixture
def stream(server: Server) -> Iterator[EventSender]:
    stream = EventSender()
    yield stream
    stream.close()
    assert not stream._thread.is_alive()


def make_event(name: str) -> Event:
    return Event(event=name, resource={"prefect.resource.id": "some.thing"})


def send(stream: EventSender, *names: str) -> None:
    for name in names:
        stream.send(partial(make_event, name))


NAMES = [f"event {number}" for number in range(50)]


def test_events_arrive_in_their_order_and_closing_waits_for_the_last(stream: EventSender, server: Server) -> None:
    send(stream, *NAMES)
    stream.close()
    assert server.names == NAMES
    assert (server.entered, server.left) == (1, 1), "over one connection, which was closed as it should be"


def test_an_event_that_is_held_back_is_sent_unless_it_is_taken(
    stream: EventSender, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_sender, "HELD_BACK", 600.0)
    taken = stream.hold(partial(make_event, "taken"))
    assert taken.take() is not None
    assert taken.take() is None
    monkeypatch.setattr(event_sender, "HELD_BACK", 0.05)
    stream.hold(partial(make_event, "after a moment"))
    deadline = time.monotonic() + 180
    while not server.names:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    monkeypatch.setattr(event_sender, "HELD_BACK", 600.0)
    stream.hold(partial(make_event, "at the end"))
    stream.close()
    assert server.names == ["after a moment", "at the end"]


def test_what_comes_after_a_while_without_anything_is_sent_as_well(
    stream: EventSender, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_sender, "_LONGEST_ATTENTION", 0.1)
    for name in NAMES[:3]:
        send(stream, name)
        deadline = time.monotonic() + 180
        while name not in server.names or stream._is_awake:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_no_sender_waits_for_prefect_and_nothing_is_lost_while_it_is_away(stream: EventSender, server: Server) -> None:
    server.unreachable = 3
    send(stream, *NAMES)
    stream.close()
    assert server.names == NAMES


def test_an_event_that_a_broken_connection_has_swallowed_is_sent_again(stream: EventSender, server: Server) -> None:
    failures = iter([OSError("broken pipe")])
    server.refuses = lambda event: next(failures, None) if event.event == NAMES[7] else None
    send(stream, *NAMES)
    stream.close()
    assert server.names == NAMES


def test_what_a_server_has_not_got_that_was_not_there_any_more_is_sent_again(
    stream: EventSender, server: Server
) -> None:
    server.is_gone_unnoticed = True

    def refuse(event: Event) -> Exception | None:
        if event.event == NAMES[20] and server.is_gone_unnoticed:
            server.is_gone_unnoticed = False  # it is back, and this connection leads nowhere
            return OSError("broken pipe")
        return None

    server.refuses = refuse
    send(stream, *NAMES)
    stream.close()
    assert server.names == NAMES


@pytest.mark.parametrize("error", [ValueError("502"), OSError("broken pipe")], ids=["refused", "broken"])
def test_an_event_is_not_to_blame_for_a_connection(stream: EventSender, server: Server, error: Exception) -> None:
    errors = iter([error, error])
    server.refuses = lambda event: next(errors, None)
    send(stream, *NAMES[:3])
    stream.close()
    assert server.names == NAMES[:3]


def test_an_event_that_can_not_be_sent_delays_no_other_event(stream: EventSender, server: Server) -> None:
    stream.send(lambda: make_event("no JSON").model_copy(update={"payload": {"key": object()}}))
    send(stream, *NAMES[:3])
    stream.close()
    assert server.names == NAMES[:3]


def test_an_event_waits_until_it_is_known_what_it_is_related_to(stream: EventSender, server: Server) -> None:
    related: Related = Future()
    stream.send(partial(make_event, "first"), related)
    send(stream, "second")
    flow = {"prefect.resource.id": "prefect.flow.1", "prefect.resource.role": "flow"}
    related.set_result([RelatedResource(flow)])
    stream.close()
    assert server.names == ["first", "second"]
    assert [each.role for each in server.heard[0].related] == ["flow"]


def test_an_event_whose_parts_stay_unknown_delays_no_other_event(
    stream: EventSender, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_sender, "_LONGEST_LOOK", 0.01)
    stream.send(partial(make_event, "of which nothing says"), Future())
    send(stream, "second")
    stream.close()
    assert server.names == ["second"]


def test_an_outage_without_end_fills_no_memory(
    stream: EventSender, server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(event_sender, "MOST_WAITING", 10)
    server.is_away = True
    send(stream, *NAMES)
    assert [record.getMessage() for record in caplog.records if "dropped" in record.getMessage()], "and says so"
    server.is_away = False
    stream.close()
    assert server.names == NAMES[:10]


def test_events_of_many_threads_all_arrive(stream: EventSender, server: Server) -> None:
    threads = [threading.Thread(target=send, args=(stream, *[f"{number}.{each}" for each in range(200)]))
               for number in range(8)]  # fmt: skip
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stream.close()
    assert len(server.names) == len(server.heard) == 8 * 200
    for number in range(8):
        mine = [name for name in server.names if name.startswith(f"{number}.")]
        assert mine == [f"{number}.{each}" for each in range(200)], "each one's in their order"


def test_giving_way_holds_events_back_except_at_the_end_of_the_process(
    stream: EventSender, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_sender, "_PAUSE", 3600.0)
    waits = threading.Event()
    await_way = stream._await_way

    async def note() -> None:
        waits.set()
        await await_way()

    monkeypatch.setattr(stream, "_await_way", note)
    stream.give_way()
    send(stream, *NAMES)
    assert waits.wait(60)
    heard_before = server.names
    stream.close()
    assert (heard_before, server.names) == ([], NAMES)


def test_events_go_on_however_many_are_given_way_to(
    stream: EventSender, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_sender, "_PAUSE", 0.02)
    send(stream, *NAMES)
    deadline = time.monotonic() + 180
    while server.names != NAMES:
        stream.give_way()
        assert time.monotonic() < deadline, f"{len(server.names)} of {len(NAMES)} arrived"


class Api:
    """Prefect's API, as far as it is needed."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.heard.append("closed")


def test_no_more_is_sent_than_the_server_has_room_for(
    stream: EventSender, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    class Slow(Api):
        async def read_task_run(self, task_run_id: UUID) -> SimpleNamespace:
            asked.append(len(server.heard))
            if len(asked) % 2:
                raise ObjectNotFound(OSError())
            return SimpleNamespace(state=SimpleNamespace(timestamp=datetime.max.replace(tzinfo=UTC)))

    monkeypatch.setattr(event_sender, "_STRIDE", 10)
    monkeypatch.setattr(event_sender, "_LOOK_INTERVAL", 0.01)
    monkeypatch.setattr(event_sender, "get_client", Slow)
    for name in NAMES:
        event = Event(event=name, resource={"prefect.resource.id": f"prefect.task-run.{uuid4()}"})
        stream.send(partial(Event.model_copy, event))
    stream.close()
    assert len(server.heard) == len(NAMES)
    assert asked == [20, 20, 30, 30, 40, 40, 50, 50], "a stride ahead of what the server shows, and it is asked again"


def test_requests_are_made_before_the_process_ends_and_one_that_fails_is_a_line_in_the_log(
    stream: EventSender, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    api = Api()
    monkeypatch.setattr(event_sender, "get_client", lambda: api)

    async def succeed(client: PrefectClient) -> None:
        assert client is not None
        await asyncio.sleep(0.01)
        api.heard.append("asked")

    async def fail(client: PrefectClient) -> None:
        raise ValueError("no such thing")

    stream.request(fail, "run 1: its name")
    stream.request(succeed, "run 1: its link")
    stream.close()
    assert api.heard == ["asked", "closed"]
    assert [each for each in caplog.messages if "is not shown" in each] == [
        "run 1: its name is not shown: no such thing"
    ]


def test_what_is_looked_up_has_another_answer_where_prefect_gives_none(
    stream: EventSender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_sender, "get_client", Api)
    monkeypatch.setattr(event_sender, "PATIENCE", 0.1)

    async def answer(client: PrefectClient) -> str:
        assert isinstance(client, Api)
        return "an answer"

    async def fail(client: PrefectClient) -> str:
        raise ValueError("no such thing")

    async def hang(client: PrefectClient) -> str:
        await asyncio.Event().wait()
        return "never"

    assert stream.look_up(answer, "another").result(10) == "an answer"
    assert stream.look_up(fail, "another").result(10) == "another"
    assert stream.look_up(hang, "another").result(10) == "another"
