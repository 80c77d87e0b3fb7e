"""Documents that Airflow, or another author, has written: what is read, and what is refused by name."""

import ast
import json
import zlib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pgflow_prefect.airflow.ledger import make_ledger
from pgflow_prefect.airflow.stubs import make_origin
from pgflow_prefect.definitions.airflow.dag import AirflowDag, read_dag
from pgflow_prefect.definitions.airflow.document import MOST_BYTES, open_file, read_row
from pgflow_prefect.definitions.airflow.schedule import ScheduleKind, read_schedule
from pgflow_prefect.deployment.code_generation import import_workflow
from pgflow_prefect.deployment.handler_files import find_workflow, load_module
from pgflow_prefect.errors import InvalidDefinitionError, UsageError


def make_task(task_id: str = "a", **fields: Any) -> dict[str, Any]:
    return {
        "__type": "operator",
        "__var": {
            "task_id": task_id,
            "task_type": "BashOperator",
            "_task_module": "ops",
            "template_fields": [],
            **fields,
        },
    }


def make_document(*tasks: dict[str, Any], version: object = 3, **fields: Any) -> dict[str, Any]:
    return {"__version": version, "dag": {"dag_id": "etl", "tasks": [*tasks], "catchup": False, **fields}}


def read(document: object, dag_id: str = "etl") -> AirflowDag:
    return read_dag(open_file(json.dumps(document).encode(), "etl.json").read(dag_id))


@pytest.mark.parametrize("version", [0, 4, 17, "3", None, True, 2.5, [3]])
def test_a_version_that_is_not_known_is_refused_by_name(version: object) -> None:
    with pytest.raises(UsageError, match=r"DAG 'etl' of etl.json has version .*: versions 1, 2, 3 are read"):
        read(make_document(make_task(), version=version))


@pytest.mark.parametrize("version", [1, 2, 3])
def test_the_versions_of_airflow_2_and_3_are_read(version: int) -> None:
    assert read(make_document(make_task(), version=version)).definition.steps == ("a",)


