"""How many steps of a run work at the same time, and which runs hold a place."""

from collections.abc import Callable, Coroutine
from typing import Any

import anyio
import pytest
from anyio import CapacityLimiter

from pgflow_prefect.execution.process.slots import Slot, Turns

pytestmark = pytest.mark.anyio


class Desk:
    """So many places, and how often one was left."""

    def __init__(self, places: int) -> None:
        self.limiter = CapacityLimiter(places)
        self.left = 0

    def make_place(self) -> Slot:
        return Slot(self.limiter, self._note)

    def _note(self) -> None:
        self.left += 1

    @property
    def taken(self) -> int:
        return self.limiter.borrowed_tokens


async def settle() -> None:
    """Let everything happen that can happen now."""
    await anyio.wait_all_tasks_blocked()


def make_waiter(turns: Turns, gate: anyio.Event) -> Callable[[str], Coroutine[Any, Any, None]]:
    async def wait(step: str) -> None:
        async with turns.take(step), turns.pause(step):
            await gate.wait()

    return wait


async def test_so_many_steps_work_and_any_number_waits() -> None:
    turns, gate, working = Turns(2), anyio.Event(), 0
    most = began = 0

    async def step(name: str) -> None:
        nonlocal working, most, began
        async with turns.take(name):
            began += 1
            working += 1
            most = max(most, working)
            await anyio.lowlevel.checkpoint()
            working -= 1
            async with turns.pause(name):
                await gate.wait()
            working += 1
            most = max(most, working)
            await anyio.lowlevel.checkpoint()
            working -= 1

    with anyio.fail_after(180):
        async with anyio.create_task_group() as group:
            for number in range(50):
                group.start_soon(step, str(number))
            await settle()
            assert (began, most) == (50, 2)
            gate.set()
    assert most == 2


async def test_a_run_that_only_waits_holds_no_place() -> None:
    desk, gate = Desk(1), anyio.Event()
    slot = desk.make_place()
    slot.take_nowait()
    async with anyio.create_task_group() as group:
        group.start_soon(make_waiter(Turns(5, slot), gate), "a")
        await settle()
        assert (desk.taken, desk.left, slot.taken) == (0, 1, False)
        gate.set()
        await settle()
        assert (desk.taken, slot.taken) == (1, True), "it went on, and keeps its place to its end"


@pytest.mark.parametrize("limit", [1, 5])
async def test_it_does_not_matter_which_step_ends_its_work_first(limit: int) -> None:
    desk, gate, work = Desk(1), anyio.Event(), anyio.Event()
    slot = desk.make_place()
    slot.take_nowait()
    turns = Turns(limit, slot)

    async def step() -> None:
        async with turns.take("works"):
            await work.wait()

    async with anyio.create_task_group() as group:
        group.start_soon(make_waiter(turns, gate), "waits")
        await settle()
        group.start_soon(step)
        await settle()
        assert desk.taken == 1, "one of its steps works"
        work.set()
        await settle()
        assert desk.taken == 0, "the other one only waits"
        gate.set()


async def test_a_run_that_goes_on_waits_for_its_slot_and_two_runs_never_share_one() -> None:
    desk, gate = Desk(1), anyio.Event()
    waiting, other = desk.make_place(), desk.make_place()
    waiting.take_nowait()
    async with anyio.create_task_group() as group:
        group.start_soon(make_waiter(Turns(5, waiting), gate), "a")
        await settle()
        other.take_nowait()
        gate.set()
        await settle()
        assert (waiting.taken, other.taken, desk.taken) == (False, True, 1)
        other.leave()
        await settle()
        assert (waiting.taken, desk.taken) == (True, 1)


async def test_several_steps_that_go_on_share_the_place_of_their_run() -> None:
    desk, gate = Desk(1), anyio.Event()
    slot = desk.make_place()
    slot.take_nowait()
    wait = make_waiter(Turns(5, slot), gate)
    with anyio.fail_after(180):
        async with anyio.create_task_group() as group:
            for step in "abc":
                group.start_soon(wait, step)
            await settle()
            assert desk.taken == 0
            gate.set()
    assert desk.taken == 1
    slot.leave()
    assert desk.taken == 0


async def test_a_wait_that_fails_takes_no_turn_again() -> None:
    turns = Turns(1)
    with pytest.raises(ValueError, match="over"):
        async with turns.take("a"), turns.pause("a"):
            raise ValueError("over")
    with anyio.fail_after(180):
        async with turns.take("b"):
            pass


async def test_without_a_place_only_the_steps_are_counted() -> None:
    turns, gate = Turns(1), anyio.Event()
    async with anyio.create_task_group() as group:
        group.start_soon(make_waiter(turns, gate), "a")
        await settle()
        with anyio.fail_after(180):
            async with turns.take("b"):
                gate.set()


async def test_leaving_twice_is_leaving_once() -> None:
    desk = Desk(2)
    slot = desk.make_place()
    slot.leave()
    slot.take_nowait()
    slot.leave()
    slot.leave()
    assert (desk.taken, desk.left) == (0, 1)
    await slot.take()
    slot.leave(quietly=True)
    assert (desk.taken, desk.left) == (0, 1)
