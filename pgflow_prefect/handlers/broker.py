"""RabbitMQ and Redis through kombu. A URL names one queue. All functions here block."""

import ssl
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from pgflow_prefect.errors import NotRetriableError, PgflowPrefectError, RetryLaterError, UsageError
from pgflow_prefect.origins import Origin, make_origin

CONNECT_TIMEOUT = 10.0
"""Seconds for connecting to a broker."""

PUBLISH_TIMEOUT = 10.0
"""Seconds in which the broker must accept a message."""

Transport = Literal["pyamqp", "redis"]
_TRANSPORTS: dict[str, tuple[Transport, bool]] = {
    "amqp": ("pyamqp", False),
    "amqps": ("pyamqp", True),
    "redis": ("redis", False),
    "rediss": ("redis", True),
}
BROKER_SCHEMES = tuple(_TRANSPORTS)


@dataclass(frozen=True)
class BrokerAddress:
    """A queue of a broker.

    Attributes:
        transport: kombu's name of the kind of broker.
        encrypted: whether TLS is used. The certificate must be valid for the host.
        host: its name, or its address.
        port: None for the usual one.
        slot: the virtual host, or the number of the database.
        queue: the queue's name.
        via: the address to connect to, if the host was resolved and checked before.
    """

    transport: Transport
    encrypted: bool
    host: str
    port: int | None
    place: str
    queue: str
    via: str | None = None

    @property
    def connect_to(self) -> str:
        """The destination of a connection. redis-py checks the certificate for this text: then it is the name."""
        return self.host if self.via is None or (self.transport == "redis" and self.encrypted) else self.via

    @property
    def origin(self) -> Origin:
        """Scheme, host and port."""
        scheme = "amqp" if self.transport == "pyamqp" else "redis"
        return make_origin(scheme + "s" * self.encrypted, self.host, self.port)

    def __str__(self) -> str:
        return f"queue {self.queue!r} of {self.host}"


@dataclass(frozen=True)
class Login:
    """The user who connects; without a name, the broker's default user.

    Attributes:
        user: None if there is only a password.
        password: never shown.
    """

    user: str | None = None
    password: str | None = field(default=None, repr=False)


def parse_broker_url(url: str) -> BrokerAddress:
    """Return the queue that `amqp[s]://HOST[:PORT]/VHOST?queue=NAME` or `redis[s]://HOST[:PORT]/DB?queue=NAME` means.

    Raises:
        UsageError: it means none.
    """
    parts = urlsplit(url)
    if parts.scheme not in _TRANSPORTS:
        raise UsageError(f"{url!r} is no address of a broker: it begins with {', '.join(BROKER_SCHEMES)}")
    if "@" in parts.netloc:
        raise UsageError("the URL of a queue has credentials in it: give them apart from it, as USER:PASSWORD")
    transport, encrypted = _TRANSPORTS[parts.scheme]
    host, port = _read_host(url, parts)
    place = unquote(parts.path.removeprefix("/"))
    if transport == "redis":
        place = place or "0"
        if not (place.isascii() and place.isdecimal()):
            raise UsageError(f"the queue {url!r} names the database {place!r}: Redis has numbers for them")
    return BrokerAddress(transport, encrypted, host, port, place or "/", _read_queue(url, parts))


def _read_host(url: str, parts: SplitResult) -> tuple[str, int | None]:
    try:
        port = parts.port
    except ValueError as error:
        raise UsageError(f"the queue {url!r} has a port that can't be right: {error}") from None
    if not parts.hostname:
        raise UsageError(f"the queue {url!r} names no host")
    return parts.hostname, port


def _read_queue(url: str, parts: SplitResult) -> str:
    parameters = parse_qsl(parts.query, keep_blank_values=True)
    names = [value for name, value in parameters if name == "queue"]
    if len(names) != 1 or not names[0]:
        raise UsageError(f"the queue {url!r} has no name: end it with ?queue=NAME")
    if others := sorted({name for name, _ in parameters} - {"queue"}):
        raise UsageError(f"the queue {url!r} has parameters that nothing reads: {', '.join(others)}")
    if parts.fragment:
        raise UsageError(f"the queue {url!r} has a fragment: write the character # of a name as %23")
    return names[0]


def make_connection(
    address: BrokerAddress, login: Login, *, visibility: float | None = None, heartbeat: int = 0
) -> Any:  # noqa: ANN401  kombu has no types
    """Return a `kombu.Connection`, not connected yet.

    Args:
        address: the broker.
        login: who connects.
        visibility: seconds after which Redis gives a message that was not acknowledged to another consumer.
        heartbeat: seconds after which RabbitMQ takes a silent consumer for dead; 0 for never.

    Raises:
        NotRetriableError: kombu is not installed.
    """
    kombu = import_kombu()
    options: dict[str, Any] = {"confirm_publish": True}
    encryption: dict[str, Any] = {"cert_reqs": ssl.CERT_REQUIRED, "server_hostname": address.host}
    if address.transport == "redis":
        options = {"socket_connect_timeout": CONNECT_TIMEOUT, "socket_timeout": PUBLISH_TIMEOUT}
        options |= {"visibility_timeout": visibility} if visibility is not None else {}
        encryption = {"ssl_cert_reqs": "required", "ssl_check_hostname": True}
    return kombu.Connection(
        hostname=address.connect_to,
        port=address.port,
        virtual_host=address.place,
        userid=login.user,
        password=login.password,
        transport=address.transport,
        ssl=encryption if address.encrypted else False,
        connect_timeout=CONNECT_TIMEOUT,
        heartbeat=heartbeat,
        transport_options=options,
    )


