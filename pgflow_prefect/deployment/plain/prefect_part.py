"""What an exported file for Prefect has beside `common_part`: it starts steps when their rules say so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from prefect import allow_failure as _allow_failure
from prefect.futures import as_completed as _as_completed
from prefect.runtime import flow_run as _flow_run
from prefect.runtime import task_run as _task_run

from pgflow_prefect.deployment.plain.common_part import Branch, Skip, StepContext, _call_handler, _log

# The exported file begins here.
_SUCCESS, _FAILED, _SKIPPED, _NOT_RUN = "success", "failed", "skipped", "not run"


@dataclass(frozen=True)
class _Step:
    slug: str
    task: Any
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


@dataclass(frozen=True)
class _End:
    outcome: str
    result: Any = None
    cascade: bool = True
    taken: tuple[str, ...] | None = None  # of a branch
    left_out: frozenset[str] = frozenset()  # what its decision skips
    error: BaseException | None = None


@dataclass
class _Run:
    steps: Mapping[str, _Step]
    payload: Any
    stops: bool
    failed_by: str
    ended: dict[str, _End] = field(default_factory=dict)
    going: dict[str, list[Any]] = field(default_factory=dict)
    futures: dict[str, list[Any]] = field(default_factory=dict)
    done: set[int] = field(default_factory=set)

    def execute(self) -> dict[str, Any]:
        """Execute all steps, and return the results of those that no other waits for."""
        while self._begin_ready() or self.going:
            if self.going:
                self._wait()
        return self._conclude()

    def _begin_ready(self) -> bool:
        """Begin the steps that are ready; tell whether some were decided without being executed."""
        decided = False
        for slug, step in self.steps.items():
            if (
                slug in self.ended
                or slug in self.going
                or any(each not in self.ended for each in step.upstream.values())
            ):
                continue
            if self.stops and any(each.outcome == _FAILED for each in self.ended.values()):
                continue
            verdict = self._decide(step)
            if verdict is not None:
                self.ended[slug] = verdict
            else:
                self._begin(step)
            decided = decided or slug in self.ended
        return decided

    def _decide(self, step: _Step) -> _End | None:
        above = {each: self.ended[each] for each in step.upstream.values()}
        if any(step.slug in end.left_out for end in above.values()):
            return _End(_SKIPPED)
        return _find_verdict(step, above, self.steps)

    def _begin(self, step: _Step) -> None:
        results = {each: self.ended[each].result for each in step.upstream.values() if self._has_result(each)}
        given = {
            "payload": self.payload,
            "upstream": results,
            **{name: results[each] for name, each in step.upstream.items() if each in results},
        }
        after = [_allow_failure(each) for slug in step.upstream.values() for each in self.futures.get(slug, ())]
        if not step.is_map:
            self.going[step.slug] = [step.task.submit(given, wait_for=after)]
        else:
            try:
                items = self._find_items(step)
            except (KeyError, TypeError, ValueError) as error:
                self.ended[step.slug] = _End(_FAILED, error=error)
                return
            if not items:
                skips = step.when_empty != "complete"
                self.ended[step.slug] = _End(
                    _SKIPPED if skips else _SUCCESS, None if skips else [], step.when_empty == "skip-cascade"
                )
                return
            self.going[step.slug] = [step.task.submit({**given, "item": item}, wait_for=after) for item in items]
        self.futures[step.slug] = self.going[step.slug]

    def _has_result(self, slug: str) -> bool:
        return self.ended[slug].outcome == _SUCCESS

    def _find_items(self, step: _Step) -> list[Any]:
        found = self.payload if step.over == "payload" else self.ended[str(step.over)].result
        for name in step.path:
            found = found[name]
        if found is not None and not isinstance(found, list):
            raise TypeError(f"step {step.slug!r} maps over something that is no array")
        return found or []

    def _wait(self) -> None:
        waiting = [each for futures in self.going.values() for each in futures if id(each) not in self.done]
        if waiting:
            self.done.add(id(next(iter(_as_completed(waiting)))))
        for slug, futures in [*self.going.items()]:
            if all(id(each) in self.done for each in futures):
                del self.going[slug]
                self.ended[slug] = _gather(self.steps[slug], [_read(each) for each in futures], self.steps)

    def _conclude(self) -> dict[str, Any]:
        waited_for = {each for step in self.steps.values() for each in step.upstream.values()}
        leaves = [slug for slug in self.steps if slug not in waited_for]
        counting = leaves if self.failed_by == "leaves" and not self.stops else [*self.steps]
        bad = {_FAILED, _NOT_RUN} if self.failed_by == "leaves" else {_FAILED}
        for slug in counting:
            end = self.ended.get(slug)
            if end is not None and end.outcome in bad and self.steps[slug].fails_run:
                raise RuntimeError(f"step {slug!r} has {end.outcome}") from end.error
        return {slug: self.ended[slug].result for slug in leaves if slug in self.ended and self._has_result(slug)}


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


def _gather(step: _Step, ends: Sequence[_End], steps: Mapping[str, _Step]) -> _End:
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
    below = {slug for slug, each in steps.items() if step.slug in each.upstream.values()}
    if unknown := {*end.taken} - below:
        return _End(_FAILED, error=ValueError(f"no step {sorted(unknown)[0]!r} waits for step {step.slug!r}"))
    return _End(end.outcome, end.result, left_out=frozenset(below - _find_reached(end.taken, steps)))


def _find_reached(taken: Sequence[str], steps: Mapping[str, _Step]) -> set[str]:
    """Return these steps and all below them."""
    reached, waiting = set(taken), [*taken]
    while waiting:
        slug = waiting.pop()
        new = {each for each, step in steps.items() if slug in step.upstream.values()} - reached
        reached |= new
        waiting += new
    return reached


def _read(future: Any) -> _End:
    found = future.result(raise_on_failure=False)
    if isinstance(found, BaseException):
        return _End(_FAILED, error=found)
    outcome, result, taken, cascade = found
    return _End(outcome, result, cascade, None if taken is None else tuple(taken))


def _perform(slug: str, workflow: str, function: Any, given: dict[str, Any]) -> tuple[str, Any, list[str] | None, bool]:
    """Do the work of a step: return its outcome, its result, what it takes, and whether a skip cascades."""
    context = StepContext(
        run_id=_flow_run.id or "", workflow_slug=workflow, step_slug=slug, attempt=_task_run.run_count or 1, logger=_log
    )
    try:
        result = _call_handler(function, {**given, "context": context})
    except Skip as skip:
        _log.info("step %r is skipped: %s", slug, skip)
        return _SKIPPED, None, None, skip.cascade
    if isinstance(result, Branch):
        return _SUCCESS, result.result, [*result.taken], True
    return _SUCCESS, result, None, True
