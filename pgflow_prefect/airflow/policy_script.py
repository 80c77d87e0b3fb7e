"""Asks pgflow who does a task, when Airflow is about to execute it. `pgflow-prefect airflow policy` prints this file.

It belongs into Airflow's folder `config`, and needs one line in `airflow_local_settings.py` there:

    from pgflow_policy import task_policy

It runs in the processes of Airflow 2.11 and 3. It needs Airflow, and psycopg2 or psycopg. It changes no DAG file.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

from airflow.triggers.base import BaseTrigger, TriggerEvent

DAGS: frozenset[str] = frozenset()
"""The DAGs whose tasks ask. The tasks of all others never do."""

INSTALLATION = uuid.UUID(int=0)
"""The id of pgflow's database. It is in the ids of the runs there."""

CONNECTION = "pgflow"
"""The Airflow Connection with the address of pgflow's database."""

WAIT = "deferrable"
"""How a task waits: `deferrable` needs Airflow's triggerer; `reschedule` needs none, and looks every half minute."""

LONGEST_WAIT = 86400.0
"""Seconds that a try of a task waits at most, if the task has no execution_timeout."""

POLL = 2.0
"""Seconds between two looks of a triggerer, for all its waiting tasks together."""

REPORT_FOR = 120.0
"""Seconds for which the end of a task is reported again while the database does not answer."""

RESCHEDULE = 30.0
LONGEST_PAUSE = 60.0
TIMEOUT = 5
LIBPQ = (
    "sslmode",
    "sslrootcert",
    "sslcert",
    "sslkey",
    "options",
    "target_session_attrs",
    "hostaddr",
    "channel_binding",
)

CLAIM = """
    SELECT answer, result, message, taken, moved, waited
    FROM pgflow_prefect.claim_airflow_task(%s, %s, %s, %s, %s, %s, %s, %s)
"""
WATCH = "SELECT pgflow_prefect.watch_airflow_tasks(%s::uuid[], %s::text[], %s::int[])"
END = "SELECT pgflow_prefect.end_airflow_task(%s, %s, %s, %s, %s::jsonb, %s, %s::text[], %s)"

UNDER_WAY = {"TaskDeferred", "AirflowRescheduleException", "TaskAwaitingInput", "DagRunTriggerException"}
"""By these exceptions, a task goes on later."""

FINAL = {"AirflowFailException", "AirflowSensorTimeout"}
"""After these exceptions, Airflow does not try again."""

log = logging.getLogger("airflow.task.pgflow")


def task_policy(task: Any) -> None:
    """Let a task ask who does it, when it executes. Airflow calls this for each task of each DAG that it parses."""
    try:
        # A mapped task has no method to execute yet: it stays with Airflow.
        if getattr(task, "dag_id", None) not in DAGS or not callable(getattr(type(task), "execute", None)):
            return
        own = vars(task).get("execute")  # of another policy
        if own is not execute:
            task.pgflow_original = own
            task.execute = execute
    except Exception:
        log.exception("pgflow's policy leaves a task as it is")


class Key(NamedTuple):
    """A try of a task."""

    run_id: str
    task_id: str
    try_number: int


class Answer(NamedTuple):
    """What pgflow says about a task."""

    answer: str
    result: str | None
    message: str | None
    taken: list[str] | None
    moved: list[str]
    waited: float | None


def execute(context: Any, event: Any = None, until: float | None = None, **sentinel: Any) -> Any:
    """Do the task, or wait for pgflow's step and return its result. Airflow calls this and not the operator's method.

    Args:
        context: Airflow's.
        event: None before the first wait. The event of a trigger says only that it is time to ask again.
        until: when a task that waits ends, in seconds since 1970; None before the first wait.
        sentinel: Airflow 2 marks its own calls with it.
    """
    ti = context["ti"]
    run_id = uuid.uuid5(uuid.uuid5(INSTALLATION, f"airflow {ti.dag_id}"), ti.run_id)
    key = Key(str(run_id), ti.task_id, int(ti.try_number))
    parameters: dict[str, Any] | None = None
    try:
        parameters = read_connection()
        answer = claim(parameters, context, key)
    except Exception as error:  # the database is away, or refuses this role: see the next line
        moved = recall(ti.dag_id)
        if until is None and moved is not None and ti.task_id not in moved:
            log.warning("pgflow can't be asked, and the task had not moved: Airflow executes it. %s", describe(error))
            return execute_unasked(context, key, parameters, sentinel)
        known = "the task has moved" if moved is not None else "Airflow does not say whether the task has moved"
        log.warning("pgflow can't be asked, and %s: it waits. %s", known, describe(error))
        return wait(context, key, until or find_end(context, 0.0), None)
    remember(ti.dag_id, answer.moved)
    if answer.answer in {"airflow", "unknown"}:
        return execute_original(context, key, parameters if answer.answer == "airflow" else None, sentinel)
    if answer.answer == "wait":
        end = min(until or float("inf"), find_end(context, answer.waited or 0.0))
        return wait(context, key, end, parameters)
    return finish(context, key, answer, asked_before=until is not None)


