"""The ledger of a DAG: each thing that it says, and what becomes of it here. Nothing is guessed."""

from collections import defaultdict
from collections.abc import Collection, Iterator
from datetime import UTC, datetime

import networkx as nx
from pydantic import JsonValue

from pgflow_prefect.airflow.arguments import describe_arguments, describe_names
from pgflow_prefect.airflow.mapping import describe_map
from pgflow_prefect.airflow.operators import describe_work, may_skip
from pgflow_prefect.airflow.retries import list_delays
from pgflow_prefect.airflow.schedule import describe_schedule
from pgflow_prefect.airflow.sentences import OF_DAGS, OF_TASKS, Sentence
from pgflow_prefect.definitions.airflow.dag import AirflowDag
from pgflow_prefect.definitions.airflow.tasks import AirflowTask
from pgflow_prefect.definitions.airflow.values import write_value
from pgflow_prefect.definitions.graph import Graph, build_graph
from pgflow_prefect.definitions.model import BEFORE_FAILURES, Rule
from pgflow_prefect.definitions.origin import Ledger, LedgerLine, list_names
from pgflow_prefect.wording import write_code

_IN_SECONDS = frozenset({"start_date", "end_date"})


def make_ledger(dag: AirflowDag) -> Ledger:
    """Return what a DAG says, and what becomes of it here: first of the DAG, then of each task."""
    graph = build_graph(dag.definition)
    lines = [*_describe_dag(dag), *_describe_whole(dag), *_describe_mixed(dag, graph)]
    maps = dag.definition.maps
    mapped = {task.task_id for task in dag.tasks if task.expansion is not None}
    added, setups = _gather_added(dag), _gather_setups(dag, graph)
    for task in dag.tasks:
        lines += _describe_task(task, has_interval=dag.schedule.has_interval)
        lines += _describe_said(task, dag)
        if task.expansion is not None:
            lines += describe_map(task, maps.get(task.task_id))
        lines += _describe_deps(task, added[task.task_id])
        lines += _describe_relatives(task, sorted(mapped.intersection(graph.predecessors(task.task_id))))
        lines += _describe_setups(task, [each for each in setups[task.task_id] if each not in graph.pred[task.task_id]])
    return Ledger(f"{dag.dag_id}: from Airflow", tuple(lines))


def _describe_dag(dag: AirflowDag) -> Iterator[LedgerLine]:
    yield _describe_source(dag)
    yield describe_schedule(dag)
    yield LedgerLine(
        None,
        "end of a run",
        "The tasks that no other waits for decide whether a run fails: failed_by='leaves'.",
        is_done=True,
    )
    if dag.stops:
        yield LedgerLine(
            None,
            "fail_fast",
            "The first failure ends a run: when_failed='stop'. Airflow also ends the tasks that are running.",
            is_done=False,
        )
    if dag.version == 1:
        yield LedgerLine(
            None,
            "fail_stop",
            "The document of this version does not say whether the DAG has it. If it has: when_failed='stop'.",
            is_done=False,
        )
    if dag.tags:
        yield LedgerLine(
            None, "tags", f"{list_names(dag.tags)}: kept in the file, as tags of the workflow.", is_done=True
        )
    if not dag.knows_settings:
        yield LedgerLine(
            None,
            "defaults",
            "Airflow's settings default_task_retries, default_task_retry_delay, default_task_execution_timeout and "
            "catchup_by_default are not in the document of this version. A task that says nothing has no retries and "
            "no time-out here. Compare them, "
            f"or dump the DAG with the script of {write_code('pgflow-prefect airflow dump')}.",
            is_done=False,
        )
    for name, value in dag.said.items():
        yield _fill(None, OF_DAGS[name], name, value)


def _describe_source(dag: AirflowDag) -> LedgerLine:
    where = f" of {write_code(dag.file)}" if dag.file else ""
    return LedgerLine(
        None,
        "source",
        f"Version {dag.version} of the serialized DAG{where}. It has no code of the tasks, and of their arguments only "
        "those that are templates. Look into the DAG's file for the rest.",
        is_done=False,
    )


def _describe_whole(dag: AirflowDag) -> Iterator[LedgerLine]:
    """Yield what concerns several tasks: groups, setups and teardowns, skips beside failures."""
    for group in dag.groups:
        named = write_code(group.group_id)
        if group.is_mapped:
            yield LedgerLine(
                None,
                "mapped group",
                f"{named}: Airflow executes its tasks once for each element. Here they are executed once. Make it a "
                "workflow of its own, and let a map start its runs.",
                is_done=False,
            )
        elif group.has_prefix:
            box = ", and a box in `graph`" if len(group.tasks) > 1 else ""
            yield LedgerLine(None, "group", f"{named}: the beginning of its steps' slugs{box}.", is_done=True)
        else:
            yield LedgerLine(
                None,
                "group",
                f"{named} gives its tasks no prefix ({list_names(group.tasks)}): `graph` draws no box around them.",
                is_done=True,
            )
    if any(task.is_setup for task in dag.tasks):
        yield LedgerLine(
            None,
            "setup",
            "Clearing a task runs its setups again in Airflow. Reopening a run here does not.",
            is_done=False,
        )
    if any(task.is_teardown for task in dag.tasks):
        yield LedgerLine(
            None, "teardown", "Cancelling a run runs no teardown here. Skip the other steps instead.", is_done=False
        )


