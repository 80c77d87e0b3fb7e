"""Does a step by a Python function. Arguments are passed by name, and pydantic checks their annotations."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

from anyio import get_cancelled_exc_class
from pydantic import (
    ValidationError,
)

from pgflow_prefect.definitions.model import to_identifier
from pgflow_prefect.errors import ArgumentInvalidError, ResultInvalidError, UsageError
from pgflow_prefect.handlers.annotation_checks import AnnotationChecks
from pgflow_prefect.handlers.base import AnyStepContext, RetryPolicy, StepExecution
from pgflow_prefect.handlers.caching import CacheOptions
from pgflow_prefect.handlers.codecs import JsonCodec
from pgflow_prefect.handlers.exact import explain
from pgflow_prefect.handlers.generators import collect, is_lazy
from pgflow_prefect.handlers.outcomes import Branch, Decided, Skip
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.references import MARK
from pgflow_prefect.handlers.stored import Inputs, ResultOptions, StepResults, Unread, leave_unread
from pgflow_prefect.handlers.threads import run_in_thread
from pgflow_prefect.handlers.values import UnstorableError, describe_unstorable, write_result
from pgflow_prefect.models import Claim
from pgflow_prefect.raw_json import RawJson, UnreadableJsonError

T = TypeVar("T")

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_NULL, _NONE = RawJson("null"), RawJson("{}")

AT_ONCE = 20
"""Items of a map that a process executes at the same time, where nothing else is said."""

ITEM = "item"
"""The argument of a map's handler that is one item."""


@dataclass(frozen=True)
class _Unfinished:
    """An awaitable that a sync function returned, to be awaited on the event loop."""

    value: Any


@dataclass(frozen=True)
class _Encoded:
    """A result for a storage, and the branches that it takes."""

    data: bytes
    branch: Branch[Any] | None


