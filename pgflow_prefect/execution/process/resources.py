"""What the handlers of one process share: HTTP clients, secrets and storages from Prefect, the policy for rows."""

from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Any, cast
from urllib.parse import urlsplit

import httpx
from prefect.blocks.system import Secret
from prefect.settings import get_current_settings

from pgflow_prefect.database.dsn import find_password
from pgflow_prefect.errors import NotRetriableError
from pgflow_prefect.execution.process.storages import BlockStorage
from pgflow_prefect.execution.result_options import read_result_options
from pgflow_prefect.handlers.base import Toolbox
from pgflow_prefect.handlers.guarded_transport import GuardedBackend, GuardedTransport
from pgflow_prefect.handlers.row_policy import RowPolicy
from pgflow_prefect.origins import parse_credential_origins, parse_origins
from pgflow_prefect.settings import HttpBody, Settings


@asynccontextmanager
async def open_toolbox(settings: Settings) -> AsyncIterator[Toolbox]:
    """Open what handlers share; an HTTP client opens at its first use, because its certificates take a while.

    Raises:
        UsageError: `PGFLOW_RESULT_STORAGE` is no storage.
    """
    clients: list[httpx.AsyncClient] = []
    rows = make_row_policy(settings)

    def share(open_client: Callable[[], httpx.AsyncClient]) -> Callable[[], httpx.AsyncClient]:
        @cache
        def find() -> httpx.AsyncClient:
            clients.append(open_client())
            return clients[-1]

        return find

    try:
        yield Toolbox(
            http=share(_open_client),
            find_secret=find_secret,
            result_limit=settings.result_limit,
            rows=rows,
            row_http=share(partial(open_row_client, rows)),
            flat_body=settings.http_body is HttpBody.FLAT,
            function_owners=settings.trusted_owners,
            programs=settings.programs,
            pools=settings.pools,
            secrets=tuple(_list_secrets(settings)),
            queue_key=settings.queue_key_bytes,
            results=read_result_options(settings),
            find_storage=_remember_storages(),
        )
    finally:
        for client in clients:
            await client.aclose()


def _remember_storages() -> Callable[[object], BlockStorage]:
    """Return a function that loads a block once, if it is named."""
    by_name: dict[str, BlockStorage] = {}

    def find(given: object) -> BlockStorage:
        if not isinstance(given, str):
            return BlockStorage(given)
        return by_name.setdefault(given, BlockStorage(given))

    return find


def _list_secrets(settings: Settings) -> Iterator[str]:
    """Yield the secrets of this process, which a program of the same user could read, and print."""
    prefect = get_current_settings().api
    for secret in (settings.dsn, settings.queue_key, prefect.key, prefect.auth_string):
        if secret is not None:
            yield secret.get_secret_value()
    if settings.dsn is not None and (password := find_password(settings.dsn.get_secret_value())):
        yield password
    if prefect.auth_string is not None:
        yield prefect.auth_string.get_secret_value().partition(":")[2]


def _open_client() -> httpx.AsyncClient:
    # The scheduler limits how many run at once. A wait for a connection would count as time of the endpoint.
    return httpx.AsyncClient(follow_redirects=False, limits=httpx.Limits(max_connections=None))


def open_row_client(rows: RowPolicy) -> httpx.AsyncClient:
    """Return a client for requests of rows; it uses no proxy, which would resolve the host itself."""
    backend = GuardedBackend(rows.find_addresses)
    return httpx.AsyncClient(follow_redirects=False, trust_env=False, transport=GuardedTransport(backend))


def make_row_policy(settings: Settings) -> RowPolicy:
    """Return the policy that these settings set for rows: what a row may name and reach."""
    return RowPolicy(
        allowed=parse_origins(settings.http_allow),
        credentials=parse_credential_origins(settings.credential_origins),
        guarded=_find_prefect_hosts(),
    )


def _find_prefect_hosts() -> frozenset[str]:
    settings = get_current_settings()
    hosts = (urlsplit(url).hostname for url in (settings.api.url, settings.ui_url) if url)
    return frozenset(host for host in hosts if host)


async def find_secret(name: str) -> str:
    """Return the text of a Prefect Secret block.

    Raises:
        NotRetriableError: there is no block of this name, or its value is no text.
    """
    try:
        block = cast(Secret[Any], await Secret.aload(name))
    except ValueError as error:
        raise NotRetriableError(
            f"there is no Prefect Secret block {name!r}: create it in Prefect's UI under Blocks, or name another one"
        ) from error
    return str(block.get())
