"""The storm on the released pgflow as a test, and the proof that it would find something.

`python -m tests.faults --released` is the long one. In a process of its own, as in `test_storm`.
"""

from pathlib import Path

import pytest

from tests.faults.test_storm import run_storm

_LIMIT = 1800.0  # seconds: for what hangs


@pytest.mark.timeout(_LIMIT)
def test_each_task_is_done_once_on_the_released_pgflow_whatever_fails(tmp_path: Path) -> None:
    arguments = ("--released", "--slow-moves", "--runs", "8", "--workers", "2", "--items", "5")
    code, log = run_storm(tmp_path, *arguments, seconds=_LIMIT)

    assert code == 0, log
    for fault in ("a worker has stopped in step", "and the first one goes on", "killed worker", "back after a crash"):
        assert fault in log, f"the storm was none: nothing of {fault!r}"


@pytest.mark.timeout(_LIMIT)
def test_a_broken_fence_is_found_on_the_released_pgflow(tmp_path: Path) -> None:
    """A stopped worker reports what another one has completed: without the fence, its rows are there twice."""
    code, log = run_storm(tmp_path, "--released", "--runs", "2", "--workers", "2", "--break-fence", seconds=_LIMIT)

    assert code == 1, log
    assert "has too many rows: 2" in log, "the broken fence was not found"
