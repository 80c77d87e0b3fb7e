"""pgflow workflows, which live in PostgreSQL, executed and shown by Prefect."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pgflow_prefect.bindings import (
        Child,
        Command,
        External,
        HttpEndpoint,
        NamedCommand,
        NamedWorkPool,
        Queue,
        SqlFunction,
        WorkPool,
    )
    from pgflow_prefect.blocks import PgflowDatabase
    from pgflow_prefect.errors import NotRetriableError, PgflowPrefectError
    from pgflow_prefect.handlers.base import (
        AsyncItemContext,
        AsyncStepContext,
        FailedStep,
        ItemContext,
        StepContext,
    )
    from pgflow_prefect.handlers.outcomes import Branch, Skip
    from pgflow_prefect.recording import RecordLater
    from pgflow_prefect.settings import Settings
    from pgflow_prefect.workflow import Workflow

__all__ = [
    "AsyncItemContext",
    "AsyncStepContext",
    "Branch",
    "Child",
    "Command",
    "External",
    "FailedStep",
    "HttpEndpoint",
    "ItemContext",
    "NamedCommand",
    "NamedWorkPool",
    "NotRetriableError",
    "PgflowDatabase",
    "PgflowPrefectError",
    "Queue",
    "RecordLater",
    "Settings",
    "Skip",
    "SqlFunction",
    "StepContext",
    "WorkPool",
    "Workflow",
]

_ORIGINS = {
    "AsyncItemContext": "pgflow_prefect.handlers.base",
    "AsyncStepContext": "pgflow_prefect.handlers.base",
    "Branch": "pgflow_prefect.handlers.outcomes",
    "Child": "pgflow_prefect.bindings",
    "Command": "pgflow_prefect.bindings",
    "External": "pgflow_prefect.bindings",
    "FailedStep": "pgflow_prefect.handlers.base",
    "HttpEndpoint": "pgflow_prefect.bindings",
    "ItemContext": "pgflow_prefect.handlers.base",
    "NamedCommand": "pgflow_prefect.bindings",
    "NamedWorkPool": "pgflow_prefect.bindings",
    "NotRetriableError": "pgflow_prefect.errors",
    "PgflowDatabase": "pgflow_prefect.blocks",
    "PgflowPrefectError": "pgflow_prefect.errors",
    "Queue": "pgflow_prefect.bindings",
    "RecordLater": "pgflow_prefect.recording",
    "Settings": "pgflow_prefect.settings",
    "Skip": "pgflow_prefect.handlers.outcomes",
    "SqlFunction": "pgflow_prefect.bindings",
    "StepContext": "pgflow_prefect.handlers.base",
    "WorkPool": "pgflow_prefect.bindings",
    "Workflow": "pgflow_prefect.workflow",
}


def __getattr__(name: str) -> object:
    """Import what is asked for when it is asked for: Prefect takes a second, and `--help` does not need it."""
    if name not in _ORIGINS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_ORIGINS[name]), name)
