"""Follows the runs of Airflow in its metadata database, and writes them here. It changes nothing in Airflow.

Each look reads one snapshot of Airflow's database, so a run and its tasks agree. It reads the runs that go on, those
that are new, and some that have ended, for a user may have cleared one. A row here says how far it has read, and is
written after the runs. So a service that dies, or a database that restarts, loses nothing. The next look reads it
again, and writing the same again changes nothing.
"""

import logging
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from time import monotonic
from uuid import UUID, uuid4

import anyio

from pgflow_prefect.airflow.mirrored import (
    FollowedRun,
    Found,
    ResultKey,
    describe_deleted,
    find_mirrored_run_id,
)
from pgflow_prefect.airflow.results import NOT_READ
from pgflow_prefect.database.airflow.reader import AirflowDatabase, open_airflow
from pgflow_prefect.database.airflow.runs import Instance, ReturnValue, SourceRun
from pgflow_prefect.database.mirror_statements import MirroredRun, TakenMirror, Written
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import DatabaseUnavailableError, PgflowPrefectError, RunNotPendingError
from pgflow_prefect.services.airflow_unseen import UnseenTasks
from pgflow_prefect.settings import Settings
from pgflow_prefect.waiting import Pauses, Wakeup

MOST_RUNS = 200
"""The most runs of which a look reads the task instances. The others come at the next one."""

MOST_ROWS = 20_000
"""The most task instances that a look expects to read, as far as it knows how many its runs have."""

MOST_NEW, MOST_RESULTS, MOST_CHECKED = 500, 500, 20
"""The most new runs that a look reads, the most return values, and the most ended runs that it compares."""

_MOST_FOLLOWED = 1_000  # runs that go on, and that a look compares: those that were looked at least lately

_OVERLAP = 60.0
"""Seconds for which an id is looked at again: a transaction that has drawn it may commit after one with a later id."""

_MANY = 500  # task instances that are described without a thread

_LEASES = 5.0  # looks that may fail before another service takes a mirror
_SHORTEST_LEASE = 15.0  # seconds

_logger = logging.getLogger(__name__)


