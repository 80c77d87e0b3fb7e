"""What a handler raises, as an exception that ends its attempt and nothing else, and in words."""

import asyncio
import dis
import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from traceback import walk_tb
from types import CodeType, TracebackType
from typing import Any

from pgflow_prefect.errors import (
    HandlerRaisedError,
    NotRetriableError,
    RetryLaterError,
    ReturnedStateError,
    StepTimeoutError,
)

_WRITTEN_FOR_USERS = (HandlerRaisedError, NotRetriableError, RetryLaterError, ReturnedStateError, StepTimeoutError)
_MEMBERS_SHOWN = 10  # of a group of exceptions
_RAISES = dis.opmap["RAISE_VARARGS"]

_EXPLAINED = {
    StopIteration: "next() found no further item; give it a default, or catch StopIteration",
    asyncio.CancelledError: "a task or a future that the handler waited for was cancelled, and not by pgflow-prefect",
}


def describe(error: BaseException) -> str:
    """Return an exception in words: its type where that says something, its text, its notes, its members."""
    text = _read_text(error)
    if isinstance(error, _WRITTEN_FOR_USERS):
        described = text or ""
    elif text is None:
        described = f"{type(error).__name__}: its str() raises, so it has no text"
    else:
        text = text or next((why for kind, why in _EXPLAINED.items() if isinstance(error, kind)), "")
        described = f"{type(error).__name__}: {text}" if text else type(error).__name__
    if isinstance(error, BaseExceptionGroup):
        described += f": {'; '.join(_describe_members(error))}"
    return "\n".join([described, *_find_notes(error)])


def make_ordinary(error: BaseException) -> Exception:
    """Return an exception that can be raised, awaited and printed like any other: this one, or one that names it."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, StopIteration):
        error = error.__cause__  # what Python makes of it in a coroutine
    is_ordinary = isinstance(error, Exception) and not isinstance(error, StopIteration | StopAsyncIteration)
    if is_ordinary and _is_printable(error):
        assert isinstance(error, Exception)
        return error
    ordinary = HandlerRaisedError(describe(error))
    ordinary.__cause__ = error
    return ordinary


def is_from_signal(error: BaseException) -> bool:
    """Tell whether a signal has raised this, and not the code that it interrupted.

    Python runs the handlers of signals in the main thread, wherever that is at the moment.
    """
    if isinstance(error, Exception) or threading.current_thread() is not threading.main_thread():
        return False
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    codes = {code for handler in handlers if (code := _find_code(handler)) is not None}
    if any(frame.f_code in codes for frame, _ in walk_tb(error.__traceback__)):
        return True
    by_default = isinstance(error, KeyboardInterrupt) and signal.default_int_handler in handlers
    return by_default and not _is_raised_by_statement(error.__traceback__)


def _find_code(handler: Any) -> CodeType | None:  # noqa: ANN401  whatever was given to `signal.signal`
    while isinstance(handler, partial):
        handler = handler.func
    code = getattr(inspect.unwrap(handler) if callable(handler) else None, "__code__", None)
    return code if isinstance(code, CodeType) else None


def _is_raised_by_statement(traceback: TracebackType | None) -> bool:
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return traceback.tb_frame.f_code.co_code[traceback.tb_lasti] == _RAISES


def _read_text(error: BaseException, convert: Callable[[BaseException], str] = str) -> str | None:
    """Return an exception's text; None where it has none, because it raises."""
    try:
        return convert(error)
    except BaseException as raised:
        if is_from_signal(raised):
            raise
        return None


def _is_printable(error: BaseException) -> bool:
    return _read_text(error) is not None and _read_text(error, repr) is not None


def _describe_members(group: BaseExceptionGroup[Any]) -> Iterator[str]:
    members = _find_leaves(group)
    yield from map(describe, islice(members, _MEMBERS_SHOWN))
    if further := sum(1 for _ in members):
        yield f"and {further} more"


def _find_leaves(group: BaseExceptionGroup[Any]) -> Iterator[BaseException]:
    waiting: list[BaseException] = [group]
    while waiting:
        error = waiting.pop()
        if isinstance(error, BaseExceptionGroup):
            waiting.extend(reversed(error.exceptions))
        else:
            yield error


def _find_notes(error: BaseException) -> list[str]:
    notes = getattr(error, "__notes__", None)
    return [note for note in notes if isinstance(note, str)] if isinstance(notes, list) else []
