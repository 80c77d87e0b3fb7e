"""The order of execution: a step starts once its own upstream steps are done, and nothing new after a failure."""

from collections import Counter

import anyio
import pytest

from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.execution.outcomes import StepOutcome
from pgflow_prefect.execution.process.slots import Slot, Turns
from pgflow_prefect.execution.scheduler import Advance, Schedule, run_in_order
from tests.unit.definitions import define, make_layered

pytestmark = pytest.mark.anyio


async def test_every_step_is_performed_once_and_after_its_upstream_steps() -> None:
    definition = define({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"], "alone": []})
    done: list[str] = []

    async def perform(slug: str, _: Advance) -> StepOutcome:
        assert {dep.upstream for dep in definition.deps if dep.downstream == slug} <= {*done}
        await anyio.lowlevel.checkpoint()
        done.append(slug)
        return StepOutcome.COMPLETED

    await run_in_order(Schedule(build_graph(definition), Turns(10)), perform)
    assert Counter(done) == Counter(definition.steps)


async def test_a_step_does_not_wait_for_its_layer() -> None:
    graph = build_graph(define({"slow": [], "quick": [], "after_quick": ["quick"], "last": ["after_quick"]}))
    last_is_done = anyio.Event()

    async def perform(slug: str, _: Advance) -> StepOutcome:
        if slug == "slow":
            await last_is_done.wait()  # never, if any layer waited for this step
        elif slug == "last":
            last_is_done.set()
        return StepOutcome.COMPLETED

    with anyio.fail_after(180):
        await run_in_order(Schedule(graph, Turns(10)), perform)


async def test_the_next_step_may_begin_before_this_one_has_returned() -> None:
    graph = build_graph(define({"a": [], "b": ["a"], "c": ["a"], "last": ["b", "c"]}))
    schedule, log = Schedule(graph, Turns(3)), list[str]()
    advanced: list[bool] = []

    async def perform(slug: str, advance: Advance) -> StepOutcome:
        log.append(f"{slug} begins")
        advanced.append(advance())
        await anyio.wait_all_tasks_blocked()
        log.append(f"{slug} is over")
        return StepOutcome.COMPLETED

    with anyio.fail_after(180):
        await run_in_order(schedule, perform)
    assert log.index("b begins") < log.index("a is over")
    assert Counter(log).most_common(1)[0][1] == 1, "once each, though it was said twice that a step is done"
    assert advanced == [True, False, True, False]


async def test_a_signal_that_meets_a_step_is_raised_as_what_it_is() -> None:
    class Signal(BaseException):
        pass

    async def perform(slug: str, _: Advance) -> StepOutcome:
        if slug == "met":
            raise Signal
        await anyio.sleep_forever()
        return StepOutcome.COMPLETED

    graph = build_graph(define({"met": [], "other": []}))
    with anyio.fail_after(180), pytest.raises(Signal):
        await run_in_order(Schedule(graph, Turns(10)), perform)


async def test_a_step_that_others_may_follow_early_still_has_its_turn() -> None:
    schedule = Schedule(build_graph(define({"a": [], "b": ["a"]})), Turns(1))
    log: list[str] = []

    async def perform(slug: str, advance: Advance) -> StepOutcome:
        log.append(f"{slug} begins")
        advance()
        await anyio.wait_all_tasks_blocked()
        log.append(f"{slug} is over")
        return StepOutcome.COMPLETED

    with anyio.fail_after(180):
        await run_in_order(schedule, perform)
    assert log == ["a begins", "a is over", "b begins", "b is over"]


async def test_steps_side_by_side_are_performed_at_the_same_time() -> None:
    graph = build_graph(define(dict.fromkeys("abc", ())))
    started: set[str] = set()
    all_started = anyio.Event()

    async def perform(slug: str, _: Advance) -> StepOutcome:
        started.add(slug)
        if len(started) == 3:
            all_started.set()
        await all_started.wait()
        return StepOutcome.COMPLETED

    with anyio.fail_after(180):
        await run_in_order(Schedule(graph, Turns(3)), perform)


@pytest.mark.parametrize("concurrency", [1, 3])
async def test_no_more_than_so_many_at_once(concurrency: int) -> None:
    under_way = most = 0

    async def perform(_: str, __: Advance) -> StepOutcome:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        for _turn in range(3):
            await anyio.lowlevel.checkpoint()
        under_way -= 1
        return StepOutcome.COMPLETED

    await run_in_order(Schedule(build_graph(make_layered(300)), Turns(concurrency)), perform)
    assert most == concurrency


async def test_after_a_failure_those_under_way_end_and_nothing_starts() -> None:
    graph = build_graph(
        define({"fails": [], "slow": [], "later": [], "after_fails": ["fails"], "after_slow": ["slow"]})
    )
    slow_started, failed = anyio.Event(), anyio.Event()
    log: list[str] = []

    async def perform(slug: str, _: Advance) -> StepOutcome:
        log.append(f"{slug} starts")
        if slug == "fails":
            await slow_started.wait()
            failed.set()
            return StepOutcome.FAILED
        slow_started.set()
        await failed.wait()
        await anyio.lowlevel.checkpoint()
        log.append(f"{slug} ends")
        return StepOutcome.COMPLETED

    with anyio.fail_after(180):
        await run_in_order(Schedule(graph, Turns(2)), perform)
    assert log == ["fails starts", "slow starts", "slow ends"]


async def test_what_performing_a_step_raises_is_raised() -> None:
    async def perform(_: str, __: Advance) -> StepOutcome:
        raise ValueError("a bug")

    with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="a bug")):
        await run_in_order(Schedule(build_graph(define({"a": []})), Turns(2)), perform)


