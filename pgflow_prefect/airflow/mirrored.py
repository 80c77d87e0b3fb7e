"""A run of Airflow that is followed: what has changed since the last look, as a document for the database."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from itertools import islice
from uuid import UUID, uuid5

from pydantic import JsonValue

from pgflow_prefect.airflow.results import read_return_value
from pgflow_prefect.airflow.states import KNOWN, SKIPPED, Standing, combine, find_standing
from pgflow_prefect.database.airflow.runs import MOST_BYTES, MOST_INSTANCES, Instance, ReturnValue, SourceRun
from pgflow_prefect.models import NOT_RUN, Ending, Status, TaskKey
from pgflow_prefect.prefect_api.ids import find_task_run_id, make_placeholder
from pgflow_prefect.raw_json import UnreadableJsonError, load_json
from pgflow_prefect.wording import clean

EPOCH = 1
"""Of every mirrored run."""

_NAMED = 5  # failed tasks in the message of a run

_DEEPEST = 190  # levels of a conf: the database stores 200 of a payload

ResultKey = tuple[str, int, int]
"""A task, a map index and a try."""


def find_mirrored_run_id(installation: UUID, dag_id: str, run_id: str) -> UUID:
    """Return the id that a run of Airflow has in a database; the same again for each look."""
    return uuid5(uuid5(installation, f"airflow {dag_id}"), run_id)


@dataclass(frozen=True)
class Found:
    """What the database is to write of a run.

    Attributes:
        document: the run, and those of its steps and items that have changed.
        results: JSON texts that the document refers to, from 1 on.
        said: by step and item, what the document says of it.
        taken: the results that it has.
        is_news: the database was not told all of it before.
        is_whole: no result is left to be read.
    """

    document: dict[str, JsonValue]
    results: list[str]
    said: Mapping[tuple[str, int], JsonValue]
    taken: frozenset[ResultKey]
    is_news: bool
    is_whole: bool

    def without_results(self, problem: str) -> "Found":
        """Return the same without results, and with a note that says why."""
        note = clean(f"its results were not copied: {problem}")
        notes = {**_as_object(self.document["notes"]), "": note}
        steps = [_drop_results(_as_object(each)) for each in _as_array(self.document["steps"])]
        return replace(self, document={**self.document, "steps": steps, "notes": notes}, results=[])

    @property
    def has_conf(self) -> bool:
        """The document has the run's `conf`."""
        return "conf" in _as_object(self.document["payload"])

    def without_conf(self, problem: str) -> "Found":
        """Return the same without the run's `conf`, and with a note that says why."""
        payload = {name: value for name, value in _as_object(self.document["payload"]).items() if name != "conf"}
        notes = {**_as_object(self.document["notes"]), "": clean(f"its conf was not copied: {problem}")}
        return replace(self, document={**self.document, "payload": payload, "notes": notes})


def _drop_results(step: dict[str, JsonValue]) -> JsonValue:
    kept = {name: value for name, value in step.items() if name != "result"}
    if "items" in kept:
        kept["items"] = [_drop_results(_as_object(each)) for each in _as_array(kept["items"])]
    return kept


def _as_object(value: JsonValue) -> dict[str, JsonValue]:
    assert isinstance(value, dict)
    return value


def _as_array(value: JsonValue) -> list[JsonValue]:
    assert isinstance(value, list)
    return value


