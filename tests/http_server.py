"""An HTTP server that answers as a test says, byte for byte."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Request:
    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


Answer = Callable[[asyncio.StreamWriter], Any]


@dataclass
class HttpServer:
    """What a test sets, and what it looks at.

    Attributes:
        url: of the server.
        answer: writes the whole response.
        requests: all that came.
        gone: a client has closed its end before it had its answer.
    """

    url: str = ""
    answer: Answer | None = None
    requests: list[Request] = field(default_factory=list)
    gone: asyncio.Event = field(default_factory=asyncio.Event)

    def respond(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Answer from now on with a whole response; `_` in a header's name stands for `-`."""
        lines = [f"HTTP/1.1 {status} Reason", f"Content-Length: {len(body)}"]
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        if status == 204:
            del lines[1]
        self.answer = send("\r\n".join([*lines, "", ""]).encode() + body)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("ascii")  # a header that is not would be a mistake
            line, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (each.partition(": ") for each in lines)}
            body = await reader.readexactly(int(headers.get("content-length", "0")))
            self.requests.append(Request(line, headers, body))
            assert self.answer is not None
            await self.answer(writer)
        except (ConnectionError, asyncio.IncompleteReadError):  # on a busy machine, before it has asked for anything
            self.gone.set()
        finally:
            writer.close()


def send(response: bytes) -> Answer:
    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(response)
        await writer.drain()

    return write


def drip(head: bytes, chunk: bytes, every: float) -> Answer:
    """Write the head, then a chunk again and again, until the client has had enough."""

    async def write(writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            await writer.drain()
            await asyncio.sleep(every)
            writer.write(chunk)

    return write


@asynccontextmanager
async def http_server() -> AsyncIterator[HttpServer]:
    answers = HttpServer()
    server = await asyncio.start_server(answers.serve, "127.0.0.1", 0)
    answers.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield answers
    finally:
        server.close()