@pytest.mark.parametrize("shape", ["wide", "chain", "layered"])
async def test_ten_thousand_steps_are_no_problem(shape: str) -> None:
    slugs = [f"s{number:05}" for number in range(10_000)]
    definition = {
        "wide": define(dict.fromkeys(slugs, ())),
        "chain": define({slug: slugs[max(place - 1, 0) : place] for place, slug in enumerate(slugs)}),
        "layered": make_layered(10_000),
    }[shape]
    done: set[str] = set()

    async def perform(slug: str, _: Advance) -> StepOutcome:
        done.add(slug)
        return StepOutcome.COMPLETED

    with anyio.fail_after(180):
        await run_in_order(Schedule(build_graph(definition), Turns(100)), perform)
    assert len(done) == 10_000


async def test_what_is_foreseen_is_what_a_step_makes_ready_as_far_as_there_are_turns() -> None:
    graph = build_graph(define({"a": [], "other": [], "b": ["a"], "c": ["a"], "d": ["a"], "join": ["a", "other"]}))
    turns = Turns(3)
    schedule = Schedule(graph, turns)
    async with turns.take("a"), turns.take("other"):
        assert schedule.foresee("a") == ["b", "c"], "one in its own turn, one in the turn that is free"
        assert schedule.foresee("other") == [], "no turn is promised twice"
        for step in ("b", "c"):
            schedule.begin(step)
    for waiting in (1, 5):
        async with turns.take("a"), turns.take("x"), turns.take("y"), anyio.create_task_group() as group:
            for number in range(waiting):
                group.start_soon(take_and_leave, turns, f"z{number}")
            await anyio.wait_all_tasks_blocked()
            assert schedule.foresee("a") == [], "a step waits for its turn already"
            group.cancel_scope.cancel()
    assert schedule.conclude("a") == ["b", "c", "d"]
    assert schedule.conclude("a") == [], "it is done once"
    assert schedule.foresee("other") == ["join"]


async def test_nothing_is_foreseen_where_a_run_may_lose_its_place() -> None:
    graph = build_graph(define({"a": [], "outside": [], "b": ["a"]}))
    place = Slot(anyio.CapacityLimiter(1), lambda: None)
    turns = Turns(3, place)
    schedule = Schedule(graph, turns)
    async with turns.take("a"), anyio.create_task_group() as group:
        group.start_soon(wait_outside, turns)
        await anyio.wait_all_tasks_blocked()
        assert schedule.foresee("a") == []
        group.cancel_scope.cancel()


async def wait_outside(turns: Turns) -> None:
    async with turns.take("outside"), turns.pause("outside"):
        await anyio.sleep_forever()


async def take_and_leave(turns: Turns, step: str) -> None:
    async with turns.take(step):
        pass
