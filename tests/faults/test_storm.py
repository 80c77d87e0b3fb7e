"""The storm as a test: 60 runs, and the proof that it would find something; `python -m tests.faults` is the long one.

PGFLOW_FAULT_SEED repeats one. The limits are there for what hangs: alone on two cores it takes a fifth of them.
In a process of its own: it breaks the servers that it uses, and an embedded PostgreSQL is for life.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.faults.storm import make_environment

_ROOT = Path(__file__).parents[2]
_STOP_TIMEOUT = 60.0


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


@pytest.mark.timeout(600)
def test_every_run_ends_right_whatever_fails(tmp_path: Path) -> None:
    code, log = run_storm(tmp_path, "--runs", "60", seconds=500)

    assert code == 0, log
    for fault in ("killed worker", "PostgreSQL is down", "Prefect is back", "reconcile finds nothing"):
        assert fault in log, f"the storm was none: nothing of {fault!r}"


@pytest.mark.timeout(300)
def test_a_broken_fence_is_found(tmp_path: Path) -> None:
    code, log = run_storm(tmp_path, "--seed", "1", "--runs", "12", "--workers", "2", "--break-fence", seconds=240)

    assert code == 1, log
    assert "was completed at the attempts [" in log
    assert "has rows of the attempts [" in log
