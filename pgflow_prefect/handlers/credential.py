"""Reads secrets for endpoints and brokers from the environment or a Prefect block, never from a row."""

import os
from collections.abc import Awaitable, Callable

from pgflow_prefect.errors import NotRetriableError


def read_variable(name: str) -> str:
    """Return the value of an environment variable, without a trailing line break.

    Raises:
        NotRetriableError: it is not set, or empty.
    """
    secret = os.environ.get(name, "").strip()
    if not secret:
        raise NotRetriableError(
            f"the environment variable {name} is not set where the step is executed: set it there, or bind the step "
            "to another one"
        )
    return secret


async def read_credential(
    variable: str | None, block: str | None, find_secret: Callable[[str], Awaitable[str]]
) -> str | None:
    """Return the secret of an environment variable or of a Prefect Secret block, or None if neither is named.

    Raises:
        NotRetriableError: the variable or the block is missing or empty.
    """
    if variable is not None:
        return read_variable(variable)
    if block is None:
        return None
    secret = (await find_secret(block)).strip()
    if not secret:
        raise NotRetriableError(f"the Prefect Secret block {block!r} is empty: give it a value")
    return secret


def split_login(login: str | None, source: str | None) -> tuple[str | None, str | None]:
    """Return user and password; the user may be empty, as it is where Redis has one password for all.

    Args:
        login: `USER:PASSWORD`.
        source: where it is from, for the error.

    Raises:
        NotRetriableError: there is no colon in it.
    """
    if login is None:
        return None, None
    user, colon, password = login.partition(":")
    if not colon:
        raise NotRetriableError(f"the login in {source} has no colon: it is to be USER:PASSWORD")
    return user or None, password
