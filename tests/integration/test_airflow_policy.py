"""The policy that runs inside Airflow, with a stand-in for Airflow's classes: Airflow can't share our environment."""

import asyncio
import sys
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from types import ModuleType, SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from psycopg import OperationalError
from psycopg.conninfo import conninfo_to_dict

from pgflow_prefect.airflow.policy import write_policy
from pgflow_prefect.cli.airflow import policy as print_policy
from pgflow_prefect.errors import UnknownWorkflowError, UsageError
from tests.conftest import Connection
from tests.engine import complete, define, fail, get_state, statuses
from tests.integration.supabase import create_role
from tests.integration.test_external_claims import bind, claim_for_prefect

INSTALLATION = UUID(int=7)


class TaskDeferred(Exception):  # noqa: N818  Airflow's name
    """What Airflow raises for a task that waits in its triggerer."""


class Operator:
    """An operator of Airflow."""

    dag_id = "dag"
    execution_timeout: timedelta | None = None
    downstream_task_ids = frozenset({"b"})

    def __init__(self, work: Callable[[], Any]) -> None:
        self.work = work

    def execute(self, context: object, **given: object) -> object:
        return self.work()

    def defer(self, **given: object) -> None:
        raise TaskDeferred(given)


class MappedOperator:
    """A mapped operator has nothing to execute when it is parsed."""

    dag_id = "dag"


@pytest.fixture
def variables() -> dict[str, str]:
    """Airflow's Variables."""
    return {}


@pytest.fixture
def connection(dsn: str) -> SimpleNamespace:
    """Airflow's Connection to the test's database."""
    known = conninfo_to_dict(dsn)
    return SimpleNamespace(
        host=known.get("host"),
        port=known.get("port"),
        login=known.get("user"),
        password=known.get("password"),
        schema=known["dbname"],
        extra_dejson={"application_name": "another", "sslmode": "prefer"},
    )


@pytest.fixture
def supervisor(variables: dict[str, str]) -> SimpleNamespace:
    """The process that Airflow's tasks ask. What it answers to a question for a Variable is `error`."""
    answers = SimpleNamespace(error="VARIABLE_NOT_FOUND")

    def send(question: SimpleNamespace) -> SimpleNamespace:
        if question.key in variables:
            return SimpleNamespace(value=variables[question.key])
        return SimpleNamespace(error=SimpleNamespace(value=answers.error))

    answers.send = send
    return answers


@pytest.fixture(params=["deferrable"])
def policy(
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    connection: SimpleNamespace,
    variables: dict[str, str],
    supervisor: SimpleNamespace,
    db: Connection,
) -> ModuleType:
    """The file that the command prints, as Airflow imports it."""
    define(db, "dag", {"a": [], "b": ["a"]})
    db.execute("SELECT pgflow_prefect.observe_workflow('dag'), pgflow_prefect.name_airflow_dags('{dag}')")
    exceptions = {
        name: type(name, (Exception,), {})
        for name in ("AirflowException", "AirflowFailException", "AirflowSkipException", "AirflowRescheduleException")
    }
    stand_ins: dict[str, dict[str, object]] = {
        "airflow": {},
        "airflow.triggers": {},
        "airflow.triggers.base": {"BaseTrigger": object, "TriggerEvent": list},
        "airflow.sdk": {
            "Variable": SimpleNamespace(get=variables.get, set=variables.__setitem__),
            "exceptions": SimpleNamespace(**exceptions),
        },
        "airflow.sdk.exceptions": {"AirflowRuntimeError": type("AirflowRuntimeError", (Exception,), {})},
        "airflow.sdk.execution_time": {},
        "airflow.sdk.execution_time.comms": {"GetVariable": SimpleNamespace},
        "airflow.sdk.execution_time.task_runner": {"SUPERVISOR_COMMS": supervisor},
        "airflow.sdk.bases": {},
        "airflow.sdk.bases.hook": {
            "BaseHook": SimpleNamespace(get_connection=lambda name: {"pgflow": connection}[name])
        },
        "asgiref": {},
        "asgiref.sync": {"sync_to_async": lambda function: lambda *given: asyncio.to_thread(function, *given)},
    }
    for name, members in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    written = ModuleType("pgflow_policy")
    text = write_policy(["dag"], INSTALLATION, connection="pgflow", wait=request.param, longest_wait=3600)
    monkeypatch.setitem(sys.modules, "pgflow_policy", written)
    exec(compile(text, "pgflow_policy.py", "exec"), vars(written))  # noqa: S102  ours
    written.POLL = 0.01  # type: ignore[attr-defined]
    written.REPORT_FOR = 0.0  # type: ignore[attr-defined]
    return written


