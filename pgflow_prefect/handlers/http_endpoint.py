"""Does a step by an HTTP endpoint that takes and answers JSON, such as a Supabase Edge Function."""

import re
import zlib
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import quote, unquote

import anyio
import httpx

from pgflow_prefect.bindings import HttpEndpoint
from pgflow_prefect.errors import NotRetriableError, ResultInvalidError, RetryLaterError
from pgflow_prefect.handlers.base import (
    AnyItemContext,
    AnyStepContext,
    Deferred,
    RetryPolicy,
    StepExecution,
    Toolbox,
    make_input,
    make_policy,
)
from pgflow_prefect.handlers.credential import read_credential
from pgflow_prefect.handlers.json_text import check_json
from pgflow_prefect.handlers.outcomes import Branch, Decided, Skip
from pgflow_prefect.handlers.row_policy import InternalAddressError, refuse_origin
from pgflow_prefect.models import Claim
from pgflow_prefect.origins import Origin, find_origin
from pgflow_prefect.raw_json import RawJson, write_object
from pgflow_prefect.wording import clean_lines, write_moment

LONGEST_RETRY_AFTER = 3600.0
"""Seconds: a longer Retry-After counts as this."""

EXCERPT = 1024
"""How many bytes of an error's answer its message shows."""

_EXCERPT_TIMEOUT = 5.0  # seconds
_RETRIED = (408, 425, 429)
_VISIBLE = re.compile(r"[\x21-\x7e]+")
_SECONDS = re.compile(r"\s*[+-]?\d+(?:\.\d+)?\s*", re.ASCII)
_GZIP = 31  # zlib's window bits for gzip

_OUTCOME, _BRANCHES = "Pgflow-Outcome", "Pgflow-Branches"
_CASCADES = {"": True, "cascade=yes": True, "cascade=no": False}
"""What may follow `skip;` in the header, and whether what is below the step is skipped, too."""


