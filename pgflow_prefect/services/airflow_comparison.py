"""Compares the runs that are mirrored with Airflow, and repairs their rows. A mirror that is alive needs a moment."""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from uuid import UUID

import anyio
from pydantic import JsonValue

from pgflow_prefect.airflow.whole_runs import find_run_ids, read_whole, write_whole
from pgflow_prefect.database.airflow.reader import AirflowDatabase, open_airflow
from pgflow_prefect.database.airflow.runs import SourceRun
from pgflow_prefect.database.mirror_statements import MirroredRun
from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation.disagreements import Disagreement, Kind
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError, UnknownRunError
from pgflow_prefect.models import Run, Status, StepState
from pgflow_prefect.settings import Settings

_PAGE = 100  # runs
_ACTIVE = 500  # runs of Airflow that go on
_SHOWN = 3  # differing steps in a sentence
_POLLS = 3  # of a mirror, before a difference counts


async def compare_with_airflow(
    store: Store, settings: Settings, *, apply: bool, everything: bool
) -> list[Disagreement]:
    """Return what mirrored runs and Airflow disagree about, and with `apply` write the rows as in Airflow.

    It returns nothing at once where no DAG is observed, or where the settings name no Airflow.

    Args:
        store: the database.
        settings: name Airflow's database.
        apply: make the repairs.
        everything: also compare the steps of ended runs that Airflow has not changed since they were written.

    Raises:
        DatabaseUnavailableError: one of the databases does not answer.
    """
    source = settings.airflow_dsn.get_secret_value() if settings.airflow_dsn is not None else ""
    if not source or not store.implementation.executes:
        return []
    slugs = [each.workflow_slug for each in await store.list_mirrors() if each.enabled]
    if not slugs:
        return []
    async with open_airflow(source, timeout=settings.connect_timeout) as airflow:
        comparer = _Comparer(store, airflow, slugs, everything, settings.airflow_results)
        found = await comparer.compare(None)
        if found:
            await anyio.sleep(_POLLS * settings.airflow_poll_interval)
            found = await comparer.compare({each.run_id for each in found if each.run_id is not None})
        return [await comparer.repair(each) for each in found] if apply else found


