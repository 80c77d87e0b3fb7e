"""Turns any error of a handler into an exception that only ends its attempt, and into words."""

import asyncio
import dis
import inspect
import signal
import threading
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from traceback import TracebackException, walk_tb
from types import CodeType, TracebackType
from typing import Any, cast

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
    """Return an exception in words: its type if that helps, its text, its notes, its members."""
    text, name = _read_text(error), _find_name(error)
    if _is_a(error, *_WRITTEN_FOR_USERS):
        described = text or ""
    elif text is None:
        described = f"{name}: its str() raises, so it has no text"
    else:
        text = text or next((why for kind, why in _EXPLAINED.items() if _is_a(error, kind)), "")
        described = f"{name}: {text}" if text else name
    if _is_a(error, BaseExceptionGroup):
        described += f": {'; '.join(_describe_members(error))}"
    return "\n".join([described, *_find_notes(error)])


def make_ordinary(error: BaseException) -> Exception:
    """Return an exception that can be raised, awaited and printed: this one, or a replacement that names it."""
    if _is_a(error, RuntimeError) and isinstance(cause := _get_cause(error), StopIteration):
        error = cause  # Python turns it into this in a coroutine
    if _is_ordinary(error):
        assert isinstance(error, Exception)
        return error
    ordinary = _make_replacement(error)
    if _succeeds(partial(_print_traceback, error)):
        ordinary.__cause__ = error
    else:  # logs could not print it, so they show its traceback alone
        ordinary.__traceback__ = _get_traceback(error)
    return ordinary


def _make_replacement(error: BaseException) -> Exception:
    """Return an exception with the same text and the same effect on further attempts."""
    if _is_a(error, NotRetriableError):
        return NotRetriableError(describe(error))
    if _is_a(error, RetryLaterError):
        after: list[float | None] = []
        _succeeds(lambda: after.append(cast("RetryLaterError", error).after))
        return RetryLaterError(describe(error), after[0] if after else None)
    return HandlerRaisedError(describe(error))


def _is_ordinary(error: BaseException) -> bool:
    if not _is_a(error, Exception) or _is_a(error, StopIteration, StopAsyncIteration):
        return False
    return all(_succeeds(partial(use, error)) for use in _USES)


def _set_traceback(error: BaseException) -> None:
    """Set the traceback, as contextlib's context managers do; a frozen dataclass refuses it."""
    error.__traceback__ = error.__traceback__


def _print_traceback(error: BaseException) -> None:
    """Format the traceback, as logging does, without the lines of code; a type or an object may refuse it."""
    "".join(TracebackException.from_exception(error, limit=0).format())


def _print_name(error: BaseException) -> None:
    """Format the name, as messages of Prefect do."""
    format(type(error).__name__)


_USES: tuple[Callable[[BaseException], object], ...] = (
    *(str, repr, format),
    *(_set_traceback, _print_traceback, _print_name),
)
"""Operations on every exception; an exception that refuses one of them gets a replacement."""


def _succeeds(use: Callable[[], object]) -> bool:
    try:
        use()
    except BaseException as raised:
        if is_from_signal(raised):
            raise
        return False
    return True


# Read past the attributes that a class may define, because they may raise.


def _is_a(error: BaseException, *kinds: type[BaseException]) -> bool:
    return issubclass(type(error), kinds)


def _find_name(error: BaseException) -> str:
    return str(type.__dict__["__name__"].__get__(type(error)))


def _get_cause(error: BaseException) -> BaseException | None:
    return cast("BaseException | None", BaseException.__dict__["__cause__"].__get__(error))


def _get_traceback(error: BaseException) -> TracebackType | None:
    return cast("TracebackType | None", BaseException.__dict__["__traceback__"].__get__(error))


def is_from_signal(error: BaseException) -> bool:
    """Tell whether a signal raised this, and not the interrupted code.

    Python runs the handlers of signals in the main thread, at any place in its code.
    """
    if _is_a(error, Exception) or threading.current_thread() is not threading.main_thread():
        return False
    handlers = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    codes = {code for handler in handlers if (code := _find_code(handler)) is not None}
    traceback = _get_traceback(error)
    if any(frame.f_code in codes for frame, _ in walk_tb(traceback)):
        return True
    by_default = _is_a(error, KeyboardInterrupt) and signal.default_int_handler in handlers
    return by_default and not _is_raised_by_statement(traceback)


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


def _read_text(error: BaseException) -> str | None:
    """Return an exception's text; None if its text raises an error."""
    found: list[str] = []
    # Joined: a text of a class of its own may raise, too.
    return "".join(found) if _succeeds(lambda: found.append(str(error))) else None


def _describe_members(group: BaseException) -> Iterator[str]:
    members = _find_leaves(group)
    yield from map(describe, islice(members, _MEMBERS_SHOWN))
    if further := sum(1 for _ in members):
        yield f"and {further} more"


def _find_leaves(group: BaseException) -> Iterator[BaseException]:
    waiting: list[BaseException] = [group]
    while waiting:
        error = waiting.pop()
        if _is_a(error, BaseExceptionGroup):
            waiting.extend(reversed(BaseExceptionGroup.__dict__["exceptions"].__get__(error)))
        else:
            yield error


def _find_notes(error: BaseException) -> list[str]:
    found: list[object] = []
    _succeeds(lambda: found.extend(getattr(error, "__notes__", ())))
    return ["".join(note) for note in found if isinstance(note, str)]
