"""Decides what a row may name and reach, by the settings of the process that executes the step, never by the row."""

import re
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address

import anyio

from pgflow_prefect.errors import NotRetriableError
from pgflow_prefect.origins import Origin

VARIABLE_PREFIX = "PGFLOW_TOKEN_"
"""The prefix of environment variables that a row may name."""

BLOCK_PREFIX = "pgflow-"
"""The prefix of Prefect Secret blocks that a row may name."""

_VARIABLE = re.compile(rf"{VARIABLE_PREFIX}[A-Za-z0-9_]+", re.ASCII)
_BLOCK = re.compile(rf"{BLOCK_PREFIX}[a-z0-9-]+", re.ASCII)

Address = IPv4Address | IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""Returns the addresses of a host; raises OSError."""

_TRANSLATED = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"), IPv6Network("::/96"))
"""Networks whose last 32 bits are the IPv4 address of the final destination (RFC 6052, RFC 8215, RFC 4291)."""

_PLATFORM = frozenset({IPv4Address("168.63.129.16")})
"""Azure's platform service for each virtual machine: a public address that only leads inside."""


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, by the operating system.

    Raises:
        OSError: it finds none.
    """
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(place[0]) for *_, place in found))


def describe_internal(text: str) -> str | None:
    """Return the kind of an internal address, such as `a loopback address`; None for a public one."""
    address: Address = ip_address(text.partition("%")[0])
    kinds = (_describe(each) for each in (address, *_find_embedded(address)))
    return next((kind for kind in kinds if kind), None)


def _describe(address: Address) -> str | None:
    if address.is_loopback or address.is_unspecified:
        return "a loopback address"
    if address.is_link_local:
        return "a link-local address"
    if address.is_multicast:
        return "a multicast address"
    is_site_local = isinstance(address, IPv6Address) and address.is_site_local
    if is_site_local or not address.is_global or address in _PLATFORM:
        return "a private address"
    return None


def _find_embedded(address: Address) -> list[IPv4Address]:
    """Return the IPv4 addresses that an IPv6 address leads to through a translator or a tunnel."""
    if isinstance(address, IPv4Address):
        return []
    found = [address.ipv4_mapped, address.sixtofour, *(address.teredo or ())]
    if any(address in network for network in _TRANSLATED):
        found.append(IPv4Address(int(address) & 0xFFFFFFFF))
    return [each for each in found if each is not None]


class InternalAddressError(NotRetriableError):
    """A host leads to an address that rows may not reach.

    Attributes:
        leads_to: its kind, such as `a loopback address`. Never the address, which the row's author must not learn.
    """

    def __init__(self, host: str, leads_to: str) -> None:
        self.leads_to = leads_to
        super().__init__(f"{host} leads to {leads_to}")


@dataclass(frozen=True)
class RowPolicy:
    """What the rows of `pgflow_prefect.bindings` may name and reach; without any setting, public addresses only.

    Attributes:
        allowed: origins that rows may reach at any address, from `PGFLOW_HTTP_ALLOW`.
        credentials: the origins that may get a variable or a block, by its name, from `PGFLOW_CREDENTIAL_ORIGINS`.
        guarded: the hosts of Prefect's server, which rows may not reach.
        resolve: finds the addresses of a host.
    """

    allowed: frozenset[Origin] = frozenset()
    credentials: Mapping[str, frozenset[Origin]] = field(default_factory=dict)
    guarded: frozenset[str] = frozenset()
    resolve: Resolve = resolve

    def check_credential(self, variable: str | None, block: str | None, origin: Origin | None) -> None:
        """Check that a row may send this credential to an origin.

        Args:
            variable: the environment variable that the row names.
            block: the Prefect Secret block that the row names.
            origin: the destination; None if it is not on the network.

        Raises:
            NotRetriableError: the name lacks the prefix, or the settings do not tie it to this origin.
        """
        if problem := find_name_problem(variable, block):
            raise NotRetriableError(problem)
        name = block if variable is None else variable
        if name is not None and origin is None:
            raise NotRetriableError(f"a row names {name} for a queue of this database, which takes no login")
        if name is not None and origin not in self.credentials.get(name, ()):
            raise NotRetriableError(
                f"a row sends {name} to {origin}, and the settings of this process do not tie the two together: add "
                f"{name}={origin} to PGFLOW_CREDENTIAL_ORIGINS where steps are executed"
            )

    async def find_addresses(self, host: str, port: int) -> list[str]:
        """Return the addresses of a host if a row may reach all of them; connect to these, not to the name again.

        Raises:
            InternalAddressError: one of them is internal, or Prefect's.
            OSError: the host has no address.
        """
        found = list(await self.resolve(host, port))
        if host in self.guarded or set(found) & await self._find_guarded():
            raise InternalAddressError(host, "Prefect's server")
        if kind := next((kind for each in found if (kind := describe_internal(each))), None):
            raise InternalAddressError(host, kind)
        return found

    async def _find_guarded(self) -> set[str]:
        addresses: set[str] = set()
        for host in self.guarded:
            try:
                addresses |= {*await self.resolve(host, 0)}
            except OSError:
                continue  # a host without an address can't be reached
        return addresses


def refuse_origin(origin: Origin, refusal: InternalAddressError) -> NotRetriableError:
    """Return the error for a row with a forbidden destination."""
    return NotRetriableError(
        f"a row binds this step to {origin}, which leads to {refusal.leads_to}. If rows may reach it, add {origin} to "
        "PGFLOW_HTTP_ALLOW where steps are executed; else bind the step in Python"
    )


def find_name_problem(variable: str | None, block: str | None) -> str | None:
    """Return the problem of a variable's or a block's name in a row; None if there is none."""
    for name, pattern, prefix, what in (
        (variable, _VARIABLE, VARIABLE_PREFIX, "environment variable"),
        (block, _BLOCK, BLOCK_PREFIX, "Prefect Secret block"),
    ):
        if name is not None and not pattern.fullmatch(name):
            return (
                f"a row names the {what} {name!r}, and a row may only name those that begin with {prefix}: "
                "`pgflow-prefect credentials --rename` renames it in all rows and says what to set"
            )
    return None


def add_prefix(name: str, *, is_block: bool) -> str | None:
    """Return the allowed name of a variable or a block for a row; None if it can't be such a name."""
    pattern, prefix = (_BLOCK, BLOCK_PREFIX) if is_block else (_VARIABLE, VARIABLE_PREFIX)
    if pattern.fullmatch(name):
        return name
    return prefix + name if pattern.fullmatch(prefix + name) else None
