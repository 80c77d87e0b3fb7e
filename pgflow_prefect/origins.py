"""Origins: scheme, host and port of an endpoint or a broker. Settings name those that a row may reach."""

from collections.abc import Mapping
from dataclasses import dataclass

_PORTS = {"http": 80, "https": 443, "amqp": 5672, "amqps": 5671, "redis": 6379, "rediss": 6379}


@dataclass(frozen=True)
class Origin:
    """Where a request or a message goes.

    Attributes:
        scheme: in lower case, such as `https` or `redis`.
        host: a name in lower case and in ASCII, or an address.
        port: never None.
    """

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}" + ("" if self.port == _PORTS.get(self.scheme) else f":{self.port}")


def make_origin(scheme: str, host: str, port: int | None) -> Origin:
    """Return an origin; without a port, the scheme's usual one.

    Raises:
        ValueError: the scheme is none that steps are bound to.
    """
    if scheme not in _PORTS:
        raise ValueError(f"{scheme!r} is not one of {', '.join(_PORTS)}")
    return Origin(scheme, host.lower(), _PORTS[scheme] if port is None else port)


def find_origin(url: str) -> Origin:
    """Return the origin of a URL, read as the HTTP client reads it: two readers could see two hosts.

    Raises:
        ValueError: it has no host, or a scheme that steps are not bound to.
    """
    import httpx  # noqa: PLC0415  slow to import, and most processes have no such setting

    try:
        parts = httpx.URL(url)
        host = parts.raw_host.decode("ascii")
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValueError("it is no URL") from error
    if not host:
        raise ValueError("it names no host")
    return make_origin(parts.scheme, host, parts.port)


def parse_origin(text: str) -> Origin:
    """Return the origin that a setting names: `https://example.org`, `http://127.0.0.1:8099`, `redis://broker`.

    Raises:
        ValueError: it names none, or more than an origin.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or any(character in rest.removesuffix("/") for character in "/?#@\\"):
        raise ValueError(f"{text!r} is no origin: write scheme, host and port, such as https://example.org")
    try:
        return find_origin(f"{scheme}://{rest}")
    except ValueError as error:
        raise ValueError(f"{text!r} is no origin: {error}") from error


def parse_origins(text: str) -> frozenset[Origin]:
    """Return the origins of a setting, which are separated by commas.

    Raises:
        ValueError: one of them is none.
    """
    return frozenset(parse_origin(each) for each in _split(text))


def parse_credential_origins(text: str) -> Mapping[str, frozenset[Origin]]:
    """Return where each credential may go, from `NAME=ORIGIN,NAME=ORIGIN`; a name may stand there more than once.

    Raises:
        ValueError: a pair has no name, or no origin.
    """
    found: dict[str, frozenset[Origin]] = {}
    for pair in _split(text):
        name, separator, origin = (part.strip() for part in pair.partition("="))
        if not (name and separator):
            raise ValueError(f"{pair!r} is no pair: write NAME=ORIGIN, such as PGFLOW_TOKEN_SEND=https://example.org")
        found[name] = found.get(name, frozenset()) | {parse_origin(origin)}
    return found


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]
