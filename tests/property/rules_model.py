"""What a run with rules should become, by a model that knows nothing of counters, waves or snapshots.

It looks at all upstream steps of a step each time, and goes on until nothing changes any more. So it is slow, and
short enough to be read beside the table of the rules in the guide.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

Graph = Mapping[str, Collection[str]]
"""Each step with the steps that it waits for."""

TOLERANT = (
    "all_done",
    "all_done_min_one_success",
    "all_done_setup_success",
    "all_failed",
    "always",
    "none_skipped",
    "one_done",
    "one_failed",
    "one_success",
)
"""Rules of steps that may run after a failure."""

INTOLERANT = ("all_success", "all_skipped", "none_failed", "none_failed_min_one_success")

_UNMET_RULES = ("all_failed", "all_skipped", "one_done", "one_failed")


@dataclass
class StepOptions:
    """What a row of `pgflow.steps` says of a step beside its name."""

    rule: str | None = None
    required: Any = None
    forbidden: Any = None
    when_unmet: str = "skip"
    when_exhausted: str = "fail"
    fails_run: bool = True
    is_setup: bool = False
    is_map: bool = False
    over: str | None = None
    path: tuple[str, ...] = ()
    max_items: int = 100
    when_empty: str = "complete"
    when_item_fails: str = "stop"


@dataclass
class Item:
    """One item of a map: how it stands, and its result."""

    status: str = "pending"
    result: Any = None
    is_left_out: bool = False


@dataclass(frozen=True)
class End:
    """How a step has ended.

    Attributes:
        outcome: success, skip, skip-cascade, failed, not_run.
        reason: the row's skip_reason.
        by: the step that did not take it as a branch.
    """

    outcome: str
    reason: str | None = None
    by: str | None = None

    @property
    def row(self) -> tuple[str, str | None, bool | None]:
        """Its status, skip_reason and skip_cascades."""
        status = "failed" if self.outcome in ("failed", "not_run") else "completed"
        cascades = self.outcome == "skip-cascade" if self.outcome.startswith("skip") else None
        return status, self.reason, cascades


@dataclass
class Tally:
    """How the upstream steps of a step have ended."""

    ups: int
    ended: int
    ok: int
    skips: int
    hard_skips: int
    failures: int
    not_run: int
    setups: list[str | None]

    @property
    def is_over(self) -> bool:
        """Whether all of them have."""
        return self.ended == self.ups

    @property
    def bad(self) -> int:
        """Those that have failed, or were not run."""
        return self.failures + self.not_run


def decide(rule: str | None, tally: Tally) -> str | None:
    """Return what a rule says: run, skip, fail, or None while a later end may change it."""
    if tally.ups == 0 or rule == "always":
        return "run"
    early = _decide_early(rule, tally)
    if early is not None or not tally.is_over:
        return early
    return _decide_at_last(rule, tally)


def _decide_early(rule: str | None, tally: Tally) -> str | None:
    if rule is None or rule in ("all_success", "none_failed", "none_failed_min_one_success"):
        return "fail" if tally.bad else None
    runs = {"one_success": tally.ok, "one_failed": tally.bad, "one_done": tally.ok + tally.failures}
    skips = {
        "all_failed": tally.ok + tally.skips,
        "all_skipped": tally.ok + tally.bad,
        "none_skipped": tally.skips,
        "all_done_min_one_success": tally.skips,
    }
    if runs.get(rule):
        return "run"
    return "skip" if skips.get(rule) else None


def _decide_at_last(rule: str | None, tally: Tally) -> str:  # noqa: PLR0911  a table
    match rule:
        case None:
            return "skip" if tally.hard_skips else "run"
        case "all_success":
            return "skip" if tally.skips else "run"
        case "none_failed_min_one_success":
            return "run" if tally.ok else "skip"
        case "one_success":
            return "fail" if tally.bad else "skip"
        case "one_failed" | "one_done":
            return "skip"
        case "all_done_min_one_success":
            return "run" if tally.ok else "fail"
        case "all_done_setup_success":
            if not tally.setups or "success" in tally.setups:
                return "run"
            return "skip" if all(str(setup).startswith("skip") for setup in tally.setups) else "fail"
    return "run"


@dataclass
class Model:
    """A run.

    Attributes:
        graph: its steps.
        options: what is said of each.
        payload: of the run.
        when_failed: of the workflow.
        failed_by: of the workflow.
        ends: of the steps that have ended.
        pending: the steps that are to be executed.
        results: of the steps that were executed.
        status: of the run.
        items: of the maps that have a row, by step.
    """

    graph: Graph
    options: Mapping[str, StepOptions]
    payload: Any
    when_failed: str | None
    failed_by: str
    ends: dict[str, End] = field(default_factory=dict)
    pending: set[str] = field(default_factory=set)
    results: dict[str, Any] = field(default_factory=dict)
    status: str = "pending"
    items: dict[str, list[Item]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.go_on()

    @property
    def continues(self) -> bool:
        """Whether it goes on after a failure."""
        if self.when_failed is not None:
            return self.when_failed == "continue"
        return any(each.rule in TOLERANT or not each.fails_run for each in self.options.values())

    @property
    def remaining(self) -> int:
        """How many steps have not ended; without `continues`, a failed step never counts as ended."""
        return sum(
            step not in self.ends or (not self.continues and self.ends[step].row[0] == "failed") for step in self.graph
        )

    @property
    def unmet(self) -> dict[str, int]:
        """How many upstream steps each half-met join still waits for."""
        counts = {step: sum(up not in self.ends for up in ups) for step, ups in self.graph.items()}
        return {step: count for step, count in counts.items() if 0 < count < len(self.graph[step])}

    @property
    def rows(self) -> dict[str, tuple[str, str | None, bool | None]]:
        """Status, skip_reason and skip_cascades of each step that has a row."""
        return dict.fromkeys(self.pending, ("pending", None, None)) | {step: end.row for step, end in self.ends.items()}

    @property
    def untouched(self) -> list[str]:
        """The steps that have no row."""
        return [step for step in self.graph if step not in self.rows]

    @property
    def open_maps(self) -> list[str]:
        """The maps that have items that have not ended."""
        return sorted(step for step, items in self.items.items() if any(each.status == "pending" for each in items))

    def find_downstream(self, step: str) -> list[str]:
        """Return the steps that wait for a step."""
        return [each for each in self.graph if step in self.graph[each]]

    def decide(self, step: str) -> str | None:
        """Return what the rule of a step says now."""
        outcomes = [self.ends[up].outcome if up in self.ends else None for up in self.graph[step]]
        tally = Tally(
            ups=len(outcomes),
            ended=sum(each is not None for each in outcomes),
            ok=outcomes.count("success"),
            skips=outcomes.count("skip") + outcomes.count("skip-cascade"),
            hard_skips=outcomes.count("skip-cascade"),
            failures=outcomes.count("failed"),
            not_run=outcomes.count("not_run"),
            setups=[
                outcome for up, outcome in zip(self.graph[step], outcomes, strict=True) if self.options[up].is_setup
            ],
        )
        return decide(self.options[step].rule, tally)

    def go_on(self) -> None:
        """Decide what follows, until nothing does."""
        while self.status == "pending" and (wave := [*self._find_wave()]):
            for step, verdict in wave:
                self._apply(step, verdict)
            is_broken = any(self.ends[step].outcome == "failed" for step, _ in wave if step in self.ends)
            if is_broken and not self.continues:
                self.status = "failed"
        if self.status == "pending" and len(self.ends) == len(self.graph):
            failed = [step for step, end in self.ends.items() if end.row[0] == "failed"]
            self.status = "failed" if any(self._decides(step) for step in failed) else "completed"

    def _find_wave(self) -> Iterator[tuple[str, str]]:
        for step in self.untouched:
            verdict = self.decide(step)
            if verdict is not None:
                yield step, verdict

    def _apply(self, step: str, verdict: str) -> None:
        options = self.options[step]
        if verdict == "skip":
            reason = "rule_unmet" if options.rule in _UNMET_RULES else "dependency_skipped"
            self.ends[step] = End("skip-cascade", reason)
        elif verdict == "fail":
            self.ends[step] = End("not_run", "dependency_failed")
        elif not self._is_met(step):
            outcome = "failed" if options.when_unmet == "fail" else options.when_unmet
            self.ends[step] = End(outcome, "condition_unmet")
        elif not options.is_map:
            self.pending.add(step)
        else:
            self._begin_map(step)

    def _begin_map(self, step: str) -> None:
        options = self.options[step]
        array = self.find_array(step)
        if not isinstance(array, list) or len(array) > options.max_items:
            self.ends[step] = End("failed", "not_mappable")
        elif array:
            self.pending.add(step)
            self.items[step] = [Item() for _ in array]
        elif options.when_empty == "complete":
            self.ends[step] = End("success")
            self.results[step] = []
        else:
            self.ends[step] = End(options.when_empty, "no_items")

    def find_array(self, step: str) -> Any:
        """Return what a map maps over; no array, where it can't."""
        ups = self.graph[step]
        over = self.options[step].over or next(iter(ups), "payload")
        if over not in ups:
            found = self.payload
            for key in self.options[step].path:
                found = found.get(key) if isinstance(found, dict) else None
            return found
        is_there = over in self.ends and self.ends[over].outcome == "success"
        return self.results[over] if is_there else []

    def _is_met(self, step: str) -> bool:
        given = self.payload
        if self.graph[step]:
            done = (up for up in self.graph[step] if up in self.ends and self.ends[up].outcome == "success")
            given = {"payload": self.payload} | {up: self.results[up] for up in done}
        options = self.options[step]
        return (options.required is None or contains(given, options.required)) and not (
            options.forbidden is not None and contains(given, options.forbidden)
        )

    def _decides(self, step: str) -> bool:
        if self.failed_by == "steps":
            return self.options[step].fails_run
        if last := [each for each in self.graph if self._is_last(each)]:
            return step in last
        return not self.find_downstream(step)

    def _is_last(self, step: str) -> bool:
        below = (self.options[each].fails_run for each in self.find_downstream(step))
        return self.options[step].fails_run and not any(below)

    # What happens to it

    def complete(self, step: str, result: Any) -> None:
        """Note that a pending step was executed."""
        self._end(step, End("success"))
        self.results[step] = result
        self.go_on()

    def fail(self, step: str) -> None:
        """Note that the last attempt of a pending step has failed."""
        outcome = self.options[step].when_exhausted
        if outcome != "fail":
            self._end(step, End(outcome, "handler_failed"))
        else:
            self._end(step, End("failed"))
            if not self.continues and self.status == "pending":
                self.status = "failed"
        self.go_on()

    def end_items(self, step: str, ends: Mapping[int, Item]) -> None:
        """Note how items of a map have ended; the first report on an item counts."""
        items = self.items[step]
        fails = False
        for index, end in ends.items():
            if items[index].status == "pending":
                items[index] = end
                fails = fails or end.status == "failed"
        if fails or all(each.status != "pending" for each in items):
            self._end_map(step)

    def _end_map(self, step: str) -> None:
        if step not in self.pending:
            return
        items, policy = self.items[step], self.options[step].when_item_fails
        is_over = all(each.status != "pending" for each in items)
        has_failed = any(each.status == "failed" for each in items)
        if has_failed and policy != "skip" and (is_over or policy == "stop"):
            self.fail(step)
        elif is_over:
            done = [each.result for each in items if each.status == "completed" and not each.is_left_out]
            self.complete(step, done)

    def skip(self, step: str, *, cascade: bool) -> None:
        """Skip a step that is pending or has no row."""
        self._end(step, End("skip-cascade" if cascade else "skip", "requested"))
        self.go_on()

    def branch(self, step: str, taken: Collection[str], *, whole: bool) -> None:
        """Complete a pending step that takes some of its branches."""
        self._end(step, End("success"))
        self.results[step] = None
        below = self._find_below(self.find_downstream(step)) if whole else set(self.find_downstream(step))
        left_out = below - self._find_below(taken)
        if self.status == "pending":
            for each in left_out - self.rows.keys():
                self.ends[each] = End("skip-cascade", "branch_not_taken", by=step)
        self.go_on()

    def _find_below(self, steps: Collection[str]) -> set[str]:
        found: set[str] = set()
        left = [*steps]
        while left:
            step = left.pop()
            if step not in found:
                found.add(step)
                left += self.find_downstream(step)
        return found

    def _end(self, step: str, end: End) -> None:
        self.pending.discard(step)
        self.ends[step] = end

    def cancel(self) -> None:
        """Cancel it."""
        for step in [*self.pending]:
            self._end(step, End("failed"))
        self.status = "failed"

    def reopen(self) -> set[str]:
        """Make it pending again, and undecided what would be decided otherwise now; return whose attempts are over."""
        undone = {step for step, end in self.ends.items() if end.row[0] == "failed"}
        for step in undone:
            if self.ends.pop(step).reason is None:
                self.pending.add(step)
                self.items[step] = [Item() if item.status == "failed" else item for item in self.items.get(step, [])]
        while found := {step for step in self.rows if self._follows_from(step, undone)}:
            for step in found:
                self._take_back(step)
            undone |= found
        self.status = "pending"
        self.go_on()
        for step in sorted(self.pending):  # those whose items were all reported while it was not pending
            if self.status == "pending" and self.options[step].is_map:
                self._resume_map(step)
        return undone

    def _take_back(self, step: str) -> None:
        self.ends.pop(step, None)
        self.pending.discard(step)
        self.items.pop(step, None)

    def _resume_map(self, step: str) -> None:
        if step in self.pending and all(each.status != "pending" for each in self.items[step]):
            self._end_map(step)

    def _follows_from(self, step: str, undone: set[str]) -> bool:
        if not undone.intersection(self.graph[step]):
            return False
        end = self.ends.get(step)
        reason = end.reason if end is not None else None
        if reason == "branch_not_taken":
            return end is not None and end.by in undone
        if reason == "requested":
            return False
        return self.decide(step) != ("skip" if reason in ("dependency_skipped", "rule_unmet") else "run")


def contains(document: Any, pattern: Any) -> bool:
    """Tell whether a document contains a pattern, as the operator `@>` of jsonb does."""
    if isinstance(document, dict) and isinstance(pattern, dict):
        return all(key in document and contains(document[key], each) for key, each in pattern.items())
    if isinstance(document, list) and isinstance(pattern, list):
        return all(any(contains(item, each) for item in document) for each in pattern)
    return type(document) is type(pattern) and bool(document == pattern)
