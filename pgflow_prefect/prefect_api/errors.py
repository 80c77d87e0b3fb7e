"""Translates errors of Prefect's API into ours."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from prefect.exceptions import ObjectAlreadyExists, ObjectLimitReached, PrefectHTTPStatusError

from pgflow_prefect.errors import PrefectRefusedError, PrefectUnavailableError
from pgflow_prefect.prefect_api.redaction import describe_error, name_server

_REFUSALS = range(400, 500)
_OF_THE_MOMENT = frozenset({401, 403, 408, 425, 429})
"""Those that another key, or a later time, may change, so that no run should fail for them."""

_LOGIN = frozenset({401, 403})
_START = "start it with `prefect server start`, or correct PREFECT_API_URL"
_LOG_IN = "set PREFECT_API_AUTH_STRING to the server's user:password, or PREFECT_API_KEY for Prefect Cloud"


@contextmanager
def translate_prefect_errors(what: str = "this") -> Iterator[None]:
    """Raise errors of Prefect's API as errors of this package; `what` is the subject of the request.

    Raises:
        PrefectUnavailableError: Prefect does not answer, or can't at this moment.
        PrefectRefusedError: Prefect refuses, and would refuse again.
    """
    try:
        yield
    except (ObjectAlreadyExists, ObjectLimitReached) as error:
        raise PrefectRefusedError(f"Prefect refuses {what}: {error}") from error
    except PrefectHTTPStatusError as error:
        code = error.response.status_code
        if code in _REFUSALS and code not in _OF_THE_MOMENT:
            raise PrefectRefusedError(f"Prefect refuses {what}: {_find_reason(error.response)}") from error
        raise refuse(error) from error
    except httpx.TransportError as error:
        raise unavailable(describe_error(error)) from error


def refuse(error: PrefectHTTPStatusError) -> PrefectUnavailableError:
    """Return the error with the answer of Prefect's API, and what to do."""
    reason = f"it answers {error.response.status_code}, {_find_reason(error.response)}"
    return unavailable(reason, advise(error))


def unavailable(reason: str, advice: str = _START) -> PrefectUnavailableError:
    """Return the error that Prefect's API does not work, with the reason and what to do."""
    return PrefectUnavailableError(f"Prefect's API at {name_server()} can't be used: {reason}; {advice}")


def advise(error: BaseException | None) -> str:
    """Return what to do if Prefect's API does not work for this reason."""
    is_login = isinstance(error, PrefectHTTPStatusError) and error.response.status_code in _LOGIN
    return _LOG_IN if is_login else _START


def _find_reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase or f"HTTP {response.status_code}"
