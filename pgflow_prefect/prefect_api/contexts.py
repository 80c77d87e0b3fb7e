"""What a handler finds in Prefect's context."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import cast

from prefect.context import FlowRunContext


@contextmanager
def leave_flow_run() -> Iterator[None]:
    """Be in no flow run: what the block calls finds none in its context."""
    current = cast("ContextVar[FlowRunContext | None]", FlowRunContext.__var__)
    token = current.set(None)
    try:
        yield
    finally:
        current.reset(token)