def test_a_dag_that_can_not_be_read_hides_no_other_one_of_its_file() -> None:
    other = make_document(make_task(), version=9)
    other["dag"]["dag_id"] = "other"
    assert read({"dags": {"etl": make_document(make_task()), "other": other}}).dag_id == "etl"
    assert read([make_document(make_task()), other]).dag_id == "etl"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"", "is no JSON"),
        (b"{", "is no JSON"),
        (b'{"a": "\xff"}', "no text in UTF-8"),
        (b"[" * 100_000, "too deep|no JSON"),
        (b"null", "has no serialized DAG"),
        (b"[1]", "has no serialized DAG"),
        (b'{"dags": 3}', "has no serialized DAG"),
        (b'{"__version": 3, "dag": {"tasks": []}}', "a serialized DAG without an id"),
        (b'{"__version": 3, "dag": {"dag_id": 7, "tasks": []}}', "a serialized DAG without an id"),
        (b'[{"dag": {"dag_id": "a"}}, {"dag": {"_dag_id": "a"}}]', "the DAG 'a' more than once"),
    ],
)
def test_a_file_that_has_no_dags_is_refused(text: bytes, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        open_file(text, "etl.json")


@pytest.mark.parametrize("tasks", [None, 3, [3], {"a": {}}, [None]])
def test_a_dag_without_a_list_of_tasks_is_refused(tasks: object) -> None:
    with pytest.raises(UsageError, match=r"DAG 'etl' of etl\.json has no list of tasks"):
        read({"__version": 3, "dag": {"dag_id": "etl", "tasks": tasks}})


def test_a_document_that_is_too_big_is_refused() -> None:
    with pytest.raises(UsageError, match="more than 67,108,864 are not read"):
        open_file(b" " * (MOST_BYTES + 1), "etl.json")
    with pytest.raises(UsageError, match="has more than 67,108,864 bytes"):
        read_row("etl", None, zlib.compress(b" " * (MOST_BYTES + 1)), "the row")
    with pytest.raises(UsageError, match="has 10,001 tasks"):
        read(make_document(*[make_task(str(number)) for number in range(10_001)]))


def test_a_row_may_be_compressed() -> None:
    document = json.dumps(make_document(make_task())).encode()
    assert read_row("etl", None, zlib.compress(document), "the row").dag_id == "etl"
    assert read_row("etl", document, None, "the row").dag_id == "etl"
    with pytest.raises(UsageError, match="can't be read"):
        read_row("etl", None, b"no zlib", "the row")
    with pytest.raises(UsageError, match="the row has the document of DAG 'etl'"):
        read_row("other", document, None, "the row")
    with pytest.raises(UsageError, match="has no data"):
        read_row("etl", None, None, "the row")


def test_every_task_that_can_not_be_read_is_named() -> None:
    document = make_document(
        make_task("rule", trigger_rule="sometimes"),
        make_task("twice"),
        make_task("twice"),
        make_task("lost", downstream_task_ids=["nowhere"]),
        make_task("many", retries="three"),
        make_task("part", retries=1.5),
        make_task("late", retry_delay={"__type": "relativedelta", "__var": {"days": 1}}),
        make_task("past", execution_timeout=-1),
        make_task("far", execution_timeout=1e300),
        make_task("x" * 300),
        make_task("nul\0"),
        {"__type": "operator", "__var": {"task_type": "BashOperator"}},
    )
    with pytest.raises(InvalidDefinitionError) as refused:
        read(document)
    assert "\n".join(refused.value.problems).splitlines() == [
        "task 'many' has retries = 'three', which is no number of them",
        "task 'part' has retries = 1.5, which is no number of them",
        "task 'late' has retry_delay = <relativedelta: {'days': 1}>, which is no duration",
        "task 'past' has execution_timeout = -1, which is no duration",
        "task 'far' has execution_timeout = 1e+300, which is no duration",
        "task None has no task_id",
        "task 'rule' has the trigger rule 'sometimes', which is not one of Airflow's 13",
        "there are two tasks 'twice'",
        "task 'lost' is followed by 'nowhere', which is no task of this DAG",
        f"the id of task '{'x' * 40}'… is longer than 250 characters",
        "the slug 'nul\\x00' has a character that PostgreSQL can't store: rename it",
    ]


def test_a_cycle_is_refused_with_its_path() -> None:
    with pytest.raises(InvalidDefinitionError, match="a -> b -> a"):
        read(make_document(make_task("a", downstream_task_ids=["b"]), make_task("b", downstream_task_ids=["a"])))


def test_a_task_says_only_what_differs_from_the_documents_defaults() -> None:
    document = make_document(make_task("a"), make_task("b", retries=0)) | {
        "client_defaults": {"tasks": {"retries": 3, "retry_delay": 10.0}}
    }
    assert [(task.retries, task.retry_delay) for task in read(document).tasks] == [(3, 10.0), (0, 10.0)]


def test_what_an_older_document_leaves_out_comes_from_the_settings_that_the_script_writes() -> None:
    old = make_document(make_task(), version=1)
    del old["dag"]["catchup"]
    unknown = read(old)
    known = read({"settings": {"retries": 2.0, "retry_delay": 60, "catchup": 0.0, "evil": "x"}, "dags": [old]})
    assert (unknown.tasks[0].retries, unknown.tasks[0].retry_delay, unknown.said) == (0, 300.0, {"catchup": True})
    assert (known.tasks[0].retries, known.tasks[0].retry_delay, known.said) == (2, 60.0, {})
    assert "defaults" in {line.topic for line in make_ledger(unknown).lines}
    assert "defaults" not in {line.topic for line in make_ledger(known).lines}


@pytest.mark.parametrize(
    ("fields", "kind", "cron", "seconds", "timezone"),
    [
        ({"schedule_interval": None}, ScheduleKind.NONE, None, None, "UTC"),
        (
            {"schedule_interval": "@daily", "timezone": "Europe/Berlin"},
            ScheduleKind.CRON,
            "0 0 * * *",
            None,
            "Europe/Berlin",
        ),
        ({"schedule_interval": {"__type": "timedelta", "__var": 60.0}}, ScheduleKind.INTERVAL, None, 60.0, "UTC"),
        ({"schedule_interval": "@once"}, ScheduleKind.ONCE, None, None, "UTC"),
        ({"schedule_interval": {"__type": "relativedelta", "__var": {}}}, ScheduleKind.OTHER, None, None, "UTC"),
        (
            {
                "timetable": {
                    "__type": "airflow.timetables.interval.CronDataIntervalTimetable",
                    "__var": {"expression": "@hourly", "timezone": "Asia/Tokyo"},
                }
            },
            ScheduleKind.CRON,
            "0 * * * *",
            None,
            "Asia/Tokyo",
        ),
        (
            {"timetable": {"__type": "airflow.timetables.simple.ContinuousTimetable", "__var": {}}},
            ScheduleKind.CONTINUOUS,
            None,
            None,
            "UTC",
        ),
        (
            {"timetable": {"__type": "plugins.MyCronDataIntervalTimetable", "__var": {"expression": "0 0 * * *"}}},
            ScheduleKind.OTHER,
            None,
            None,
            "UTC",
        ),
        ({"timetable": 3}, ScheduleKind.OTHER, None, None, "UTC"),
    ],
)
def test_a_schedule_is_read_or_named(
    fields: dict[str, Any], kind: ScheduleKind, cron: str | None, seconds: float | None, timezone: str
) -> None:
    found = read_schedule(fields)
    assert (found.kind, found.cron, found.seconds, found.timezone) == (kind, cron, seconds, timezone)


def test_a_text_that_stands_in_a_file_is_named() -> None:
    task = make_task(template_fields=["bash_command"], template_ext=[".sh"], bash_command="scripts/run.sh")
    [line] = [line for line in make_ledger(read(make_document(task))).lines if line.topic == "file"]
    assert line.says == "The text of `bash_command` is in the file `'scripts/run.sh'`."


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<callable dags.etl.choose>", "the document has the name of an object"),
        ("<my.Thing object at 0x7f00aa>", "the document has the name of an object"),
        ("(XComArg(<Task(PythonOperator): get>),)", "the document has the name of an object"),
        (
            "Truncated. You can change this behaviour in [core]max_templated_field_length. 'SELECT",
            "Airflow has kept the beginning only",
        ),
    ],
)
def test_an_argument_that_the_document_does_not_have_is_named(text: str, why: str) -> None:
    task = make_task(template_fields=["op_args", "other"], op_args=["a", {"b": text}], other="plain <b> object")
    [line] = [line for line in make_ledger(read(make_document(task))).lines if line.topic == "argument"]
    assert (line.about, line.is_done) == ("a", False)
    assert line.says == f"`op_args`: {why}{', not what it is' if 'object' in why else ''}. Look into the DAG's file."