def import_kombu() -> Any:  # noqa: ANN401
    """Return the package kombu.

    Raises:
        NotRetriableError: it is not installed.
    """
    try:
        import kombu.pools  # noqa: PLC0415  an extra, and slow to import
    except ImportError as error:
        raise missing_package("kombu") from error
    return kombu


def missing_package(name: str) -> NotRetriableError:
    """Return the error that says how to install the packages for queues."""
    return NotRetriableError(f"the package {name} is not installed here: pip install 'pgflow-prefect[queues]'")


def declare_queue(connection: Any, address: BrokerAddress) -> Any:  # noqa: ANN401
    """Declare a queue, durable if it is new, and return a channel.

    A queue that exists with another type, such as a quorum queue, stays as it is.
    """
    channel = connection.channel()
    if address.transport == "redis":
        return channel  # a list, which exists as soon as it has an item
    try:
        channel.queue_declare(address.queue, passive=True)
    except connection.channel_errors as error:
        if getattr(error, "reply_code", None) != 404:  # noqa: PLR2004  AMQP's code for "not found"; it has closed the channel
            raise
        channel = connection.channel()
        channel.queue_declare(address.queue, durable=True, auto_delete=False)
    return channel


def publish(address: BrokerAddress, login: Login, body: bytes) -> None:
    """Put a message on a queue and wait until the broker has taken it.

    Connections are kept for the next message. A broken one is closed. One that broke while it was idle is replaced at
    once.

    Raises:
        RetryLaterError: the broker can't be reached, or did not take it.
        NotRetriableError: the broker refuses the login or the queue, or kombu is not installed.
    """
    kombu = import_kombu()
    with translate_broker_errors(address, login):
        pool = kombu.pools.connections[make_connection(address, login)]
        with pool.acquire(block=True, timeout=CONNECT_TIMEOUT) as connection:
            was_open = connection.connected
            failure = _try_to_send(kombu, connection, address, body)
            if was_open and isinstance(failure, connection.connection_errors):
                failure = _try_to_send(kombu, connection, address, body)
        if failure is not None:  # an error in the block would make the pool keep a connection that never opens again
            raise failure


def _try_to_send(kombu: Any, connection: Any, address: BrokerAddress, body: bytes) -> Exception | None:  # noqa: ANN401
    try:
        _send(kombu, connection, address, body)
    except Exception as error:  # noqa: BLE001  returned
        connection.collect()  # drops the link, so that no late answer of the broker is read
        return error
    return None


def _send(kombu: Any, connection: Any, address: BrokerAddress, body: bytes) -> None:  # noqa: ANN401
    channel = declare_queue(connection, address)
    try:
        kombu.Producer(channel, auto_declare=False).publish(
            body,
            exchange="",
            routing_key=address.queue,
            delivery_mode=2,  # persistent
            content_type="application/json",
            content_encoding="utf-8",
            timeout=PUBLISH_TIMEOUT,
            confirm_timeout=PUBLISH_TIMEOUT,
        )
    finally:
        with suppress(Exception):  # no longer useful; a broken connection is closed with it
            channel.close()


@contextmanager
def translate_broker_errors(address: BrokerAddress, login: Login) -> Iterator[None]:
    """Raise errors of a broker, or of the link to it, as errors of this package without the login.

    Errors of this package pass.

    Raises:
        RetryLaterError: the error may pass.
        NotRetriableError: the error will not pass.
    """
    try:
        yield
    except PgflowPrefectError:
        raise
    except Exception as error:  # noqa: BLE001  two libraries' own, and sockets'
        reason = _hide(f"{type(error).__name__}: {error}", login)
        if is_refusal(error):
            raise NotRetriableError(f"{address} refused: {reason}") from None
        raise RetryLaterError(f"{address} can't be reached, or did not take it: {reason}", None) from None


def is_refusal(error: BaseException) -> bool:
    """Tell whether a broker would refuse again: wrong login, no right, another kind of queue of this name."""
    from amqp import exceptions as amqp  # noqa: PLC0415  an extra
    from redis import exceptions as redis  # noqa: PLC0415  an extra

    refusals = (
        amqp.AccessRefused,
        amqp.NotAllowed,
        amqp.PreconditionFailed,
        amqp.NotFound,
        redis.AuthenticationError,
        redis.NoPermissionError,
        ssl.SSLCertVerificationError,
    )
    seen: BaseException | None = error
    while seen is not None:  # kombu wraps some of them
        if isinstance(seen, refusals):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _hide(text: str, login: Login) -> str:
    return text.replace(login.password, "***") if login.password else text
