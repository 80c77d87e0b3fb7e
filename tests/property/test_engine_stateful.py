"""Any interleaving of calls on any graph: the engine does what a model of a page in Python does."""

from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID, uuid4

import psycopg
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tests.conftest import Connection
from tests.engine import (
    NOT_READY,
    cancel,
    claim,
    complete,
    define,
    fail,
    get_run,
    refused,
    reopen,
    repair,
    run_workflow,
    start_step,
    statuses,
    take,
    waiting,
)

Graph = dict[str, list[str]]

# Step number n waits for some of those before it: any numbers will do, and no cycle can come of them.
GRAPHS = st.lists(st.sets(st.integers(0, 5), max_size=3), min_size=2, max_size=6).map(
    lambda drawn: {f"s{n}": [f"s{up}" for up in sorted(ups) if up < n] for n, ups in enumerate(drawn)}
)
SLOTS = st.integers(0, 23)
FENCES = st.sampled_from(["none", "none", "current", "stale"])


@dataclass
class Step:
    status: str = "pending"
    attempts: int = 0
    under_way: bool = False
    result: str | None = None


@dataclass
class Run:
    """What the engine should have: a run's states, by rules that know nothing of counters or snapshots."""

    id: UUID
    graph: Graph
    status: str = "pending"
    epoch: int = 0
    steps: dict[str, Step] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start_ready_steps()

    def is_completed(self, slug: str) -> bool:
        return slug in self.steps and self.steps[slug].status == "completed"

    def start_ready_steps(self) -> None:
        for slug, upstreams in self.graph.items():
            if slug not in self.steps and all(map(self.is_completed, upstreams)):
                self.steps[slug] = Step()

    def complete(self, slug: str, result: str) -> None:
        self.steps[slug].status, self.steps[slug].result = "completed", result
        if self.status == "pending":
            self.start_ready_steps()
            if all(map(self.is_completed, self.graph)):
                self.status = "completed"

    def fail(self, slug: str) -> None:
        self.steps[slug].status = self.status = "failed"

    def cancel(self) -> None:
        if self.status != "completed":
            self.status = "failed"
            for step in self.steps.values():
                step.status = "failed" if step.status == "pending" else step.status

    def reopen(self) -> None:
        if self.status == "failed":
            self.status, self.epoch = "pending", self.epoch + 1
            for step in self.steps.values():
                if step.status == "failed":
                    step.status, step.under_way = "pending", False
            self.start_ready_steps()

    def accepts(self, slug: str, epoch: int | None, attempt: int | None) -> bool:
        step = self.steps[slug]
        current = attempt is None or (attempt == step.attempts and step.under_way)
        return step.status == "pending" and epoch in {None, self.epoch} and current

    def half_met(self) -> dict[str, int]:
        """Return the joins of which some upstream steps, not all, are completed, and how many are missing."""
        missing = {slug: [up for up in ups if not self.is_completed(up)] for slug, ups in self.graph.items()}
        return {slug: len(ups) for slug, ups in missing.items() if 0 < len(ups) < len(self.graph[slug])}


def fence(choice: str, current: int) -> int | None:
    return {"none": None, "current": current, "stale": current - 1}[choice]