def test_a_delay_that_grows_is_written_out_up_to_its_bound() -> None:
    task = make_task(retries=4, retry_delay=60.0, retry_exponential_backoff=True, max_retry_delay=300.0)
    options = make_origin(read(make_document(task))).steps["a"].options
    assert options == {"retries": 4, "retry_delay_seconds": [60, 120, 240, 300]}


@pytest.mark.parametrize(
    ("timetable", "here"),
    [
        ("interval.CronDataIntervalTimetable", "`context.data_interval_start`"),
        ("trigger.CronTriggerTimetable", "`context.logical_date`"),
    ],
)
def test_a_date_in_a_template_is_named_with_what_it_is_here(timetable: str, here: str) -> None:
    task = make_task(template_fields=["sql"], sql="SELECT '{{ ds }}', 'ts', {{ prev_ds }} -- logical_date")
    schedule = {"__type": f"airflow.timetables.{timetable}", "__var": {"expression": "0 0 * * *", "timezone": "UTC"}}
    [line] = [line for line in make_ledger(read(make_document(task, timetable=schedule))).lines if line.topic == "date"]
    assert line.says == f"It reads `ds`, `prev_ds`. Here: {here}. Compute the others from context.logical_date."


def test_three_quotes_stay_three_quotes_in_a_docstring(tmp_path: Path) -> None:
    said = 'echo """a""" \\'
    dag = read(make_document(make_task(template_fields=["bash_command"], bash_command=said)))
    import_workflow(dag.definition, tmp_path / "stubs.py", make_origin(dag))
    text = load_module(str(tmp_path / "stubs.py")).a.__doc__
    [line] = [line.strip() for line in text.splitlines() if "bash_command" in line]
    assert ast.literal_eval(line.removeprefix("bash_command = ")) == said


def test_the_hash_of_a_files_path_is_left_out_of_names() -> None:
    prefix = f"unusual_prefix_{'0a' * 20}_"
    [task] = read(make_document(make_task(_task_module=f"{prefix}etl", python_callable_name=f"{prefix}etl.load"))).tasks
    assert (task.module, task.callable) == ("etl", "etl.load")


ODD = [
    '"""',
    "'''",
    '\\"""',
    "\\",
    '"',
    'a\n"""\nimport os\nos.abort()\n',
    "\u2028import os",
    "\0",
    "{x}",
    "%s",
    "\t\r\n",
    "\\N{x}",
]
texts = st.text(max_size=30) | st.sampled_from(ODD) | st.lists(st.sampled_from(ODD), max_size=4).map("".join)


@pytest.mark.thorough
@settings(deadline=None, max_examples=150)  # a machine may be busy
@given(texts, texts, texts, texts, texts)
def test_no_text_of_a_document_becomes_code(
    tmp_path_factory: pytest.TempPathFactory, operator: str, name: str, text: str, module: str, description: str
) -> None:
    task = make_task(
        "step",
        _operator_name=operator,
        _task_module=module,
        python_callable_name=text,
        template_fields=[name],
        **({} if name in {"task_id", "task_type", "template_fields"} else {name: text}),
    )
    dag = read(make_document(task, description=description, relative_fileloc=text, tags=[name]))
    path = tmp_path_factory.mktemp("drawn") / "stubs.py"
    import_workflow(dag.definition, path, make_origin(dag))
    body = ast.parse(path.read_text(encoding="utf-8")).body
    kinds = [type(node).__name__ for node in body]
    assert kinds == ["Expr", "ImportFrom", "ImportFrom", "Assign", "AsyncFunctionDef", "Assign"]
    assert find_workflow(load_module(str(path)), "etl", str(path)).stubs == ["step"]
    for line in make_ledger(dag).lines:
        assert "\n" not in line.write()


def test_a_docstring_is_bounded(tmp_path: Path) -> None:
    fields = {f"argument{number}": "x\n" * 1_500 for number in range(200)}
    dag = read(make_document(make_task(template_fields=list(fields), **fields, deep=json.loads("[" * 90 + "]" * 90))))
    import_workflow(dag.definition, tmp_path / "stubs.py", make_origin(dag))
    source = (tmp_path / "stubs.py").read_text(encoding="utf-8")
    assert len(source) < 300_000
    assert "lines more" in source