@dataclass
class _Comparer:
    store: Store
    airflow: AirflowDatabase
    slugs: list[str]
    everything: bool
    with_results: bool
    _source_ids: dict[UUID, int] = field(default_factory=dict, init=False)  # Airflow's ids, of what differs

    async def compare(self, only: set[UUID] | None) -> list[Disagreement]:
        """Compare the runs page by page: all of them, or these."""
        found: list[Disagreement] = []
        after = -1
        while page := await self.store.list_mirrored(self.slugs, only_pending=False, after=after, limit=_PAGE):
            after = page[-1].source_id
            found += await self._compare_page([each for each in page if only is None or each.run_id in only])
        return [*found, *await self._find_missing(only)]

    async def _compare_page(self, page: list[MirroredRun]) -> list[Disagreement]:
        there = {each.source_id: each for each in page}
        found = []
        async with self.airflow.snapshot():
            runs = {run.id: run for run in await self.airflow.read_runs(there)}
            for source_id, mirrored in there.items():
                run = runs.get(source_id)
                self._source_ids[mirrored.run_id] = source_id
                if run is None and mirrored.status == Status.PENDING:
                    found.append(_make(mirrored.run_id, mirrored.workflow_slug, "Airflow has deleted it"))
                elif run is not None and (self.everything or not run.has_ended or run.mark != mirrored.source_mark):
                    found += await self._compare_run(run, mirrored.run_id)
        return found

    async def _compare_run(self, run: SourceRun, run_id: UUID) -> list[Disagreement]:
        document = (await read_whole(self.airflow, run, run_id, with_results=False)).document
        here = await self.store.read_run(run_id)
        slugs = (await self.store.load_run_definition(run_id)).steps
        steps = {each.step_slug: each for each in await self.store.list_step_ends(run_id, slugs)}
        differences = [*list_differences(document, here, steps, slugs)]
        if not differences:
            return []
        more = f" and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        return [_make(run_id, run.dag_id, "; ".join(differences[:_SHOWN]) + more)]

    async def _find_missing(self, only: set[UUID] | None) -> list[Disagreement]:
        """Return the runs that go on in Airflow and have no rows here."""
        asking = await self.store.list_asking_dags(self.slugs)  # their tasks begin new runs here
        slugs = [slug for slug in self.slugs if slug not in asking]
        async with self.airflow.snapshot():
            runs = await self.airflow.read_runs(await self.airflow.list_active_runs(slugs, limit=_ACTIVE))
        ids = await find_run_ids(self.store, runs, await self.store.read_installation())
        there = await self.store.find_mirrored([(run.dag_id, run.run_id) for run in runs]) if runs else []
        known = {each.run_id for each in there}
        for run_id in {ids[run.id] for run in runs} - known:
            with suppress(UnknownRunError):
                await self.store.read_run(run_id)
                known.add(run_id)  # begun by a task, before the DAG's policy was taken back
        self._source_ids |= {ids[run.id]: run.id for run in runs}
        return [
            _make(ids[run.id], run.dag_id, f"Airflow's run {run.run_id!r} goes on, and has no rows here")
            for run in runs
            if ids[run.id] not in known and (only is None or ids[run.id] in only)
        ]

    async def repair(self, found: Disagreement) -> Disagreement:
        """Write a run as it is in Airflow."""
        run_id = found.run_id
        assert run_id is not None
        try:
            async with self.airflow.snapshot():
                runs = await self.airflow.read_runs([self._source_ids[run_id]])
                documents = [
                    await read_whole(self.airflow, run, run_id, with_results=self.with_results) for run in runs
                ]
            for document in documents:
                await write_whole(self.store, document)
        except DatabaseUnavailableError:
            raise
        except PgflowPrefectError as error:
            return found.model_copy(update={"error": str(error)})
        if not documents:
            return found.model_copy(update={"error": "Airflow does not have it any more: the mirror ends it"})
        return found.model_copy(update={"repaired": True})


def list_differences(
    document: Mapping[str, JsonValue], run: Run, steps: Mapping[str, StepState], known: tuple[str, ...]
) -> Iterator[str]:
    """Yield what differs between the rows of a run and Airflow, in words.

    Args:
        document: the whole run, as Airflow has it.
        run: its row.
        steps: the rows of its steps, by slug.
        known: all steps of the run; other tasks of Airflow are left out.
    """
    if run.status != document["status"]:
        yield f"it is {run.status}, and {document['status']} in Airflow"
    made = document["steps"]
    assert isinstance(made, list)
    for step in made:
        assert isinstance(step, dict)
        slug, state = str(step["slug"]), steps.get(str(step["slug"]))
        if slug not in known or (state is not None and state.handler not in {"airflow", None}):
            continue
        theirs = (step["status"], step["skip_reason"], step["attempts"])
        if state is None:
            if step["status"] is not None:
                yield f"step {slug!r} has not started, and is {step['status']} in Airflow"
        elif (state.status, state.skip_reason, state.attempts) != (theirs[0] or Status.PENDING, theirs[1], theirs[2]):
            yield f"step {slug!r} is {_describe(state)}, and {theirs[0] or 'cleared'} in Airflow"


def _describe(state: StepState) -> str:
    word = "skipped" if state.is_skipped else "not run" if state.is_not_run else str(state.status)
    return f"{word} after {state.attempts} tries" if state.attempts else word


def _make(run_id: UUID, workflow_slug: str, found: str) -> Disagreement:
    return Disagreement(
        kind=Kind.UNLIKE_AIRFLOW,
        run_id=run_id,
        workflow_slug=workflow_slug,
        flow_run_id=None,
        found=found,
        repair="rows as in Airflow",
    )
