"""What an exported file for Prefect has beside `common_part`: it starts steps when their rules say so."""

from __future__ import annotations

from collections import deque as _deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial as _partial
from inspect import signature as _signature
from itertools import islice as _islice
from queue import Empty as _Empty
from queue import SimpleQueue as _SimpleQueue
from typing import Any

from prefect import allow_failure as _allow_failure
from prefect.runtime import flow_run as _flow_run
from prefect.runtime import task_run as _task_run

from pgflow_prefect.deployment.plain.common_part import (
    Branch,
    FailedStep,
    Skip,
    StepContext,
    _call_handler,
    _log,
)

# The exported file begins here.
_INDEX = "index of the item"  # no argument of a handler has this name
_BEFORE_FAILURES = {None, "all_success", "none_failed", "none_failed_min_one_success", "all_skipped"}
_SUCCESS, _FAILED, _SKIPPED, _NOT_RUN = "success", "failed", "skipped", "not run"


@dataclass(frozen=True)
class _Step:
    slug: str
    task: Any
    function: Any  # the handler; None for a step that fails
    upstream: Mapping[str, str]  # the step, by the argument that gets its result
    rule: str | None = None
    fails_run: bool = True
    is_setup: bool = False
    when_exhausted: str = "fail"
    over: str | None = None  # of a map: a step, or payload
    path: tuple[str, ...] = ()
    when_empty: str = "complete"
    when_item_fails: str = "stop"
    is_map: bool = False
    at_once: int = 1  # of a map, the most items at the same time


@dataclass(frozen=True)
class _End:
    outcome: str
    result: Any = None
    cascade: bool = True
    taken: tuple[str, ...] | None = None  # of a branch
    whole: bool = False
    left_out: frozenset[str] = frozenset()  # what its decision skips
    error: BaseException | None = None


@dataclass
class _Going:
    futures: list[Any]
    left: int  # futures that have not ended
    items: Iterator[tuple[int, Any]]  # of a map, those that have not begun
    given: dict[str, Any]
    after: list[Any]
    is_cut: bool = False  # the run stopped before all items had begun


