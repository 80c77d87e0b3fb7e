"""What is said of an exception that a handler raised."""

import asyncio
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import format_exception

import pytest

from pgflow_prefect.errors import HandlerRaisedError, NotRetriableError, RetryLaterError, StepTimeoutError
from pgflow_prefect.execution.reporting.tracebacks import trim
from pgflow_prefect.handlers.containment import contain
from pgflow_prefect.handlers.raised import describe, is_from_signal, make_ordinary


class MuteError(Exception):
    def __str__(self) -> str:
        raise AttributeError("no response")


def add_notes(error: BaseException, *notes: str) -> BaseException:
    for note in notes:
        error.add_note(note)
    return error


GROUP = ExceptionGroup("unhandled errors in a TaskGroup", [ConnectionError(f"host {number}") for number in range(3)])
NESTED = ExceptionGroup("outer", [ExceptionGroup("inner", [ValueError("first")]), MuteError()])


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("no such customer"), "ValueError: no such customer"),
        (ValueError(), "ValueError"),
        (StepTimeoutError("step 'a' took longer than 2 s"), "step 'a' took longer than 2 s"),
        (SystemExit(0), "SystemExit: 0"),
        (MuteError(), "MuteError: its str() raises, so it has no text"),
        (add_notes(ValueError("no"), "row 7", "file a.csv"), "ValueError: no\nrow 7\nfile a.csv"),
        (
            GROUP,
            "ExceptionGroup: unhandled errors in a TaskGroup (3 sub-exceptions): ConnectionError: host 0; "
            "ConnectionError: host 1; ConnectionError: host 2",
        ),
        (NESTED, "ExceptionGroup: outer (2 sub-exceptions): ValueError: first; MuteError: its str() raises, so it has"),
        (StopIteration(), "StopIteration: next() found no further item"),
        (asyncio.CancelledError(), "CancelledError: a task or a future that the handler waited for was cancelled"),
    ],
)
def test_an_exception_is_described_with_its_notes_and_members(error: BaseException, words: str) -> None:
    assert describe(error).startswith(words)


def test_of_a_large_group_the_first_members_are_shown() -> None:
    words = describe(ExceptionGroup("many", [ValueError(str(number)) for number in range(5_000)]))
    assert words.endswith("ValueError: 9; and 4990 more")


def test_notes_that_are_no_texts_are_left_out() -> None:
    error = ValueError("no")
    error.__notes__ = [1, "row 7"]  # type: ignore[list-item]
    assert describe(error) == "ValueError: no\nrow 7"


def test_an_ordinary_exception_stays_as_it_is_and_any_other_names_what_it_was() -> None:
    ordinary = KeyError("no such recipient")
    assert make_ordinary(ordinary) is ordinary
    left = SystemExit("no licence")
    made = make_ordinary(left)
    assert isinstance(made, HandlerRaisedError)
    assert str(made) == "SystemExit: no licence"
    assert made.__cause__ is left


def test_an_interrupt_is_a_signals_only_where_a_signal_has_raised_it() -> None:
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt) as raised:
            raise KeyboardInterrupt
        assert not is_from_signal(raised.value)
        with pytest.raises(KeyboardInterrupt) as interrupted:
            signal.raise_signal(signal.SIGINT)
        assert is_from_signal(interrupted.value)
    finally:
        signal.signal(signal.SIGINT, former)


def test_what_a_handler_of_signals_raises_is_a_signals() -> None:
    def leave(number: int, frame: object) -> None:
        raise SystemExit(number)

    former = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit) as ended:
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(SystemExit) as left:
            raise SystemExit(15)
    finally:
        found = is_from_signal(ended.value), is_from_signal(left.value)
        signal.signal(signal.SIGTERM, former)
    assert found == (True, False)


def test_nothing_in_another_thread_is_a_signals() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(is_from_signal(KeyboardInterrupt())))
    thread.start()
    thread.join()
    assert found == [False]


@dataclass(frozen=True)
class FrozenError(Exception):
    code: int


@dataclass(frozen=True)
class FrozenSlotsError(Exception):
    __slots__ = ("code",)
    code: int