@dataclass(frozen=True)
class HttpHandler:
    """An endpoint that gets the step's input as a POST of JSON, and answers with its result.

    Attributes:
        step_slug: the step.
        binding: which endpoint.
        toolbox: the client and the secrets.
        is_row: whether a row binds the step. The settings limit which hosts and secrets a row can use.
    """

    step_slug: str
    binding: HttpEndpoint
    toolbox: Toolbox
    is_row: bool = False

    @property
    def policy(self) -> RetryPolicy:
        """The binding's."""
        return make_policy(self.binding)

    @property
    def _endpoint(self) -> str:
        return self.binding.url.partition("?")[0].partition("#")[0]

    async def execute(
        self, claim: Claim, upstream: Collection[str], execution: StepExecution
    ) -> str | Decided | Deferred:
        """Send the request and return the answer's JSON text, or that the endpoint reports later.

        The headers of the answer may say that the step is skipped, or which branches it takes.

        Raises:
            RetryLaterError: there was no answer in time, or it was 408, 425, 429 or 5xx.
            ResultInvalidError: the answer is not JSON, or too large.
            NotRetriableError: any other answer. Or the token is missing, or the settings refuse token or endpoint.
        """
        client = self._find_client()
        token = await self._find_token()
        headers = make_headers(execution.context) | ({"Authorization": f"Bearer {token}"} if token else {})
        body = make_body(claim, flat=self.toolbox.flat_body).text.encode()
        timeout = self.binding.request_timeout_seconds
        try:
            # httpx's own time-outs are for each read: a body that drips would never end.
            with anyio.fail_after(timeout):
                return await self._request(client, body, headers, token)
        except InternalAddressError as error:
            raise refuse_origin(self._origin, error) from None
        except TimeoutError:
            raise RetryLaterError(f"{self._endpoint} did not answer within {timeout:g} s", None) from None
        except (httpx.InvalidURL, httpx.UnsupportedProtocol, httpx.LocalProtocolError) as error:
            # Without its cause: a message about a header would quote it.
            raise NotRetriableError(f"no request can be sent to {self._endpoint}: {type(error).__name__}") from None
        except httpx.TransportError as error:
            raise RetryLaterError(
                f"{self._endpoint} can't be reached: {error or type(error).__name__} ({type(error).__name__})", None
            ) from error

    @property
    def _origin(self) -> Origin:
        try:
            return find_origin(self.binding.url)
        except ValueError as error:
            raise NotRetriableError(f"no request can be sent to {self._endpoint}: {error}") from None

    def _find_client(self) -> httpx.AsyncClient:
        """Return the client. For a row, it checks the addresses that it connects to."""
        if not self.is_row or self._origin in self.toolbox.rows.allowed:
            return self.toolbox.http()
        return self.toolbox.row_http()

    async def _find_token(self) -> str | None:
        binding = self.binding
        if self.is_row:
            self.toolbox.rows.check_credential(binding.token_env, binding.token_block, self._origin)
        token = await read_credential(binding.token_env, binding.token_block, self.toolbox.find_secret)
        if token is not None and not _VISIBLE.fullmatch(token):
            source = binding.token_env or f"Prefect Secret block {binding.token_block!r}"
            raise NotRetriableError(f"the token in {source} has characters that no HTTP header can have")
        return token

    async def _request(
        self, client: httpx.AsyncClient, body: bytes, headers: dict[str, str], token: str | None
    ) -> str | Decided | Deferred:
        request = client.stream(
            "POST", self.binding.url, content=body, headers=headers, timeout=None, follow_redirects=False
        )
        async with request as response:
            if response.status_code == httpx.codes.ACCEPTED:
                return Deferred(f"accepted by {self._endpoint}")
            if response.is_success:
                return decide(await self._read_result(response), response.headers)
            raise await self._make_error(response, token)

    async def _read_result(self, response: httpx.Response) -> str:
        if response.status_code == httpx.codes.NO_CONTENT:
            return "null"
        limit = self.toolbox.result_limit
        try:
            body = await read_body(response, limit + 1)
            if len(body) <= limit:
                return check_json(body) if body.strip() else "null"
        except ValueError as error:
            raise ResultInvalidError(
                f"step {self.step_slug!r}: wrong JSON: {self._endpoint} answered {response.status_code}, and its body "
                f"can't be read: {_explain(error)}"
            ) from None  # the cause has the body, which may hold secrets
        raise ResultInvalidError(
            f"step {self.step_slug!r}: the answer of {self._endpoint} has more bytes than the limit of {limit:,} "
            "(PGFLOW_RESULT_LIMIT): store it elsewhere and answer with its address"
        )

    async def _make_error(self, response: httpx.Response, token: str | None) -> RetryLaterError | NotRetriableError:
        status = response.status_code
        answer = f"{self._endpoint} answered {status} {response.reason_phrase}".rstrip()
        if response.is_redirect or response.has_redirect_location:
            target = _show(response.headers.get("Location", "").encode(), token)
            return NotRetriableError(f"{answer}, and redirects are not followed: bind the step to {target!r} itself")
        excerpt = await _read_excerpt(response, token)
        message = f"{answer}: {excerpt}" if excerpt else answer
        if status in _RETRIED or response.is_server_error:
            return RetryLaterError(message, parse_retry_after(response.headers.get("Retry-After")))
        return NotRetriableError(message)


def decide(result: str, headers: Mapping[str, str]) -> str | Decided:
    """Return the result of an answer, with what its headers have decided.

    `Pgflow-Outcome: skip` skips the step, `skip; cascade=no` without what is below it; `Pgflow-Note` says why.
    `Pgflow-Branches: full, audit` takes these branches, `; whole` skips all that is below the others. Slugs and notes
    are percent-encoded.

    Raises:
        NotRetriableError: a header says something else.
    """
    outcome, branches = headers.get(_OUTCOME), headers.get(_BRANCHES)
    if outcome is not None:
        word, _, option = (part.strip().lower() for part in outcome.partition(";"))
        if word != "skip" or option not in _CASCADES:
            raise NotRetriableError(
                f"the header {_OUTCOME}: {outcome!r} of the answer says nothing: `skip`, or `skip; cascade=no`"
            )
        note = unquote(headers.get("Pgflow-Note", "")) or None
        return Decided.to_skip(Skip(note, cascade=_CASCADES[option]))
    if branches is not None:
        slugs, _, option = branches.partition(";")
        if option.strip().lower() not in ("", "whole"):
            raise NotRetriableError(
                f"the header {_BRANCHES}: {branches!r} of the answer says nothing: slugs, and perhaps `; whole`"
            )
        taken = [unquote(slug.strip()) for slug in slugs.split(",") if slug.strip()]
        return Decided.to_branch(Branch(taken, whole=bool(option.strip())), result)
    return result