@dataclass
class _Run:
    steps: Mapping[str, _Step]
    payload: Any
    stops: bool
    failed_by: str
    ended: dict[str, _End] = field(default_factory=dict)
    going: dict[str, _Going] = field(default_factory=dict)
    futures: dict[str, list[Any]] = field(default_factory=dict)
    finished: _SimpleQueue[tuple[str, Any]] = field(default_factory=_SimpleQueue)
    below: dict[str, list[str]] = field(default_factory=dict)
    missing: dict[str, int] = field(default_factory=dict)  # steps above that have not ended
    left_out: set[str] = field(default_factory=set)
    has_failed: bool = False

    def execute(self) -> dict[str, Any]:
        """Execute all steps, and return the results of those that no other waits for."""
        self.below = {slug: [] for slug in self.steps}
        for slug, step in self.steps.items():
            self.missing[slug] = len(step.upstream)
            for each in step.upstream.values():
                self.below[each].append(slug)
        self._begin_all([slug for slug, missing in self.missing.items() if not missing])
        while self.going:
            self._begin_all(self._wait())
        return self._conclude()

    @property
    def _has_stopped(self) -> bool:
        return self.stops and self.has_failed

    def _begin_all(self, slugs: Sequence[str]) -> None:
        """Begin these steps, or decide that they are not executed, and all that this lets begin."""
        ready = _deque(slugs)
        while ready and not self._has_stopped:
            step = self.steps[ready.popleft()]
            verdict = self._decide(step) or self._begin(step)
            if verdict is not None:
                ready += self._end(step.slug, verdict)

    def _end(self, slug: str, end: _End) -> list[str]:
        """Note the end of a step, and return the steps that wait for nothing more."""
        self.ended[slug] = end
        self.left_out |= end.left_out
        self.has_failed = self.has_failed or end.outcome == _FAILED
        ready = []
        for each in self.below[slug]:
            self.missing[each] -= 1
            if not self.missing[each]:
                ready.append(each)
        return ready

    def _decide(self, step: _Step) -> _End | None:
        if step.slug in self.left_out:
            return _End(_SKIPPED)
        return _find_verdict(step, {each: self.ended[each] for each in step.upstream.values()}, self.steps)

    def _begin(self, step: _Step) -> _End | None:
        """Begin a step; return its end if it ends at once."""
        given = self._gather_arguments(step)
        if not step.is_map:
            after = [_allow_failure(each) for slug in step.upstream.values() for each in self.futures.get(slug, ())]
            self._start(step, _Going([], 0, iter(()), given, after), given)
            return None
        try:
            items = self._find_items(step)
        except (KeyError, TypeError, ValueError) as error:
            return _End(_FAILED, error=error)
        if not items:
            skips = step.when_empty != "complete"
            return _End(_SKIPPED if skips else _SUCCESS, None if skips else [], step.when_empty == "skip-cascade")
        # All above has ended. One edge for each step shows that: edges between all items would be their square.
        after = [_allow_failure(self.futures[slug][0]) for slug in step.upstream.values() if slug in self.futures]
        self._start_items(step, _Going([], 0, enumerate(items), given, after), step.at_once)
        return None

    def _gather_arguments(self, step: _Step) -> dict[str, Any]:
        """Return what the handler takes, and no more: Prefect reads the arguments of each task run."""
        results = {each: self.ended[each].result for each in step.upstream.values() if self._has_result(each)}
        ends = self.ended.items() if step.rule not in _BEFORE_FAILURES else ()
        given = {
            "payload": self.payload,
            "upstream": results,
            **{name: results[each] for name, each in step.upstream.items() if each in results},
            "context": [[slug, str(end.error or "")] for slug, end in ends if end.outcome == _FAILED],
        }
        taken = _signature(step.function).parameters if step.function is not None else {}
        return {name: value for name, value in given.items() if name in taken}

    def _start(self, step: _Step, going: _Going, given: dict[str, Any]) -> None:
        future = step.task.submit(given, wait_for=going.after)
        going.futures.append(future)
        going.left += 1
        self.going[step.slug] = going
        self.futures[step.slug] = going.futures
        future.add_done_callback(_partial(self._note, step.slug))

    def _start_items(self, step: _Step, going: _Going, most: int) -> None:
        for index, item in _islice(going.items, most):
            self._start(step, going, {**going.given, "item": item, _INDEX: index})

    def _note(self, slug: str, future: Any) -> None:
        self.finished.put((slug, future))

    def _wait(self) -> list[str]:
        """Wait until a task has ended; return the steps that can begin."""
        try:
            slug, future = self.finished.get(timeout=1)  # so that a time-out or a cancellation of the flow gets through
        except _Empty:
            return []
        step, going = self.steps[slug], self.going[slug]
        going.left -= 1
        if self._has_stopped:
            going.is_cut = next(going.items, None) is not None or going.is_cut
            going.items = iter(())
        elif step.when_item_fails == "stop" and _read(future).outcome == _FAILED:
            going.items = iter(())
        self._start_items(step, going, 1)
        if going.left:
            return []
        del self.going[slug]
        ends = [_read(each) for each in going.futures]
        return self._end(slug, _End(_NOT_RUN) if going.is_cut else self._gather(step, ends))

    def _has_result(self, slug: str) -> bool:
        return self.ended[slug].outcome == _SUCCESS

    def _find_items(self, step: _Step) -> list[Any]:
        found = self.payload if step.over == "payload" else self.ended[str(step.over)].result
        for name in step.path:
            found = found[name]
        if found is not None and not isinstance(found, list):
            raise TypeError(f"step {step.slug!r} maps over something that is no array")
        return found or []

    def _conclude(self) -> dict[str, Any]:
        leaves = [slug for slug in self.steps if not self.below[slug]]
        counting = leaves if self.failed_by == "leaves" and not self.stops else [*self.steps]
        bad = {_FAILED, _NOT_RUN} if self.failed_by == "leaves" else {_FAILED}
        for slug in counting:
            end = self.ended.get(slug)
            if end is not None and end.outcome in bad and self.steps[slug].fails_run:
                raise RuntimeError(f"step {slug!r} has {end.outcome}") from end.error
        return {slug: self.ended[slug].result for slug in leaves if slug in self.ended and self._has_result(slug)}

    def _gather(self, step: _Step, ends: Sequence[_End]) -> _End:
        """Return the end of a step from those of its tasks."""
        failed = [each for each in ends if each.outcome == _FAILED]
        if failed and not (step.is_map and step.when_item_fails == "skip"):
            if step.when_exhausted == "fail":
                return failed[0]
            return _End(_SKIPPED, cascade=step.when_exhausted == "skip-cascade")
        if step.is_map:
            return _End(_SUCCESS, [each.result for each in ends if each.outcome == _SUCCESS])
        [end] = ends
        if end.taken is None:
            return end
        if unknown := {*end.taken} - {*self.below[step.slug]}:
            return _End(_FAILED, error=ValueError(f"no step {sorted(unknown)[0]!r} waits for step {step.slug!r}"))
        below = self._find_reached(self.below[step.slug]) if end.whole else {*self.below[step.slug]}
        return _End(end.outcome, end.result, left_out=frozenset(below - self._find_reached(end.taken)))

    def _find_reached(self, taken: Sequence[str]) -> set[str]:
        """Return these steps and all below them."""
        reached, waiting = set(taken), [*taken]
        while waiting:
            new = {*self.below[waiting.pop()]} - reached
            reached |= new
            waiting += new
        return reached


