"""One way to define workflows, start runs and do steps on every implementation, for the contract's suite."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from pgflow_prefect.database.implementations import Implementation
from tests.conftest import Connection
from tests.engine import claim, complete, define, fail, run_workflow
from tests.released_lab import ReleasedFlows

Do = Callable[[str], object]


class World(Protocol):
    """A database with one of the implementations.

    Attributes:
        dsn: its connection string.
        db: a connection to it.
        implementation: which one it is.
    """

    @property
    def dsn(self) -> str: ...

    @property
    def db(self) -> Connection: ...

    @property
    def implementation(self) -> Implementation: ...

    def define(self, slug: str, steps: Mapping[str, Sequence[str]]) -> None:
        """Define a workflow: each step with those that it waits for. A step has one attempt."""

    def start(self, slug: str, payload: object) -> UUID:
        """Start a run."""

    def work(self, slug: str, do: Do) -> None:
        """Do all steps that are ready: `do` returns the result of a step, and an exception is its failure."""


@dataclass(frozen=True)
class ClassicWorld:
    """The classic schema."""

    dsn: str
    db: Connection
    implementation: Implementation

    def define(self, slug: str, steps: Mapping[str, Sequence[str]]) -> None:
        define(self.db, slug, steps)

    def start(self, slug: str, payload: object) -> UUID:
        return run_workflow(self.db, slug, payload).id

    def work(self, slug: str, do: Do) -> None:
        ready = """
            SELECT s.run_id, s.step_slug FROM pgflow.step_states s JOIN pgflow.runs r ON r.id = s.run_id
            WHERE s.workflow_slug = %s AND s.status = 'pending' AND r.status = 'pending'
        """
        found = [(UUID(str(run_id)), str(step)) for run_id, step in self.db.execute(ready, [slug]).fetchall()]
        for run_id, step in found:
            claim(self.db, run_id, step)
        for run_id, step in found:
            try:
                complete(self.db, run_id, step, do(step))
            except BrokenError as error:
                fail(self.db, run_id, step, str(error))


@dataclass(frozen=True)
class ReleasedWorld:
    """The released pgflow, whose functions its own workers call."""

    dsn: str
    flows: ReleasedFlows
    implementation: Implementation

    @property
    def db(self) -> Connection:
        return self.flows.db

    def define(self, slug: str, steps: Mapping[str, Sequence[str]]) -> None:
        self.flows.define(slug, steps)

    def start(self, slug: str, payload: object) -> UUID:
        return self.flows.start(slug, payload)

    def work(self, slug: str, do: Do) -> None:
        self.flows.work(slug, lambda step, index: do(step))


class BrokenError(Exception):
    """What a step fails with."""
