"""Real brokers for tests: processes of their own on free ports, in temporary directories, gone afterwards."""

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

import pytest

from tests.sharing import share

_PACKAGES = {"epmd": "rabbitmq-server"}

_PLACES = ("/usr/lib/rabbitmq/bin", "/usr/sbin", "/usr/local/sbin")


def find_program(name: str, *, after: tuple[str, ...] = ()) -> str:
    """Return a program's path; skip the test where it is not installed and does not have to be."""
    path = os.pathsep.join([*after, os.environ.get("PATH", ""), *_PLACES])
    if found := shutil.which(name, path=path):
        return found
    reason = f"{name} is not installed: install the Debian package {_PACKAGES.get(name, name)}, or what your system has"
    if os.environ.get("PGFLOW_TEST_BROKERS") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def answers(port: int, greeting: bytes, expected: bytes) -> bool:
    """Tell whether a server is ready: it takes a connection, and answers its protocol's greeting."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
            link.sendall(greeting)
            return link.recv(100).startswith(expected)
    except OSError:
        return False


@contextmanager
def running(
    command: list[str], environment: Mapping[str, str], directory: Path, is_ready: Callable[[], bool]
) -> Iterator[None]:
    log = directory / "output"
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=directory, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        deadline = monotonic() + 300
        while not is_ready():
            assert process.poll() is None, f"{command[0]} has ended: {log.read_text(errors='replace')[-2000:]}"
            assert monotonic() < deadline, f"{command[0]} does not answer: {log.read_text(errors='replace')[-2000:]}"
            sleep(0.1)
        yield
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def redis_server(port: int, *options: str) -> Iterator[None]:
    with tempfile.TemporaryDirectory(prefix="redis-") as directory:
        command = [find_program("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--save", "", *options]
        with running(command, {}, Path(directory), lambda: answers(port, b"PING\r\n", b"")):
            yield


@contextmanager
def _start_redis() -> Iterator[str]:
    port = free_port()
    with redis_server(port):
        yield f"redis://127.0.0.1:{port}/0"


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A Redis server, as the beginning of a queue's URL; all processes of this session share it."""
    with share("redis", _start_redis) as url:
        yield url


@contextmanager
def _start_rabbitmq() -> Iterator[str]:
    # The one that is no wrapper: that would insist on a user, and on directories of the system's.
    program = find_program("rabbitmq-server", after=("/usr/lib/rabbitmq/bin",))
    epmd = find_program("epmd", after=("/usr/lib/erlang/bin",))
    port, distribution, epmd_port = free_port(), free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="rabbitmq-") as directory:
        environment = {
            "HOME": directory,
            "RABBITMQ_NODENAME": f"pgflow-{port}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(port),
            "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_MNESIA_BASE": f"{directory}/data",
            "RABBITMQ_LOG_BASE": f"{directory}/log",
            "RABBITMQ_PID_FILE": f"{directory}/pid",
            "RABBITMQ_ENABLED_PLUGINS_FILE": f"{directory}/plugins",
            "RABBITMQ_CONF_ENV_FILE": f"{directory}/environment",
            "RABBITMQ_CONFIG_FILE": f"{directory}/configuration",
            "ERL_EPMD_PORT": str(epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "ERL_EPMD_RELAXED_COMMAND_CHECK": "true",
        }
        # A daemon otherwise, which would stay.
        registry = subprocess.Popen(
            [epmd, "-relaxed_command_check"], env={**os.environ, **environment}, stdout=subprocess.DEVNULL
        )
        try:
            greeting = b"AMQP\x00\x00\x09\x01"
            with running([program], environment, Path(directory), lambda: answers(port, greeting, b"\x01")):
                yield f"amqp://127.0.0.1:{port}/"
        finally:
            registry.terminate()
            registry.wait()


@pytest.fixture(scope="session")
def rabbitmq_url() -> Iterator[str]:
    """A RabbitMQ server, as the beginning of a queue's URL; its user is guest:guest; all processes share it."""
    with share("rabbitmq", _start_rabbitmq) as url:
        yield url