def execute_original(context: Any, key: Key, parameters: dict[str, Any] | None, sentinel: dict[str, Any]) -> Any:
    """Do the task as Airflow does without this policy, and report how it has ended."""
    task, ti = context["task"], context["ti"]  # the copy with rendered templates, not the object that the policy saw

    def tell(outcome: str, result: Any = None, **given: Any) -> None:
        report(parameters, key, outcome, result, patience=find_patience(context), **given)

    try:
        if (original := getattr(task, "pgflow_original", None)) is not None:
            result = original(context)
        else:
            result = type(task).execute(task, context, **sentinel)
    except BaseException as error:
        name = type(error).__name__
        if name == "AirflowSkipException":
            tell("skipped", message=str(error) or "skipped in Airflow")
        elif name == "DownstreamTasksSkipped":  # a branch of Airflow 3
            named = getattr(error, "tasks", ())
            left_out = (
                [named] if isinstance(named, str) else [each if isinstance(each, str) else each[0] for each in named]
            )
            tell("completed", left_out=left_out, task=task)
        elif name in FINAL or (isinstance(error, Exception) and name not in UNDER_WAY and is_last_try(ti)):
            tell("failed", message=f"{name}: {error}" if str(error) else name)
        raise
    tell("completed", result, left_out=find_left_out(task, ti), task=task)
    return result


def is_last_try(ti: Any) -> bool:
    """Tell whether Airflow does not try the task again if it fails now."""
    return int(ti.try_number) > int(getattr(ti, "max_tries", 0) or 0)


def find_left_out(task: Any, ti: Any) -> list[str] | None:
    """Return the tasks that a branch of Airflow 2 did not take; None for a task that takes no branches."""
    if not hasattr(task, "skip_all_except"):
        return None
    try:
        noted = ti.xcom_pull(task_ids=ti.task_id, key="skipmixin_key") or {}
    except Exception:
        log.exception("pgflow's policy can't read which branch was taken")
        return None
    if "followed" in noted:
        return sorted(set(task.downstream_task_ids) - set(noted["followed"]))
    return list(noted["skipped"]) if "skipped" in noted else None


def report(
    parameters: dict[str, Any] | None,
    key: Key,
    outcome: str,
    result: Any = None,
    *,
    message: str | None = None,
    left_out: list[str] | None = None,
    task: Any = None,
    patience: float = 0.0,
) -> bool:
    """Say how a task has ended. A report that is lost does not end the task otherwise.

    While the database does not answer, this tries again for `patience` seconds. A result or a message that it refuses
    is left out.

    Returns:
        False where this changes nothing, or the report is lost. Nothing reports it later: no mirror follows the DAG.
    """
    if parameters is None:
        return False
    taken = whole = None
    if left_out is not None:
        below = set(task.downstream_task_ids)
        taken, whole = sorted(below - set(left_out)), not below.issuperset(left_out)
    try:
        text = json.dumps(result if getattr(task, "do_xcom_push", True) else None, allow_nan=False)
    except (RecursionError, TypeError, ValueError) as error:
        log.warning("pgflow gets no result of this task, because it is no JSON: %s", describe(error))
        text = "null"
    until, pause, may_refuse = time.monotonic() + patience, 1.0, True
    while True:
        try:
            return bool(call(parameters, END, (*key, outcome, text, message, taken, bool(whole)))[0][0])
        except Exception as error:
            if may_refuse and is_refused(error):
                log.warning("pgflow refuses the result or the message of this task: %s", describe(error))
                may_refuse, text = False, "null"
                message = "its message can't be stored" if message is not None else None
                continue
            if not is_away(error) or time.monotonic() + pause > until:
                log.error("pgflow does not hear that this task has ended: %s", describe(error))  # noqa: TRY400
                return False
            log.warning("pgflow does not hear yet that this task has ended: %s", describe(error))
        time.sleep(pause)
        pause = min(pause * 2, 15.0)


