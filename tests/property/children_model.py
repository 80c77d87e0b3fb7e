"""What a run with child workflows should become: the naive model, nested.

A child is a model of its own. Its end is told to its parent at once, as in the engine one transaction does both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.property.rules_model import Graph, Item, Model, StepOptions

Key = tuple[str, int | None]
"""A step, and the item of a map of children."""


@dataclass(frozen=True)
class ChildOptions:
    """What a step says of its children, and the workflow that they are runs of.

    Attributes:
        workflow: its slug.
        graph: its steps.
        options: what is said of each.
        when_failed: of that workflow.
        failed_by: of that workflow.
        below: its own steps that are children.
        retries: how many further children follow one that has failed.
        path: where their payload is in the step's input; None: all of it.
        max_children: of a map, how many are under way at the same time.
    """

    workflow: str
    graph: Graph
    options: Mapping[str, StepOptions]
    when_failed: str | None
    failed_by: str
    below: Mapping[str, "ChildOptions"]
    retries: int
    path: tuple[str, ...] | None
    max_children: int


@dataclass
class Slot:
    """The attempts of a step, or of an item, since it was last decided; `child` is that of the latest, if one began."""

    attempts: int = 0
    child: "Family | None" = None


@dataclass
class Family(Model):
    """A run, and the runs nested in it.

    Attributes:
        children: its steps that are children, with what they say of them.
        slots: the attempts of each such step or item.
        born: all children that ever began, in their order for each key.
        was_cancelled: whether its end was a cancellation.
        parent: the run that it is nested in, and for which step or item.
    """

    children: Mapping[str, ChildOptions] = field(default_factory=dict)
    slots: dict[Key, Slot] = field(default_factory=dict)
    born: list[tuple[Key, "Family"]] = field(default_factory=list)
    was_cancelled: bool = False
    parent: "tuple[Family, Key] | None" = None
    _due: dict[str, list[int]] = field(default_factory=dict)  # items that were begun before, and begin first
    _is_told: bool = False

    @property
    def leaves(self) -> dict[str, Any]:
        """The result of the run: that of each of its last steps that was executed."""
        ended = (step for step, end in self.ends.items() if end.outcome == "success")
        return {step: self.results[step] for step in ended if not self.find_downstream(step)}

    def go_on(self) -> None:
        """Decide what follows; then begin the children of what has started, and tell the parent of an end."""
        begun = {*self.pending}
        super().go_on()
        for step in sorted(self.pending - begun):
            if self.status == "pending" and step in self.children:
                self._begin(step)
        self._tell()

    def _tell(self) -> None:
        if self.status != "pending" and not self._is_told and self.parent is not None:
            self._is_told = True
            parent, key = self.parent
            parent.hear(key, self)

    # How children begin

    def _begin(self, step: str) -> None:
        if self.options[step].is_map:
            self._begin_items(step, self.children[step].max_children)
        else:
            self._attempt(step)

    def _attempt(self, step: str) -> None:
        if step not in self.pending:
            return
        slot = self._bear((step, None))
        while self._may_try_again(step, slot):
            slot = self._bear((step, None))
        if slot.child is None or slot.child.status != "pending":
            self._end_by((step, None), slot.child)

    def _begin_items(self, step: str, places: int) -> None:
        while places > 0 and self.status == "pending" and step in self.pending:
            index = next(self._find_next_items(step), None)
            if index is None:
                break
            slot = self._bear((step, index))
            if slot.child is not None and slot.child.status == "pending":
                places -= 1
            elif self._may_try_again(step, slot):
                self._due.setdefault(step, []).append(index)
            else:
                self._end_by((step, index), slot.child)

    def _find_next_items(self, step: str) -> Iterator[int]:
        due = self._due.get(step, [])
        while due:
            yield due.pop(0)
        yield from (index for index, _ in enumerate(self.items[step]) if (step, index) not in self.slots)

    def _bear(self, key: Key) -> Slot:
        """Count an attempt, and begin its child, if there is a payload for it."""
        step, _ = key
        said, slot = self.children[step], self.slots.setdefault(key, Slot())
        slot.attempts += 1
        slot.child = None
        payload: Any = self._find_input(key)
        for name in said.path or ():
            if name not in payload:
                return slot
            payload = payload[name]
        child = Family(said.graph, said.options, payload, said.when_failed, said.failed_by, children=said.below)
        child.parent, child._is_told = (self, key), child.status != "pending"
        slot.child = child
        self.born.append((key, child))
        return slot

    def _find_input(self, key: Key) -> dict[str, Any]:
        step, index = key
        ups = self.graph[step]
        given = {up: self.results[up] for up in ups if up in self.ends and self.ends[up].outcome == "success"}
        if index is None:
            return {"payload": self.payload} | given
        over = self.options[step].over or next(iter(ups), "payload")
        array = self.find_array(step)
        given.pop(over, None)
        return {"payload": None if over == "payload" else self.payload} | given | {"item": array[index]}

    # How children end

    def _may_try_again(self, step: str, slot: Slot) -> bool:
        child = slot.child
        return (
            child is not None
            and child.status == "failed"
            and not child.was_cancelled
            and self.status == "pending"
            and slot.attempts <= self.children[step].retries
        )

    def hear(self, key: Key, child: "Family") -> None:
        """Note that a child has ended: the latest one of its step or item ends that, or another one follows."""
        step, index = key
        slot = self.slots.get(key)
        if slot is None or slot.child is not child:
            return
        if step not in self.pending or not self._may_try_again(step, slot):
            self._end_by(key, child)
        elif index is None:
            self._attempt(step)
        else:
            self._due.setdefault(step, []).append(index)
        if index is not None:
            self._begin_items(step, 1)

    def _end_by(self, key: Key, child: "Family | None") -> None:
        step, index = key
        is_done = child is not None and child.status == "completed"
        result = child.leaves if child is not None and is_done else None
        if index is not None:
            self.end_items(step, {index: Item("completed", result) if is_done else Item("failed")})
        elif step in self.pending:
            if is_done:
                self.complete(step, result)
            else:
                self.fail(step)

    # What happens to the parent

    def fail(self, step: str) -> None:
        """Note that a step has failed: its child is cancelled. Children of items go on."""
        super().fail(step)
        self._leave(step, of_items=False)

    def skip(self, step: str, *, cascade: bool) -> None:
        """Skip a step: its children are cancelled."""
        super().skip(step, cascade=cascade)
        self._leave(step)

    def _leave(self, step: str, *, of_items: bool = True) -> None:
        for (each, index), child in [*self.born]:
            if each == step and child.status == "pending" and (of_items or index is None):
                child.cancel()

    def cancel(self) -> None:
        """Cancel it, and its children. Those of steps that were completed by hand go on."""
        super().cancel()
        self.was_cancelled = True
        self._tell()
        for step in self.children:
            end = self.ends.get(step)
            if end is None or end.outcome != "success":
                self._leave(step)

    def _take_back(self, step: str) -> None:
        super()._take_back(step)
        for key in [key for key in self.slots if key[0] == step]:
            del self.slots[key]
        self._due.pop(step, None)
        self._leave(step)

    def reopen(self) -> set[str]:
        """Make it pending again; failed children of its steps go on, and those that could not begin are tried again."""
        self.was_cancelled = self._is_told = False
        undone = super().reopen()
        for step in sorted(self.pending & self.children.keys()):
            if self.status != "pending":
                break
            if step in self.pending:
                self._resume(step)
        return undone

    def _resume(self, step: str) -> None:
        if not self.options[step].is_map:
            slot = self.slots.get((step, None))
            if slot is None or slot.child is None:
                self._attempt(step)
            elif slot.child.status == "failed":
                slot.child.reopen()
            return
        begun = [i for i, item in enumerate(self.items[step]) if item.status == "pending" and (step, i) in self.slots]
        under_way = [(index, child) for index in begun if (child := self.slots[step, index].child) is not None]
        self._due[step] = [index for index in begun if self.slots[step, index].child is None]
        for index, child in under_way:
            is_awaited = step in self.pending and self.items[step][index].status == "pending"
            if child.status == "failed" and self.status == "pending" and is_awaited:
                child.reopen()
        self._begin_items(step, self.children[step].max_children - len(under_way))
