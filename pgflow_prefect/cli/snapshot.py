"""A snapshot of a run for `status`: sentences about the run, and a row for each step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from pgflow_prefect.cli.console import format_duration, format_time, shorten, style_status
from pgflow_prefect.models import Held, Relative, Run, Status, StepState
from pgflow_prefect.render.labels import clean, cut, measure
from pgflow_prefect.render.progress import Look, find_look, write_tasks

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from pgflow_prefect.models import Enabled

COLUMNS = ("step", "status", "in Prefect", "attempts", "took", "done by", "result or error")

_NOT_REACHED = "not reached"
"""A step that had not started when its run ended."""

_STOPPED = "stopped"
"""A step that a former owner began, and that no process works on now."""

_GAP = 2
_WIDTHS = {"status": 19, "in Prefect": 13, "attempts": 8, "took": 8, "done by": 20}
"""Column widths in characters. They are fixed, so that a table that is drawn again does not jump."""

_LEAST_NOTE = 20
"""The characters that a result or an error gets before any other column."""


class Row(NamedTuple):
    """A step, a cell for each of `COLUMNS`."""

    step: str
    status: str
    in_prefect: str = ""
    attempts: str = ""
    took: str = ""
    done_by: str = ""
    note: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment.

    Attributes:
        run: the run.
        states: the steps that have started, by slug.
        order: the slugs of all steps.
        enabled: whether its workflow is enabled, or None if that was never set or does not matter.
        executes: Prefect can execute it. Otherwise pgflow's own workers do.
        has_dead_holder: the process that holds it was on this machine, and is dead.
        relatives: its parent, if it is a step of another run, and its latest children.
    """

    run: Run
    states: dict[str, StepState]
    order: list[str]
    enabled: Enabled | None = None
    executes: bool = True
    has_dead_holder: bool = False
    relatives: tuple[Relative, ...] = ()

    @property
    def has_ended(self) -> bool:
        """Whether the run has come to rest. Claimed steps of a failed run may still finish."""
        working = any(state.status is Status.PENDING and state.started_at for state in self.states.values())
        lives = self.run.held is Held.LEASED and not self.has_dead_holder
        return self.run.status is not Status.PENDING and not (working and lives)

    def describe(self) -> list[str]:
        """Return the sentences about the whole run."""
        run = self.run
        lines = [f"run {run.id} of workflow {run.workflow_slug!r}: {describe_run_status(run)}"]
        if run.error_message:
            lines.append(run.error_message)
        if run.logical_date is not None:
            lines.append(_describe_dates(run))
        if run.status is Status.PENDING:
            lines += self._describe_owner() if self.executes else ["pgflow's own workers execute it"]
        if run.is_unshown:
            lines.append(_describe_unshown(run))
        lines += map(_describe_relative, self.relatives)
        if run.recoveries:
            lines.append(f"taken over {count(run.recoveries, 'time')} in a row without a further step completing")
        if run.stale_writes:
            lines.append(f"refused {count(run.stale_writes, 'write')} of former owners")
        return lines

    def _describe_owner(self) -> list[str]:
        if self.has_dead_holder:
            resume = f"`pgflow-prefect run --resume {self.run.id}`"
            return [f"held by {self.run.held_by}, which is dead: a worker of this machine takes it over, or {resume}"]
        return _describe_owner(self.run, self.enabled)

    def pick(self, room: int) -> list[str]:
        """Return the most important steps, in their order: those that failed, are executing, or ended last."""
        chosen = frozenset(sorted(self.order, key=self._rank)[:room])
        return [slug for slug in self.order if slug in chosen]

    def _rank(self, slug: str) -> tuple[int, float]:
        state = self.states.get(slug)
        if state is None:
            return 4, 0.0
        if state.status is Status.COMPLETED:
            return 3, -state.finished_at.timestamp() if state.finished_at else 0.0
        return (0 if state.status is Status.FAILED else 1 if state.started_at else 2), 0.0

    def count(self) -> str:
        """Return the progress of the run."""
        done = sum(state.status is Status.COMPLETED for state in self.states.values())
        skipped = sum(state.is_skipped for state in self.states.values())
        note = f", {skipped} of them skipped" if skipped else ""
        return f"{done} of {count(len(self.order), 'step')} completed{note}"

    def rows(self, slugs: Iterable[str] | None = None) -> Iterator[Row]:
        """Yield a row for each step, or for each of these steps."""
        from pgflow_prefect.handlers.references import parse_reference

        for slug in self.order if slugs is None else slugs:
            if (state := self.states.get(slug)) is None:
                yield Row(slug, self.describe_word(slug))
                continue
            took = format_duration(state.started_at, state.finished_at) if state.started_at else ""
            result = "" if state.step_result is None or state.step_result.text == "null" else state.step_result.text
            if state.step_result is not None and (reference := parse_reference(state.step_result)) is not None:
                result = f"in a storage: {reference.describe()}"
            if state.result_problem is not None:
                result = f"not shown: it {state.result_problem}"
            note = shorten(state.skip_message or state.error_message or _describe_tasks(state, result))
            # Where pgflow's own workers execute the run, the state is of their queue, and not of Prefect.
            status, shown = self._describe_status(state), (state.task_state or "") if self.executes else ""
            yield Row(slug, status, shown, str(state.attempts), took, state.handler or "", note)

    def describe_word(self, slug: str) -> str:
        """Return the plain word for a step's state."""
        state = self.states.get(slug)
        if state is None:
            return Look.WAITING if self.run.status is Status.PENDING else _NOT_REACHED
        if state.status is Status.COMPLETED:  # where it was cached, Prefect's column says so
            return Look.SKIPPED if state.is_skipped else state.status
        look = find_look(state)
        is_left = self.has_dead_holder or self.run.held in {Held.EXPIRED, Held.RELEASED}
        return _STOPPED if is_left and look in {Look.RUNNING, Look.RETRYING} else look

    def _describe_status(self, state: StepState) -> str:
        """Return the row's status, after the plain word if that differs."""
        word = self.describe_word(state.step_slug)
        return word if word in {state.status, Look.SKIPPED, Look.NOT_RUN} else f"{word} ({state.status})"

    def make_table(self, width: int, slugs: Iterable[str] | None = None) -> Table:
        """Return a line for each step, in columns whose widths do not change while the run executes.

        Args:
            width: of the terminal, in characters.
            slugs: only these steps.
        """
        from rich.table import Table

        widths = choose_widths(width, max(map(measure, self.order), default=0))
        table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, _GAP, 0, 0))
        for name, room in widths.items():
            table.add_column(name, width=room, no_wrap=True, overflow="ellipsis")
        for row in self.rows(slugs):
            cells = {name: cell for name, cell in zip(COLUMNS, row, strict=True) if name in widths}
            table.add_row(*(_draw_cell(name, cell, widths[name]) for name, cell in cells.items()))
        return table


