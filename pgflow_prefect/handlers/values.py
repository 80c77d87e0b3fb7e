"""Writes a handler's result as JSON, and refuses values that can't be stored or would not come back unchanged."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError

from pgflow_prefect.handlers.json_text import dump, write_json
from pgflow_prefect.handlers.losses import find_losses, find_losses_in_models
from pgflow_prefect.handlers.schemas import SchemaView, is_lossless
from pgflow_prefect.handlers.unstorable import DEEPEST, Found, find_replaced, find_secrets, find_unstorable

_STARS = '"**********"'
"""pydantic's text for a secret."""


class UnstorableError(ValueError):
    """A value that JSON can't store unchanged for the next step; the message contains no value."""


def write_result(value: Any, adapter: TypeAdapter[Any] | None) -> str:  # noqa: ANN401  any value
    """Return a result as JSON text.

    Args:
        value: what the handler returned.
        adapter: checks it; None if its annotation allows anything.

    Raises:
        ValidationError: it does not fit its annotation.
        UnstorableError: JSON has no form for it, or the next step would read another value.
    """
    if adapter is None:
        return _write_unchecked(value)
    try:
        checked = adapter.validate_python(value)
    except TypeError as error:  # pandas' NaT is a datetime that has no year
        raise _make_error(value, error) from error
    text = _write(checked, lambda: dump(checked, adapter))
    if not is_lossless(adapter):
        try:
            _check_comes_back(checked, adapter, text)
        except (ValidationError, TypeError, AttributeError) as error:
            raise UnstorableError(_explain_unreadable(error)) from None
    return text


def _write_unchecked(value: Any) -> str:  # noqa: ANN401
    with suppress(TypeError, ValueError, RecursionError):
        # Most results are plain JSON, and lose nothing. Keys that can't be sorted are not all texts.
        return write_json(value, sort_keys=True)
    _refuse(_find_replaced(value))
    with suppress(TypeError, ValueError, RecursionError):
        return write_json(value)
    text = _write(value, lambda: dump(value, None))
    if "NaN" in text or "Infinity" in text:  # what pydantic writes for a Decimal that is none
        _refuse(find_unstorable(value))
    _refuse(find_losses_in_models(value))
    return text


def _write(value: Any, write: Callable[[], str]) -> str:  # noqa: ANN401
    """Write a value; if that fails, name the place in the value.

    Raises:
        UnstorableError: JSON has no form for it, or only stars.
    """
    try:
        text = write()
    except (PydanticSerializationError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise _make_error(value, error) from error
    if _STARS in text:
        _refuse(find_secrets(value))
    return text


def _make_error(value: Any, error: Exception) -> UnstorableError:  # noqa: ANN401
    """Return an error with the place in the value, or at least with the original message."""
    try:
        for place, reason in find_unstorable(value):
            return UnstorableError(f"{_name(place)} {reason}")
    except RecursionError:
        return UnstorableError(
            f"it nests lists, dicts or objects more than {DEEPEST} deep: store it elsewhere and return its address"
        )
    return UnstorableError(str(error))


def describe_unstorable(value: Any) -> str:  # noqa: ANN401
    """Return the part of a value without a form in JSON, as `: [1].price is …`; empty if there is none."""
    with suppress(RecursionError):
        for place, reason in find_unstorable(value):
            return f": {_name(place)} {reason}"
    return ""


def _find_replaced(value: Any) -> Iterator[Found]:  # noqa: ANN401
    try:
        yield from find_replaced(value)
    except (PydanticSerializationError, ValueError, TypeError, AttributeError, RecursionError):
        return  # a value that can't be written raises its own error


def _check_comes_back(value: Any, adapter: TypeAdapter[Any], text: str) -> None:  # noqa: ANN401
    """Read the JSON as the next step reads it, and compare.

    Raises:
        ValidationError: it can't be read.
        UnstorableError: it is another value.
    """
    again = adapter.validate_json(text)
    with suppress(Exception):  # an object's own comparison; its parts are compared
        if bool(again == value):
            return
    _refuse(find_losses(value, again, SchemaView.of(adapter)))


def _refuse(found: Iterator[Found]) -> None:
    for place, reason in found:
        raise UnstorableError(f"{_name(place)} {reason}")


def _name(place: str) -> str:
    return place.removeprefix(".") or "it"


def _explain_unreadable(error: Exception) -> str:
    if not isinstance(error, ValidationError):  # a validator of the user's
        return f"it is written so that it can't be read again ({type(error).__name__})"
    [detail, *_] = error.errors(include_url=False, include_input=False)
    place = "".join(f"[{each}]" if isinstance(each, int) else f".{each}" for each in detail["loc"])
    return (
        f"{_name(place)} is written so that it can't be read again ({detail['msg']}): have one alias for both ways, "
        "and no `exclude`"
    )
