"""Checks the arguments and the result of a handler by their annotations."""

import inspect
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args, get_origin

from pydantic import (
    ConfigDict,
    InstanceOf,
    JsonValue,
    PydanticSchemaGenerationError,
    PydanticUserError,
    TypeAdapter,
)

from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.annotations import find_hints
from pgflow_prefect.handlers.exact import ValueReader
from pgflow_prefect.handlers.generators import find_collected
from pgflow_prefect.handlers.outcomes import find_returned

_PLAIN = (Any, JsonValue, object, inspect.Parameter.empty)
"""Annotations that every JSON value fits, so that there is nothing to check."""

_TYPED_DICT_OF_TYPING = "typed-dict-version"
"""pydantic's error code for `typing.TypedDict` before Python 3.12."""


@dataclass(frozen=True)
class AnnotationChecks:
    """The checks of a handler's arguments, and of its result.

    Attributes:
        step_slug: the step, for messages.
        function: the handler.
        arguments: the names of its arguments.
        returns_objects: its result is kept by a serializer such as pickle, so that it need not be JSON.
    """

    step_slug: str
    function: Callable[..., Any]
    arguments: Collection[str]
    returns_objects: bool

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
    def _readers(self) -> dict[str, ValueReader]:
        """The readers so far, of arguments whose annotations restrict the value."""
        return {}

    @cached_property
    def _adapters(self) -> dict[tuple[str, bool], TypeAdapter[Any] | None]:
        """The checks so far, of arguments and of `return`, for values that are JSON and for those that are not."""
        return {}

    def find(self, name: str, *, is_object: bool = False) -> TypeAdapter[Any] | None:
        """Return the check of an argument or of `return`; None if its annotation does not restrict the value.

        Args:
            name: of the argument, or `return`.
            is_object: the argument gets a value that is no JSON, so its annotation may name any class.

        Raises:
            UsageError: the annotation can't be used.
        """
        is_object = is_object or (name == "return" and self.returns_objects)
        if (name, is_object) not in self._adapters:
            hint = self.hints.get(name, Any)
            adapter = None if _is_plain(hint) else self._make_adapter(name, hint, is_object=is_object)
            self._adapters[name, is_object] = adapter
        return self._adapters[name, is_object]

    def _make_adapter(self, name: str, hint: Any, *, is_object: bool) -> TypeAdapter[Any]:  # noqa: ANN401
        which = "its result" if name == "return" else f"argument {name!r}"
        what = f"that of {which}, {inspect.formatannotation(hint)}"
        try:
            return _adapt_object(hint) if is_object else TypeAdapter(hint)
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

    def find_reader(self, name: str) -> ValueReader | None:
        """Return what reads an argument from JSON; None if its annotation does not restrict the value.

        Raises:
            UsageError: the annotation can't be used.
        """
        adapter = self.find(name)
        return None if adapter is None else self._readers.setdefault(name, ValueReader(adapter))

    def check(self, objects: Collection[str] = ()) -> None:
        """Check that every annotation can be used.

        Args:
            objects: the arguments whose values are no JSON, so that their annotations may name any class.

        Raises:
            UsageError: one names something that is not defined, or that pydantic has no schema for.
        """
        for name in self.hints:
            self.find(name, is_object=name in objects)


def _is_plain(hint: Any) -> bool:  # noqa: ANN401
    if any(hint is plain for plain in _PLAIN):
        return True
    is_mapping = get_origin(hint) in (dict, Mapping)
    return is_mapping and get_args(hint)[:1] == (str,) and _is_plain(get_args(hint)[1])


def _adapt_object(hint: Any) -> TypeAdapter[Any]:  # noqa: ANN401
    """Return the check of a value that is no JSON: of a class that pydantic does not know, each instance fits."""
    with suppress(PydanticSchemaGenerationError):
        return TypeAdapter(hint)
    with suppress(PydanticSchemaGenerationError, PydanticUserError):  # a dataclass or a model takes no config
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    return TypeAdapter(InstanceOf[hint] if isinstance(hint, type) else Any)


def _advise(hint: Any) -> str:  # noqa: ANN401
    """Return what to do instead of a type that pydantic has no schema for."""
    storage = "or keep it in a storage: `pgflow-prefect guide results`"
    if "DataFrame" in str(hint):
        return f"pass its rows, frame.to_dict('records'), as list[dict[str, Any]], {storage}"
    return f"use a plain type, a dataclass or a pydantic model, {storage}"
