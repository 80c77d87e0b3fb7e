"""What each exported file has: `export --as` copies it. It needs pydantic, which Airflow and Prefect have."""

from __future__ import annotations

import asyncio as _asyncio
import inspect as _inspect
import logging as _logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar
from typing import get_type_hints as _get_type_hints
from urllib.parse import quote as _quote
from uuid import UUID

from pydantic import TypeAdapter as _TypeAdapter
from pydantic_core import to_jsonable_python as _to_jsonable_python

# The exported file begins here.
_T = TypeVar("_T")


class Skip(Exception):  # noqa: N818  as in pgflow-prefect
    """A handler raises it if its step is not needed this time."""

    def __init__(self, note: str | None = None, *, cascade: bool = True) -> None:
        self.note = note
        self.cascade = cascade
        super().__init__(note or "skipped")


class Branch(Generic[_T]):
    """A handler returns it to choose which of the steps below are taken."""

    def __init__(self, taken: str | Collection[str], result: _T | None = None, *, whole: bool = False) -> None:
        self.taken = (taken,) if isinstance(taken, str) else tuple(taken)
        self.result = result
        self.whole = whole


class FailedStep(NamedTuple):
    """A step of the run that has failed, and its error."""

    slug: str
    message: str


@dataclass(frozen=True)
class StepContext:
    """What a handler may ask for as its argument `context`. There is no transaction any more."""

    run_id: UUID | str
    workflow_slug: str
    step_slug: str
    attempt: int
    logger: Any
    shadow: bool = False
    index: int = 0
    item_index: int = 0
    item_indexes: tuple[int, ...] = ()  # of an item of a map: only its own
    failed_steps: Any = ()
    logical_date: Any = None
    data_interval_start: Any = None
    data_interval_end: Any = None

    @property
    def connection(self) -> Any:
        """Fail: there is no transaction any more."""
        raise RuntimeError(f"step {self.step_slug!r}: context.connection was a transaction of pgflow-prefect")

    @property
    def idempotency_key(self) -> str:
        """A key that all attempts of this step share, or of this item of a map, and no other step or item has."""
        which = f".{self.item_indexes[0]}" if self.item_indexes else ""
        # Runs of two workflows may have one id in Airflow: it is only the time of their schedules.
        return f"{_quote(self.workflow_slug, safe='')}/{self.run_id}{which}/{self.step_slug}"


AsyncStepContext = ItemContext = AsyncItemContext = StepContext


def _call_handler(function: Any, available: Mapping[str, Any]) -> Any:
    """Call a handler with those of these arguments that it takes, in the types of its annotations; return JSON."""
    hints = _get_type_hints(function, include_extras=True)
    given: dict[str, Any] = {}
    for name, parameter in _inspect.signature(function).parameters.items():
        if name not in available and parameter.default is not _inspect.Parameter.empty:
            continue
        value = available.get(name)
        is_typed = name in hints and name != "context"
        given[name] = _TypeAdapter(hints[name]).validate_python(value) if is_typed else value
    result = function(**given)
    if _inspect.isawaitable(result):
        result = _asyncio.run(_await(result))
    if _inspect.isgenerator(result):
        result = [*result]
    elif _inspect.isasyncgen(result):
        result = _asyncio.run(_collect(result))
    if isinstance(result, Branch):
        return Branch(result.taken, _to_jsonable_python(result.result), whole=result.whole)
    return _to_jsonable_python(result)


async def _await(awaitable: Any) -> Any:
    return await awaitable


async def _collect(generated: Any) -> list[Any]:
    return [each async for each in generated]


def _refuse(step_slug: str, why: str) -> Any:
    """Fail a step whose work can't be exported."""
    raise NotImplementedError(f"step {step_slug!r}: {why}")


_log = _logging.getLogger(__name__)
