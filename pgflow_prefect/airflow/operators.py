"""What a task does in Airflow, and the nearest thing here, by the kind of its operator."""

from collections.abc import Iterator
from enum import StrEnum

from pgflow_prefect.definitions.airflow.arguments import Argument
from pgflow_prefect.definitions.airflow.tasks import AirflowTask
from pgflow_prefect.definitions.origin import LedgerLine
from pgflow_prefect.wording import write_code


class Work(StrEnum):
    """Kinds of operators that differ in what to write here."""

    EMPTY = "empty"
    BRANCH = "branch"
    SHORT_CIRCUIT = "short circuit"
    LATEST_ONLY = "latest only"
    EXTERNAL_SENSOR = "sensor of another DAG"
    SENSOR = "sensor"
    TRIGGER = "trigger"
    CONTAINER = "container"
    SHELL = "shell"
    SQL = "SQL"
    HTTP = "HTTP"
    PYTHON = "Python"
    OTHER = "operator"


_CONTAINERS = (
    "Docker",
    "Kubernetes",
    "EksPod",
    "GKEStartPod",
    "GKEStartJob",
    "EcsRunTask",
    "Batch",
    "CloudRun",
    "ContainerInstances",
)
_ENDINGS = {
    "ExternalTaskSensor": Work.EXTERNAL_SENSOR,
    "TriggerDagRunOperator": Work.TRIGGER,
    "LatestOnlyOperator": Work.LATEST_ONLY,
    "BashOperator": Work.SHELL,
    "SSHOperator": Work.SHELL,
    "HttpOperator": Work.HTTP,
    "SimpleHttpOperator": Work.HTTP,
}
_SQL = (
    "SQLExecuteQuery",
    "PostgresOperator",
    "MySqlOperator",
    "SqliteOperator",
    "SQLColumnCheck",
    "SQLTableCheck",
    "SQLCheck",
    "MsSqlOperator",
    "OracleOperator",
    "SnowflakeOperator",
    "SnowflakeSqlApi",
    "BigQueryInsertJob",
    "RedshiftSQL",
    "TrinoOperator",
)
_SHORT_CIRCUITS = ("ShortCircuit", "@task.short_circuit")
_PYTHON = ("PythonOperator", "PythonDecoratedOperator", "PythonVirtualenvOperator", "@task")

_SAYS = {
    Work.EMPTY: "It does nothing. Return None.",
    Work.BRANCH: "It chooses which steps below run. Return Branch([…]) with their slugs.",
    Work.SHORT_CIRCUIT: "It skips all that is below it, or nothing. Return Branch([], whole=True) to skip it.",
    Work.LATEST_ONLY: "It skips what is below it in runs of the past. Return Branch([]) in those.",
    Work.SENSOR: "It waits. Write a loop that asks and pauses, or make the step external and let a program report it.",
    Work.CONTAINER: "It runs a container. Write what starts it, or bind the step to a command that does.",
    Work.SHELL: "It runs a shell command. Write it in Python, or bind the step to a command.",
    Work.SQL: "It runs SQL. Write it in Python, or bind the step to a function of this database (--sql).",
    Work.HTTP: "It sends a request. Write it in Python, or bind the step to the endpoint (--http).",
    Work.PYTHON: "Write its code here.",
    Work.OTHER: "Write its work here.",
}


def find_work(task: AirflowTask) -> Work:  # noqa: PLR0911  a line a kind
    """Return the kind of a task's operator, by what the document says of it and by the name of its class."""
    name = task.operator.removeprefix("_")
    if task.is_empty:
        return Work.EMPTY
    if named := next((work for ending, work in _ENDINGS.items() if name.endswith(ending)), None):
        return named
    if any(each in name for each in _SHORT_CIRCUITS):
        return Work.SHORT_CIRCUIT
    if task.may_skip or "branch" in name.lower():  # older documents do not say that it may skip
        return Work.BRANCH
    if task.is_sensor:
        return Work.SENSOR
    if any(each in name for each in _CONTAINERS) or name in {"@task.docker", "@task.kubernetes"}:
        return Work.CONTAINER
    if name == "@task.bash":
        return Work.SHELL
    if any(each in name for each in _SQL):
        return Work.SQL
    return Work.PYTHON if name.startswith("@task") or name.endswith(_PYTHON) else Work.OTHER


def may_skip(task: AirflowTask) -> bool:
    """Return whether a task decides which tasks below it run."""
    return find_work(task) in {Work.BRANCH, Work.SHORT_CIRCUIT, Work.LATEST_ONLY}


def describe_work(task: AirflowTask) -> Iterator[LedgerLine]:
    """Yield what a task does, and what to write for it."""
    work = find_work(task)
    operator = write_code(task.operator)
    called = f" that calls {write_code(task.callable)}" if task.callable else ""
    says = _SAYS.get(work) or _describe_other_dag(work, task.arguments)
    yield LedgerLine(task.task_id, str(work), f"{operator}{called}. {says}", is_done=False)
    if work is Work.PYTHON and task.callable is None:
        yield LedgerLine(
            task.task_id,
            "callable",
            "The name of its function is not in the document of this version. Look into the DAG's file.",
            is_done=False,
        )


def _describe_other_dag(work: Work, arguments: tuple[Argument, ...]) -> str:
    said = {argument.name: argument.text for argument in arguments}
    if work is Work.TRIGGER:
        target = write_code(said["trigger_dag_id"]) if "trigger_dag_id" in said else "another DAG"
        return f"It starts a run of {target}. Import that one, too, and start its run in SQL: pgflow.run_workflow."
    target = write_code(said["external_dag_id"]) if "external_dag_id" in said else "another DAG"
    return f"It waits for {target}. Make both one workflow, or let the other workflow report this step from outside."
