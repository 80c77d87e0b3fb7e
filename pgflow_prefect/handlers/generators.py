"""Handlers that yield their result item by item. The result is stored as one list."""

import io
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator
from typing import Any, get_args, get_origin

from anyio.from_thread import check_cancelled

_ITEM_BY_ITEM = (AsyncGenerator, AsyncIterable, AsyncIterator, Generator, Iterable, Iterator)


def is_lazy(value: object) -> bool:
    """Tell whether a value is lazy: a generator, `map`, the lines of a file."""
    return isinstance(value, Iterator) and not isinstance(value, io.IOBase)


def collect(value: Any) -> Any:  # noqa: ANN401  whatever a handler returned
    """Return a handler's result. A lazy one is read into a list, in the calling thread.

    Raises:
        CancelledError: no task waits for the result any more. An endless generator would fill the memory.
    """
    if not is_lazy(value):
        return value
    items = []
    try:
        for item in value:
            check_cancelled()
            items.append(item)
    finally:
        # Close it at once, and not when the error is garbage collected: the handler may hold a file or a lock.
        if isinstance(value, Generator):
            value.close()
    return items


def find_collected(annotation: Any) -> Any:  # noqa: ANN401  an annotation is any object
    """Return the annotation of the stored result: a list if the function yields items."""
    origin = get_origin(annotation) or annotation
    if origin not in _ITEM_BY_ITEM:
        return annotation
    items = get_args(annotation)[:1]
    return list[items[0]] if items else list  # type: ignore[valid-type]
