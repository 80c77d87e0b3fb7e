"""Names the task run of a step after the step's input, as its `task_run_name` says."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import anyio
from prefect.context import TaskRunContext
from pydantic import JsonValue

from pgflow_prefect.database.step_transaction import Logger
from pgflow_prefect.definitions.model import to_identifier
from pgflow_prefect.errors import ArgumentInvalidError
from pgflow_prefect.handlers.python import PythonHandler
from pgflow_prefect.handlers.run_names import Naming, NamingFailedError, find_fields
from pgflow_prefect.handlers.task_options import list_values, name_task_run
from pgflow_prefect.handlers.threads import run_in_thread
from pgflow_prefect.models import Claim
from pgflow_prefect.raw_json import RawJson, UnreadableJsonError

PATIENCE = 5.0
"""Seconds that a user's function may take to make a name."""

_NULL, _NONE = RawJson("null"), RawJson("{}")


@dataclass(frozen=True)
class NamedInput:
    """The input of a step, as far as its name may need it.

    Attributes:
        claim: has the payload and the results of upstream steps.
        upstream: the slugs of the steps that it waits for.
        function: the function that does the step now; None for a step of another kind.
    """

    claim: Claim
    upstream: tuple[str, ...]
    function: PythonHandler | None

    def fill(self, payload: RawJson, results: RawJson) -> "NamedInput":
        """Return the same with the input of a step that another program does: its claim has none."""
        return replace(self, claim=self.claim.model_copy(update={"payload": payload, "upstream_results": results}))

    def read(self, fields: frozenset[str]) -> tuple[Mapping[str, Any], Mapping[str, JsonValue]]:
        """Return the arguments in the types of their annotations, and as JSON; those of another kind are JSON only.

        Raises:
            ArgumentInvalidError: the input does not fit.
            UnreadableJsonError: Python can't read it.
        """
        if self.function is not None:
            typed = self.function.read_arguments(self.claim, self.upstream)
            return typed, dict(self._read_json({*typed} if "parameters" in fields else fields & {*typed}))
        values = dict(self._read_json({*list_values(self.upstream)} if "parameters" in fields else fields))
        return values, values

    def _read_json(self, fields: set[str] | frozenset[str]) -> Iterator[tuple[str, JsonValue]]:
        results = self.claim.upstream_results or _NONE
        if "payload" in fields:
            yield "payload", (self.claim.payload or _NULL).decode()
        if "upstream" in fields:
            yield "upstream", results.decode()
        if fields - {"payload", "upstream"}:
            members = results.split()
            for slug in self.upstream:
                if to_identifier(slug) in fields and slug in members:
                    yield to_identifier(slug), members[slug].decode()


async def name_step(naming: Naming, given: NamedInput, logger: Logger) -> str | None:
    """Return the name of a step's task run; None if it can't be made, which the step's log tells then.

    Args:
        naming: a template or a function. A function is called in a thread.
        given: the step's input.
        logger: of the task run.
    """
    try:
        fields = find_fields(naming)
        arguments, raw = given.read(fields) if fields else ({}, {})
        return await call_briefly(partial(name_task_run, naming, arguments, raw), is_code=callable(naming))
    except ArgumentInvalidError:
        return None  # the step fails with it
    except Exception as error:  # noqa: BLE001  a name keeps no step from being executed
        logger.error("The task run keeps its name, for its `task_run_name` failed: %s", describe_failure(error))  # noqa: TRY400
        return None


def describe_failure(error: Exception) -> str:
    """Return why there is no name, without any value of the input."""
    if isinstance(error, TimeoutError):
        return f"it took longer than {PATIENCE:g} s"
    return str(error) if isinstance(error, NamingFailedError | UnreadableJsonError) else type(error).__name__


async def call_briefly(make: Callable[[], str], *, is_code: bool) -> str:
    """Call what makes a name: in a thread, for a limited time, if a user's code does it.

    Raises:
        TimeoutError: it takes too long.
        NamingFailedError: from the call.
    """
    if not is_code:
        return make()
    with anyio.fail_after(PATIENCE):
        name: str = await run_in_thread(make)
        return name


def rename_current(name: str) -> None:
    """Give the current task run another name, which Prefect gets with its next state."""
    context = TaskRunContext.get()
    assert context is not None
    context.task_run.name = name
