"""Checks what a user says of a step in code, where it is said."""

from collections.abc import Collection
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from pydantic import ValidationError

from pgflow_prefect.bindings import AnyBinding, Child
from pgflow_prefect.definitions.model import (
    AnyWhenEmpty,
    AnyWhenItemFails,
    ChildRules,
    MapRules,
    Rule,
    StepRules,
    WhenUnmet,
)
from pgflow_prefect.errors import UsageError

T = TypeVar("T")

AnyRule: TypeAlias = Literal[
    "all_success",
    "all_failed",
    "all_done",
    "all_done_min_one_success",
    "all_done_setup_success",
    "all_skipped",
    "always",
    "none_failed",
    "none_failed_min_one_success",
    "none_skipped",
    "one_done",
    "one_failed",
    "one_success",
]
AnyWhen: TypeAlias = Literal["fail", "skip", "skip-cascade"]


def refuse_text(name: str, given: Collection[str], what: str) -> None:
    """Refuse a text where a list is meant: a text is a collection too, of letters.

    Args:
        name: the option.
        given: its value.
        what: what to give instead, for the message.

    Raises:
        UsageError: it is a text.
    """
    if isinstance(given, str):
        raise UsageError(f"{name}={given!r} is a text: give {what}, {name}=[{given!r}]")


def choose(name: str, chosen: T, known: Collection[object]) -> T:
    """Return a choice.

    Raises:
        UsageError: it is none of the known ones.
    """
    if chosen not in known:
        listed = ", ".join(repr(each) for each in known)
        raise UsageError(f"{name}={chosen!r} is no choice: there is {listed}")
    return chosen


def make_rules(**said: Any) -> StepRules:  # noqa: ANN401  what a user has written
    """Return what is said of a step.

    Raises:
        UsageError: there is no such choice, or a condition is no JSON.
    """
    choose("rule", said["rule"], (None, *map(str, Rule)))
    choose("when_unmet", said["when_unmet"], [*map(str, WhenUnmet)])
    choose("when_exhausted", said["when_exhausted"], [*map(str, WhenUnmet)])
    try:
        return StepRules(**said)
    except ValidationError as error:
        wrong = error.errors(include_input=False, include_url=False)[0]
        raise UsageError(f"{'.'.join(map(str, wrong['loc'][:1]))} of a step is no JSON: {wrong['msg']}") from None


def make_map(over: str, max_items: int | None, when_empty: AnyWhenEmpty, when_item_fails: AnyWhenItemFails) -> MapRules:
    """Return what is said of a map; what it maps over is resolved once all steps are known.

    Raises:
        UsageError: there is no such choice.
    """
    if not isinstance(over, str) or not over:
        raise UsageError(f"over={over!r} names nothing: give the slug of an upstream step, or 'payload'")
    choose("when_empty", when_empty, get_args(AnyWhenEmpty))
    choose("when_item_fails", when_item_fails, get_args(AnyWhenItemFails))
    if max_items is not None:
        _check_number("max_items", max_items)
    return MapRules(over=over, max_items=max_items, when_empty=when_empty, when_item_fails=when_item_fails)


def make_child(binding: AnyBinding) -> ChildRules | None:
    """Return what a binding says of a child; None for any other binding."""
    if not isinstance(binding, Child):
        return None
    path = None if binding.payload is None else (binding.payload,)
    return ChildRules(
        workflow=binding.workflow, payload=path, retries=binding.retries, max_children=binding.max_children
    )


def check_at_once(at_once: int) -> int:
    """Return how many items a process may execute at the same time.

    Raises:
        UsageError: it is no such number.
    """
    return _check_number("at_once", at_once)


def _check_number(name: str, given: int) -> int:
    if isinstance(given, bool) or not isinstance(given, int) or given < 1:
        raise UsageError(f"{name}={given!r} is no number of items: give 1 or more")
    return given
