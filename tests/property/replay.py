"""The calls of several sessions on one run, in the order in which the engine has made them, in the model of rules."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from tests.property.rules_model import Item, Model
from tests.property.sessions import Call


@dataclass
class Replay:
    """The calls on one run in the model, one after the other.

    Attributes:
        model: of the run.
        epoch: of the run.
        attempts: of its steps.
        under_way: the steps that are claimed.
        item_attempts: the latest one of each item that was claimed.
        items_under_way: the items that are claimed.
        late: how many reports came after another one.
    """

    model: Model
    epoch: int = 0
    attempts: dict[str, int] = field(default_factory=dict)
    under_way: set[str] = field(default_factory=set)
    item_attempts: dict[tuple[str, int], int] = field(default_factory=dict)
    items_under_way: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    late: int = 0

    def refuses(self, call: Call) -> bool:
        """Tell whether the engine has to refuse a call now."""
        status, row = self.model.status, self.model.rows.get(call.get("step", ""))
        match call["do"]:
            case "claim_step":
                return status != "pending" or row is None or row[0] == "failed"
            case "skip_step":
                may_begin = status == "pending" and call["attempt"] is None and call["epoch"] in (None, self.epoch)
                return row is None and not may_begin
            case "reopen_run":
                return status == "completed"
            case "take_run":
                return status != "pending"
            case "cancel_run" | "repair_run":
                return False
        return row is None

    def apply(self, call: Call, answer: Sequence[Mapping[str, Any]]) -> None:
        """Do what a call has done, and compare what it has answered."""
        assert not self.refuses(call)
        do, step = call["do"], call.get("step", "")
        if do.endswith("_items"):
            self._apply_to_items(do, step, call, answer)
        elif do == "claim_step":
            self._claim(step, answer[0])
        elif step:
            self._report(do, step, call)
        elif do == "cancel_run" and self.model.status != "completed":
            self.model.cancel()
        elif do == "reopen_run" and self.model.status == "failed":
            self._reopen()
        elif do == "take_run":
            self.epoch += 1
            assert answer == [{"epoch": self.epoch}]
        self.under_way &= self.model.pending

    def _claim(self, step: str, answer: Mapping[str, Any]) -> None:
        if step not in self.model.pending:
            assert answer["status"] == "completed"
            return
        assert answer == {"status": "pending", "attempt": self.attempts.get(step, 0) + 1}
        self.under_way.add(step)

    def _report(self, do: str, step: str, call: Call) -> None:
        is_of_now = call["epoch"] in (None, self.epoch)
        is_under_way = step in self.under_way and call["attempt"] == self.attempts[step]
        is_new = do == "skip_step" and step not in self.model.rows
        if not is_new and (
            step not in self.model.pending or not is_of_now or (call["attempt"] is not None and not is_under_way)
        ):
            self.late += 1
            return
        match do:
            case "complete_step":
                self.model.complete(step, json.loads(call["result"]))
            case "fail_step":
                self.model.fail(step)
            case "skip_step":
                self.model.skip(step, cascade=call["cascade"])
            case "take_branches":
                self.model.branch(step, call["taken"], whole=call["whole"])

    def _reopen(self) -> None:
        undone = self.model.reopen()
        self.epoch += 1
        self.under_way -= undone
        for step in undone:
            self.items_under_way.pop(step, None)

    def _apply_to_items(self, do: str, step: str, call: Call, answer: Sequence[Mapping[str, Any]]) -> None:
        items, claimed = self.model.items.get(step, []), self.items_under_way[step]
        if do == "claim_items":
            is_open = self.model.status == "pending" and step in self.model.pending
            free = {place for place, item in enumerate(items) if item.status == "pending"} - claimed
            got = {each["item_index"]: each["attempt"] for each in answer}
            assert len(got) == len(answer) == (min(call["wanted"], len(free)) if is_open else 0)
            assert free >= got.keys()
            assert all(attempt > self.item_attempts.get((step, index), 0) for index, attempt in got.items())
            claimed.update(got)
            self.item_attempts |= {(step, index): attempt for index, attempt in got.items()}
            return
        accepted = [
            place
            for place, index in enumerate(call["indexes"])
            if index < len(items)
            and items[index].status == "pending"
            and (
                call["attempts"] is None
                or (index in claimed and call["attempts"][place] == self.item_attempts[step, index])
            )
        ]
        assert answer == [{"accepted": len(accepted)}]
        self.late += len(call["indexes"]) - len(accepted)
        claimed.difference_update(call["indexes"][place] for place in accepted)
        if accepted and do != "retry_items":
            ends = {call["indexes"][place]: self._make_end(do, call, place) for place in accepted}
            self.model.end_items(step, ends)

    def _make_end(self, do: str, call: Call, place: int) -> Item:
        if do == "complete_items":
            return Item("completed", json.loads(call["results"])[place])
        return Item("completed", is_left_out=True) if do == "skip_items" else Item("failed")

    def check(self, seen: Mapping[str, Any]) -> None:
        """Compare what the run has become with the model."""
        model = self.model
        assert {step: tuple(row) for step, row in seen["rows"].items()} == model.rows
        items = {
            step: [(each.status, each.result, each.is_left_out) for each in model.items[step]] for step in model.items
        }
        assert {step: [*map(tuple, found)] for step, found in seen["items"].items()} == {
            step: found for step, found in items.items() if found
        }
        counts = {
            step: [sum(status == wanted for status, _, _ in found) for wanted in ("pending", "failed")]
            for step, found in items.items()
            if found
        }
        assert seen["counts"] == counts
        ended = {step for step, end in model.ends.items() if end.outcome == "success"}
        assert seen["results"] == {step: model.results[step] for step in ended}
        assert (seen["status"], seen["epoch"]) == (model.status, self.epoch)
        assert seen["has_message"] == (model.status == "failed")
        if model.status != "failed":
            assert seen["remaining"] == model.remaining
        if model.status == "pending":
            assert model.pending, "it is stuck"
            assert seen["waiting"] == model.unmet
        self.attempts = dict(seen["attempts"])
