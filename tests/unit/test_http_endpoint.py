"""A step that is bound to an HTTP endpoint: what is sent, and what each answer means."""

import gzip
import logging
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any
from urllib.parse import unquote
from uuid import UUID

import anyio
import httpx
import pytest

from pgflow_prefect.bindings import HttpEndpoint
from pgflow_prefect.errors import NotRetriableError, ResultInvalidError, RetryLaterError
from pgflow_prefect.handlers.base import Deferred, StepContext, StepExecution, Toolbox
from pgflow_prefect.handlers.http_endpoint import HttpHandler, parse_retry_after
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.models import Claim, Status
from pgflow_prefect.raw_json import RawJson
from tests.http_server import HttpServer, drip, http_server, send

pytestmark = pytest.mark.anyio

TOKEN = "s3cr3t-t0ken"  # noqa: S105  a made-up one
LIMIT = 10_000
RUN = UUID(int=7)
CLAIM = Claim(
    status=Status.PENDING,
    attempt=2,
    payload=RawJson('{"n": 1}'),
    upstream_results=RawJson('{"a": [1.5], "payload": "é"}'),
)
CONTEXT = StepContext(RUN, "Prüfung 工", "send/ü %", 2, logging.getLogger(__name__))


@pytest.fixture
async def server() -> AsyncIterator[HttpServer]:
    async with http_server() as server:
        yield server


@pytest.fixture
async def toolbox(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Toolbox]:
    monkeypatch.setenv("EDGE_TOKEN", f"{TOKEN}\n")

    async def find_secret(name: str) -> str:
        if name != "edge":
            raise NotRetriableError(f"there is no Prefect Secret block {name!r}")
        return TOKEN

    async with httpx.AsyncClient(trust_env=False) as client:
        yield Toolbox(lambda: client, find_secret, LIMIT)


async def call(server: HttpServer, toolbox: Toolbox, claim: Claim = CLAIM, **options: Any) -> str | Decided | Deferred:
    binding = HttpEndpoint(f"{server.url}/send?x=1", **{"token_env": "EDGE_TOKEN"} | options)
    return await HttpHandler("send", binding, toolbox).execute(claim, ["a", "payload"], StepExecution(CONTEXT))


async def test_the_request_has_the_steps_input_and_tells_which_step_it_is(server: HttpServer, toolbox: Toolbox) -> None:
    server.respond(200, b"{}")
    await call(server, toolbox)
    (request,) = server.requests
    assert request.line == "POST /send?x=1 HTTP/1.1"
    assert request.json == {"input": {"payload": {"n": 1}, "a": [1.5], "payload_": "é"}}
    told = {name: unquote(value) for name, value in request.headers.items() if name.startswith(("pgflow", "idem"))}
    assert told == {
        "idempotency-key": f"{RUN}/send/ü %",
        "pgflow-run-id": str(RUN),
        "pgflow-workflow": "Prüfung 工",
        "pgflow-step": "send/ü %",
        "pgflow-attempt": "2",
    }
    assert request.headers["content-type"] == "application/json"
    assert request.headers["authorization"] == f"Bearer {TOKEN}"


async def test_the_token_may_be_in_a_block_and_need_not_be_there(server: HttpServer, toolbox: Toolbox) -> None:
    server.respond(200)
    await call(server, toolbox, token_env=None, token_block="edge")  # noqa: S106  its name
    await call(server, toolbox, token_env=None)
    assert [request.headers.get("authorization") for request in server.requests] == [f"Bearer {TOKEN}", None]


@pytest.mark.parametrize("value", [None, "", "  "])
async def test_a_missing_token_is_named(
    server: HttpServer, toolbox: Toolbox, monkeypatch: pytest.MonkeyPatch, value: str | None
) -> None:
    monkeypatch.delenv("EDGE_TOKEN") if value is None else monkeypatch.setenv("EDGE_TOKEN", value)
    with pytest.raises(NotRetriableError, match="EDGE_TOKEN is not set"):
        await call(server, toolbox)
    with pytest.raises(NotRetriableError, match="no Prefect Secret block 'other'"):
        await call(server, toolbox, token_env=None, token_block="other")  # noqa: S106  its name
    assert server.requests == []


