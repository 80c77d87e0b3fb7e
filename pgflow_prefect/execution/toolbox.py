"""What the handlers of one process share: a client for HTTP, and secrets from Prefect."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, cast

import httpx
from prefect.blocks.system import Secret

from pgflow_prefect.errors import NotRetriableError
from pgflow_prefect.handlers.base import Toolbox


@asynccontextmanager
async def open_toolbox(result_limit: int) -> AsyncIterator[Toolbox]:
    """Open what handlers share; a client for HTTP only once one of them asks for it: its certificates take a while."""
    clients: list[httpx.AsyncClient] = []

    def find_client() -> httpx.AsyncClient:
        if not clients:
            # How many run at once is the scheduler's business: waiting for a connection would count as time of the
            # endpoint's.
            clients.append(httpx.AsyncClient(follow_redirects=False, limits=httpx.Limits(max_connections=None)))
        return clients[0]

    try:
        yield Toolbox(find_client, find_secret, result_limit)
    finally:
        for client in clients:
            await client.aclose()


async def find_secret(name: str) -> str:
    """Return the text of a Prefect Secret block.

    Raises:
        NotRetriableError: there is none of this name, or it is no text.
    """
    try:
        block = cast(Secret[Any], await Secret.aload(name))
    except ValueError as error:
        raise NotRetriableError(
            f"there is no Prefect Secret block {name!r}: create it in Prefect's UI under Blocks, or name another one"
        ) from error
    return str(block.get())