def find_patience(context: Any) -> float:
    """Return how long a report may be tried again: Airflow's own time-out must not end a task that is done."""
    if not getattr(context["task"], "execution_timeout", None):
        return REPORT_FOR
    return min(REPORT_FOR, find_end(context, 0.0) - time.time() - 3 * TIMEOUT)


def is_refused(error: Exception) -> bool:
    """Tell whether the database, or its driver, can't store a value."""
    drivers = any(each.__name__ == "DataError" for each in type(error).__mro__)  # psycopg's has no code for NUL
    return drivers or find_code(error)[:2] in {"22", "54"} or isinstance(error, (TypeError, ValueError))


def is_away(error: Exception) -> bool:
    """Tell whether the same statement may succeed later."""
    if code := find_code(error):
        return code[:2] in {"08", "40", "53", "55", "57"}
    return any(each.__name__ in {"OperationalError", "InterfaceError"} for each in type(error).__mro__)


def find_code(error: Exception) -> str:
    """Return the SQLSTATE; nothing where there is none, such as for a connection that was not made."""
    return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None) or ""


def execute_unasked(context: Any, key: Key, parameters: dict[str, Any] | None, sentinel: dict[str, Any]) -> Any:
    """Do the task without a claim, and claim it as soon as the database answers again."""
    ended = threading.Event()

    def claim_late() -> None:
        while parameters is not None and not ended.wait(POLL):
            try:
                answer = claim(parameters, context, key)
            except Exception:  # noqa: S112  still away
                continue
            if answer.answer not in {"airflow", "unknown"}:
                log.error("pgflow has moved this task meanwhile, and Airflow executes it: %s", answer.answer)
            return

    threading.Thread(target=claim_late, name="pgflow", daemon=True).start()
    try:
        return execute_original(context, key, parameters, sentinel)
    finally:
        ended.set()


def finish(context: Any, key: Key, answer: Answer, *, asked_before: bool) -> Any:
    """End the task as pgflow's step has ended."""
    task, ti = context["task"], context["ti"]
    if not asked_before:
        log.info(
            "pgflow's step of run %s has ended before this try began, and is not executed again: %s",
            key[0],
            answer.answer,
        )
    if answer.answer == "skipped":
        raise find_exception("AirflowSkipException")(f"pgflow has skipped the step: {answer.message}")
    if answer.answer == "failed":  # pgflow has made the retries
        raise find_exception("AirflowFailException")(f"pgflow's step has failed: {answer.message}")
    if answer.answer != "completed":
        raise find_exception("AirflowException")(f"pgflow does not let this try execute: {answer.answer}")
    result = json.loads(answer.result) if answer.result is not None else None
    if answer.taken is not None and callable(getattr(task, "do_branch", None)):
        if result is not None and getattr(task, "do_xcom_push", True):
            ti.xcom_push(key="return_value", value=result)  # the branch may end the task
        task.do_branch(context, answer.taken or None)
    return result


def wait(context: Any, key: Key, until: float, parameters: dict[str, Any] | None) -> Any:
    """Leave the worker's slot until there is something new.

    Raises:
        BaseException: of Airflow: the task is deferred, or rescheduled, or has waited too long.
    """
    task = context["task"]
    left = until - time.time()
    if left <= 0:
        give_up(context, key, parameters)
    if WAIT == "reschedule":
        pause = timedelta(seconds=min(RESCHEDULE, left))
        raise find_exception("AirflowRescheduleException")(datetime.now(timezone.utc) + pause)  # noqa: UP017
    log.info("a worker of pgflow does this task, as run %s: Airflow waits for it", key.run_id)
    task.defer(
        trigger=PgflowTrigger(*key, until),
        method_name="execute",
        kwargs={"until": until},
        timeout=timedelta(
            seconds=min(left + LONGEST_PAUSE, 366 * 86400.0)
        ),  # if no triggerer is alive, the scheduler ends it
    )