@dataclass
class Mirror:
    """Follows the DAGs of the workflows that are observed, as far as no other service does.

    Attributes:
        store: the database.
        airflow_dsn: Airflow's metadata database.
        settings: its intervals.
        on_change: called with the runs that have changed, and with the workflows that are followed.
        passed_at: the time of the last look, by the monotonic clock.
        holder: this service, among those that follow Airflow.
        installation: the database's id.
    """

    store: Store
    airflow_dsn: str
    settings: Settings
    on_change: Callable[[Collection[UUID], Collection[str]], None] = lambda _runs, _slugs: None
    passed_at: float = field(default_factory=monotonic, init=False)
    holder: UUID = field(default_factory=uuid4, init=False)
    _taken: dict[str, TakenMirror] = field(default_factory=dict, init=False)
    _followed: dict[int, FollowedRun] = field(default_factory=dict, init=False)  # by Airflow's id, those that go on
    _checked_to: int = field(default=-1, init=False)  # ended runs up to this id were compared
    _marks: deque[tuple[float, int]] = field(default_factory=deque, init=False)  # when ids were read up to where
    _stopped: bool = field(default=False, init=False)
    _warned: set[str] = field(default_factory=set, init=False)
    _told: dict[object, str] = field(default_factory=dict, init=False)
    _asking: frozenset[str] = field(default=frozenset(), init=False)  # DAGs whose tasks report their runs themselves
    installation: UUID = field(init=False)

    def __post_init__(self) -> None:
        self._wakeup = Wakeup()
        self._unseen = UnseenTasks(self.store, self.settings.airflow_results)
        self._lease = max(_SHORTEST_LEASE, _LEASES * self.settings.airflow_poll_interval)

    async def run(self) -> None:
        """Follow Airflow until `stop`. A database that does not answer is asked again, ever more rarely."""
        pauses = Pauses(self.settings.airflow_poll_interval, 10 * self.settings.airflow_poll_interval)
        while not self._stopped:
            try:
                await self._follow(pauses)
            except PgflowPrefectError as error:
                self._warn(f"Airflow's runs are written later: {error}")
                if isinstance(error, DatabaseUnavailableError):
                    await self._drop_broken_connections()
            self.passed_at = monotonic()
            if not self._stopped:
                await self._wakeup.wait(pauses.draw())
        try:
            await self.store.release_mirrors(self.holder)
        except PgflowPrefectError as error:
            _logger.debug("the mirrors are free once their leases are over: %s", error)

    def stop(self) -> None:
        """End after the present look. Another mirror goes on from there."""
        self._stopped = True
        self._wakeup.wake()

    async def _follow(self, pauses: Pauses) -> None:
        """Look again and again on one connection."""
        async with open_airflow(self.airflow_dsn, timeout=self.settings.connect_timeout) as airflow:
            while not self._stopped:
                await self.look(airflow)
                pauses.reset()
                self._warned.clear()
                self.passed_at = monotonic()
                await self._wakeup.wait(self.settings.airflow_poll_interval)

    async def _drop_broken_connections(self) -> None:
        try:
            await self.store.drop_broken_connections()
        except PgflowPrefectError as error:
            _logger.debug("connections are not checked: %s", error)

    def _warn(self, message: str) -> None:
        """Log what is wrong, once until a look succeeds."""
        if message not in self._warned:
            self._warned.add(message)
            _logger.warning("%s", message)

    # One look

    async def look(self, airflow: AirflowDatabase) -> None:
        """Write what has changed in Airflow.

        Raises:
            DatabaseUnavailableError: one of the databases does not answer; the next look begins where this one did.
            PgflowPrefectError: rows can't be read.
        """
        self.installation = await self.store.read_installation()
        await self._take()
        if not self._taken:
            return
        known = await self._list_ended()
        async with airflow.snapshot():
            new, read_to = await self._list_new(airflow)
            active = await airflow.list_active_runs(self._list_beginning(), limit=MOST_RUNS)
            followed = [*islice(self._followed, _MOST_FOLLOWED)]
            runs = await airflow.read_runs({*followed, *known, *new, *active})
            known |= await self._find_known(runs)
            wanted = self._list_changed(runs, known)
            chosen = await self._read_confs(airflow, [*islice(self._fit(wanted), MOST_RUNS)], known)
            instances = await airflow.read_instances(chosen) if chosen else {}
            results = await self._read_results(airflow, chosen, instances)
            unseen = await self._unseen.read(airflow, self._taken, self.installation)
        written = []
        for run in chosen:
            await anyio.lowlevel.checkpoint()  # between two of them, a worker goes on with its steps
            written.append(await self._write(run, instances[run.id], results[run.id]))
        written += await self._end_deleted({*followed} - {run.id for run in runs})
        await self._unseen.report(unseen)
        self.on_change([each for each in written if each is not None], [*self._taken])
        if read_to is not None and len(chosen) == len(wanted):  # otherwise the next look finds the others again
            await self.store.note_look(self.holder, [*self._taken], read_to)

    async def _take(self) -> None:
        taken = {each.workflow_slug: each for each in await self.store.take_mirrors(self.holder, self._lease)}
        asking = await self.store.list_asking_dags(taken) if taken else frozenset()
        for slug in taken.keys() - self._taken.keys() - asking:
            _logger.info("following the DAG %r in Airflow", slug)
        for slug in asking - (self._asking & self._taken.keys()):
            _logger.warning(
                "the DAG %r is followed no more, because its tasks report here by a policy. Its runs that began before "
                "are followed to their end, and so are the tasks that the policy does not see",
                slug,
            )
        for slug in self._asking & self._taken.keys() & taken.keys() - asking:
            _logger.warning("the DAG %r has no policy any more: its new runs are followed", slug)
        self._asking = asking
        if taken.keys() - self._taken.keys():
            self._marks.clear()
        gone = {slug for slug in self._taken if slug not in taken or taken[slug].epoch != self._taken[slug].epoch}
        self._followed = {
            each: run
            for each, run in self._followed.items()
            if run.workflow_slug not in gone and not (run.is_new and run.workflow_slug in asking)
        }
        new = [slug for slug in taken if slug not in self._taken or slug in gone]
        self._taken = taken
        after = -1
        while new and (page := await self.store.list_mirrored(new, only_pending=True, after=after, limit=MOST_NEW)):
            after = page[-1].source_id
            for each in page:
                self._followed[each.source_id] = FollowedRun(each.run_id, each.workflow_slug, each.source_run_id)

    async def _list_ended(self) -> dict[int, MirroredRun]:
        """Return some runs that have ended here, by Airflow's id; the next ones at each call."""
        page = await self.store.list_mirrored(
            [*self._taken], only_pending=False, after=self._checked_to, limit=MOST_CHECKED
        )
        self._checked_to = page[-1].source_id if page else -1
        return {each.source_id: each for each in page}

    async def _find_known(self, runs: Sequence[SourceRun]) -> dict[int, MirroredRun]:
        """Return those of these runs that have rows here, by Airflow's id."""
        asked = {(run.dag_id, run.run_id): run.id for run in runs if run.id not in self._followed}
        if not asked:
            return {}
        found = await self.store.find_mirrored(asked)
        return {asked[each.workflow_slug, each.source_run_id]: each for each in found}

    def _list_beginning(self) -> list[str]:
        """Return the DAGs whose new runs are written here: those that no policy reports."""
        return [slug for slug in self._taken if slug not in self._asking]

    async def _list_new(self, airflow: AirflowDatabase) -> tuple[list[int], int | None]:
        """Return runs that were not looked at before, and up to which id no other one can come; None: not known yet."""
        first = [slug for slug, each in self._taken.items() if each.read_to is None]
        if first:  # its runs count from now on, and those that go on
            newest = await airflow.read_newest_run()
            await self.store.note_look(self.holder, first, newest)
            self._taken |= {slug: self._taken[slug].model_copy(update={"read_to": newest}) for slug in first}
        after = min(each.read_to or 0 for each in self._taken.values())
        found = await airflow.list_new_runs(self._list_beginning(), after=after, limit=MOST_NEW)
        if not found.is_all:
            return found.ids, found.read_to
        self._marks.append((monotonic(), after if found.read_to is None else found.read_to))
        while len(self._marks) > 1 and self._marks[1][0] < monotonic() - _OVERLAP:
            self._marks.popleft()
        at, read_to = self._marks[0]
        return found.ids, read_to if at < monotonic() - _OVERLAP else None

    def _list_changed(self, runs: Sequence[SourceRun], known: dict[int, MirroredRun]) -> list[SourceRun]:
        """Return the runs to be written: those that go on or have changed, those first that are not followed yet."""
        changed = [run for run in runs if self._is_changed(run, known.get(run.id))]
        for run in changed:
            if run.id not in self._followed:
                there = known.get(run.id)
                run_id = there.run_id if there is not None else self._make_run_id(run)
                self._followed[run.id] = FollowedRun(run_id, run.dag_id, run.run_id, is_new=True)
        changed.sort(key=lambda run: not self._followed[run.id].is_new)
        return changed

    def _is_changed(self, run: SourceRun, known: MirroredRun | None) -> bool:
        if run.dag_id not in self._taken:
            return False
        if run.dag_id in self._asking and known is None and run.id not in self._followed:
            return False  # it began to be named just now
        if run.id in self._followed or not run.has_ended:
            return True
        if known is not None:
            return known.source_mark != run.mark
        return run.id > (self._taken[run.dag_id].read_to or 0)

    def _make_run_id(self, run: SourceRun) -> UUID:
        return find_mirrored_run_id(self.installation, run.dag_id, run.run_id)

    def _fit(self, runs: Sequence[SourceRun]) -> Iterator[SourceRun]:
        """Yield the runs whose task instances are read now. Those that were looked at least lately come first."""
        order = {source_id: place for place, source_id in enumerate(self._followed)}
        rows = 0
        for run in sorted(runs, key=lambda run: (not self._followed[run.id].is_new, order[run.id])):
            rows += self._followed[run.id].instances
            if rows > MOST_ROWS and rows > self._followed[run.id].instances:
                return
            yield run

    async def _read_confs(
        self, airflow: AirflowDatabase, runs: Sequence[SourceRun], known: Collection[int]
    ) -> list[SourceRun]:
        """Return these runs; those that have no rows here yet with their `conf`, as many as are not too much."""
        new = [run for run in runs if self._followed[run.id].is_new and run.id not in known]
        found = {run.id: run for run in await airflow.read_confs(new)}
        later = {run.id for run in new} - found.keys()
        return [found.get(run.id, run) for run in runs if run.id not in later]

    async def _read_results(
        self, airflow: AirflowDatabase, runs: Sequence[SourceRun], instances: dict[int, list[Instance] | None]
    ) -> dict[int, dict[ResultKey, ReturnValue | None]]:
        results: dict[int, dict[ResultKey, ReturnValue | None]] = {run.id: {} for run in runs}
        wanted = [(run.id, key) for run in runs for key in self._followed[run.id].list_wanted(instances[run.id] or [])]
        if not self.settings.airflow_results:
            for source_id, key in wanted:
                results[source_id][key] = NOT_READ
            return results
        wanted = wanted[:MOST_RESULTS]
        found = await airflow.read_results([(source_id, task_id, index) for source_id, (task_id, index, _) in wanted])
        for source_id, key in wanted:
            if (source_id, key[0], key[1]) in found:
                results[source_id][key] = found[source_id, key[0], key[1]]
        return results

    async def _write(
        self,
        run: SourceRun,
        instances: list[Instance] | None,
        results: dict[ResultKey, ReturnValue | None],
    ) -> UUID | None:
        """Write a run. Return its id if something has changed."""
        followed = self._followed.pop(run.id)  # and at the end again: the next look begins with others
        self._followed[run.id] = followed
        followed.instances = len(instances or [])
        fingerprint = hash((run.mark, tuple(instances or ())))
        if fingerprint == followed.fingerprint and not results:
            return None  # it is as it was
        try:
            found = await self._describe(followed, run, instances, results)
        except (ArithmeticError, LookupError, RecursionError, TypeError, ValueError) as error:
            self._tell(run.id, f"run {followed.run_id} of {followed.workflow_slug!r} can't be read: {error}")
            return None
        written = await self._store(run.id, followed, found) if found.is_news else None
        if found.is_news and written is None:
            return None
        followed.accept(found)
        followed.fingerprint = fingerprint
        if run.has_ended and found.is_whole:
            del self._followed[run.id]
        if written is None:
            return None
        if written.left_out:
            self._tell(
                followed.workflow_slug,
                f"the DAG {run.dag_id!r} has tasks that are no steps here: {', '.join(written.left_out)}. "
                "Import it again",
            )
        return written.run_id if written.changed else None

    async def _describe(
        self,
        followed: FollowedRun,
        run: SourceRun,
        instances: list[Instance] | None,
        results: dict[ResultKey, ReturnValue | None],
    ) -> Found:
        """Return what is new of a run. What may take long is done in a thread: a worker goes on with its steps."""
        if results or len(instances or []) > _MANY:
            return await anyio.to_thread.run_sync(followed.describe, run, instances, results)
        return followed.describe(run, instances, results)

    async def _store(self, source_id: int, followed: FollowedRun, found: Found) -> Written | None:
        """Write what was found of a run; None if that is not possible now."""
        epoch = self._taken[followed.workflow_slug].epoch
        problem = ""
        for without_results, without_conf in ((False, False), (True, False), (False, True), (True, True)):
            if (without_results and not found.results) or (without_conf and not found.has_conf):
                continue
            tried = found.without_results(problem) if without_results else found
            tried = tried.without_conf(problem) if without_conf else tried
            try:
                return await self.store.mirror_run(epoch, tried.document, tried.results)
            except RunNotPendingError as error:  # another service has taken the mirror
                _logger.info("%s", error)
                return None
            except DatabaseUnavailableError:
                raise
            except (PgflowPrefectError, RecursionError, ValueError) as error:
                problem = str(error)
        self._tell(source_id, f"run {followed.run_id} of {followed.workflow_slug!r} is written later: {problem}")
        return None

    async def _end_deleted(self, source_ids: Collection[int]) -> list[UUID]:
        """End the runs that Airflow has deleted while they went on."""
        ended = []
        for source_id in source_ids:
            followed = self._followed[source_id]
            if followed.is_new or await self._end(source_id, followed):
                del self._followed[source_id]
                ended += [] if followed.is_new else [followed.run_id]
        return ended

    async def _end(self, source_id: int, followed: FollowedRun) -> bool:
        """End a run; False if that is not possible now. It keeps no other run waiting."""
        epoch = self._taken[followed.workflow_slug].epoch
        try:
            await self.store.mirror_run(epoch, describe_deleted(followed, source_id), [])
        except RunNotPendingError as error:  # another service has taken the mirror
            _logger.info("%s", error)
            return False
        except DatabaseUnavailableError:
            raise
        except PgflowPrefectError as error:
            self._tell(source_id, f"run {followed.run_id} of {followed.workflow_slug!r} is ended later: {error}")
            return False
        return True

    def _tell(self, of: object, message: str) -> None:
        """Log a problem that lasts once."""
        if self._told.get(of) != message:
            self._told[of] = message
            _logger.warning("%s", message)