class SlotsError(Exception):
    __slots__ = ("code",)


class SealedError(Exception):
    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError("sealed")


class DeafError(Exception):
    def __getattribute__(self, name: str) -> object:
        raise RuntimeError("no attributes")


class ProxyError(Exception):
    def __getattr__(self, name: str) -> object:
        raise RuntimeError("no connection")


class _NamelessType(type):
    @property
    def __name__(cls) -> str:  # type: ignore[override]
        raise RuntimeError("no name")


class NamelessError(Exception, metaclass=_NamelessType):
    pass


class DisguisedError(Exception):
    @property
    def __class__(self) -> type:
        raise RuntimeError("no class")

    @__class__.setter
    def __class__(self, value: type) -> None:
        raise RuntimeError("no class")


class FalseError(Exception):
    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")


class EqualError(Exception):
    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")


class NotingError(Exception):
    @property
    def __notes__(self) -> list[str]:  # type: ignore[override]
        raise RuntimeError("no notes")


class _Text(str):
    __slots__ = ()

    def __format__(self, spec: str) -> str:
        raise RuntimeError("no format")


class TextError(Exception):
    def __str__(self) -> str:
        return _Text("of a text of its own")


class LoopingError(Exception):
    def __str__(self) -> str:
        return str(self)


ODD: dict[str, tuple[BaseException, str]] = {
    "frozen": (FrozenError(7), "FrozenError: 7"),
    "frozen, with slots": (FrozenSlotsError(7), "FrozenSlotsError: 7"),
    "slots": (SlotsError("no"), "SlotsError: no"),
    "no attribute can be set": (SealedError("no"), "SealedError: no"),
    "no attribute can be read": (DeafError("no"), "DeafError: no"),
    "unknown attributes raise": (ProxyError("no"), "ProxyError: no"),
    "its type has no name": (NamelessError("no"), "NamelessError: no"),
    "it has no class": (DisguisedError("no"), "DisguisedError: no"),
    "neither true nor false": (FalseError("no"), "FalseError: no"),
    "can't be compared or hashed": (EqualError("no"), "EqualError: no"),
    "its notes raise": (NotingError("no"), "NotingError: no"),
    "its text is of an odd type": (TextError(), "TextError: of a text of its own"),
    "its text has no end": (LoopingError(), "LoopingError: its str() raises, so it has no text"),
}


@dataclass(frozen=True)
class FrozenRefusalError(NotRetriableError):
    code: int


class SealedDelayError(RetryLaterError):
    def __setattr__(self, name: str, value: object) -> None:
        if name != "after":
            raise TypeError("sealed")
        super().__setattr__(name, value)


def test_errors_that_forbid_or_delay_a_retry_keep_their_meaning() -> None:
    refusal = make_ordinary(FrozenRefusalError(7))
    assert (type(refusal), str(refusal)) == (NotRetriableError, "7")
    delay = make_ordinary(SealedDelayError("busy", 30))
    assert isinstance(delay, RetryLaterError)
    assert (type(delay), str(delay), delay.after) == (RetryLaterError, "busy", 30)


def raise_through_a_context_manager(error: BaseException) -> None:
    @contextmanager
    def passing() -> Iterator[None]:
        yield

    with passing():
        raise error


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("in_group", [False, True], ids=["alone", "in a group"])
def test_an_odd_exception_keeps_its_type_and_text_and_can_be_used_like_any_other(odd: str, in_group: bool) -> None:
    error, words = ODD[odd]
    if in_group:
        error = BaseExceptionGroup("all", [error])
        words = f"{type(error).__name__}: all (1 sub-exception): {words}"

    async def work() -> None:
        raise error

    with pytest.raises(Exception) as contained:  # noqa: PT011
        asyncio.run(contain(work()))
    made = contained.value

    assert describe(made) == words
    with pytest.raises(Exception) as passed:  # noqa: PT011
        raise_through_a_context_manager(made)
    assert passed.value is made
    assert isinstance(made, HandlerRaisedError) is not (type(made) is type(error))
    logged = trim(made)
    assert logged is not None
    assert "raise error" in "".join(format_exception(*logged))
