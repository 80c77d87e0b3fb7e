"""A real Airflow on PostgreSQL: a scheduler, a triggerer and an API server in a temporary directory.

`PGFLOW_TEST_AIRFLOW` names the Python of an environment with Airflow 3 or 2.11. Airflow can't share an environment with
Prefect. `tests/airflow/constraints-*.txt` have the versions to install there.
"""

import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from time import monotonic, sleep
from typing import Any, LiteralString, cast
from urllib.parse import quote, urlencode
from uuid import uuid4

import httpx
import psutil
import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from tests.brokers import free_port

HERE = Path(__file__).parent
VARIABLE = "PGFLOW_TEST_AIRFLOW"
TIMEOUT = 600.0
"""Seconds after which something that is waited for will not come any more."""

DAG_IDS = (
    "observed",
    "past",
    "story",
    "unlucky",
    "unlucky_moved",
    "unlucky_role",
    "unlucky_name",
    "untouched",
    "waiting",
    "flipped",
)
"""The DAGs in its folder."""

_LONG = "3600"
"""Seconds for what Airflow gives up after some time: no process is to be fast."""

# It lets each test have a policy of its own: the file that `pgflow-prefect airflow policy` prints.
_LOCAL_SETTINGS = """
from importlib import import_module
from pathlib import Path


def task_policy(task):
    for path in sorted(Path(__file__).parent.glob("pgflow_policy_*.py")):
        import_module(path.stem).task_policy(task)
"""

_RUNNING = (
    "SELECT count(DISTINCT job_type) FROM job WHERE state = 'running' AND job_type IN ('SchedulerJob', 'TriggererJob')"
)
_PARSED = "SELECT count(DISTINCT dag_id) FROM serialized_dag WHERE dag_id = ANY (%s)"


def find_python() -> Path:
    """Return the Python of an environment with Airflow; skip the test where none is named."""
    named = os.environ.get(VARIABLE)
    if not named:
        pytest.skip(f"no Airflow: {VARIABLE} names the Python of an environment with Airflow; see CONTRIBUTING.md")
    found = Path(named).absolute()
    if not found.is_file():
        pytest.fail(f"{VARIABLE} is {named!r}, and has to be the Python of an environment with Airflow")
    return found


