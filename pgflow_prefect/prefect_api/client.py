"""Asks Prefect's API: opens a client, and bounds the wait for each answer."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import anyio
import httpx
from prefect.client.orchestration import PrefectClient, get_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings

from pgflow_prefect.errors import PrefectUnavailableError
from pgflow_prefect.prefect_api.errors import refuse, translate_prefect_errors, unavailable
from pgflow_prefect.prefect_api.internals import AsyncClientContext
from pgflow_prefect.prefect_api.redaction import describe_error

TAG = "pgflow"
"""The tag of all our objects in Prefect."""


def has_server() -> bool:
    """Tell whether Prefect is set to use a server; otherwise it starts a temporary one, which takes a while."""
    return bool(get_current_settings().api.url)  # an empty variable means nothing


@asynccontextmanager
async def connect_to_prefect() -> AsyncIterator[PrefectClient]:
    """Open a client of Prefect's API; if none is configured, Prefect starts a temporary server for it.

    Raises:
        PrefectUnavailableError: the API does not answer, or the server does not start.
    """
    url = get_current_settings().api.url
    try:
        async with get_client() as client:
            await client.hello()
        # The flow runs of this event loop find this client and share it. Otherwise each would make its own, and load
        # certificates for it, which is a quarter of the cost of a small run.
        async with AsyncClientContext() as context:
            yield context.client
    except PrefectHTTPStatusError as error:
        raise refuse(error) from error
    except httpx.TransportError as error:
        raise unavailable(describe_error(error)) from error
    except RuntimeError as error:
        if url is not None or "ephemeral" not in str(error):
            raise
        raise PrefectUnavailableError(
            f"Prefect's temporary server did not start: {error} Set PREFECT_API_URL to a server that runs, or try "
            "pip install 'pgflow-prefect[embedded]', which has versions that are known to work together"
        ) from error


PATIENCE = 15.0
"""Seconds to wait for an answer. Prefect's client alone retries for a minute if no server answers."""

STARTING = 90.0
"""Seconds to wait if no server is configured: Prefect may have to start a temporary one first."""


@contextmanager
def ask_prefect(what: str = "this") -> Iterator[None]:
    """Bound the wait for Prefect's answer to the requests in this block, and translate Prefect's errors.

    Args:
        what: the subject of the request, for the error message.

    Raises:
        PrefectUnavailableError: Prefect's API does not answer in time, or can't answer now.
        PrefectRefusedError: Prefect refuses the request, and would refuse it again.
    """
    bound = PATIENCE if has_server() else STARTING
    with anyio.move_on_after(bound) as scope, translate_prefect_errors(what):
        yield
    if scope.cancelled_caught:
        raise unavailable(f"no answer in {bound:g} s")


async def check_that_prefect_answers() -> None:
    """Check that Prefect's API answers.

    Raises:
        PrefectUnavailableError: it did not answer within a limited time.
    """
    with ask_prefect("a sign of life"):
        async with get_client() as client:
            await client.hello()
