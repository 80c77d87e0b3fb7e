"""DAG files of ours, as Airflow has serialized them: the graph, the ledger and the stubs of each."""

from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path

import networkx as nx
import pytest
from pydantic import JsonValue

from pgflow_prefect.airflow.ledger import make_ledger
from pgflow_prefect.airflow.operators import Work, find_work
from pgflow_prefect.airflow.stubs import make_origin
from pgflow_prefect.definitions.airflow.dag import AirflowDag
from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.deployment.code_generation import MOST_ARGUMENTS, import_workflow
from pgflow_prefect.deployment.handler_files import find_workflow, load_module
from tests.airflow.recorded import DAG_IDS, VERSIONS, expect_lines, load, load_upstream, write_lines
from tests.unit.test_code_generation import run_ruff

EACH = [(version, dag_id) for version in VERSIONS for dag_id in DAG_IDS]

SECRETS = ["hunter2", "t0ps3cret", "s3cret"]
"""What the DAG files have, and nothing here may."""


@pytest.mark.parametrize(("version", "dag_id"), EACH)
def test_the_graph_is_that_of_the_dag_object_in_airflows_own_process(version: str, dag_id: str) -> None:
    dag = load(version, dag_id)
    graph = build_graph(dag.definition)
    graph.remove_edges_from(dag.added_deps)
    assert {slug: sorted(graph.predecessors(slug)) for slug in graph} == load_upstream(version, dag_id)
    assert nx.is_directed_acyclic_graph(build_graph(dag.definition))


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_the_ledger_has_the_lines_that_the_dags_file_expects(dag_id: str) -> None:
    assert write_lines(load("3.3", dag_id)) == expect_lines(dag_id)


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_the_ledger_of_an_older_document_names_what_it_lacks(dag_id: str) -> None:
    dag = load("2.11", dag_id)
    callables = [f"- {task.task_id}: callable" for task in dag.tasks if find_work(task) is Work.PYTHON]
    # It has the names of objects where later ones say whose results the arguments are.
    objects = [f"- {task.task_id}: argument" for task in dag.tasks if any(each.is_object for each in task.arguments)]
    expected = [line for line in expect_lines(dag_id) if line != "- fail_fast" and not line.endswith(": argument")]
    assert write_lines(dag) == sorted([*expected, *callables, *objects, "- fail_stop"])


@pytest.mark.parametrize("dag_id", DAG_IDS)
def test_both_versions_of_airflow_make_the_same_workflow(dag_id: str) -> None:
    old, new = load("2.11", dag_id), load("3.3", dag_id)
    same = old.definition.model_copy(update={"when_failed": new.definition.when_failed})  # the older one can't tell
    assert same.said == new.definition.said
    assert {*same.deps} == {*new.definition.deps}
    assert old.schedule.cron == new.schedule.cron
    assert {slug: each.options for slug, each in make_origin(old).steps.items()} == {
        slug: each.options for slug, each in make_origin(new).steps.items()
    }


@pytest.mark.parametrize(("version", "dag_id"), EACH)
def test_the_stubs_can_be_imported_say_the_operator_and_have_no_secret(
    version: str, dag_id: str, tmp_path: Path
) -> None:
    dag = load(version, dag_id)
    path = tmp_path / "stubs.py"
    report = import_workflow(dag.definition, path, make_origin(dag))
    source = path.read_text(encoding="utf-8")
    workflow = find_workflow(load_module(str(path)), dag_id, str(path))
    page = make_ledger(dag).write()

    assert sorted(report.stubs) == sorted(workflow.stubs) == sorted(dag.definition.steps)
    assert [problem for problem in workflow.find_problems(dag.definition) if "is a stub" not in problem] == []
    if all(len(upstream) <= MOST_ARGUMENTS for upstream in load_upstream(version, dag_id).values()):
        assert workflow.definition.definition_hash == dag.definition.definition_hash, "push changes nothing"
    for task in dag.tasks:
        assert f"In Airflow: {task.operator} of {task.module}." in source
    for secret in SECRETS:
        assert secret not in source
        assert secret not in page


def test_the_stubs_pass_linter_and_formatter(tmp_path: Path) -> None:
    for dag_id in DAG_IDS:
        dag = load("3.3", dag_id)
        import_workflow(dag.definition, tmp_path / f"{dag_id}.py", make_origin(dag))
    run_ruff("check", "--isolated", str(tmp_path))
    run_ruff("format", "--isolated", "--check", "--diff", str(tmp_path))


def uses(*kinds: Work) -> Callable[[AirflowDag], bool]:
    return lambda dag: any(find_work(task) in kinds for task in dag.tasks)


def mentions(name: str) -> Callable[[AirflowDag], bool]:
    return lambda dag: any(getattr(task.mentioned, name) for task in dag.tasks)


def list_said(dag: AirflowDag) -> list[Mapping[str, JsonValue]]:
    return [dag.said, *(task.said for task in dag.tasks)]


CENSUS: dict[str, Callable[[AirflowDag], bool]] = {
    "Python and TaskFlow": uses(Work.PYTHON),
    "containers": uses(Work.CONTAINER),
    "empty": uses(Work.EMPTY),
    "branch or short circuit": uses(Work.BRANCH, Work.SHORT_CIRCUIT),
    "sensors": uses(Work.SENSOR, Work.EXTERNAL_SENSOR),
    "shell": uses(Work.SHELL),
    "trigger of another DAG": uses(Work.TRIGGER),
    "SQL": uses(Work.SQL),
    "retries": lambda dag: any(task.retries for task in dag.tasks),
    "no catchup": lambda dag: "catchup" not in dag.said,
    "connections": mentions("connections"),
    "callbacks": lambda dag: any("callback" in name for said in list_said(dag) for name in said),
    "templates": lambda dag: any(argument.is_template for task in dag.tasks for argument in task.arguments),
    "params": mentions("params"),
    "Variables": mentions("variables"),
    "maps": lambda dag: any(task.expansion is not None for task in dag.tasks),
    "other rules": lambda dag: any(task.rule != "all_success" and not task.is_teardown for task in dag.tasks),
    "groups": lambda dag: bool(dag.groups),
    "pools": lambda dag: any("pool" in task.said for task in dag.tasks),
    "setups": lambda dag: any(task.is_setup for task in dag.tasks),
}


@pytest.mark.parametrize("construct", CENSUS)
def test_each_construct_of_the_census_is_in_three_dag_files(construct: str) -> None:
    found = [dag_id for dag_id in DAG_IDS if CENSUS[construct](load("3.3", dag_id))]
    assert len(found) >= 3, found


def test_no_step_of_a_dag_is_named_twice_in_its_ledger_for_the_same_thing() -> None:
    for dag_id in DAG_IDS:
        lines = Counter(line.text for line in make_ledger(load("3.3", dag_id)).lines)
        assert [text for text, times in lines.items() if times > 1] == []
