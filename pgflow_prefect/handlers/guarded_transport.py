"""HTTP for rows: resolves the host once, checks the addresses, and connects to one of them.

The check happens when a connection is opened. So it does not matter if the name leads elsewhere a moment later. TLS and
the Host header still use the name.
"""

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager

import httpcore
import httpx

FindAddresses = Callable[[str, int], Awaitable[list[str]]]
"""Returns the allowed addresses of a host and port. Raises OSError, or the error that refuses them."""

CONNECT_TIMEOUT = 10.0
"""Seconds for connecting to one of several addresses, before the next one is tried."""

_SocketOption = tuple[int, int, int] | tuple[int, int, bytes | bytearray] | tuple[int, int, None, int]


class GuardedBackend(httpcore.AsyncNetworkBackend):
    """Opens connections to addresses that were checked.

    Args:
        find_addresses: resolves and checks.
        inner: opens the connection to an address.
    """

    def __init__(self, find_addresses: FindAddresses, inner: httpcore.AsyncNetworkBackend | None = None) -> None:
        self._find_addresses = find_addresses
        self._inner = inner or httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[_SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first of the checked addresses that answers."""
        try:
            addresses = await self._find_addresses(host, port)
        except OSError as error:
            raise httpcore.ConnectError(str(error)) from error
        failure: Exception = httpcore.ConnectError(f"{host} has no address")
        for address in addresses:
            patience = timeout if address == addresses[-1] else CONNECT_TIMEOUT
            try:
                return await self._inner.connect_tcp(address, port, patience, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109  httpcore's signature
        socket_options: Iterable[_SocketOption] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Refuse: no URL leads here."""
        raise httpcore.ConnectError("sockets of this machine can't be reached")

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._inner.sleep(seconds)


class GuardedTransport(httpx.AsyncBaseTransport):
    """httpx's way to the network, over httpcore's pool with a backend that checks addresses. It knows no proxy.

    Args:
        backend: opens connections.
        tls: how certificates are checked.
    """

    def __init__(self, backend: httpcore.AsyncNetworkBackend, tls: ssl.SSLContext | None = None) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=tls or httpx.create_ssl_context(),
            max_connections=None,
            max_keepalive_connections=20,
            keepalive_expiry=5,
            network_backend=backend,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send a request."""
        url = request.url
        sent = httpcore.Request(
            method=request.method,
            url=httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
            headers=request.headers.raw,
            content=request.stream,
            extensions=request.extensions,
        )
        with _translate():
            response = await self._pool.handle_async_request(sent)
        return httpx.Response(
            response.status, headers=response.headers, stream=_Body(response), extensions=response.extensions
        )

    async def aclose(self) -> None:
        """Close all connections."""
        await self._pool.aclose()


class _Body(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    async def __aiter__(self) -> AsyncIterator[bytes]:
        with _translate():
            async for chunk in self._response.aiter_stream():
                yield chunk

    async def aclose(self) -> None:
        await self._response.aclose()


@contextmanager
def _translate() -> Iterator[None]:
    """Raise httpcore's errors as httpx's of the same name."""
    try:
        yield
    except Exception as error:
        known = getattr(httpx, type(error).__name__, None) if isinstance(error, _CORE_ERRORS) else None
        if known is None:
            raise
        raise known(str(error)) from error


_CORE_ERRORS = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
)