class Task:
    """A task of a run of Airflow, whose operator the policy has seen."""

    def __init__(self, policy: ModuleType, work: Callable[[], Any] = lambda: "there", task_id: str = "a") -> None:
        self.policy = policy
        self.operator = Operator(work)
        policy.task_policy(self.operator)
        self.ti = SimpleNamespace(
            dag_id="dag", run_id=f"manual {uuid4()}", task_id=task_id, try_number=1, max_tries=0,
            start_date=datetime.now(UTC),
        )  # fmt: skip
        self.run_id = UUID(self.key.run_id)

    @property
    def key(self) -> Any:
        parts = self.policy.uuid.uuid5(INSTALLATION, "airflow dag")
        return self.policy.Key(str(self.policy.uuid.uuid5(parts, self.ti.run_id)), self.ti.task_id, self.ti.try_number)

    def execute(self, conf: object = None, **given: object) -> object:
        """Execute the task as Airflow does."""
        run = SimpleNamespace(
            conf={"n": 1} if conf is None else conf, logical_date=None, data_interval_start=None, data_interval_end=None
        )
        return self.operator.execute({"task": self.operator, "ti": self.ti, "dag_run": run}, **given)

    def wait(self) -> dict[str, Any]:
        """Execute a task that waits, and return how it is deferred."""
        with pytest.raises(TaskDeferred) as deferred:
            self.execute()
        given = deferred.value.args[0]
        assert isinstance(given, dict)
        return given


def test_a_task_that_has_not_moved_is_executed_by_airflow_and_reported(policy: ModuleType, db: Connection) -> None:
    task = Task(policy, lambda: {"rows": [1]})
    assert task.execute() == {"rows": [1]}
    assert get_state(db, task.run_id, "a").step_result == {"rows": [1]}
    assert statuses(db, task.run_id)["b"] == "pending"


def test_a_moved_task_waits_in_the_triggerer_and_returns_our_result(policy: ModuleType, db: Connection) -> None:
    bind(db, "dag", "a", "python")
    task = Task(policy, lambda: pytest.fail("Airflow has executed it"))
    deferred = task.wait()
    classpath, given = deferred["trigger"].serialize()
    assert classpath == "pgflow_policy.PgflowTrigger"
    assert deferred["method_name"] == "execute"

    async def fire() -> list[object]:
        waiting = asyncio.ensure_future(anext(policy.PgflowTrigger(**given).run()))
        await asyncio.to_thread(claim_for_prefect, db, task.run_id, "a")
        assert not waiting.done()
        await asyncio.to_thread(complete, db, task.run_id, "a", [1, 2])
        return [await asyncio.wait_for(waiting, 60)]

    assert len(asyncio.run(fire())) == 1
    assert task.execute(event={}, **deferred["kwargs"]) == [1, 2]


def test_a_moved_task_fails_as_ours_failed(policy: ModuleType, db: Connection) -> None:
    bind(db, "dag", "a", "python")
    task = Task(policy)
    task.wait()
    fail(db, task.run_id, "a", "no such customer")
    with pytest.raises(policy.find_exception("AirflowFailException"), match="no such customer"):
        task.execute(event={})