@dataclass
class FollowedRun:
    """A run of Airflow, and what the database was told of it.

    Attributes:
        run_id: the run's id here.
        workflow_slug: the workflow, and the DAG.
        source_run_id: its id in Airflow.
        is_new: the database was not told of it by this object.
        mark: of Airflow's row, when the database was told of it last.
        instances: how many task instances it had at the last look.
        fingerprint: of what was read when the database was told all of it; None if it was not yet.
    """

    run_id: UUID
    workflow_slug: str
    source_run_id: str
    is_new: bool = False
    mark: str = ""
    instances: int = 0
    fingerprint: int | None = None
    _said: dict[tuple[str, int], JsonValue] = field(default_factory=dict, init=False)
    _taken: set[ResultKey] = field(default_factory=set, init=False)

    def list_wanted(self, instances: Iterable[Instance]) -> list[ResultKey]:
        """Return the instances whose return values the database does not have."""
        keys = ((each.task_id, each.map_index, each.tries) for each in instances if each.state == "success")
        return [each for each in keys if each not in self._taken]

    def describe(
        self,
        run: SourceRun,
        instances: Sequence[Instance] | None,
        results: Mapping[ResultKey, ReturnValue | None],
        *,
        imported: bool = False,
    ) -> Found:
        """Return what the database is to write.

        Args:
            run: as Airflow has it.
            instances: all of its task instances; None if there are too many.
            results: return values that were read; None for one that there is not.
            imported: it had ended before it was written.
        """
        maker = _Maker(self.run_id, self._said, self._taken, results)
        tasks: dict[str, list[Instance]] = defaultdict(list)
        for each in instances or []:
            tasks[each.task_id].append(each)
        steps: list[JsonValue] = [
            step for task_id, of in tasks.items() if (step := maker.make_step(task_id, of)) is not None
        ]
        if instances is None:
            maker.notes[""] = f"it has more than {MOST_INSTANCES:,} task instances: its steps are not followed"
        document: dict[str, JsonValue] = {
            **_describe_run(run, maker.notes, [each for each in instances or [] if each.state == "failed"]),
            "run_id": str(self.run_id),
            "placeholder": str(make_placeholder(self.run_id, EPOCH)),
            "imported": imported,
            "steps": steps,
            "notes": {name: clean(note) for name, note in maker.notes.items()},
        }
        is_whole = all(key in results for key in self.list_wanted(instances or []))
        if not is_whole:  # the run goes on here until the last result is read
            document |= {"status": Status.PENDING, "error_message": None, "finished_at": None, "source_mark": ""}
        is_news = bool(maker.said) or document["source_mark"] != self.mark
        return Found(document, maker.texts, maker.said, frozenset(results), is_news, is_whole)

    def accept(self, found: Found) -> None:
        """Note that the database has written this."""
        self._said.update(found.said)
        self._taken.update(found.taken)
        self.mark = str(found.document["source_mark"])
        self.is_new = False


def describe_deleted(followed: FollowedRun, source_id: int) -> dict[str, JsonValue]:
    """Return what the database is to write of a pending run that Airflow has deleted."""
    return {
        "run_id": str(followed.run_id),
        "workflow_slug": followed.workflow_slug,
        "status": Status.FAILED,
        "ended_as": Ending.CANCELLED,
        "error_message": "cancelled: the run was deleted in Airflow",
        "source_id": source_id,
        "source_run_id": followed.source_run_id,
        "source_mark": "deleted",
        "placeholder": str(make_placeholder(followed.run_id, EPOCH)),
        "steps": [],
    }


def _describe_run(run: SourceRun, notes: dict[str, str], failed: Sequence[Instance]) -> dict[str, JsonValue]:
    status = {"success": Status.COMPLETED, "failed": Status.FAILED}.get(run.state or "", Status.PENDING)
    error = None
    if status is Status.FAILED:
        names = list(dict.fromkeys(each.task_id for each in failed))
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        error = f"failed in Airflow: {', '.join(islice(names, _NAMED))}{more}" if names else "failed in Airflow"
    logical_date = run.logical_date or run.execution_date
    return {
        "workflow_slug": run.dag_id,
        "status": status,
        "error_message": error,
        "payload": _make_payload(run, logical_date, notes),
        "logical_date": _write_time(logical_date),
        "interval_start": _write_time(run.data_interval_start),
        "interval_end": _write_time(run.data_interval_end),
        "created_at": _write_time(run.queued_at or run.start_date),
        "finished_at": _write_time(run.end_date or run.updated_at) if run.has_ended else None,
        "source_id": run.id,
        "source_run_id": run.run_id,
        "source_mark": run.mark,
    }


def _make_payload(run: SourceRun, logical_date: datetime | None, notes: dict[str, str]) -> dict[str, JsonValue]:
    payload: dict[str, JsonValue] = {
        "airflow_run_id": run.run_id,
        "logical_date": _write_time(logical_date),
        "data_interval_start": _write_time(run.data_interval_start),
        "data_interval_end": _write_time(run.data_interval_end),
    }
    if not run.conf_is_json:
        if run.conf_size:
            notes.setdefault("", "its conf is pickled: it was not copied")
    elif run.conf is None and run.conf_size:
        notes.setdefault("", f"its conf has more than {MOST_BYTES:,} bytes: it was not copied")
    elif run.conf is not None:
        try:
            conf = load_json(run.conf)
        except UnreadableJsonError:
            notes.setdefault("", "its conf can't be read: it was not copied")
        else:
            if _is_deep(conf):
                notes.setdefault("", f"its conf has more than {_DEEPEST} levels: it was not copied")
            else:
                payload["conf"] = conf
    return payload


