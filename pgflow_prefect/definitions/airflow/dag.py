"""A DAG: its tasks, groups and schedule, and the workflow that it becomes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import networkx as nx
from pydantic import JsonValue

from pgflow_prefect.definitions.airflow.document import SerializedDag
from pgflow_prefect.definitions.airflow.schedule import Schedule, read_schedule
from pgflow_prefect.definitions.airflow.tasks import AirflowTask, UnreadableTaskError, read_task
from pgflow_prefect.definitions.airflow.values import Fields, read_names, read_seconds, read_text, unwrap
from pgflow_prefect.definitions.from_handlers import find_unstorable
from pgflow_prefect.definitions.graph import Graph, find_problems
from pgflow_prefect.definitions.model import Dep, MapRules, Rule, StepRules, WorkflowDefinition
from pgflow_prefect.errors import InvalidDefinitionError

LONGEST_ID = 250
"""Characters of an id, as Airflow allows."""

DEEPEST_GROUP = 100

DEFAULTS: Mapping[str, JsonValue] = {
    "catchup": False,
    "max_active_runs": 16,
    "max_active_tasks": 16,
    "max_consecutive_failed_dag_runs": 0,
    "dagrun_timeout": None,
    "start_date": None,
    "end_date": None,
    "params": [],
    "deadline": None,
    "sla_miss_callback": None,
    "has_on_success_callback": False,
    "has_on_failure_callback": False,
    "is_paused_upon_creation": None,
    "allowed_run_types": None,
}
"""What a DAG may say, and Airflow's default."""


@dataclass(frozen=True)
class Group:
    """A group of tasks.

    Attributes:
        group_id: with the ids of the groups that it is in before it.
        has_prefix: the ids of its tasks begin with its own.
        is_mapped: its tasks are executed once for each element of a list.
        tasks: the ids of the tasks in it, and in the groups in it.
    """

    group_id: str
    has_prefix: bool
    is_mapped: bool
    tasks: tuple[str, ...]


@dataclass(frozen=True)
class AirflowDag:
    """A DAG.

    Attributes:
        dag_id: its id.
        version: of the serialization that it was read from.
        file: the file that defines it, relative to the folder of DAGs where the document says so; None: not said.
        description: a text for people; None for none.
        tags: of the DAG.
        schedule: when it runs.
        tasks: in the order of the document.
        deps: what waits for what, with what a teardown waits for beside it.
        added_deps: those of them that Airflow keeps without writing them into the document.
        groups: of tasks.
        stops: a failure ends a run at once.
        knows_settings: what a task does not say of retries and time-outs is known.
        max_items: the most items of a mapped task, by Airflow's setting; None where that is not known.
        said: what it says beside that, by the names of `DEFAULTS`; defaults are left out.
    """

    dag_id: str
    version: int
    file: str | None
    description: str | None
    tags: tuple[str, ...]
    schedule: Schedule
    tasks: tuple[AirflowTask, ...]
    deps: tuple[Dep, ...]
    added_deps: tuple[Dep, ...] = ()
    groups: tuple[Group, ...] = ()
    stops: bool = False
    knows_settings: bool = True
    max_items: int | None = None
    said: Mapping[str, JsonValue] = field(default_factory=dict)

    @property
    def definition(self) -> WorkflowDefinition:
        """The workflow: a step a task, whose rule is always written out, and Airflow's way to end a run."""
        deps = {*self.deps}
        return WorkflowDefinition(
            slug=self.dag_id,
            steps=tuple(task.task_id for task in self.tasks),
            deps=self.deps,
            rules={
                task.task_id: StepRules(
                    rule=Rule(task.rule),
                    fails_run=task.fails_run,
                    is_setup=task.is_setup,
                    map=self._make_map(task, deps),
                )
                for task in self.tasks
            },
            when_failed="stop" if self.stops else "continue",
            failed_by="leaves",
        )

    def _make_map(self, task: AirflowTask, deps: set[Dep]) -> MapRules | None:
        """Return what a map says; None for a task that is executed once, or whose list is not one task's result.

        In Airflow, the other items go on where one fails, and a task without items is skipped.
        """
        source = None if task.expansion is None else task.expansion.source
        if source is None or Dep(source, task.task_id) not in deps:
            return None
        return MapRules(over=source, max_items=self.max_items, when_empty="skip-cascade", when_item_fails="continue")