def test_a_task_that_moves_back_while_it_waits_is_executed_by_airflow(policy: ModuleType, db: Connection) -> None:
    bind(db, "dag", "a", "python")
    task = Task(policy)
    deferred = task.wait()
    db.execute("SELECT pgflow_prefect.undo_binding('dag', 'a')")
    assert task.execute(event={}, **deferred["kwargs"]) == "there"


def test_a_wait_ends_within_the_time_out_of_the_task(policy: ModuleType, db: Connection) -> None:
    bind(db, "dag", "a", "python")
    task = Task(policy)
    task.operator.execution_timeout = timedelta(seconds=100)
    until = task.wait()["kwargs"]["until"]
    assert until < task.ti.start_date.timestamp() + 100
    task.ti.start_date -= timedelta(seconds=100)
    with pytest.raises(policy.find_exception("AirflowException"), match="no worker of pgflow has ended it"):
        task.execute(event={}, until=until)
    assert "as long as its task may take" in str(get_state(db, task.run_id, "a").error_message)


@pytest.mark.parametrize("max_tries", [0, 1])
def test_only_the_last_failure_of_a_task_is_reported(max_tries: int, policy: ModuleType, db: Connection) -> None:
    task = Task(policy, lambda: 1 / 0)
    task.ti.max_tries = max_tries
    with pytest.raises(ZeroDivisionError):
        task.execute()
    assert get_state(db, task.run_id, "a").status == ("pending" if max_tries else "failed")


def test_a_task_that_defers_itself_is_not_reported(policy: ModuleType, db: Connection) -> None:
    def defer() -> None:
        raise TaskDeferred

    task = Task(policy, defer)
    with pytest.raises(TaskDeferred):
        task.execute()
    assert get_state(db, task.run_id, "a").status == "pending"


class DownstreamTasksSkipped(Exception):  # noqa: N818  Airflow's name
    """What a branch of Airflow 3 raises."""

    tasks = ("other",)


@pytest.mark.parametrize("version", [2, 3])
def test_a_branch_of_airflow_is_reported(version: int, policy: ModuleType, db: Connection) -> None:
    def choose() -> str:
        if version == 3:
            raise DownstreamTasksSkipped
        return "b"

    db.execute("INSERT INTO pgflow.steps (workflow_slug, slug) VALUES ('dag', 'other')")
    db.execute("INSERT INTO pgflow.deps VALUES ('dag', 'a', 'other')")
    task = Task(policy, choose)
    vars(task.operator)["downstream_task_ids"] = {"b", "other"}
    vars(task.operator)["skip_all_except"] = None
    task.ti.xcom_pull = lambda **given: {"followed": ["b"]} if given["key"] == "skipmixin_key" else None
    with nullcontext() if version == 2 else pytest.raises(DownstreamTasksSkipped):
        task.execute()
    assert get_state(db, task.run_id, "other").skip_reason == "branch_not_taken"
    assert get_state(db, task.run_id, "b").status == "pending"


def test_a_result_that_is_no_json_does_not_fail_the_task(policy: ModuleType, db: Connection) -> None:
    task = Task(policy, lambda: {1, 2})
    assert task.execute() == {1, 2}
    assert get_state(db, task.run_id, "a").step_result is None


@pytest.mark.parametrize("result", ["a\0b", float("inf")])
def test_a_result_that_the_database_refuses_is_reported_as_null(
    result: object, policy: ModuleType, db: Connection
) -> None:
    task = Task(policy, lambda: result)
    assert task.execute() == result
    state = get_state(db, task.run_id, "a")
    assert (state.status, state.step_result) == ("completed", None)


def test_a_message_that_the_database_refuses_still_fails_the_step(policy: ModuleType, db: Connection) -> None:
    def work() -> None:
        raise RuntimeError("a\0b")

    task = Task(policy, work)
    with pytest.raises(RuntimeError):
        task.execute()
    assert get_state(db, task.run_id, "a").status == "failed"


