"""The storms as tests, and the proof that they would find something; `python -m tests.faults` is the long one.

PGFLOW_FAULT_SEED repeats one. The limits are there for what hangs: alone on two cores they take a tenth of them.
In a process of its own: it breaks the servers that it uses, and an embedded PostgreSQL is for life.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.storm import make_environment
from tests.faults.weathers import WEATHERS

_ROOT = Path(__file__).parents[2]
_STOP_TIMEOUT = 120.0
_LIMIT = 1800.0  # seconds
_NEW = ("connection-limits", "statement-timeout", "silence", "second-installation", "read-only")
_NAMED = tuple(argument for kind in _NEW for argument in ("--storm", kind))


def run_storm(directory: Path, *arguments: str, seconds: float) -> tuple[int, str]:
    """Return the exit code and what was written; pytest shows that, and with it the seed, where the test fails."""
    seed = os.environ.get("PGFLOW_FAULT_SEED")
    log = directory / "storm.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults", *arguments, *(("--seed", seed) if seed else ())],
            cwd=_ROOT,
            env={**make_environment(directory), "TMPDIR": "/tmp"},  # noqa: S108  the name of a socket has to be short
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        code = process.wait(seconds)
    finally:
        process.terminate()  # in time, it has stopped all that it has started
        try:
            process.wait(_STOP_TIMEOUT)
        finally:
            process.kill()
            print(log.read_text(encoding="utf-8"))
    return code, log.read_text(encoding="utf-8")


@pytest.mark.timeout(_LIMIT)
def test_every_run_ends_right_whatever_fails(tmp_path: Path) -> None:
    code, log = run_storm(tmp_path, "--storm", "crashes", "--runs", "60", seconds=_LIMIT)

    assert code == 0, log
    for fault in ("killed worker", "PostgreSQL is down", "Prefect is back", "reconcile finds nothing"):
        assert fault in log, f"the storm was none: nothing of {fault!r}"


@pytest.mark.timeout(_LIMIT)
def test_every_run_with_rules_and_maps_that_prefect_hears_of_later_ends_right_whatever_fails(tmp_path: Path) -> None:
    code, log = run_storm(tmp_path, "--storm", "crashes", "--later", "--rules", "--runs", "60", seconds=_LIMIT)

    assert code == 0, log
    for fault in ("killed worker", "PostgreSQL is down", "Prefect is back", "reconcile finds nothing"):
        assert fault in log, f"the storm was none: nothing of {fault!r}"


@pytest.mark.timeout(_LIMIT)
def test_every_run_ends_right_on_databases_in_trouble(tmp_path: Path) -> None:
    code, log = run_storm(tmp_path, *_NAMED, "--runs", "100", seconds=_LIMIT)

    assert code == 0, log
    for fault in (
        *("the role gets no further connection", "the database gets no further connection", "the server is full"),
        *("locks on runs", "locks on leases", "and new ones work", "and new ones, too"),
        *("a copy acts as the original", "the copy is a second installation"),
        *("the role may only read", "PostgreSQL is a primary again"),
    ):
        assert fault in log, f"the storm was none: nothing of {fault!r}"
    assert log.count("reconcile finds nothing") == len(_NEW)


@pytest.mark.timeout(_LIMIT)
def test_a_broken_fence_is_found(tmp_path: Path) -> None:
    arguments = ("--storm", "crashes", "--seed", "1", "--runs", "12", "--workers", "2", "--break-fence")
    code, log = run_storm(tmp_path, *arguments, seconds=_LIMIT)

    assert code == 1, log
    check_found(log, "crashes")


@pytest.mark.timeout(_LIMIT)
def test_a_broken_fence_is_found_on_databases_in_trouble(tmp_path: Path) -> None:
    code, log = run_storm(tmp_path, *_NAMED, "--runs", "20", "--break-fence", seconds=_LIMIT)

    assert code == 1, log
    for kind in _NEW:
        check_found(log, kind)


def check_found(log: str, kind: str) -> None:
    for sign in WEATHERS[kind].twin.signs:
        assert f"{sign!r} was found" in log, f"{kind}: the broken fence was not found"
