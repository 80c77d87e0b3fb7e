"""What moves between the rooms: definitions, runs, step states, claims. All frozen; none knows where it came from."""

import hashlib
import json
import keyword
import unicodedata
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from typing import NamedTuple
from uuid import UUID

from pydantic import BaseModel, ConfigDict, JsonValue

RESERVED_NAMES = frozenset({"payload", "context", "upstream"})
"""Argument names of a handler that mean something else than an upstream step."""


def to_identifier(slug: str) -> str:
    """Return the Python name that stands for a step's slug in a handler's arguments.

    Characters that no name may have become `_`, a leading digit gets `_` before it, a keyword or a reserved name `_`
    after it: `send-emails` -> `send_emails`, `2nd` -> `_2nd`, `class` -> `class_`, `payload` -> `payload_`.
    """
    name = slug
    if not (slug.isascii() and slug.isidentifier()):
        # Python itself compares names in this form.
        normal = unicodedata.normalize("NFKC", slug)
        name = "".join(character if f"_{character}".isidentifier() else "_" for character in normal)
        if not name[:1].isidentifier():
            name = f"_{name}"
    if keyword.iskeyword(name) or name in RESERVED_NAMES or name == "__debug__":  # which nobody may assign to
        name = f"{name}_"
    return name


CANCELLED = "cancelled"
"""What the reason of a run that somebody ended begins with."""


class Held(StrEnum):
    """How a run's latest owner holds it."""

    LEASED = "leased"
    """It executes the run, or is about to."""

    QUEUED = "queued"
    """Its flow run waits in Prefect."""

    EXPIRED = "expired"
    """It has not been heard of for too long: another one may take the run."""

    RELEASED = "released"
    """It has let go of the run, or has lost it."""


class Status(StrEnum):
    """The status of a run, and of a step's state."""

    PENDING = "pending"
    FAILED = "failed"
    COMPLETED = "completed"


class Dep(NamedTuple):
    """A dependency: `upstream` must complete before `downstream` starts. Both are step slugs."""

    upstream: str
    downstream: str


class WorkflowDefinition(BaseModel):
    """A workflow as the database defines it: its steps and what they wait for, in no particular order."""

    model_config = ConfigDict(frozen=True)

    slug: str
    steps: tuple[str, ...]
    deps: tuple[Dep, ...]

    @cached_property
    def definition_hash(self) -> str:
        """A name for exactly this definition, whatever the order of its rows: 16 hexadecimal digits."""
        canonical = json.dumps([self.slug, sorted(self.steps), sorted(self.deps)], ensure_ascii=False)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]


class WorkflowSummary(BaseModel):
    """One line of `pgflow-prefect list`."""

    model_config = ConfigDict(frozen=True)

    slug: str
    steps: int
    deps: int
    pending: int
    completed: int
    failed: int
    enabled: bool | None
    """Whether workers and bridges take its runs; None: nobody has said."""


class Run(BaseModel):
    """One execution of a workflow: a row of `pgflow.runs`. Times are the database's."""

    model_config = ConfigDict(frozen=True)

    id: UUID
    workflow_slug: str
    status: Status
    payload: JsonValue
    epoch: int
    remaining: int | None
    error_message: str | None
    created_at: datetime | None
    finished_at: datetime | None
    flow_run_id: UUID | None = None
    held_by: str | None = None
    held: Held | None = None
    recoveries: int = 0
    stale_writes: int = 0

    @property
    def is_cancelled(self) -> bool:
        """Whether somebody ended it, where a failed one has failed by itself."""
        return self.status is Status.FAILED and (self.error_message or "").startswith(CANCELLED)


class TakenRun(BaseModel):
    """A run that was reserved for a flow run which is yet to be created.

    Attributes:
        run_id: the run.
        workflow_slug: its workflow.
        epoch: in which it was taken.
        former_flow_run_id: whose lease has run out; None for a run that nobody has executed before.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    epoch: int
    former_flow_run_id: UUID | None

    @property
    def idempotency_key(self) -> str:
        """Names the flow run to be created: asked for twice, Prefect creates one."""
        return f"pgflow/{self.run_id}/{self.epoch}"


class Enabled(BaseModel):
    """Whether workers and bridges take a workflow's runs, and those begun since when."""

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    enabled: bool
    since: datetime


class StepState(BaseModel):
    """What is known of one step in one run: a row of `pgflow.step_states`, and the state of its task run."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    status: Status
    attempts: int
    step_result: JsonValue
    error_message: str | None
    created_at: datetime | None
    started_at: datetime | None
    finished_at: datetime | None
    task_state: str | None = None


class Claim(BaseModel):
    """What whoever executes a step gets: which attempt it is, and the step's input.

    `payload` and `upstream_results` (by the upstream step's slug) are None where they were not asked for, and where
    the step is completed already.
    """

    model_config = ConfigDict(frozen=True)

    status: Status
    attempt: int
    payload: JsonValue
    upstream_results: dict[str, JsonValue] | None


class Report(BaseModel):
    """A step's state after a report on it: of this report, or of the one that came first."""

    model_config = ConfigDict(frozen=True)

    status: Status
    error_message: str | None