@dataclass(frozen=True)
class Airflow:
    """A running Airflow.

    Attributes:
        python: of its environment.
        version: of Airflow.
        dsn: its metadata database.
        home: its directory. `config` has the policies, and `logs` the logs of tasks.
        url: its API; empty for Airflow 2, which is asked by its command line.
    """

    python: str
    version: str
    dsn: str
    home: str
    url: str

    @property
    def is_2(self) -> bool:
        """Tell whether it is Airflow 2."""
        return self.version.startswith("2")

    @cached_property
    def environment(self) -> dict[str, str]:
        """What its processes have in their environment."""
        return make_environment(Path(self.python), Path(self.home), self.dsn, self.url)

    # What a user does

    def trigger(self, dag_id: str, run_id: str, conf: Mapping[str, Any] | None = None) -> None:
        """Start a run."""
        if self.is_2:
            self.call("dags", "trigger", dag_id, "-r", run_id, "-c", json.dumps(conf or {}))
        else:
            self.post(f"dags/{dag_id}/dagRuns", dag_run_id=run_id, logical_date=None, conf=conf or {})

    def clear(self, dag_id: str, run_id: str, task_id: str) -> None:
        """Clear a task of a run, and those below it."""
        if self.is_2:
            self.call("tasks", "clear", dag_id, "-t", f"^{task_id}$", "-d", "-y")
        else:
            self.post(
                f"dags/{dag_id}/clearTaskInstances",
                dry_run=False,
                dag_run_id=run_id,
                task_ids=[task_id],
                only_failed=False,
                include_downstream=True,
            )

    @contextmanager
    def paused(self, dag_id: str) -> Iterator[None]:
        """Let Airflow begin no task of a DAG during the block."""
        self._pause(dag_id, is_paused=True)
        try:
            yield
        finally:
            self._pause(dag_id, is_paused=False)

    def _pause(self, dag_id: str, *, is_paused: bool) -> None:
        if self.is_2:
            self.call("dags", "pause" if is_paused else "unpause", dag_id)
        else:
            answer = httpx.patch(f"{self.url}/api/v2/dags/{dag_id}", json={"is_paused": is_paused}, timeout=TIMEOUT)
            assert answer.is_success, answer.text

    def add_connection(self, name: str, dsn: str) -> None:
        """Add an Airflow Connection to a database, as the role that the address names; or change its address."""
        given = {key: str(text) for key, text in conninfo_to_dict(dsn).items()}
        if self.is_2:
            login = f"{quote(given['user'], safe='')}:{quote(given['password'], safe='')}"
            place = f"{quote(given['host'], safe='')}:{given.get('port', 5432)}/{given['dbname']}"
            subprocess.run(
                [self.python, "-m", "airflow", "connections", "delete", name], env=self.environment, check=False
            )
            self.call("connections", "add", name, "--conn-uri", f"postgresql://{login}@{place}")
            return
        body = {
            "connection_id": name,
            "conn_type": "postgres",
            "host": given["host"],
            "port": int(given.get("port", 5432)),
            "login": given["user"],
            "password": given["password"],
            "schema": given["dbname"],
        }
        httpx.delete(f"{self.url}/api/v2/connections/{name}", timeout=TIMEOUT)
        self.post("connections", **body)

    def set_variable(self, name: str, text: str) -> None:
        """Set an Airflow Variable."""
        if self.is_2:
            self.call("variables", "set", name, text)
        else:
            self.post("variables", key=name, value=text)

    def call(self, *arguments: str) -> str:
        """Run a command of Airflow to its end, and return what it wrote."""
        done = subprocess.run(
            [self.python, "-m", "airflow", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
        return done.stdout

    def post(self, path: str, **body: Any) -> Any:
        """Ask the API of Airflow 3."""
        answer = httpx.post(f"{self.url}/api/v2/{path}", json=body, timeout=TIMEOUT)
        assert answer.is_success, answer.text
        return answer.json()

    def give_up(self, pids: Collection[int]) -> None:
        """Let Airflow notice that processes of tasks are dead, as it does once they gave no sign of life for long."""
        if self.is_2:
            statement: LiteralString = """
                UPDATE job SET latest_heartbeat = '2000-01-01' FROM task_instance t
                WHERE t.job_id = job.id AND t.state = 'running' AND t.pid = ANY (%s) RETURNING 1
            """
        else:
            statement = """
                UPDATE task_instance SET last_heartbeat_at = '2000-01-01'
                WHERE state = 'running' AND pid = ANY (%s) RETURNING 1
            """
        self.ask(statement, [*pids])

    # What Airflow says

    def ask(self, statement: LiteralString, *values: object) -> list[tuple[Any, ...]]:
        """Return rows of the metadata database."""
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return connection.execute(statement, values).fetchall()

    def read_run(self, dag_id: str, run_id: str) -> str:
        """Return the state of a run; nothing where there is none."""
        found = self.ask("SELECT state FROM dag_run WHERE dag_id = %s AND run_id = %s", dag_id, run_id)
        return str(found[0][0]) if found else ""

    def read_tasks(self, dag_id: str, run_id: str) -> dict[str, tuple[str | None, int]]:
        """Return the state and the number of the try of each task of a run; of a mapped one, by `task[index]`."""
        statement: LiteralString = (
            "SELECT task_id || CASE WHEN map_index < 0 THEN '' ELSE '[' || map_index || ']' END, state, try_number"
            " FROM task_instance WHERE dag_id = %s AND run_id = %s"
        )
        return {str(task): (state, number) for task, state, number in self.ask(statement, dag_id, run_id)}

    def read_result(self, dag_id: str, run_id: str, task_id: str) -> Any:
        """Return what a task has returned, of Airflow 3; None where it has returned nothing."""
        statement: LiteralString = (
            "SELECT value FROM xcom"
            " WHERE dag_id = %s AND run_id = %s AND task_id = %s AND map_index < 0 AND key = 'return_value'"
        )
        found = self.ask(statement, dag_id, run_id, task_id)
        value = found[0][0] if found else None
        value = json.loads(bytes(value)) if isinstance(value, bytes | memoryview) else value
        return value["__data__"] if isinstance(value, dict) and "__data__" in value else value  # a tuple

    def read_log(self, dag_id: str, run_id: str, task_id: str) -> str:
        """Return what all tries of a task have logged."""
        folder = Path(self.home) / "logs" / f"dag_id={dag_id}" / f"run_id={run_id}" / f"task_id={task_id}"
        return "".join(path.read_text("utf-8", "replace") for path in sorted(folder.glob("*.log")))

    def read_executions(self) -> list[str]:
        """Return a line for each time that a task of `dags` was executed."""
        file = Path(self.home) / "executions"
        return file.read_text("utf-8").splitlines() if file.exists() else []

    # What is awaited

    def await_run(self, dag_id: str, run_id: str, state: str) -> None:
        """Return once a run has this state."""
        self.wait_until(lambda: self.read_run(dag_id, run_id) == state, f"{run_id} of {dag_id} is {state}")

    def await_task(self, dag_id: str, run_id: str, task_id: str, state: str) -> None:
        """Return once a task of a run has this state."""
        self.wait_until(
            lambda: self.read_tasks(dag_id, run_id).get(task_id, ("", 0))[0] == state,
            f"{task_id} of {run_id} of {dag_id} is {state}",
        )

    def wait_until(self, is_so: Callable[[], bool], what: str) -> None:
        """Return once something is so; say what Airflow has logged if it does not become so."""
        deadline = monotonic() + TIMEOUT
        while not is_so():
            if monotonic() > deadline:
                logs = [f"{path.name}:\n{path.read_text('utf-8', 'replace')[-2000:]}" for path in self.list_logs()]
                pytest.fail("\n".join([f"waited in vain until {what}", *logs]))
            sleep(0.2)

    def list_logs(self) -> Sequence[Path]:
        """Return what the processes have written."""
        return sorted(Path(self.home).glob("*.out"))

    def write_policy(self, text: str) -> None:
        """Put a policy into the folder `config`, under a name of its own."""
        config = Path(self.home) / "config"
        made = config / "policy.new"
        made.write_text(text, encoding="utf-8")
        made.rename(config / f"pgflow_policy_{uuid4().hex}.py")  # at once: tasks may be starting


def make_environment(python: Path, home: Path, dsn: str, url: str) -> dict[str, str]:
    """Return the environment of the processes of an Airflow."""
    given = {name: str(text) for name, text in conninfo_to_dict(dsn).items()}
    user = quote(given.get("user", ""), safe="") + (
        f":{quote(given['password'], safe='')}" if "password" in given else ""
    )
    place = urlencode([(name, given[name]) for name in ("host", "port") if name in given])
    settings = {
        "DATABASE__SQL_ALCHEMY_CONN": f"postgresql+psycopg2://{user}@/{given['dbname']}?{place}",
        "CORE__EXECUTOR": "LocalExecutor",
        "CORE__PARALLELISM": "4",
        "CORE__LOAD_EXAMPLES": "False",
        "DATABASE__LOAD_DEFAULT_CONNECTIONS": "False",
        "CORE__DAGS_FOLDER": str(home / "dags"),
        "CORE__DAGS_ARE_PAUSED_AT_CREATION": "False",
        "CORE__DAG_DISCOVERY_SAFE_MODE": "False",
        "CORE__FERNET_KEY": "",
        "LOGGING__LOGGING_LEVEL": "INFO",
        "LOGGING__WORKER_LOG_SERVER_PORT": str(free_port()),
        "LOGGING__TRIGGER_LOG_SERVER_PORT": str(free_port()),
        "SCHEDULER__ENABLE_HEALTH_CHECK": "False",
        "SCHEDULER__MIN_FILE_PROCESS_INTERVAL": "86400",
        **dict.fromkeys(
            (
                "CORE__DAGBAG_IMPORT_TIMEOUT",
                "CORE__DAG_FILE_PROCESSOR_TIMEOUT",
                "DAG_PROCESSOR__DAG_FILE_PROCESSOR_TIMEOUT",
                "SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD",
                "SCHEDULER__SCHEDULER_ZOMBIE_TASK_THRESHOLD",
                "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT",
                "SCHEDULER__TASK_QUEUED_TIMEOUT",
                "TRIGGERER__RUNNER_HEALTH_CHECK_THRESHOLD",
                "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD",
            ),
            _LONG,
        ),
        "WORKERS__EXECUTION_API_TIMEOUT": "60",
        "SCHEDULER__ZOMBIE_DETECTION_INTERVAL": "5",
        "SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "5",
        "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "API__WORKERS": "1",
        "API__BASE_URL": url,
        "CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "API_AUTH__JWT_SECRET": "a secret of these tests, which is long enough for all of them",
    }
    inherited = {name: text for name, text in os.environ.items() if not name.startswith(("AIRFLOW", "PG", "PREFECT_"))}
    return {
        **inherited,
        "AIRFLOW_HOME": str(home),
        "TMPDIR": str(home / "tmp"),
        "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', '')}",
        **{f"AIRFLOW__{name}": text for name, text in settings.items()},
    }


@contextmanager
def start(python: Path, dsn: str) -> Iterator[str]:
    """Start an Airflow on an empty database; yield what `load` makes an `Airflow` of.

    Everything that it keeps is in a temporary directory and in that database, and every process ends with the block.
    """
    script = "import importlib.metadata as m; print(m.version('apache-airflow'))"
    version = subprocess.run([python, "-c", script], check=True, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory(prefix="pgflow-airflow-", ignore_cleanup_errors=True) as directory:
        home = Path(directory)
        for name in ("config", "tmp"):
            (home / name).mkdir()
        (home / "config" / "airflow_local_settings.py").write_text(_LOCAL_SETTINGS, encoding="utf-8")
        shutil.copytree(HERE / "dags", home / "dags")
        shutil.copy(HERE / "executions.py", home / "config")  # both folders are importable for DAG files
        shutil.copy(HERE.parent / "observed" / "observed.py", home / "dags")
        is_2 = version.startswith("2")
        port = free_port()
        airflow = Airflow(str(python), version, dsn, directory, "" if is_2 else f"http://127.0.0.1:{port}")
        airflow.call("db", "migrate")
        programs = [["scheduler", "--skip-serve-logs"], ["triggerer", "--skip-serve-logs"]]
        if not is_2:  # the DAGs do not change: it reads them once
            programs += [
                ["api-server", "--host", "127.0.0.1", "--port", str(port)],
                ["dag-processor", "--num-runs", "1"],
            ]
        with ExitStack() as running:
            for program in programs:
                running.enter_context(_running(airflow, program))
            _await_ready(airflow)
            yield json.dumps(asdict(airflow))


def load(address: str) -> Airflow:
    """Return the Airflow that `start` has started, perhaps in another process."""
    return Airflow(**cast("dict[str, Any]", json.loads(address)))


def _await_ready(airflow: Airflow) -> None:
    dag_ids = [*DAG_IDS]

    def is_ready() -> bool:
        assert not (wrong := airflow.ask("SELECT filename, stacktrace FROM import_error")), wrong
        if airflow.ask(_PARSED, dag_ids) != [(len(dag_ids),)] or airflow.ask(_RUNNING) != [(2,)]:
            return False
        if airflow.is_2:
            return True
        with suppress(httpx.TransportError):
            return httpx.get(f"{airflow.url}/api/v2/version", timeout=5).is_success
        return False

    airflow.wait_until(is_ready, "Airflow is ready")


@contextmanager
def _running(airflow: Airflow, program: list[str]) -> Iterator[None]:
    """Run a program of Airflow, and kill it with all processes that it has started: what they keep goes as a whole."""
    with (Path(airflow.home) / f"{program[0]}.out").open("wb") as output:
        process = subprocess.Popen(
            [airflow.python, "-m", "airflow", *program],
            env=airflow.environment,
            cwd=airflow.home,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield
    finally:
        while found := _list_session(process.pid):
            for each in found:
                with suppress(psutil.NoSuchProcess):
                    each.kill()
            process.wait(TIMEOUT)
            psutil.wait_procs(found, timeout=10)
        process.wait(TIMEOUT)


def _list_session(leader: int) -> set[psutil.Process]:
    """Return a process, those below it, and those that were: they are of its session, unless they have begun one."""
    found = set()
    for each in psutil.process_iter():
        with suppress(ProcessLookupError, psutil.Error):
            if os.getsid(each.pid) == leader and each.status() != psutil.STATUS_ZOMBIE:
                found |= {each, *each.children(recursive=True)}
    return found