def _describe_mixed(dag: AirflowDag, graph: Graph) -> Iterator[LedgerLine]:
    """Yield a line where Airflow decides by which of a skip and a failure it sees first."""
    below = _find_below(graph, [task.task_id for task in dag.tasks if may_skip(task)])
    rules = {task.task_id: task.rule for task in dag.tasks}
    mixed = [
        slug
        for slug in graph
        if rules[slug] == Rule.ALL_SUCCESS
        and graph.in_degree(slug) > 1
        and below.intersection(graph.predecessors(slug))
    ]
    if mixed:
        yield LedgerLine(
            None,
            "skip beside a failure",
            f"Where one task above {list_names(mixed)} is skipped and another fails, Airflow decides by which it sees "
            "first. Here the step does not run.",
            is_done=True,
        )


def _find_below(graph: Graph, slugs: Collection[str]) -> set[str]:
    """Return all steps below some steps, in one walk."""
    below: set[str] = set()
    waiting = [*slugs]
    while waiting:
        new = set(graph.successors(waiting.pop())) - below
        below |= new
        waiting += new
    return below


def _gather_added(dag: AirflowDag) -> dict[str, list[str]]:
    added = defaultdict(list)
    for dep in dag.added_deps:
        added[dep.downstream].append(dep.upstream)
    return added


def _gather_setups(dag: AirflowDag, graph: Graph) -> dict[str, list[str]]:
    """Return the setups above each step."""
    setups = defaultdict(list)
    for task in dag.tasks:
        if task.is_setup:
            for each in nx.descendants(graph, task.task_id):
                setups[each].append(task.task_id)
    return setups


def _describe_task(task: AirflowTask, *, has_interval: bool) -> Iterator[LedgerLine]:
    slug = task.task_id
    yield from describe_work(task)
    if task.rule != Rule.ALL_SUCCESS:
        yield LedgerLine(slug, "trigger rule", f"{write_code(task.rule)}: the rule of the step.", is_done=True)
    yield from _describe_attempts(task)
    yield from _describe_role(task)
    yield from describe_arguments(task)
    yield from describe_names(task, has_interval=has_interval)


def _describe_attempts(task: AirflowTask) -> Iterator[LedgerLine]:
    slug = task.task_id
    if task.retries:
        delays = list_delays(task)
        said = f"{task.retries} with {task.retry_delay:g} s between them"
        if isinstance(delays, list):
            yield LedgerLine(
                slug,
                "retries",
                f"{task.retries}, whose delay grows from {task.retry_delay:g} s by the factor {task.backoff:g}. The "
                f"stub has {'the first of ' if len(delays) < task.retries else ''}these delays. "
                "Airflow lengthens each at random: see retry_jitter_factor.",
                is_done=False,
            )
        else:
            yield LedgerLine(slug, "retries", f"{said}: options of the stub.", is_done=True)
    if task.timeout is not None:
        yield LedgerLine(slug, "time-out", f"{task.timeout:g} s for each attempt: an option of the stub.", is_done=True)


def _describe_role(task: AirflowTask) -> Iterator[LedgerLine]:
    slug = task.task_id
    if task.is_setup:
        yield LedgerLine(
            slug, "setup", "is_setup=True: the rule all_done_setup_success of teardowns counts it.", is_done=True
        )
    if task.is_teardown:
        fails = "fails the run" if task.fails_run else "does not fail the run: fails_run=False"
        yield LedgerLine(slug, "teardown", f"Its failure {fails}.", is_done=True)


def _describe_deps(task: AirflowTask, added: list[str]) -> Iterator[LedgerLine]:
    if added:
        yield LedgerLine(
            task.task_id,
            "teardown",
            f"It also waits for {list_names(added)}, as Airflow 3.3 does without an edge.",
            is_done=True,
        )


def _describe_relatives(task: AirflowTask, mapped: list[str]) -> Iterator[LedgerLine]:
    for each in mapped:
        yield LedgerLine(
            task.task_id,
            "map above",
            f"Its rule {write_code(task.rule)} counts the items of {write_code(each)} one by one in Airflow. Here a "
            "map is one step.",
            is_done=False,
        )


def _describe_setups(task: AirflowTask, setups: list[str]) -> Iterator[LedgerLine]:
    """Yield what a rule that runs after a failure does not see: setups further up, which have to succeed in Airflow."""
    if setups and not task.is_teardown and task.rule not in BEFORE_FAILURES:
        yield LedgerLine(
            task.task_id,
            "setup above",
            f"Airflow looks at the setups {list_names(setups)} further up, whatever the rule. Here its rule "
            f"{write_code(task.rule)} does not.",
            is_done=False,
        )


def _describe_said(task: AirflowTask, dag: AirflowDag) -> Iterator[LedgerLine]:
    of_dag = {*_list_params(dag.said.get("params"))}
    for name, value in task.said.items():
        if name != "params":
            yield _fill(task.task_id, OF_TASKS[name], name, value)
        elif own := [each for each in _list_params(value) if each not in of_dag]:  # Airflow gives each task the DAG's
            sentence = OF_TASKS[name]
            says = sentence.says.replace("{value}", list_names(own))
            yield LedgerLine(task.task_id, sentence.topic, says, is_done=sentence.is_done)


def _list_params(value: JsonValue) -> list[str]:
    """Return the names of parameters: older documents have an object, later ones a list of pairs."""
    if isinstance(value, dict):
        return [*value]
    pairs = value if isinstance(value, list) else []
    return [each[0] for each in pairs if isinstance(each, list) and each and isinstance(each[0], str)]


def _fill(about: str | None, sentence: Sentence, name: str, value: JsonValue) -> LedgerLine:
    return LedgerLine(
        about, sentence.topic, sentence.says.replace("{value}", _write(name, value)), is_done=sentence.is_done
    )


def _write(name: str, value: JsonValue) -> str:
    if name in _IN_SECONDS and isinstance(value, int | float):
        try:
            return write_code(datetime.fromtimestamp(value, UTC).isoformat())
        except (OverflowError, ValueError, OSError):
            pass
    if name == "params":
        return list_names(_list_params(value))
    return write_code(write_value(name, value))
