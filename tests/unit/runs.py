"""Runs for tests of their pictures: what each step has done, in seconds since the run began."""

from datetime import UTC, datetime, timedelta
from uuid import UUID
from xml.etree.ElementTree import Element, fromstring

from hypothesis import strategies as st

from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.definitions.model import Dep, WorkflowDefinition
from pgflow_prefect.models import Ending, Held, Run, Status, StepState
from pgflow_prefect.raw_json import RawJson
from pgflow_prefect.render.progress import Progress, trace_progress
from tests.unit.definitions import dags

BEGAN = datetime(2026, 1, 31, 9, 30, tzinfo=UTC)

# Whatever PostgreSQL takes for a slug.
slugs = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=12)


@st.composite
def odd_dags(draw: st.DrawFn) -> WorkflowDefinition:
    """Draw a definition with no cycle whose slugs have any character."""
    definition = draw(dags())
    count = len(definition.steps)
    names = dict(zip(definition.steps, draw(st.lists(slugs, min_size=count, max_size=count, unique=True)), strict=True))
    deps = tuple(Dep(names[upstream], names[downstream]) for upstream, downstream in definition.deps)
    return WorkflowDefinition(slug=draw(slugs), steps=tuple(names.values()), deps=deps)


def read_svg(drawn: str) -> Element:
    """Return a picture's outermost element; refuses what is not well-formed."""
    return fromstring(drawn)  # noqa: S314  of our own making


def at(seconds: float) -> datetime:
    return BEGAN + timedelta(seconds=seconds)


def make_run(
    status: Status = Status.PENDING,
    *,
    error: str | None = None,
    ended_as: Ending | None = None,
    finished: float | None = None,
    held: Held | None = Held.LEASED,
) -> Run:
    return Run(
        id=UUID(int=7),
        workflow_slug="workflow",
        status=status,
        ended_as=ended_as,
        payload=RawJson("{}"),
        epoch=1,
        remaining=None,
        error_message=error,
        created_at=BEGAN,
        finished_at=None if finished is None else at(finished),
        held=held,
    )


def make_state(
    slug: str,
    status: Status = Status.COMPLETED,
    start: float | None = None,
    end: float | None = None,
    *,
    attempts: int = 1,
    shown: str | None = None,
    error: str | None = None,
    ended_as: Ending | None = None,
) -> StepState:
    """Return a step's state; `shown` is its state in Prefect."""
    return StepState(
        step_slug=slug,
        status=status,
        ended_as=ended_as,
        attempts=attempts,
        step_result=None,
        error_message=error,
        created_at=BEGAN,
        started_at=None if start is None else at(start),
        finished_at=None if end is None else at(end),
        task_state=shown,
    )


def trace(definition: WorkflowDefinition, *states: StepState, run: Run | None = None, now: float = 100) -> Progress:
    by_slug = {state.step_slug: state for state in states}
    return trace_progress(build_graph(definition), run or make_run(), by_slug, at(now))


@st.composite
def runs(draw: st.DrawFn, definition: WorkflowDefinition) -> Progress:
    """Draw a run of a definition, sensible or not."""
    moments = st.none() | st.floats(0, 1e6)
    states = [
        make_state(
            slug,
            draw(st.sampled_from(Status)),
            draw(moments),
            draw(moments),
            shown=draw(st.sampled_from([None, "Running", "AwaitingRetry", "Waiting", "Deferred", "Cached"])),
            error=draw(st.none() | slugs),
        )
        for slug in draw(st.lists(st.sampled_from(definition.steps), unique=True))
    ]
    return trace(definition, *states, run=make_run(draw(st.sampled_from(Status))), now=1e6)