@pytest.mark.parametrize("token", ["one\r\ntwo", "tökén", "a b"])
async def test_a_token_that_no_header_can_have_is_not_shown(
    server: HttpServer, toolbox: Toolbox, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    monkeypatch.setenv("EDGE_TOKEN", token)
    with pytest.raises(NotRetriableError, match="the token in EDGE_TOKEN has characters") as caught:
        await call(server, toolbox)
    assert token not in str(caught.value)


@pytest.mark.parametrize(
    ("status", "body", "result"),
    [
        (200, b'{"a": 1}', '{"a": 1}'),
        (201, b" null ", " null "),
        (200, b"12345678901234567890.5", "12345678901234567890.5"),
        (200, b"9" * 5000, "9" * 5000),
        (200, b"\xef\xbb\xbf[]", "[]"),
        (200, b"", "null"),
        (200, b" \r\n", "null"),
        (204, b"", "null"),
    ],
)
async def test_the_answer_is_the_result(
    server: HttpServer, toolbox: Toolbox, status: int, body: bytes, result: str
) -> None:
    server.respond(status, body)
    assert await call(server, toolbox) == result


@pytest.mark.parametrize(
    "body", [b"<html>", b"[NaN]", b"-Infinity", b"{} {}", b'"\xff"', b"[" * 9_000, b'{"a": 1', b"'a'"]
)
async def test_an_answer_that_is_no_json_fails_at_once(server: HttpServer, toolbox: Toolbox, body: bytes) -> None:
    server.respond(200, body)
    with pytest.raises(ResultInvalidError, match="wrong JSON"):
        await call(server, toolbox)


async def test_accepted_means_that_the_endpoint_reports_later(server: HttpServer, toolbox: Toolbox) -> None:
    server.respond(202, b"<not read>")
    assert await call(server, toolbox) == Deferred(f"accepted by {server.url}/send")


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 599])
async def test_what_may_pass_is_retried_when_the_endpoint_says(
    server: HttpServer, toolbox: Toolbox, status: int
) -> None:
    server.respond(status, b"busy", Retry_After="7")
    with pytest.raises(RetryLaterError, match=f"answered {status} Reason: busy") as caught:
        await call(server, toolbox)
    assert caught.value.after == 7


def test_retry_after_has_two_forms_and_bounds() -> None:
    now = datetime.now(UTC)
    given = [None, "5", " 1.5 ", "-3", "999999999999", "soon", "nan", "Wed, 99 Foo 2026 00:00:00 GMT", ""]
    assert [parse_retry_after(each) for each in given] == [None, 5, 1.5, 0, 3600, None, None, None, None]
    assert parse_retry_after(format_datetime(now + timedelta(seconds=60), usegmt=True)) == pytest.approx(60, abs=3)
    assert parse_retry_after(format_datetime(now - timedelta(days=9), usegmt=True)) == 0
    assert parse_retry_after(format_datetime(now + timedelta(days=9), usegmt=True)) == 3600
    assert parse_retry_after((now + timedelta(seconds=60)).strftime("%a, %d %b %Y %H:%M:%S -0000")) == pytest.approx(
        60, abs=3
    )


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 422, 499])
async def test_a_refusal_fails_at_once_with_the_beginning_of_its_body(
    server: HttpServer, toolbox: Toolbox, status: int
) -> None:
    server.respond(status, b"no\0\xff" + b"x" * 5000)
    with pytest.raises(NotRetriableError, match=f"answered {status}") as caught:
        await call(server, toolbox)
    assert str(caught.value).endswith(": no\N{REPLACEMENT CHARACTER}\N{REPLACEMENT CHARACTER}" + "x" * 1020)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_named_and_not_followed(server: HttpServer, toolbox: Toolbox, status: int) -> None:
    server.respond(status, Location=f"https://elsewhere.example/?t={TOKEN}")
    with pytest.raises(NotRetriableError, match=r"redirects are not followed.*'https://elsewhere.example/") as caught:
        await call(server, toolbox)
    assert TOKEN not in str(caught.value)
    assert len(server.requests) == 1


@pytest.mark.parametrize("before", [0, 1015, 1020])
async def test_a_token_that_the_endpoint_echoes_is_in_no_error(
    server: HttpServer, toolbox: Toolbox, before: int, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    server.respond(400, b"-" * before + (TOKEN * 3).encode())
    with pytest.raises(NotRetriableError) as caught:
        await call(server, toolbox)
    assert "s3c" not in f"{caught.value} {caught.value.__cause__!r} {caught.value.__context__!r}"
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("status", [200, 500])
async def test_a_body_that_drips_is_a_request_that_takes_too_long(
    server: HttpServer, toolbox: Toolbox, status: int
) -> None:
    # The whole body would take 2,000 s.
    server.answer = drip(f"HTTP/1.1 {status} OK\r\nContent-Length: 100000\r\n\r\n[".encode(), b" ", every=0.02)
    with pytest.raises(RetryLaterError, match=r"did not answer within 0\.3 s") as caught:
        await call(server, toolbox, request_timeout_seconds=0.3)
    assert caught.value.after is None
    with anyio.fail_after(180):
        await server.gone.wait()


async def test_an_endpoint_that_never_answers_is_tried_again(server: HttpServer, toolbox: Toolbox) -> None:
    server.answer = drip(b"", b"", every=0.02)
    with pytest.raises(RetryLaterError, match="did not answer within"):
        await call(server, toolbox, request_timeout_seconds=0.2)


async def test_an_endless_answer_is_read_up_to_the_limit(server: HttpServer, toolbox: Toolbox) -> None:
    server.answer = drip(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", b"1" * 3000, every=0)
    with pytest.raises(ResultInvalidError, match="more bytes than the limit of 10,000"):
        await call(server, toolbox)
    with anyio.fail_after(180):
        await server.gone.wait()


async def test_the_limit_itself_is_allowed(server: HttpServer, toolbox: Toolbox) -> None:
    server.respond(200, b"1" * LIMIT)
    assert await call(server, toolbox) == "1" * LIMIT


async def test_gzip_is_read_and_a_bomb_of_it_is_not(server: HttpServer, toolbox: Toolbox) -> None:
    server.respond(200, gzip.compress(b'{"a": 1}'), Content_Encoding="gzip")
    assert await call(server, toolbox) == '{"a": 1}'
    server.respond(200, gzip.compress(b"1" * 50_000_000), Content_Encoding="gzip")
    with pytest.raises(ResultInvalidError, match="more bytes than the limit"):
        await call(server, toolbox)


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("gzip", b"no gzip"),
        ("gzip", gzip.compress(b"{}", mtime=0)[:-4]),
        ("gzip", gzip.compress(b"1", mtime=0) * 2),
        ("br", b"{}"),
    ],
)
async def test_an_encoding_that_is_broken_or_was_not_asked_for_fails_at_once(
    server: HttpServer, toolbox: Toolbox, encoding: str, body: bytes
) -> None:
    server.respond(200, body, Content_Encoding=encoding)
    with pytest.raises(ResultInvalidError, match="its body can't be read"):
        await call(server, toolbox)


