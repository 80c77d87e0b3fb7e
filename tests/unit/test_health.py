"""What probes hear of a service: over HTTP, from a file, and as systemd is told."""

import socket
from collections.abc import Callable
from pathlib import Path
from time import monotonic

import anyio
import httpx
import pytest

from pgflow_prefect.errors import DatabaseReadOnlyError, DatabaseUnavailableError, UsageError
from pgflow_prefect.services import health as module
from pgflow_prefect.services.health import Health, open_health

pytestmark = pytest.mark.anyio


class Database:
    """Stands for the store: writable, or in the trouble that it is given."""

    def __init__(self) -> None:
        self.trouble: Exception | None = None

    async def check_writable(self) -> None:
        if self.trouble is not None:
            raise self.trouble

    async def drop_broken_connections(self) -> None: ...


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch) -> Health:
    monkeypatch.setattr(module, "_INTERVAL", 0.02)
    monkeypatch.setattr(module, "_BEAT", 0.02)
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    return Health(statement_bound=20)


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


async def ask(port: int, path: str) -> tuple[int, str]:
    async with httpx.AsyncClient() as client:
        answer = await client.get(f"http://127.0.0.1:{port}{path}")
    return answer.status_code, answer.text.strip()


async def await_answer(port: int, path: str, expected: tuple[int, str]) -> None:
    with anyio.fail_after(180):
        while await ask(port, path) != expected:
            await anyio.sleep(0.02)


async def test_a_service_is_ready_while_it_works_and_its_database_can_be_written(health: Health, port: int) -> None:
    database = Database()
    async with open_health(health, port=port, file=None):
        assert await ask(port, "/live") == (200, "ok")
        assert await ask(port, "/ready") == (503, "it starts")
        async with health.watched(database, monotonic):  # type: ignore[arg-type]
            await await_answer(port, "/ready", (200, "ok"))
            database.trouble = DatabaseReadOnlyError("a standby, and where it is")
            await await_answer(port, "/ready", (503, "the database is read-only"))
            database.trouble = DatabaseUnavailableError("secret")
            await await_answer(port, "/ready", (503, "the database does not answer"))
            assert await ask(port, "/live") == (200, "ok"), "to start it anew would not help"
            database.trouble = None
            await await_answer(port, "/ready", (200, "ok"))
            health.drains(lambda: None)()
            assert await ask(port, "/ready") == (503, "it drains")
            assert await ask(port, "/live") == (200, "ok")
        assert (await ask(port, "/secrets"))[0] == 404


async def test_a_service_that_does_not_look_for_runs_is_dead(health: Health, port: int) -> None:
    async with open_health(health, port=port, file=None), health.watched(Database(), lambda: monotonic() - 1000):  # type: ignore[arg-type]
        status, reason = await ask(port, "/live")
    assert status == 503
    assert reason.startswith("it has not looked for pending runs for 1")


async def test_an_event_loop_that_hangs_is_dead(
    health: Health, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALLED", 0.2)
    file = tmp_path / "health"
    async with open_health(health, port=port, file=file):
        began = monotonic()
        with httpx.Client() as client:  # the event loop waits for each answer
            while (answer := client.get(f"http://127.0.0.1:{port}/live")).status_code == 200:  # noqa: ASYNC212
                assert monotonic() - began < 30
        assert answer.text.startswith("the event loop has not turned for")
        await await_answer(port, "/live", (200, "ok"))


def read(file: Path) -> tuple[str, int]:
    return file.read_text(encoding="utf-8"), file.stat().st_mtime_ns


async def await_text(file: Path, expected: str) -> None:
    with anyio.fail_after(180):
        while read(file)[0] != expected:
            await anyio.sleep(0.02)


async def test_a_file_says_how_it_is_and_is_gone_with_the_service(health: Health, tmp_path: Path) -> None:
    file = tmp_path / "health"
    async with open_health(health, port=None, file=file):
        await await_text(file, "not ready: it starts\n")
        async with health.watched(Database(), monotonic):  # type: ignore[arg-type]
            await await_text(file, "ready\n")
            before = read(file)
            with anyio.fail_after(180):
                while read(file) == before:
                    await anyio.sleep(0.02)
    assert not any(tmp_path.iterdir())  # noqa: ASYNC240  nothing else runs


async def test_systemd_is_told_when_it_is_ready_and_that_it_lives(
    health: Health, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        monkeypatch.setenv("WATCHDOG_USEC", "60000")
        async with open_health(health, port=None, file=None):
            assert await anyio.to_thread.run_sync(systemd.recv, 100) == b"WATCHDOG=1", "it lives before it is ready"
            async with health.watched(Database(), monotonic):  # type: ignore[arg-type]
                while await anyio.to_thread.run_sync(systemd.recv, 100) != b"READY=1":
                    pass
                health.drains(lambda: None)()
                while await anyio.to_thread.run_sync(systemd.recv, 100) != b"STOPPING=1":
                    pass


def take_port(port: int, directory: Path) -> tuple[int | None, Path | None]:
    return port, None


def name_directory(port: int, directory: Path) -> tuple[int | None, Path | None]:
    return None, directory


def name_nowhere(port: int, directory: Path) -> tuple[int | None, Path | None]:
    return None, directory / "nowhere" / "health"


@pytest.mark.parametrize(
    ("choose", "message"),
    [
        (take_port, r"--health-port \d+ can't be used: Address already in use"),
        (name_directory, "--health-file .* can't be written: Is a directory"),
        (name_nowhere, "--health-file .* can't be written: No such file"),
    ],
)
async def test_what_can_t_be_used_is_refused_at_the_start(
    health: Health,
    port: int,
    tmp_path: Path,
    choose: Callable[[int, Path], tuple[int | None, Path | None]],
    message: str,
) -> None:
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        asked_port, file = choose(port, tmp_path)
        with pytest.raises(UsageError, match=message):
            async with open_health(health, port=asked_port, file=file):
                pass