def _find_verdict(step: _Step, above: Mapping[str, _End], steps: Mapping[str, _Step]) -> _End | None:
    """Return the end of a step that is not executed; None for one that is."""
    rule, outcomes = step.rule, [each.outcome for each in above.values()]
    failed = any(each in {_FAILED, _NOT_RUN} for each in outcomes)
    skipped, succeeded = outcomes.count(_SKIPPED), outcomes.count(_SUCCESS)
    if not outcomes or rule in {"all_done", "always"}:
        return None
    if rule is None:
        cascades = any(each.outcome == _SKIPPED and each.cascade for each in above.values())
        return _End(_NOT_RUN) if failed else _End(_SKIPPED) if cascades else None
    if rule == "all_done_setup_success":
        setups = [each.outcome for slug, each in above.items() if steps[slug].is_setup]
        if not setups or _SUCCESS in setups:
            return None
        return _End(_SKIPPED) if all(each == _SKIPPED for each in setups) else _End(_NOT_RUN)
    is_not_run, runs = {
        "all_success": (failed, not skipped),
        "all_failed": (False, not succeeded and not skipped),
        "all_skipped": (_NOT_RUN in outcomes, skipped == len(outcomes)),
        "all_done_min_one_success": (failed and not succeeded, succeeded > 0),
        "none_failed": (failed, True),
        "none_failed_min_one_success": (failed, succeeded > 0),
        "none_skipped": (False, not skipped),
        "one_done": (
            _NOT_RUN in outcomes and not succeeded and _FAILED not in outcomes,
            succeeded > 0 or _FAILED in outcomes,
        ),
        "one_failed": (False, failed),
        "one_success": (failed and not succeeded, succeeded > 0),
    }[rule]
    return _End(_NOT_RUN) if is_not_run else None if runs else _End(_SKIPPED)


def _read(future: Any) -> _End:
    found = future.result(raise_on_failure=False)
    if isinstance(found, BaseException):
        return _End(_FAILED, error=found)
    outcome, result, taken, cascade, whole = found
    return _End(outcome, result, cascade, None if taken is None else tuple(taken), whole)


def _perform(
    slug: str, workflow: str, function: Any, given: Mapping[str, Any]
) -> tuple[str, Any, list[str] | None, bool, bool]:
    """Do the work of a step: return its outcome, its result, what it takes, whether a skip cascades, and `whole`."""
    index = given.get(_INDEX)
    context = StepContext(
        run_id=_flow_run.id or "",
        workflow_slug=workflow,
        step_slug=slug,
        attempt=_task_run.run_count or 1,
        logger=_log,
        item_index=index or 0,
        item_indexes=() if index is None else (index,),
        failed_steps=tuple(FailedStep(*each) for each in given.get("context", ())),
    )
    try:
        result = _call_handler(function, {**given, "context": context})
    except Skip as skip:
        _log.info("step %r is skipped: %s", slug, skip)
        return _SKIPPED, None, None, skip.cascade, False
    if not isinstance(result, Branch):
        return _SUCCESS, result, None, True, False
    if index is not None:
        raise TypeError(f"step {slug!r}: an item can't take branches: only a whole step does")
    return _SUCCESS, result.result, [*result.taken], True, result.whole