def _is_deep(value: JsonValue) -> bool:
    level = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True


def _write_time(moment: datetime | None) -> str | None:
    return None if moment is None else moment.isoformat()


@dataclass
class _Maker:
    """Makes the steps of one document."""

    run_id: UUID
    former: Mapping[tuple[str, int], JsonValue]
    taken: Collection[ResultKey]
    results: Mapping[ResultKey, ReturnValue | None]
    texts: list[str] = field(default_factory=list)
    said: dict[tuple[str, int], JsonValue] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def make_step(self, task_id: str, instances: Sequence[Instance]) -> dict[str, JsonValue] | None:
        """Return what is new of a task; None if nothing is."""
        items = [each for each in instances if each.map_index >= 0 and each.state != "removed"]
        for state in {each.state for each in instances} - KNOWN:
            self.notes[task_id] = f"Airflow's state {state!r} is not known here: it counts as not begun"
        if items:
            return self._make_map(task_id, items)
        [instance] = [each for each in instances if each.map_index < 0][:1] or instances[:1]
        standing = self._find_standing(instance)
        step = self._place(task_id, standing, (task_id, instance.map_index, instance.tries))
        return self._note(task_id, -1, step)

    def _make_map(self, task_id: str, instances: Sequence[Instance]) -> dict[str, JsonValue] | None:
        standings = [(each, self._find_standing(each)) for each in instances]
        combined = combine([standing for _, standing in standings])
        items: list[JsonValue] = []
        for each, standing in standings:
            item = _make_item(each.map_index, standing)
            self._add_result(item, task_id, standing, (task_id, each.map_index, each.tries))
            if self._note(task_id, each.map_index, item) is not None:
                items.append(item)
        ended = [each for _, each in standings if each.status not in {None, Status.PENDING}]
        failed = sum(each.status is Status.FAILED for each in ended)
        step = {
            **self._place(task_id, combined, None),
            "tasks": max(each.map_index for each in instances) + 1,
            "remaining": len(instances) - len(ended),
            "failed": failed,
        }
        if self._note(task_id, -1, dict(step)) is None and not items:
            return None
        return {**step, "items": items}

    def _find_standing(self, instance: Instance) -> Standing:
        """Return how an instance stands. One whose result is not read yet counts as running: a step ends with it."""
        key = instance.task_id, instance.map_index, instance.tries
        if instance.state == "success" and key not in self.results and key not in self.taken:
            return find_standing(replace(instance, state="running"))
        return find_standing(instance)

    def _place(self, task_id: str, standing: Standing, key: ResultKey | None) -> dict[str, JsonValue]:
        task_run_id = find_task_run_id(make_placeholder(self.run_id, EPOCH), TaskKey(task_id))
        step = {"slug": task_id, **standing.to_json(), "task_run_id": str(task_run_id)}
        if key is not None:
            self._add_result(step, task_id, standing, key)
        return step

    def _add_result(self, of: dict[str, JsonValue], task_id: str, standing: Standing, key: ResultKey) -> None:
        """Add the result of a step or an item, if it was read; JSON null where the task has returned nothing."""
        if standing.status is not Status.COMPLETED or standing.skip_reason is not None or key not in self.results:
            return
        found = self.results[key]
        text, note = ("null", None) if found is None else read_return_value(found)
        if note is not None:
            self.notes[task_id] = note
        if text is not None:
            self.texts.append(text)
            of["result"] = len(self.texts)

    def _note(self, task_id: str, place: int, made: dict[str, JsonValue]) -> dict[str, JsonValue] | None:
        """Return what was made, if the database was not told of it before."""
        plain = {name: value for name, value in made.items() if name != "result"}
        if self.former.get((task_id, place)) == plain and "result" not in made:
            return None
        self.said[task_id, place] = plain
        return made


def _make_item(index: int, standing: Standing) -> dict[str, JsonValue]:
    made = standing.to_json()
    item = {name: made[name] for name in ("status", "attempts", "error_message", "started_at", "finished_at")}
    if standing.skip_reason == NOT_RUN:
        item["error_message"] = "a task that it waits for has failed"
    return {**item, "index": index, "skip_reason": SKIPPED if standing.skip_reason == SKIPPED else None}