def _describe_tasks(state: StepState, result: str) -> str:
    """Return the reason of a skip, or the number of tasks, and then the result."""
    if state.skip_reason is not None:
        return state.skip_reason
    tasks = write_tasks(state)
    return f"{tasks}: {result}" if tasks and result else tasks or result


def _draw_cell(column: str, cell: str, width: int) -> Text | str:
    from rich.text import Text

    return style_status(cell) if column in {"status", "in Prefect"} else Text(cut(clean(cell), width))


def choose_widths(width: int, longest_slug: int) -> dict[str, int]:
    """Return the columns that fit into a terminal, each with its width.

    Args:
        width: of the terminal, in characters.
        longest_slug: of the run's steps, in characters.
    """
    chosen = {"step", "status", "attempts", "took"}
    room = width - sum(_WIDTHS[name] + _GAP for name in chosen - {"step"})
    step = max(min(longest_slug, width // 3, room), len("step"))
    left = room - step - _GAP
    for name in ("in Prefect", "done by"):
        if left - _WIDTHS[name] - _GAP < _LEAST_NOTE:
            break
        left -= _WIDTHS[name] + _GAP
        chosen.add(name)
    widths = {"step": step, **_WIDTHS, "result or error": left - 1}  # a full line would wrap in some terminals
    return {name: widths[name] for name in COLUMNS if name in chosen or (name == COLUMNS[-1] and left > 1)}


def describe_run_status(run: Run) -> str:
    """Return a run's status, after the plain word if that differs."""
    word = run.ended_as or run.status
    return str(run.status) if word == run.status else f"{word} ({run.status})"


def count(number: int, thing: str) -> str:
    """Return a number with its noun."""
    return f"{number} {thing}{'s'[: number != 1]}"


def _describe_relative(each: Relative) -> str:
    """Return a sentence about the parent of a run, or about one of its children."""
    step = each.step_slug if each.item_index is None else f"{each.step_slug}[{each.item_index}]"
    run, status = f"run {each.run_id} of workflow {each.workflow_slug!r}", each.ended_as or each.status
    if each.is_parent:
        return f"it is step {step} of {run}, which is {status}"
    attempt = f", attempt {each.attempt}" if each.attempt > 1 else ""
    return f"step {step}{attempt} is {run}: {status}"


def _describe_dates(run: Run) -> str:
    """Return a sentence about the logical date, in the user's time zone."""
    since = f", with the data since {format_time(run.interval_start)}" if run.interval_start is not None else ""
    backfill = f"; backfill {run.backfill_id}" if run.backfill_id is not None else ""
    return f"for the date {format_time(run.logical_date)}{since}{backfill}"


def _describe_unshown(run: Run) -> str:
    if run.status is Status.PENDING:
        return "not shown in Prefect: its workflow is recorded later"
    return f"not shown in Prefect: `pgflow-prefect record {run.id}` shows it"


def _describe_owner(run: Run, enabled: Enabled | None) -> list[str]:
    if run.held is Held.LEASED:
        return [f"held by {run.held_by}"]
    if run.held is Held.QUEUED:
        return ["waits in Prefect for a worker"]
    if run.next_try is not None:
        return [
            f"set aside: a worker or a bridge tries again to take it at {run.next_try:%Y-%m-%d %H:%M:%S %Z}",
            f"the reason: {run.set_aside}",
        ]
    return _describe_left(run, enabled)


def _describe_left(run: Run, enabled: Enabled | None) -> list[str]:
    """Return a sentence that says which process can take a pending run."""
    resume = f"`pgflow-prefect run --resume {run.id}`"
    slug = run.workflow_slug
    left = f"{run.held_by} has not been heard of" if run.held is Held.EXPIRED else "no process holds it"
    if enabled is not None and not enabled.enabled:
        # A run without an owner will count as older than the enabling.
        adopt = ", then `pgflow-prefect worker --adopt`" if run.held is None or run.is_older else ""
        return [
            f"{left}, and workflow {slug!r} is disabled: no worker and no bridge takes it. "
            f"`pgflow-prefect enable {slug}`{adopt}; or {resume}"
        ]
    if enabled is None:
        # The first worker will enable the workflow, and this run is older.
        return [
            f"{left}, and no worker or bridge has served workflow {slug!r} yet: "
            f"`pgflow-prefect worker --adopt` takes it, or {resume}"
        ]
    if run.held is Held.EXPIRED and not run.is_older:
        return [f"{left}: a worker or a bridge takes it over"]
    lines = [f"{left}: a worker or a bridge takes it, or `pgflow-prefect run --resume`"]
    if run.is_older:
        lines.append("it began before its workflow was enabled: `pgflow-prefect worker --adopt` takes it")
    return lines
