"""Does a step by a Python function. Arguments are passed by name, and pydantic checks their annotations."""

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, get_args, get_origin

from anyio import get_cancelled_exc_class
from pydantic import JsonValue, PydanticSchemaGenerationError, PydanticUserError, TypeAdapter, ValidationError

from pgflow_prefect.definitions.model import to_identifier
from pgflow_prefect.errors import ArgumentInvalidError, ResultInvalidError, UsageError
from pgflow_prefect.handlers.annotations import find_hints
from pgflow_prefect.handlers.base import AnyStepContext, RetryPolicy, StepExecution
from pgflow_prefect.handlers.exact import ValueReader, explain
from pgflow_prefect.handlers.generators import collect, find_collected, is_lazy
from pgflow_prefect.handlers.outcomes import Branch, Decided, Skip, find_returned
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.threads import run_in_thread
from pgflow_prefect.handlers.values import UnstorableError, describe_unstorable, write_result
from pgflow_prefect.models import Claim
from pgflow_prefect.raw_json import RawJson, UnreadableJsonError

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
_PLAIN = (Any, JsonValue, object, inspect.Parameter.empty)
"""Annotations that every JSON value fits, so that there is nothing to check."""

_TYPED_DICT_OF_TYPING = "typed-dict-version"
"""pydantic's error code for `typing.TypedDict` before Python 3.12."""

_NULL, _NONE = RawJson("null"), RawJson("{}")


@dataclass(frozen=True)
class _Unfinished:
    """An awaitable that a sync function returned, to be awaited on the event loop."""

    value: Any