@dataclass(frozen=True)
class PythonHandler:
    """A sync or async function that does the work of a step.

    Attributes:
        step_slug: the step.
        function: the decorated function; sync functions run in a thread.
        policy: when to try again.
        unimplemented: it is a stub of `pgflow-prefect import`, not a handler yet.
        shadow: it can run beside an external worker, to be compared with it.
        results: what the code says of a storage for its results.
        is_map: it is called for each item of a map, and `item` is that item.
        at_once: of a map, the most items that it executes at the same time in a process.
        cache: what the code says of results of earlier runs; None if it takes none over.
    """

    step_slug: str
    function: Callable[..., Any]
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    unimplemented: bool = False
    shadow: bool = False
    results: ResultOptions = field(default_factory=ResultOptions)
    is_map: bool = False
    at_once: int = AT_ONCE
    cache: CacheOptions | None = None

    def __post_init__(self) -> None:
        for parameter in self._parameters.values():
            if parameter.kind not in _BY_NAME:
                raise UsageError(
                    f"the handler of step {self.step_slug!r} takes {parameter}: name each upstream step as an "
                    "argument, or take `upstream` for the results of all by slug; if a decorator takes it, write "
                    "@functools.wraps(function) above the decorator's inner function"
                )

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        try:
            found = inspect.signature(self.function).parameters
        except (TypeError, ValueError) as error:  # one that is written in C
            raise UsageError(
                f"the handler of step {self.step_slug!r} is {self.function!r}, and Python can't tell its arguments: "
                "write a function that calls it"
            ) from error
        given = _find_given(self.function)
        return {name: each for name, each in found.items() if name not in given}

    @property
    def description(self) -> str | None:
        """The function's docstring."""
        return inspect.getdoc(self.function)

    @cached_property
    def arguments(self) -> tuple[str, ...]:
        """The names of the function's arguments, in their order; of a map without that of the item.

        In a map, an upstream step called `item` is the argument `item_`.
        """
        if not self.is_map:
            return tuple(self._parameters)
        return tuple(ITEM if name == f"{ITEM}_" else name for name in self._parameters if name != ITEM)

    @cached_property
    def optional(self) -> tuple[str, ...]:
        """The names of the arguments with a default; an argument that names no upstream step keeps it."""
        return tuple(
            name for name in self.arguments if self._find_parameter(name).default is not inspect.Parameter.empty
        )

    def _find_parameter(self, name: str) -> inspect.Parameter:
        return self._parameters[self._name_argument(name)]

    def _name_argument(self, name: str) -> str:
        """Return the argument in the function's own words: `item_` for an upstream step called `item` in a map."""
        return f"{ITEM}_" if self.is_map and name == ITEM else name

    @cached_property
    def required(self) -> tuple[str, ...]:
        """The names of the arguments that have no default."""
        return tuple(name for name in self.arguments if name not in self.optional)

    @property
    def wants_payload(self) -> bool:
        """Whether the function takes `payload`."""
        return "payload" in self.arguments

    def choose_upstream(self, upstream: Collection[str]) -> list[str] | None:
        """Return the upstream slugs that the function names as arguments, or None if it takes `upstream`."""
        if "upstream" in self.arguments:
            return None
        return [slug for slug in upstream if to_identifier(slug) in self.arguments]

    async def execute(self, claim: Claim, upstream: Collection[str], execution: StepExecution) -> str | Decided:
        """Call the function with the claimed input and return its result as JSON text, with what it has decided."""
        try:
            return await self._execute(claim, upstream, execution)
        except Skip as skip:
            return Decided.to_skip(skip)

    async def bind_shared(self, claim: Claim, upstream: Collection[str], stored: StepResults | None) -> dict[str, Any]:
        """Return the arguments that all items of a map have in common: they are read once.

        Args:
            claim: of the map.
            upstream: the slugs of the steps that it waits for.
            stored: reads the results that are in a storage.

        Raises:
            ArgumentInvalidError: one does not fit.
        """
        inputs = await self._resolve(claim, stored)
        return {name: value for name, value in self._bind(claim, inputs, upstream, None) if name != "context"}

    async def execute_item(self, shared: Mapping[str, Any], item: RawJson, execution: StepExecution) -> str | Decided:
        """Call the function for one item, as `execute` calls it for a step.

        Args:
            shared: from `bind_shared`.
            item: the item.
            execution: of the item.
        """
        given = dict(shared)
        if ITEM in self._parameters:
            given[ITEM] = self._read(ITEM, item)
        if "context" in self._parameters:
            given["context"] = execution.context
        try:
            made = await self._perform(partial(self.function, **given), execution)
        except Skip as skip:
            return Decided.to_skip(skip)
        assert not isinstance(made, _Encoded)  # the result of an item is in its row
        return made

    async def _execute(self, claim: Claim, upstream: Collection[str], execution: StepExecution) -> str | Decided:
        inputs = await self._find_inputs(claim, execution)
        given = dict(self._bind(claim, inputs, upstream, execution.context))
        if self.cache is None or execution.cache is None or execution.context.shadow:
            return await self._call_with(given, execution)
        key = await execution.cache.find_key(self.cache, self._add_defaults(given))
        if key is not None and (found := await execution.cache.find(key)) is not None:
            return found
        result = await self._call_with(given, execution)
        # A result with branches is not cached: to take it over would need the branches, too.
        return self.cache.note(key, result) if key is not None and isinstance(result, str) else result

    def _add_defaults(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments with the defaults of the others, without `context`."""
        defaults = {name: self._parameters[name].default for name in self.optional}
        return {name: value for name, value in {**defaults, **given}.items() if name != "context"}

    async def _call_with(self, given: Mapping[str, Any], execution: StepExecution) -> str | Decided:
        made = await self._perform(partial(self.function, **given), execution)
        if not isinstance(made, _Encoded):
            return made
        assert execution.results is not None
        reference = await execution.results.save(made.data)
        return reference if made.branch is None else Decided.to_branch(made.branch, reference)

    async def _perform(self, call: Callable[[], Any], execution: StepExecution) -> str | Decided | _Encoded:
        if self.is_async:
            return await self._finish(call(), execution)
        try:
            returned = await run_in_thread(partial(self._call, call, execution))
        except get_cancelled_exc_class():
            execution.abandon()
            raise
        # An async function may be behind a sync decorator.
        if isinstance(returned, _Unfinished):
            return await self._finish(returned.value, execution)
        return returned

    def read_arguments(self, claim: Claim, upstream: Collection[str]) -> dict[str, Any]:
        """Return the function's arguments in the types of their annotations, without `context`.

        An argument whose value is in a storage is the reference: the storage is not read for this.

        Raises:
            ArgumentInvalidError: the input does not fit.
        """
        nothing: Any = None
        inputs = leave_unread(claim.upstream_results or _NONE)
        return self._add_defaults(dict(self._bind(claim, inputs, upstream, nothing)))

    @cached_property
    def is_async(self) -> bool:
        """Whether the function is async, an async generator, or an object that is called like one."""
        function: Any = self.function
        kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        return any(is_kind(each) for is_kind in kinds for each in (function, function.__call__))

    def _call(self, call: Callable[[], Any], execution: StepExecution) -> str | Decided | _Encoded | _Unfinished:
        """Call a sync function in its thread, and convert its result there, because that may call the user's code."""
        value = call()
        if inspect.isawaitable(value) or inspect.isasyncgen(value):
            return _Unfinished(value)
        return self._serialise(execution.settle(collect(value)), execution)

    async def _finish(self, value: Any, execution: StepExecution) -> str | Decided | _Encoded:  # noqa: ANN401
        """Await what an async function returns, and return its result as JSON text, or as bytes for a storage."""
        if inspect.isasyncgen(value):
            value = [each async for each in value]
        elif inspect.isawaitable(value):
            value = await value
        if not is_lazy(value) and self.results.codec is None:
            return self._serialise(execution.settle(value), execution)
        try:  # it may block, and so may a serializer: not on the event loop
            return await run_in_thread(lambda: self._serialise(execution.settle(collect(value)), execution))
        except get_cancelled_exc_class():
            execution.abandon()
            raise

    async def _find_inputs(self, claim: Claim, execution: StepExecution) -> Inputs:
        """Return the results of the upstream steps; those that are in a storage are read there."""
        return await self._resolve(claim, execution.results)

    async def _resolve(self, claim: Claim, stored: StepResults | None) -> Inputs:
        results = claim.upstream_results or _NONE
        if stored is None or MARK not in results.text:
            return Inputs(results)
        try:
            return await stored.resolve(results)
        except UnreadableJsonError as error:
            raise self._refuse_input(error) from None

    def _bind(
        self, claim: Claim, inputs: Inputs, upstream: Collection[str], context: AnyStepContext[Any] | None
    ) -> Iterator[tuple[str, Any]]:
        results = inputs.results
        slugs = {to_identifier(slug): slug for slug in upstream}
        members: Mapping[str, RawJson] | None = None
        missing: list[str] = []
        for name in self.arguments:
            if name == "context":
                yield name, context
            elif name == "payload":
                yield name, self._read_payload(claim.payload or _NULL)
            elif name == "upstream":
                yield name, self._read_all(inputs) if inputs.objects else self._read(name, results)
            elif slugs.get(name) in inputs.objects:
                argument = self._name_argument(name)
                yield argument, self._check(argument, inputs.objects[slugs[name]])
            elif name in slugs:
                members = self._split(results) if members is None else members
                if slugs[name] in members:
                    argument = self._name_argument(name)
                    yield argument, self._read(argument, members[slugs[name]])
                elif name not in self.optional:
                    missing.append(slugs[name])
        if missing:
            raise ArgumentInvalidError(
                f"step {self.step_slug!r} runs without the result of {' and '.join(map(repr, missing))}, which was "
                "skipped or has not ended well: give that argument a default"
            )

    def _split(self, results: RawJson) -> Mapping[str, RawJson]:
        try:
            return results.split()
        except UnreadableJsonError as error:
            raise self._refuse_input(error) from None

    def _refuse_input(self, reason: object) -> ArgumentInvalidError:
        return ArgumentInvalidError(f"the input of step {self.step_slug!r} can't be read: {reason}")

    def _read(self, name: str, raw: RawJson) -> Any:  # noqa: ANN401  it is whatever the annotation says
        reader = self._checks.find_reader(name)
        # As JSON, because a strict model accepts a date as text only there.
        return self._fit(name, raw.decode if reader is None else partial(reader.read, raw.text))

    def _read_all(self, inputs: Inputs) -> Any:  # noqa: ANN401
        """Return `upstream` where some of the results are no JSON."""
        values = self._fit("upstream", lambda: {slug: raw.decode() for slug, raw in inputs.results.split().items()})
        values |= inputs.objects
        is_unread = any(isinstance(each, Unread) for each in values.values())
        return values if is_unread else self._check("upstream", values)

    def _check(self, name: str, value: Any) -> Any:  # noqa: ANN401
        """Return a value that is no JSON, as the annotation of its argument has it."""
        if isinstance(value, Unread):
            return value
        adapter = self._checks.find(name, is_object=True)
        return value if adapter is None else self._fit(name, partial(adapter.validate_python, value))

    def _fit(self, name: str, read: Callable[[], Any]) -> Any:  # noqa: ANN401
        try:
            return read()
        except UnreadableJsonError as error:
            raise self._refuse_input(error) from None
        except ValidationError as error:
            raise ArgumentInvalidError(
                f"step {self.step_slug!r}: argument {name!r} does not fit its annotation: {explain(error)}"
            ) from None  # pydantic's message has the value, and Prefect logs causes, too
        except Exception as error:  # a validator of the user's
            raise ArgumentInvalidError(
                f"step {self.step_slug!r}: argument {name!r} can't be checked: {describe(error)}"
            ) from error

    def _serialise(self, value: Any, execution: StepExecution) -> str | Decided | _Encoded:  # noqa: ANN401
        if not isinstance(value, Branch):
            written = self._encode(value, execution)
            return written if isinstance(written, str) else _Encoded(written, None)
        # Without a result, there is nothing to check.
        written = "null" if value.result is None else self._encode(value.result, execution)
        return Decided.to_branch(value, written) if isinstance(written, str) else _Encoded(written, value)

    def _encode(self, value: Any, execution: StepExecution) -> str | bytes:  # noqa: ANN401
        """Return a result as JSON text for its row, or as bytes for a storage."""
        # Of a shadow, nothing is stored: it is compared as JSON.
        results = None if execution.context.shadow else execution.results
        place = results.own if results is not None else None
        if results is None or place is None:
            return self._write(value)
        if isinstance(place.codec, JsonCodec):
            text = self._write(value)
            return self._encode_by(place.codec.encode, text) if place.takes(text, results.limit) else text
        adapter = self._checks.find("return")
        checked = value if adapter is None else self._fit_result(value, partial(adapter.validate_python, value))
        return "null" if checked is None else self._encode_by(place.codec.encode, checked)

    def _encode_by(self, encode: Callable[[Any], bytes], value: Any) -> bytes:  # noqa: ANN401
        try:
            return encode(value)
        except Exception as error:  # of the serializer, or of the value's class
            raise ResultInvalidError(
                f"step {self.step_slug!r}: the result can't be written with its serializer: {describe(error)}"
            ) from error

    def _write(self, value: Any) -> str:  # noqa: ANN401
        return self._fit_result(value, lambda: write_result(value, self._checks.find("return")))

    def _fit_result(self, value: Any, write: Callable[[], T]) -> T:  # noqa: ANN401
        try:
            return write()
        except ValidationError as error:
            raise ResultInvalidError(
                f"step {self.step_slug!r}: the result does not fit its annotation: {explain(error)}"
                f"{describe_unstorable(value)}"
            ) from None
        except UnstorableError as error:
            raise ResultInvalidError(f"step {self.step_slug!r}: the result can't be stored as JSON: {error}") from None

    def check_payload(self, payload: RawJson) -> None:
        """Check a run's payload against the function's annotation, if it takes one.

        Raises:
            ArgumentInvalidError: it does not.
        """
        if self.wants_payload:
            self._read_payload(payload)

    def read_payload(self, payload: RawJson) -> Any:  # noqa: ANN401
        """Return a payload in the type of its annotation; None if there is no such type, or it does not fit."""
        if not self.wants_payload or self._checks.find("payload") is None:
            return None
        try:
            return self._read_payload(payload)
        except ArgumentInvalidError:
            return None

    def _read_payload(self, payload: RawJson) -> Any:  # noqa: ANN401
        """Return the payload in its annotation's type; its default if the run has none and `{}` does not fit."""
        try:
            return self._read("payload", payload)
        except ArgumentInvalidError:
            default = self._parameters["payload"].default
            if _is_empty(payload) and default is not inspect.Parameter.empty:
                return default
            raise

    @cached_property
    def _checks(self) -> AnnotationChecks:
        return AnnotationChecks(
            self.step_slug, self.function, tuple(self._parameters), returns_objects=self.results.passes_objects
        )

    @property
    def hints(self) -> Mapping[str, Any]:
        """The annotations to check, of arguments and of `return`, without that of `context`.

        Raises:
            UsageError: an annotation names something that is not defined.
        """
        return self._checks.hints

    def check_annotations(self, objects: Collection[str] = ()) -> None:
        """Check that every annotation can be used.

        Args:
            objects: the arguments whose values are no JSON, so that their annotations may name any class.

        Raises:
            UsageError: one names something that is not defined, or that pydantic has no schema for.
        """
        self._checks.check(objects)


def _is_empty(payload: RawJson) -> bool:
    """Tell whether a payload is the one of a run without a payload."""
    return "".join(payload.text.split()) == "{}"


def _find_given(function: Any) -> Collection[str]:  # noqa: ANN401  any callable
    """Return the arguments that `functools.partial` has given to a function by name."""
    return function.keywords.keys() if isinstance(function, partial) else ()
