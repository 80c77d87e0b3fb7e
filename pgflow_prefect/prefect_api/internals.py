"""Prefect's internals that this package uses: names that Prefect does not document and may move in any version.

Import them from here. `tests/unit/test_internals.py` compares each name and its parameters with the installed Prefect.
The internals of Prefect's runner are in `runner_internals`, because their import takes longer and only `serve` needs
them.
"""

from prefect.concurrency._leases import amaintain_concurrency_lease
from prefect.concurrency.context import ConcurrencyContext
from prefect.context import AsyncClientContext, SettingsContext, TagsContext, get_settings_context
from prefect.events.clients import EventsClient, get_events_client
from prefect.events.related import related_resources_from_run_context
from prefect.flow_engine import run_flow_async
from prefect.futures import resolve_futures_to_states
from prefect.logging.configuration import DEFAULT_LOGGING_SETTINGS_PATH, load_logging_config
from prefect.logging.formatters import JsonFormatter
from prefect.logging.handlers import APILogHandler
from prefect.logging.loggers import flow_run_logger, patch_print, task_run_logger
from prefect.results import ResultStore, should_persist_result
from prefect.states import (
    exception_to_crashed_state,
    exception_to_failed_state,
    return_value_to_state,
    to_state_create,
)
from prefect.transactions import AsyncTransaction
from prefect.utilities import importtools
from prefect.utilities.callables import ParameterSchema, generate_parameter_schema
from prefect.utilities.engine import propose_state, should_log_prints
from prefect.utilities.math import clamped_poisson_interval
from prefect.utilities.urls import url_for

__all__ = [
    "DEFAULT_LOGGING_SETTINGS_PATH",
    "APILogHandler",
    "AsyncClientContext",
    "AsyncTransaction",
    "ConcurrencyContext",
    "EventsClient",
    "JsonFormatter",
    "ParameterSchema",
    "ResultStore",
    "SettingsContext",
    "TagsContext",
    "amaintain_concurrency_lease",
    "clamped_poisson_interval",
    "exception_to_crashed_state",
    "exception_to_failed_state",
    "flow_run_logger",
    "generate_parameter_schema",
    "get_events_client",
    "get_settings_context",
    "importtools",
    "load_logging_config",
    "patch_print",
    "propose_state",
    "related_resources_from_run_context",
    "resolve_futures_to_states",
    "return_value_to_state",
    "run_flow_async",
    "should_log_prints",
    "should_persist_result",
    "task_run_logger",
    "to_state_create",
    "url_for",
]