def make_body(claim: Claim, *, flat: bool) -> RawJson:
    """Return the body of the request. The input is its only member, so no slug can be a key of another API.

    Args:
        claim: with the input.
        flat: the form of earlier versions, in which the input is the whole body.
    """
    return make_input(claim) if flat else write_object({"input": make_input(claim)})


def make_headers(context: AnyStepContext[Any]) -> dict[str, str]:
    """Return the headers that name the step. They are percent-encoded, because a slug may have any characters."""
    named = {
        "Idempotency-Key": context.idempotency_key,
        "Pgflow-Run-Id": str(context.run_id),
        "Pgflow-Workflow": context.workflow_slug,
        "Pgflow-Step": context.step_slug,
        "Pgflow-Attempt": str(context.attempt),
    }
    if context.index and not isinstance(context, AnyItemContext):
        named["Pgflow-Task-Index"] = str(context.index)
    own = {"Content-Type": "application/json", "Accept": "application/json", "Accept-Encoding": "gzip"} | _write_dates(
        context
    )
    if isinstance(context, AnyItemContext):
        own["Pgflow-Item"] = ",".join(map(str, context.item_indexes))
    return own | {name: quote(value, safe="/") for name, value in named.items()}


def _write_dates(context: AnyStepContext[Any]) -> dict[str, str]:
    """Return the headers that name the run's logical date and its data interval, if it has them."""
    dates = {
        "Pgflow-Logical-Date": context.logical_date,
        "Pgflow-Data-Interval-Start": context.data_interval_start,
        "Pgflow-Data-Interval-End": context.data_interval_end,
    }
    return {name: write_moment(moment) for name, moment in dates.items() if moment is not None}


async def read_body(response: httpx.Response, limit: int) -> bytes:
    """Read and decode at most so many bytes of a body.

    httpx would decode a whole chunk at once, which may be a thousand times its size.

    Raises:
        ValueError: the encoding is not gzip, or is broken.
    """
    decode, is_complete = _make_decoder(response.headers.get("Content-Encoding", "identity").strip().lower())
    body = bytearray()
    async for chunk in response.aiter_raw():
        body += decode(chunk, limit - len(body))
        if len(body) >= limit:
            return bytes(body)
    if not is_complete():
        raise ValueError("its gzip data end too early")
    return bytes(body)


def _make_decoder(encoding: str) -> tuple[Callable[[bytes, int], bytes], Callable[[], bool]]:
    """Return two functions: one decodes so many bytes at most, the other tells whether the data are complete."""
    if encoding in ("identity", ""):
        return lambda chunk, room: chunk[:room], lambda: True
    if encoding not in ("gzip", "x-gzip"):
        raise ValueError(f"its Content-Encoding is {encoding[:50]!r}, and only gzip was asked for")
    inflate = zlib.decompressobj(wbits=_GZIP)

    def decode(chunk: bytes, room: int) -> bytes:
        try:
            decoded = inflate.decompress(chunk, room)
        except zlib.error as error:
            raise ValueError(f"its gzip data are broken: {error}") from error
        if inflate.unused_data:
            raise ValueError("it goes on after its gzip data")
        return decoded

    return decode, lambda: inflate.eof


async def _read_excerpt(response: httpx.Response, token: str | None) -> str:
    """Return the beginning of a body as text, if it can be read soon. Without it, the status says enough."""
    body = b""
    with suppress(ValueError, httpx.HTTPError), anyio.move_on_after(_EXCERPT_TIMEOUT):
        body = await read_body(response, EXCERPT + len(token or ""))
    return _show(body, token)


def _show(body: bytes, token: str | None) -> str:
    """Return an excerpt that PostgreSQL can store, without the token, which an endpoint may echo."""
    if token:
        # A replacement of the same length also finds a token that the end of the excerpt cuts.
        body = body.replace(token.encode(), b"*" * len(token))
    text = body[:EXCERPT].decode("utf-8", "replace").replace("\0", "\N{REPLACEMENT CHARACTER}")
    return clean_lines(text).strip()


def _explain(error: ValueError) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return str(error)


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds to wait before a retry, 0 to `LONGEST_RETRY_AFTER`, or None if the header is unreadable.

    Args:
        value: seconds or a date, as in RFC 9110, section 10.2.3.
    """
    if value is None:
        return None
    if _SECONDS.fullmatch(value):
        seconds = float(value)
    else:
        try:
            moment = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        seconds = (moment.replace(tzinfo=moment.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return min(max(seconds, 0.0), LONGEST_RETRY_AFTER)