@dataclass(frozen=True)
class PythonHandler:
    """A sync or async function that does the work of a step.

    Attributes:
        step_slug: the step.
        function: the decorated function; sync functions run in a thread.
        policy: when to try again.
        unimplemented: it is a stub of `pgflow-prefect import`, not a handler yet.
        shadow: it can run beside an external worker, to be compared with it.
    """

    step_slug: str
    function: Callable[..., Any]
    policy: RetryPolicy = field(default_factory=RetryPolicy)
    unimplemented: bool = False
    shadow: bool = False

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
        """The names of the function's arguments, in their order."""
        return tuple(self._parameters)

    @cached_property
    def optional(self) -> tuple[str, ...]:
        """The names of the arguments with a default; an argument that names no upstream step keeps it."""
        return tuple(name for name, each in self._parameters.items() if each.default is not inspect.Parameter.empty)

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

    async def _execute(self, claim: Claim, upstream: Collection[str], execution: StepExecution) -> str | Decided:
        call = partial(self.function, **dict(self._bind(claim, upstream, execution.context)))
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

        Raises:
            ArgumentInvalidError: the input does not fit.
        """
        nothing: Any = None
        bound = dict(self._bind(claim, upstream, nothing))
        bound.pop("context", None)
        defaults = {name: each.default for name, each in self._parameters.items() if name in self.optional}
        return {**defaults, **bound}

    @cached_property
    def is_async(self) -> bool:
        """Whether the function is async, an async generator, or an object that is called like one."""
        function: Any = self.function
        kinds = (inspect.iscoroutinefunction, inspect.isasyncgenfunction)
        return any(is_kind(each) for is_kind in kinds for each in (function, function.__call__))

    def _call(self, call: Callable[[], Any], execution: StepExecution) -> "str | Decided | _Unfinished":
        """Call a sync function in its thread, and convert its result there, because that may call the user's code."""
        value = call()
        if inspect.isawaitable(value) or inspect.isasyncgen(value):
            return _Unfinished(value)
        return self._serialise(execution.settle(collect(value)))

    async def _finish(self, value: Any, execution: StepExecution) -> str | Decided:  # noqa: ANN401
        """Await what an async function returns, and return its result as JSON text."""
        if inspect.isasyncgen(value):
            value = [each async for each in value]
        elif inspect.isawaitable(value):
            value = await value
        if not is_lazy(value):
            return self._serialise(execution.settle(value))
        try:  # it may block: not on the event loop
            return await run_in_thread(lambda: self._serialise(execution.settle(collect(value))))
        except get_cancelled_exc_class():
            execution.abandon()
            raise

    def _bind(self, claim: Claim, upstream: Collection[str], context: AnyStepContext[Any]) -> Iterator[tuple[str, Any]]:
        results = claim.upstream_results or _NONE
        slugs = {to_identifier(slug): slug for slug in upstream}
        members: Mapping[str, RawJson] | None = None
        missing: list[str] = []
        for name in self.arguments:
            if name == "context":
                yield name, context
            elif name == "payload":
                yield name, self._read_payload(claim.payload or _NULL)
            elif name == "upstream":
                yield name, self._read(name, results)
            elif name in slugs:
                members = self._split(results) if members is None else members
                if slugs[name] in members:
                    yield name, self._read(name, members[slugs[name]])
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
        reader = self._readers.get(name)
        try:
            # As JSON, because a strict model accepts a date as text only there.
            return raw.decode() if reader is None else reader.read(raw.text)
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

    def _serialise(self, value: Any) -> str | Decided:  # noqa: ANN401
        if isinstance(value, Branch):
            # Without a result, there is nothing to check.
            return Decided.to_branch(value, "null" if value.result is None else self._write(value.result))
        return self._write(value)

    def _write(self, value: Any) -> str:  # noqa: ANN401
        try:
            return write_result(value, self._adapters.get("return"))
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
        if "payload" not in self._readers:
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
    def hints(self) -> Mapping[str, Any]:
        """The annotations to check, of arguments and of `return`, without that of `context`.

        Raises:
            UsageError: an annotation names something that is not defined.
        """
        try:
            found = find_hints(self.function)
        except Exception as error:  # an annotation in quotes is any code
            raise self._refuse(error) from error
        if "return" in found:
            found["return"] = find_returned(find_collected(found["return"]))
        return {
            name: hint
            for name, hint in found.items()
            if name != "context"
            and not any(hint is plain for plain in _PLAIN)
            and (name in self.arguments or name == "return")
        }

    @cached_property
    def _readers(self) -> Mapping[str, ValueReader]:
        """The readers of the arguments whose annotations restrict the value."""
        return {name: ValueReader(adapter) for name, adapter in self._adapters.items() if name != "return"}

    @cached_property
    def _adapters(self) -> Mapping[str, TypeAdapter[Any]]:
        """The checks of arguments and of `return`, for annotations that restrict the value."""
        return {name: self._make_adapter(name, hint) for name, hint in self.hints.items() if not _is_plain(hint)}

    def _make_adapter(self, name: str, hint: Any) -> TypeAdapter[Any]:  # noqa: ANN401  any annotation
        which = "its result" if name == "return" else f"argument {name!r}"
        what = f"that of {which}, {inspect.formatannotation(hint)}"
        try:
            return TypeAdapter(hint)
        except (PydanticSchemaGenerationError, PydanticUserError) as error:
            # Not pydantic's own message, which speaks of its schemas.
            if isinstance(error, PydanticUserError) and error.code == _TYPED_DICT_OF_TYPING:
                raise self._refuse(
                    f"{what}, needs Python 3.12, for it has a TypedDict of `typing`: import it by `from "
                    "typing_extensions import TypedDict` instead"
                ) from error
            raise self._refuse(f"{what}, is no type that JSON can be checked against: {_advise(hint)}") from error
        except (NameError, TypeError) as error:
            raise self._refuse(error) from error

    def _refuse(self, reason: object) -> UsageError:
        return UsageError(f"the handler of step {self.step_slug!r} has an annotation that can't be used: {reason}")

    def check_annotations(self) -> None:
        """Check that every annotation can be used.

        Raises:
            UsageError: one names something that is not defined, or that pydantic has no schema for.
        """
        _ = self._adapters


def _is_empty(payload: RawJson) -> bool:
    """Tell whether a payload is the one of a run without a payload."""
    return "".join(payload.text.split()) == "{}"


def _find_given(function: Any) -> Collection[str]:  # noqa: ANN401  any callable
    """Return the arguments that `functools.partial` has given to a function by name."""
    return function.keywords.keys() if isinstance(function, partial) else ()


def _is_plain(hint: Any) -> bool:  # noqa: ANN401
    if any(hint is plain for plain in _PLAIN):
        return True
    is_mapping = get_origin(hint) in (dict, Mapping)
    return is_mapping and get_args(hint)[:1] == (str,) and _is_plain(get_args(hint)[1])


def _advise(hint: Any) -> str:  # noqa: ANN401
    """Return what to do instead of a type that pydantic has no schema for."""
    if "DataFrame" in str(hint):
        return "pass its rows, frame.to_dict('records'), as list[dict[str, Any]], or the address of a file"
    return "use a plain type, a dataclass or a pydantic model"