def test_a_report_is_made_again_until_the_database_answers(
    policy: ModuleType, connection: SimpleNamespace, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = []

    def call(parameters: object, statement: str, values: object) -> Any:
        if statement == policy.END:
            tries.append(values)
            if len(tries) < 3:
                raise OperationalError("the server closed the connection")
        return answer(parameters, statement, values)

    answer = policy.call
    monkeypatch.setattr(policy, "call", call)
    monkeypatch.setattr(policy.time, "sleep", lambda seconds: None)
    monkeypatch.setattr(policy, "REPORT_FOR", 60.0)
    task = Task(policy)
    assert task.execute() == "there"
    assert len(tries) == 3
    assert get_state(db, task.run_id, "a").status == "completed"


def test_a_task_is_claimed_without_a_conf_that_the_database_refuses(policy: ModuleType, db: Connection) -> None:
    task = Task(policy)
    assert task.execute(conf={"name": "a\0b"}) == "there"
    assert get_state(db, task.run_id, "a").status == "completed"


@pytest.mark.parametrize("trouble", ["away", "connection", "role"])
def test_without_the_database_moved_tasks_wait_and_others_go_on(
    trouble: str, policy: ModuleType, connection: SimpleNamespace, db: Connection
) -> None:
    bind(db, "dag", "b", "python")
    assert Task(policy).execute() == "there", "it hears that b has moved"
    if trouble == "role":
        connection.login = create_role(db, "LOGIN")
    elif trouble == "away":
        connection.schema = "gone"
    else:
        connection.port = "1"
    try:
        assert Task(policy).execute() == "there"
        Task(policy, task_id="b").wait()
    finally:
        if trouble == "role":
            db.execute(f"DROP ROLE {connection.login}".encode())


@pytest.mark.parametrize("kept", [None, "no JSON", '{"a": 1}'], ids=["no answer", "no JSON", "no list"])
def test_a_task_waits_where_airflow_can_not_say_whether_it_has_moved(
    kept: str | None,
    policy: ModuleType,
    connection: SimpleNamespace,
    variables: dict[str, str],
    supervisor: SimpleNamespace,
) -> None:
    connection.schema = "gone"
    if kept is None:  # Airflow's class then returns the default, as if there were no Variable
        supervisor.error = "API_SERVER_ERROR"
    else:
        variables["pgflow_moved_dag"] = kept
    Task(policy, lambda: pytest.fail("a worker here may have executed it")).wait()


def test_a_task_that_no_variable_names_is_executed_while_the_database_is_away(
    policy: ModuleType, connection: SimpleNamespace
) -> None:
    connection.schema = "gone"
    assert Task(policy).execute() == "there"


def test_a_trigger_is_woken_though_another_one_of_the_same_try_is_cancelled(policy: ModuleType, db: Connection) -> None:
    bind(db, "dag", "a", "python")
    task = Task(policy)
    given = task.wait()["trigger"].serialize()[1]

    async def fire() -> list[object]:
        first, second = (asyncio.ensure_future(anext(policy.PgflowTrigger(**given).run())) for _ in range(2))
        await asyncio.sleep(0)  # both wait
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        await asyncio.to_thread(claim_for_prefect, db, task.run_id, "a")
        await asyncio.to_thread(complete, db, task.run_id, "a", 1)
        return [await asyncio.wait_for(second, 60)]

    assert len(asyncio.run(fire())) == 1


@pytest.mark.parametrize("policy", ["reschedule"], indirect=True)
def test_without_a_triggerer_a_task_looks_again_later(policy: ModuleType, db: Connection) -> None:
    bind(db, "dag", "a", "python")
    task = Task(policy)
    with pytest.raises(policy.find_exception("AirflowRescheduleException")) as waiting:
        task.execute()
    assert timedelta(0) < waiting.value.args[0] - datetime.now(UTC) <= timedelta(seconds=policy.RESCHEDULE)
    complete(db, task.run_id, "a", 3)
    assert task.execute() == 3


def test_mapped_tasks_and_other_dags_are_left_alone(policy: ModuleType) -> None:
    mapped, other = MappedOperator(), Operator(lambda: "there")
    other.dag_id = "other"
    for each in (mapped, other):
        policy.task_policy(each)
        assert "execute" not in vars(each)


def test_the_policy_never_raises(policy: ModuleType) -> None:
    class Strange(Operator):
        def __setattr__(self, name: str, value: object) -> None:
            raise RuntimeError(name)

    strange = Strange.__new__(Strange)
    policy.task_policy(strange)
    policy.task_policy(None)


def test_another_policys_method_is_called(policy: ModuleType) -> None:
    task = Task(policy)
    del task.operator.execute
    vars(task.operator)["execute"] = lambda context: "the other policy's"
    policy.task_policy(task.operator)
    assert task.execute() == "the other policy's"


def test_the_command_prints_the_file_and_lets_the_dag_ask(
    db: Connection, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    define(db, "dag", {"a": []})
    print_policy("dag", connection="ours", wait="reschedule", longest_wait=60, dsn=dsn)
    printed = capsys.readouterr()
    compile(printed.out, "pgflow_policy.py", "exec")
    assert "DAGS: frozenset[str] = frozenset(['dag'])" in printed.out
    assert "CONNECTION = 'ours'" in printed.out
    assert "from pgflow_policy import task_policy" in printed.err
    assert db.execute("SELECT workflow_slug FROM pgflow_prefect.airflow_dags").fetchall() == [("dag",)]


def test_the_command_says_that_mirrors_stop_and_takes_the_policy_back(
    db: Connection, dsn: str, capsys: pytest.CaptureFixture[str]
) -> None:
    define(db, "dag", {"a": []})
    define(db, "other", {"a": []})
    db.execute("SELECT pgflow_prefect.add_mirror('dag')")
    print_policy("dag", "other", dsn=dsn)
    assert "mirrors of Airflow follow dag no more" in capsys.readouterr().err
    bind(db, "dag", "a", "python")
    db.execute("SELECT pgflow_prefect.claim_airflow_task('other', 'a', 1, gen_random_uuid(), '{}', NULL, NULL, NULL)")
    print_policy("dag", "other", remove=True, dsn=dsn)
    printed = capsys.readouterr()
    assert printed.out == ""
    said = " ".join(printed.err.split())
    assert "the tasks of DAG 'dag' ask no more: Airflow executes those of new runs. That is true of a, too" in said
    assert "the tasks of DAG 'other' ask no more: Airflow executes those of new runs. 1 runs go on" in said
    assert db.execute("SELECT FROM pgflow_prefect.airflow_dags WHERE removed_at IS NULL").fetchall() == []
    with pytest.raises(UsageError, match="the tasks of 'dag' do not ask this database"):
        print_policy("dag", remove=True, dsn=dsn)
    print_policy("dag", dsn=dsn)
    assert db.execute("SELECT workflow_slug FROM pgflow_prefect.airflow_dags WHERE removed_at IS NULL").fetchall() == [
        ("dag",)
    ]


def test_the_command_names_what_is_wrong(db: Connection, dsn: str) -> None:
    define(db, "dag", {"a": []})
    with pytest.raises(UnknownWorkflowError, match="dg"):
        print_policy("dag", "dg", dsn=dsn)
    assert db.execute("SELECT FROM pgflow_prefect.airflow_dags").fetchall() == [], "none of them"
    with pytest.raises(UsageError, match="which DAGs"):
        print_policy(dsn=dsn)
    with pytest.raises(UsageError, match="--longest-wait"):
        print_policy("dag", longest_wait=0, dsn=dsn)
    with pytest.raises(UsageError, match="366 days"):
        print_policy("dag", longest_wait=1e15, dsn=dsn)
