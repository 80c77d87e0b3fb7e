"""Which items were handed over, and may be overdue."""

import pytest

from pgflow_prefect.execution.steps import handed_over
from pgflow_prefect.execution.steps.handed_over import HandedOver


def test_an_item_that_is_claimed_again_is_found_once() -> None:
    items = HandedOver(60)
    items.add([1, 2])
    assert items.take([2, 3], were_all=False) == [2]
    assert items.take([2, 1], were_all=True) == [1]


def test_without_a_limit_no_item_is_overdue() -> None:
    items = HandedOver(None)
    items.add([1])
    assert items.take([1], were_all=True) == []


def test_items_that_others_have_ended_are_forgotten_long_after_their_time(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(handed_over, "monotonic", lambda: now)
    items = HandedOver(60)
    items.add([1, 2, 3])
    now = 1000.0
    items.add([3, 4])
    assert items.take([], were_all=False) == []
    assert len(items) == 4
    items.take([], were_all=True)
    assert len(items) == 2
    assert items.take([3, 4], were_all=True) == [3, 4]