def give_up(context: Any, key: Key, parameters: dict[str, Any] | None) -> None:
    """End a task that has waited as long as it may. After its last try, fail pgflow's step unless a worker has it."""
    message = "Airflow has waited for this step as long as its task may take"
    if is_last_try(context["ti"]):
        given_up = report(parameters, key, "gave-up", message=message)
        log.warning("pgflow's step %s", "has failed with the task" if given_up else "goes on without the task")
    raise find_exception("AirflowException")(f"{message}: no worker of pgflow has ended it")


def find_end(context: Any, waited: float) -> float:
    """Return when this try has to end: a little before its own time-out, so that it can say why."""
    limit = getattr(context["task"], "execution_timeout", None)
    seconds = limit.total_seconds() if limit else LONGEST_WAIT
    began = getattr(context["ti"], "start_date", None)
    if began is not None:
        waited = max(waited, time.time() - began.timestamp())
    return time.time() + seconds - min(10.0, seconds / 20) - waited


class PgflowTrigger(BaseTrigger):  # type: ignore[misc]
    """Waits in Airflow's triggerer until pgflow's step has ended, or Airflow is to do it again."""

    def __init__(self, run_id: str, task_id: str, try_number: int, until: float) -> None:
        super().__init__()
        self.key = Key(run_id, task_id, try_number)
        self.until = until

    def serialize(self) -> tuple[str, dict[str, Any]]:
        """Return what Airflow stores of it."""
        return f"{__name__}.PgflowTrigger", {**self.key._asdict(), "until": self.until}

    async def run(self) -> AsyncIterator[TriggerEvent]:
        """Fire once. The event has no result: the task asks again, and that answer counts."""
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(WATCHER.wait(self.key), max(self.until - time.time(), 0))
        yield TriggerEvent({})


class Watcher:
    """Asks for all waiting tasks of a triggerer in one statement."""

    def __init__(self) -> None:
        self._waiting: dict[object, tuple[Key, asyncio.Future[None]]] = {}  # by wait: two may have one key
        self._looking: asyncio.Task[None] | None = None

    async def wait(self, key: Key) -> None:
        """Return when a task is to ask again."""
        loop = asyncio.get_running_loop()
        self._waiting = {each: of for each, of in self._waiting.items() if of[1].get_loop() is loop}
        this, future = object(), loop.create_future()
        self._waiting[this] = key, future
        if self._looking is None or self._looking.done() or self._looking.get_loop() is not loop:
            self._looking = asyncio.ensure_future(self._look())
        try:
            await future
        finally:
            self._waiting.pop(this, None)

    async def _look(self) -> None:
        from asgiref.sync import sync_to_async

        pause = POLL
        while self._waiting:
            keys = sorted({key for key, _ in self._waiting.values()})
            try:
                parameters = await sync_to_async(read_connection)()
                places = await asyncio.to_thread(watch, parameters, keys)
                pause = POLL
            except Exception as error:
                log.warning("pgflow can't be asked about %d waiting tasks: %s", len(keys), describe(error))
                places, pause = [], min(pause * 2, LONGEST_PAUSE)
            over = {keys[place - 1] for place in places}
            for key, future in [*self._waiting.values()]:
                if key in over and not future.done():
                    future.set_result(None)
            await asyncio.sleep(pause)


WATCHER = Watcher()


def claim(parameters: dict[str, Any], context: Any, key: Key) -> Answer:
    """Ask pgflow who does a task. If Airflow does it, it is claimed for this try afterwards."""
    ti, run = context["ti"], context["dag_run"]
    moments = {
        "logical_date": getattr(run, "logical_date", None),
        "data_interval_start": getattr(run, "data_interval_start", None),
        "data_interval_end": getattr(run, "data_interval_end", None),
    }
    texts = {name: moment.isoformat() if moment is not None else None for name, moment in moments.items()}
    payload = {"airflow_run_id": ti.run_id, "conf": getattr(run, "conf", None) or {}, **texts}

    def ask() -> Answer:
        text = json.dumps(payload, allow_nan=False)
        values = (ti.dag_id, ti.task_id, key.try_number, key.run_id, text, *texts.values())
        [row] = call(parameters, CLAIM, values)
        return Answer(*row)

    try:
        return ask()
    except Exception as error:
        if not is_refused(error) and not isinstance(error, RecursionError):
            raise
        log.warning("pgflow does not get the conf of this run: %s", describe(error))
        del payload["conf"]
        return ask()