class EngineMachine(RuleBasedStateMachine):
    """Does everything twice: in the database, and in the model."""

    runs: Bundle[Run] = Bundle("runs")

    def __init__(self, db: Connection) -> None:
        super().__init__()
        self.db = db
        self.workflow = f"workflow {uuid4()}"
        self.graph: Graph = {}

    @initialize(target=runs, graph=GRAPHS)
    def define_and_run(self, graph: Graph) -> Run:
        self.graph = graph
        define(self.db, self.workflow, graph)
        return self.new_run()

    @rule(target=runs)
    def run_again(self) -> Run:
        return self.new_run()

    def new_run(self) -> Run:
        run = Run(run_workflow(self.db, self.workflow).id, self.graph)
        self.check(run)
        return run

    def pick(self, run: Run, slot: int) -> str:
        """Return any step, but more often one that is pending: something should happen."""
        pending = [slug for slug, step in run.steps.items() if step.status == "pending"]
        choice = [*pending * 3, *self.graph]
        return choice[slot % len(choice)]

    def report(self, run: Run, slug: str, send: Callable[[], object], accepted: Callable[[], object]) -> None:
        """Send a report of a step: not started, it is refused; else it changes what the model says."""
        if slug not in run.steps:
            with refused(NOT_READY, "has not been started"):
                send()
        else:
            send()
            accepted()
        self.check(run)

    @rule(run=runs, slots=st.lists(SLOTS, min_size=1, max_size=6))
    def complete_some_steps(self, run: Run, slots: list[int]) -> None:
        for slot in slots:
            self.complete_step(run, slot, "none", "none")

    @rule(run=runs, slot=SLOTS, epoch=FENCES, attempt=FENCES)
    def complete_fenced_step(self, run: Run, slot: int, epoch: str, attempt: str) -> None:
        self.complete_step(run, slot, epoch, attempt)

    def complete_step(self, run: Run, slot: int, epoch: str, attempt: str) -> None:
        slug, result = self.pick(run, slot), str(uuid4())
        step = run.steps.get(slug, Step())
        fences = fence(epoch, run.epoch), fence(attempt, step.attempts)

        def accepted() -> None:
            if run.accepts(slug, *fences):
                run.complete(slug, result)

        self.report(
            run, slug, lambda: complete(self.db, run.id, slug, result, epoch=fences[0], attempt=fences[1]), accepted
        )

    @rule(run=runs, slot=SLOTS)
    def fail_any_step(self, run: Run, slot: int) -> None:
        self.fail_step(run, slot, "none", "none")

    @rule(run=runs, slot=SLOTS, epoch=FENCES, attempt=FENCES)
    def fail_fenced_step(self, run: Run, slot: int, epoch: str, attempt: str) -> None:
        self.fail_step(run, slot, epoch, attempt)

    def fail_step(self, run: Run, slot: int, epoch: str, attempt: str) -> None:
        slug = self.pick(run, slot)
        step = run.steps.get(slug, Step())
        fences = fence(epoch, run.epoch), fence(attempt, step.attempts)

        def accepted() -> None:
            if run.accepts(slug, *fences):
                run.fail(slug)

        self.report(run, slug, lambda: fail(self.db, run.id, slug, epoch=fences[0], attempt=fences[1]), accepted)

    @rule(run=runs, slot=SLOTS, epoch=FENCES)
    def claim_step(self, run: Run, slot: int, epoch: str) -> None:
        slug = self.pick(run, slot)
        step = run.steps.get(slug)
        if epoch == "stale" or run.status != "pending" or step is None:
            with refused(NOT_READY):
                claim(self.db, run.id, slug, fence(epoch, run.epoch))
        else:
            claimed = claim(self.db, run.id, slug, fence(epoch, run.epoch))
            if step.status == "pending":
                step.attempts, step.under_way = step.attempts + 1, True
                assert claimed.upstream_results == {up: run.steps[up].result for up in self.graph[slug]}
            assert (claimed.status, claimed.attempt, claimed.step_result) == (step.status, step.attempts, step.result)
        self.check(run)

    @rule(run=runs, slot=SLOTS, act=st.sampled_from(["start", "take", "cancel"]))
    def do_what_seldom_matters(self, run: Run, slot: int, act: str) -> None:
        if act == "start":
            self.start_step(run, slot)
        elif act == "take":
            self.take_run(run)
        else:
            self.cancel_run(run)

    def start_step(self, run: Run, slot: int) -> None:
        slug = self.pick(run, slot)
        if slug in run.steps:
            assert start_step(self.db, run.id, slug).status == run.steps[slug].status
        else:
            with refused(NOT_READY, "can't start"):
                start_step(self.db, run.id, slug)
        self.check(run)

    def take_run(self, run: Run) -> None:
        if run.status == "pending":
            run.epoch += 1
            assert take(self.db, run.id) == run.epoch
        else:
            with refused(NOT_READY, "can't be taken"):
                take(self.db, run.id)
        self.check(run)

    def cancel_run(self, run: Run) -> None:
        cancel(self.db, run.id)
        run.cancel()
        self.check(run)

    @rule(run=runs)
    def reopen_run(self, run: Run) -> None:
        if run.status == "completed":
            with refused(NOT_READY, "can't be reopened"):
                reopen(self.db, run.id)
        else:
            reopen(self.db, run.id)
        run.reopen()
        self.check(run)

    def check(self, run: Run) -> None:
        """Compare the run's rows with the model, and with what a repair would make of them."""
        states = statuses(self.db, run.id)
        assert states == {slug: run.steps[slug].status for slug in sorted(run.steps)}
        assert all(states.get(up) == "completed" for slug in states for up in self.graph[slug])
        stored = get_run(self.db, run.id)
        completed = [slug for slug, status in states.items() if status == "completed"]
        assert (stored.status, stored.epoch) == (run.status, run.epoch)
        assert stored.remaining == len(self.graph) - len(completed)
        assert (stored.status == "completed") == (stored.remaining == 0)
        assert (stored.status == "failed") == ("failed" in states.values())
        assert waiting(self.db, run.id) == run.half_met()
        with self.db.transaction(force_rollback=True):
            assert repair(self.db, run.id) == stored
            assert (statuses(self.db, run.id), waiting(self.db, run.id)) == (states, run.half_met())


@pytest.mark.parametrize("examples", [20, pytest.param(120, marks=pytest.mark.thorough)])
def test_any_interleaving_of_calls_keeps_every_promise(dsn: str, examples: int) -> None:
    with psycopg.connect(dsn, autocommit=True) as db:
        db.execute("SET synchronous_commit = off")

        class Machine(EngineMachine):
            def __init__(self) -> None:
                super().__init__(db)

        drawn = settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            database=None,
            suppress_health_check=[*HealthCheck],
        )
        run_state_machine_as_test(Machine, settings=drawn)
