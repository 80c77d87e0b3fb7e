"""A test session that SIGTERM or Ctrl-C ends leaves nothing running, and no data."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import httpx
import psutil
import pytest

from tests.termination import Termination

SESSION = Path(__file__).with_name("interrupted_session.py")
PATIENCE = 600.0  # seconds: for what hangs

starts_servers = pytest.mark.skipif("PGFLOW_TEST_DSN" in os.environ, reason="PGFLOW_TEST_DSN names a server")


def wait_until(is_so: Callable[[], bool], session: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not is_so():
        assert session.poll() is None, log.read_text(encoding="utf-8")
        assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
        time.sleep(0.1)


def test_what_uses_the_fixtures_without_pytest_leaves_no_directory(tmp_path: Path) -> None:
    inherited = {name: text for name, text in os.environ.items() if name != "PGFLOW_TEST_SHARED"}
    code = "from tests.conftest import PREFECT_HOME; from pathlib import Path; print(Path(PREFECT_HOME).is_dir())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | {"TMPDIR": str(tmp_path)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
        timeout=PATIENCE,
    )
    assert done.stdout == "True\n"
    assert [*tmp_path.iterdir()] == []


def interrupt(tmp_path: Path, tests: list[str], number: signal.Signals, processes: int) -> list[Path]:
    """Run a session, end it by a signal once all its processes wait in a test, and return what these have told."""
    answers = tmp_path / "told"
    answers.mkdir()
    log = tmp_path / "log"
    inherited = {name: text for name, text in os.environ.items() if name != "PGFLOW_TEST_SHARED"}
    with log.open("wb") as output:
        session = subprocess.Popen(
            [sys.executable, "-m", "pytest", "-n", str(processes), *(f"{SESSION}::{test}" for test in tests)],
            env={**inherited, "PGFLOW_TEST_TOLD": str(answers)},
            cwd=SESSION.parents[2],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        wait_until(lambda: len([*answers.glob("[!.]*")]) == max(1, processes), session, log)
        session.send_signal(number)
        assert session.wait(PATIENCE) == pytest.ExitCode.INTERRUPTED, log.read_text(encoding="utf-8")
    finally:
        session.kill()
        session.wait()
    return sorted(answers.iterdir())


def check_gone(told: Path) -> None:
    """Check that a process of the session has left neither its server nor a directory."""
    server, *directories = told.read_text(encoding="utf-8").split()
    assert not [each for each in directories if Path(each).exists()]
    with suppress(psutil.NoSuchProcess):
        psutil.Process(int(server)).wait(PATIENCE)  # it removes its file, on which `pg_ctl` waits, a moment earlier


@pytest.mark.processes
@starts_servers
@pytest.mark.parametrize(
    ("test", "processes", "number"),
    [
        ("test_that_blocks", 0, signal.SIGTERM),
        ("test_that_blocks", 2, signal.SIGTERM),
        ("test_that_blocks", 2, signal.SIGINT),
        ("test_on_an_event_loop", 0, signal.SIGTERM),
        ("test_on_an_event_loop", 2, signal.SIGTERM),
    ],
)
def test_no_postgresql_is_left(tmp_path: Path, test: str, processes: int, number: signal.Signals) -> None:
    for told in interrupt(tmp_path, [test], number, processes):
        check_gone(told)


@pytest.mark.processes
@starts_servers
def test_no_prefect_server_is_left(tmp_path: Path) -> None:
    """It has its data on the PostgreSQL of one process; the other process waits in a test of its own."""
    tests = ["test_with_a_prefect_server", "test_that_blocks[0]"]
    own, shared = interrupt(tmp_path, tests, signal.SIGTERM, 2)
    check_gone(own)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{shared.read_text(encoding='utf-8')}/health")


def test_the_first_signal_interrupts_and_a_later_one_does_not() -> None:
    termination = Termination()
    with pytest.raises(KeyboardInterrupt):
        termination.handle(signal.SIGTERM, None)
    termination.handle(signal.SIGTERM, None)


def test_a_signal_waits_for_the_start_of_a_server() -> None:
    termination = Termination()
    done: list[str] = []

    def start() -> None:
        with termination.delayed():
            with termination.delayed():
                termination.handle(signal.SIGTERM, None)
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        start()
    assert done == ["inner", "outer"]
