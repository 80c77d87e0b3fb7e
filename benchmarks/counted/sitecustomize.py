"""Count the HTTP requests of a process of any version: imported by Python itself, where this folder is on its path."""

import os
from typing import Any

import httpx

_file = os.open(os.environ["BENCHMARK_REQUESTS"], os.O_APPEND | os.O_CREAT | os.O_WRONLY)
_send, _send_async = httpx.Client.send, httpx.AsyncClient.send


def send(self: httpx.Client, *arguments: Any, **options: Any) -> httpx.Response:  # noqa: ANN401
    """Write a byte for each request, and make it."""
    os.write(_file, b".")
    return _send(self, *arguments, **options)


async def send_async(self: httpx.AsyncClient, *arguments: Any, **options: Any) -> httpx.Response:  # noqa: ANN401
    """Write a byte for each request, and make it."""
    os.write(_file, b".")
    return await _send_async(self, *arguments, **options)


httpx.Client.send, httpx.AsyncClient.send = send, send_async  # type: ignore[method-assign]