async def test_a_broken_link_is_tried_again(server: HttpServer, toolbox: Toolbox) -> None:
    server.answer = send(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n[")
    with pytest.raises(RetryLaterError, match="can't be reached") as caught:
        await call(server, toolbox)
    assert caught.value.after is None
    unreachable = replace(server, url="http://127.0.0.1:1")
    with pytest.raises(RetryLaterError, match="can't be reached"):
        await call(unreachable, toolbox)


async def test_an_address_that_is_none_fails_at_once(server: HttpServer, toolbox: Toolbox) -> None:
    with pytest.raises(NotRetriableError, match="no request can be sent to ftp:"):
        await call(replace(server, url="ftp://example.org"), toolbox)


NUMBERS = f"[12345678901234567.89, 1.10, -0.0, 1{'0' * 999}, 0.{'0' * 40}1, 18446744073709551617]"


@pytest.mark.parametrize("upstream_results", ["{}", f'{{"a": {NUMBERS}}}', f'{{"payload": {NUMBERS}}}'])
async def test_every_number_is_sent_with_every_digit(
    server: HttpServer, toolbox: Toolbox, upstream_results: str
) -> None:
    server.respond(200, b"{}")
    claim = Claim(
        status=Status.PENDING, attempt=1, payload=RawJson(NUMBERS), upstream_results=RawJson(upstream_results)
    )
    await call(server, toolbox, claim)
    [request] = server.requests
    results = upstream_results.removeprefix("{").removesuffix("}").replace('"payload": ', '"payload_":')
    rest = f",{results}" if results else ""
    assert request.body.decode() == f'{{"input":{{"payload":{NUMBERS}{rest}}}}}'


def test_the_policy_is_the_bindings() -> None:
    toolbox: Any = None
    policy = HttpHandler("send", HttpEndpoint("https://example.org", timeout_seconds=9), toolbox).policy
    assert (policy.retries, policy.retry_delay_seconds, policy.timeout_seconds) == (3, [1, 10, 60], 9)


@pytest.mark.parametrize(
    ("headers", "outcome"),
    [
        ({"Pgflow-Outcome": "skip"}, {"skip": True, "note": None, "cascade": True}),
        (
            {"Pgflow-Outcome": "Skip; cascade=no", "Pgflow-Note": "nichts%20n%C3%B6tig"},
            {"skip": True, "note": "nichts nötig", "cascade": False},
        ),
        ({"Pgflow-Branches": "full, au%2Cdit"}, {"taken": ["full", "au,dit"], "whole": False}),
        ({"Pgflow-Branches": "; whole"}, {"taken": [], "whole": True}),
    ],
)
async def test_an_answer_skips_its_step_or_takes_branches(
    server: HttpServer, toolbox: Toolbox, headers: dict[str, str], outcome: dict[str, object]
) -> None:
    server.respond(200, b"1", **headers)
    answered = await call(server, toolbox)
    assert isinstance(answered, Decided)
    assert answered.outcome == outcome
    assert answered.result == ("null" if "Pgflow-Outcome" in headers else "1")


@pytest.mark.parametrize("headers", [{"Pgflow-Outcome": "later"}, {"Pgflow-Branches": "full; hole"}])
async def test_an_answer_that_says_something_else_is_refused(
    server: HttpServer, toolbox: Toolbox, headers: dict[str, str]
) -> None:
    server.respond(200, b"1", **headers)
    with pytest.raises(NotRetriableError, match="says nothing"):
        await call(server, toolbox)
