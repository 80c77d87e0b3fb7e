"""Caching between runs: a step takes over the result of an earlier run if a function of the user gives both one key."""

import inspect
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Any, Protocol

from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.outcomes import Decided
from pgflow_prefect.models import CacheOutcome

_LONGEST = timedelta(days=36525)  # a century: later dates may be none for PostgreSQL


@dataclass(frozen=True)
class CacheOptions:
    """What the code of a step says of caching.

    Attributes:
        key_fn: Prefect's `cache_key_fn`: gets the task run's context and the arguments; returns a text, or None for
            this time without a cache.
        expires_in: seconds after which a result is none to take over; None for never.
        source: a hash of the handler's source, so that a changed handler takes over no former result.
    """

    key_fn: Callable[..., Any]
    expires_in: float | None
    source: str

    def note(self, key: str, result: str) -> Decided:
        """Return a result that later runs may take over by this hash of a key."""
        return Decided(result, CacheOutcome(cache_key=key, expires_in=self.expires_in))

    def hash_key(self, workflow_slug: str, step_slug: str, key: str) -> str:
        """Return what the database knows of a key. The key itself may have anything of the input, and any length."""
        parts = json.dumps([workflow_slug, step_slug, self.source, key])
        return sha256(parts.encode("utf-8", "surrogatepass")).hexdigest()


class StepCache(Protocol):
    """The execution's part in caching."""

    async def find_key(self, options: CacheOptions, arguments: Mapping[str, Any]) -> str | None:
        """Return the hash of this execution's key; None if the step is executed without a cache."""

    async def find(self, key: str) -> Decided | None:
        """Return the result that the step takes over; None if there is none."""


def make_cache_options(
    function: Callable[..., Any], key_fn: Callable[..., Any] | None, expiration: timedelta | None
) -> CacheOptions | None:
    """Return the options that `cache_key_fn=` and `cache_expiration=` name, or None.

    Raises:
        UsageError: one of them can't be used.
    """
    if expiration is not None and (not isinstance(expiration, timedelta) or expiration <= timedelta()):
        raise UsageError(f"cache_expiration={expiration!r} is no time after a step's end: give a positive timedelta")
    if key_fn is None:
        if expiration is not None:
            raise UsageError("cache_expiration needs cache_key_fn, which says what may be taken over")
        return None
    _check_function(key_fn)
    expires_in = None if expiration is None or expiration > _LONGEST else expiration.total_seconds()
    return CacheOptions(key_fn, expires_in, hash_source(function))


def _check_function(key_fn: object) -> None:
    if not callable(key_fn):
        raise UsageError(f"cache_key_fn={key_fn!r} is no function: give one as for Prefect's tasks")
    try:
        inspect.signature(key_fn).bind(None, {})
    except TypeError:
        raise UsageError(
            f"cache_key_fn={getattr(key_fn, '__name__', key_fn)!r} has to take two arguments, as for Prefect's tasks: "
            "the context and a dict of the step's arguments"
        ) from None
    except ValueError:  # Python can't tell its arguments
        return


def hash_source(function: Callable[..., Any]) -> str:
    """Return a hash of a function's source; of its code, if the source is not known."""
    try:
        text = inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = getattr(inspect.unwrap(function), "__code__", None)
        text = code.co_code if code is not None else repr(type(function)).encode()
    return sha256(text).hexdigest()