def watch(parameters: dict[str, Any], keys: Sequence[Key]) -> list[int]:
    """Return the places of those tasks, from 1 on, that are to ask again."""
    columns = [[*column] for column in zip(*keys)]  # noqa: B905  Python 3.9
    return [place for (place,) in call(parameters, WATCH, columns)]


def call(parameters: dict[str, Any], statement: str, values: Sequence[Any]) -> list[Any]:
    """Return the rows of a statement. It is a transaction and a connection of its own, and has time-outs."""
    try:
        driver = importlib.import_module("psycopg2")  # what this environment has
    except ImportError:
        driver = importlib.import_module("psycopg")
    connection = driver.connect(**parameters)
    try:
        cursor = connection.cursor()
        cursor.execute("SELECT set_config('statement_timeout', '10s', true), set_config('lock_timeout', '8s', true)")
        cursor.execute(statement, values)
        rows = list(cursor.fetchall())
        connection.commit()
        return rows
    finally:
        connection.close()


def read_connection() -> dict[str, Any]:
    """Return how to reach pgflow's database, by the Airflow Connection."""
    try:
        from airflow.sdk.bases.hook import BaseHook
    except ImportError:
        from airflow.hooks.base import BaseHook
    found = BaseHook.get_connection(CONNECTION)
    extra = {name: text for name, text in (found.extra_dejson or {}).items() if name in LIBPQ}
    given = {"host": found.host, "port": found.port, "user": found.login, "password": found.password}
    named = {name: text for name, text in {**given, "dbname": found.schema, **extra}.items() if text not in {None, ""}}
    return {**named, "connect_timeout": TIMEOUT, "application_name": "pgflow_policy", "client_encoding": "utf8"}


def recall(dag_id: str) -> list[str] | None:
    """Return the tasks of a DAG that had moved, as pgflow said last; None where Airflow can't say."""
    name = f"pgflow_moved_{dag_id}"
    try:
        text = find_variable().get(name, None)  # the default, in Airflow 2 and in Airflow 3
        if text is None:  # Airflow says so, too, where nothing answers
            return [] if is_missing(name) else None
        found = json.loads(text)
        return [each for each in found if isinstance(each, str)] if isinstance(found, list) else None
    except Exception as error:
        log.warning("Airflow does not say which tasks have moved: %s", describe(error))
        return None


def is_missing(name: str) -> bool:
    """Tell whether Airflow itself answers that it has no such Variable; it raises an error where it can't say."""
    try:
        from airflow.sdk.exceptions import AirflowRuntimeError
        from airflow.sdk.execution_time.comms import GetVariable
        from airflow.sdk.execution_time.task_runner import SUPERVISOR_COMMS
    except ImportError:  # Airflow 2 asks its database
        from airflow.models import Variable
        from airflow.utils.session import create_session

        with create_session() as session:
            return session.query(Variable.id).filter(Variable.key == name).first() is None
    try:
        said = SUPERVISOR_COMMS.send(GetVariable(key=name))
    except AirflowRuntimeError as error:
        said = error.error
    return getattr(getattr(said, "error", None), "value", None) == "VARIABLE_NOT_FOUND"


def remember(dag_id: str, moved: list[str]) -> None:
    """Keep in an Airflow Variable which tasks of a DAG have moved, for when the database is away."""
    try:
        if recall(dag_id) != moved:
            find_variable().set(f"pgflow_moved_{dag_id}", json.dumps(moved))
    except Exception:
        log.exception("Airflow does not remember which tasks have moved")


def find_variable() -> Any:
    """Return Airflow's class of Variables."""
    try:
        from airflow.sdk import Variable
    except ImportError:
        from airflow.models import Variable
    return Variable


def find_exception(name: str) -> type[BaseException]:
    """Return an exception of Airflow."""
    try:
        from airflow.sdk import exceptions
    except ImportError:
        from airflow import exceptions
    found: type[BaseException] = getattr(exceptions, name)
    return found


def describe(error: Exception) -> str:
    """Return an error in one line."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:300] if str(error).strip() else ''}"