def read_dag(document: SerializedDag) -> AirflowDag:
    """Return the DAG of a document.

    Raises:
        InvalidDefinitionError: with every problem: a task that can't be read, a rule that is not known, a cycle.
    """
    tasks: list[AirflowTask] = []
    problems: list[str] = []
    for given in document.tasks:
        try:
            tasks.append(read_task(given, document.settings))
        except UnreadableTaskError as error:
            problems.append(f"task {read_text(given.get('task_id'))!r} {error}")
    problems += [*_find_task_problems(tasks), *find_unstorable(document.dag_id, [task.task_id for task in tasks])]
    fields = document.fields
    if problems:
        raise InvalidDefinitionError(document.dag_id, problems)
    known = {task.task_id for task in tasks}
    deps = dict.fromkeys(Dep(task.task_id, each) for task in tasks for each in task.downstream if each in known)
    if problems := find_problems(WorkflowDefinition(slug=document.dag_id, steps=tuple(known), deps=tuple(deps))):
        raise InvalidDefinitionError(document.dag_id, problems)
    added = [dep for dep in _find_deps_of_teardowns(tasks, deps) if dep not in deps]
    groups = tuple(_list_groups(fields.get("task_group"), known))
    return AirflowDag(
        dag_id=document.dag_id,
        version=document.version,
        file=read_text(fields.get("relative_fileloc")) or read_text(fields.get("fileloc")),
        description=read_text(fields.get("description")) or None,
        tags=tuple(sorted(read_names(fields.get("tags")))),
        schedule=read_schedule(fields),
        tasks=tuple(tasks),
        deps=(*deps, *added),
        added_deps=tuple(added),
        groups=groups,
        stops=fields.get("fail_fast", fields.get("fail_stop")) is True,
        knows_settings=document.version >= 3 or bool(document.settings),  # noqa: PLR2004  from 3 on, with defaults
        max_items=_read_most_items(document.settings),
        said=_list_said(fields),
    )


def _read_most_items(settings: Fields) -> int | None:
    number = read_seconds(settings.get("max_map_length"))
    return int(number) if number and number >= 1 else None


def _find_task_problems(tasks: list[AirflowTask]) -> Iterator[str]:
    seen: set[str] = set()
    rules = {rule.value for rule in Rule}
    known = {task.task_id for task in tasks}
    for task in tasks:
        if task.task_id in seen:
            yield f"there are two tasks {task.task_id!r}"
        seen.add(task.task_id)
        if len(task.task_id) > LONGEST_ID:
            yield f"the id of task {task.task_id[:40]!r}… is longer than {LONGEST_ID} characters"
        if task.rule not in rules:
            yield f"task {task.task_id!r} has the trigger rule {task.rule[:40]!r}, which is not one of Airflow's 13"
        for each in task.downstream:
            if each not in known:
                yield f"task {task.task_id!r} is followed by {each[:LONGEST_ID]!r}, which is no task of this DAG"


def _find_deps_of_teardowns(tasks: list[AirflowTask], deps: Mapping[Dep, None]) -> Iterator[Dep]:
    """Yield what a teardown waits for beside its edges: the tasks between its setups and itself.

    Airflow 3.3 waits for them in `TriggerRuleDep._evaluate_teardown_scope`. Those that its upstream tasks wait for
    anyway are left out: a task with one upstream task ends after it.
    """
    by_id = {task.task_id: task for task in tasks}
    graph: Graph = nx.DiGraph()
    graph.add_edges_from(deps)
    for task in tasks:
        if not task.is_teardown or task.task_id not in graph:
            continue
        direct = set(graph.predecessors(task.task_id))
        setups = {each for each in direct if by_id[each].is_setup}
        below = {each for setup in setups for each in nx.descendants(graph, setup)}
        between = (nx.ancestors(graph, task.task_id) - direct) & below
        for each in sorted(between - _find_ended(graph, by_id, direct)):
            if not by_id[each].is_setup:  # a teardown's rule counts the setups above it
                yield Dep(each, task.task_id)


def _find_ended(graph: Graph, tasks: Mapping[str, AirflowTask], ended: set[str]) -> set[str]:
    """Return the tasks that have ended where these have."""
    found: set[str] = set()
    waiting = [*ended]
    while waiting:
        slug = waiting.pop()
        above = list(graph.predecessors(slug))
        if len(above) == 1 and tasks[slug].rule != Rule.ALWAYS and above[0] not in found:
            found.add(above[0])
            waiting += above
    return found


def _list_said(fields: Fields) -> dict[str, JsonValue]:
    return {
        name: unwrap(each)
        for name, default in DEFAULTS.items()
        if (each := fields.get(name)) is not None and unwrap(each) not in (default, [], {})
    }


def _list_groups(tree: JsonValue, known: set[str]) -> Iterator[Group]:
    """Yield the groups, the outer ones first; the DAG itself is the outermost group, and is left out."""
    waiting = [(unwrap(tree), 0)]
    while waiting:
        group, depth = waiting.pop(0)
        if not isinstance(group, dict) or depth > DEEPEST_GROUP:
            continue
        inner = [each for _, each in _list_children(group, "taskgroup")]
        waiting += [(each, depth + 1) for each in inner]
        group_id = read_text(group.get("_group_id"))
        if group_id:
            yield Group(
                group_id,
                has_prefix=group.get("prefix_group_id") is not False,
                is_mapped=group.get("is_mapped") is True,
                tasks=tuple(sorted(_list_tasks(group, known, depth))),
            )


def _list_tasks(group: Fields, known: set[str], depth: int) -> set[str]:
    found = {each for _, each in _list_children(group, "operator") if isinstance(each, str) and each in known}
    if depth <= DEEPEST_GROUP:
        for _, inner in _list_children(group, "taskgroup"):
            if isinstance(inner, dict):
                found |= _list_tasks(inner, known, depth + 1)
    return found


def _list_children(group: Fields, kind: str) -> Iterator[tuple[str, JsonValue]]:
    children = unwrap(group.get("children"))
    for name, child in (children if isinstance(children, dict) else {}).items():
        if isinstance(child, list) and len(child) == 2 and child[0] == kind:  # noqa: PLR2004  kind and child
            yield name, unwrap(child[1])
