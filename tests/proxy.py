"""An HTTP proxy in front of a server that, as many do, lets no websocket through."""

import asyncio
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from urllib.parse import urlsplit

REFUSAL = b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"


@contextmanager
def proxy_without_websockets(url: str) -> Iterator[str]:
    """Pass plain HTTP on to a server, and yield the URL under which it is to be reached that way."""
    target = urlsplit(url)
    assert target.hostname is not None
    loop = asyncio.new_event_loop()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            head = await reader.readuntil(b"\r\n\r\n")
            lines = [line for line in head.split(b"\r\n") if not line.lower().startswith(b"connection:")]
            if any(line.lower().startswith(b"upgrade:") for line in lines):
                writer.write(REFUSAL)
                await writer.drain()
                return
            lengths = [line for line in lines if line.lower().startswith(b"content-length:")]
            body = await reader.readexactly(int(lengths[0].partition(b":")[2])) if lengths else b""
            # One request a connection: where a response ends need not be known.
            upstream, upwards = await asyncio.open_connection(target.hostname, target.port)
            with closing(upwards):
                upwards.write(b"\r\n".join([*lines[:-2], b"Connection: close", b"", b""]) + body)
                while part := await upstream.read(65536):
                    writer.write(part)
                    await writer.drain()

    async def start() -> asyncio.Server:
        return await asyncio.start_server(serve, "127.0.0.1", 0)

    server = loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}{target.path}"
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
