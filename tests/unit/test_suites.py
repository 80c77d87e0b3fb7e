"""Which tests each of the README's commands runs, in one process and in several."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUITES = Path(__file__).parents[1] / "suites.py"
TESTS = {
    "unit/test_quick.py": "def test_quick(): pass",
    "unit/test_starter.py": "import pytest\n\n\n@pytest.mark.processes\ndef test_marked(): pass",
    "unit/test_forking.py": "def test_forking(forker): pass",
    "unit/test_thorough.py": "import pytest\n\n\n@pytest.mark.thorough\ndef test_thorough(): pass",
    "unit/test_cases.py": (
        "import pytest\n\n\n@pytest.mark.parametrize('n', [1, 2, 3, 4])\ndef test_cases(server_dsn, n): pass\n\n\n"
        "@pytest.mark.parametrize('n', [1, 2, 3])\ndef test_light(n): pass"
    ),
    "unit/test_flows.py": "\n".join(f"def test_flow_{n}(server_dsn, prefect_api): pass" for n in range(10)),
    "acceptance/test_command.py": "def test_command(): pass",
}
CONFTEST = """
import pytest
from suites import *

@pytest.fixture
def forker(): pass

@pytest.fixture
def server_dsn(): pass

@pytest.fixture
def prefect_api(): pass
"""
CONFIGURATION = """
[pytest]
testpaths = tests/unit
addopts = --strict-markers
markers =
    processes: starts some
    thorough: takes long
"""


def run(project: Path, *options: str) -> set[str]:
    """Run pytest, and return the names of the tests that have passed."""
    command = [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider", "-p", "xdist", *options]
    environment = {**os.environ, "PYTHONPATH": str(SUITES.parent), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    return {line.rpartition("::")[2] for line in done.stdout.splitlines() if line.startswith("PASSED")}


@pytest.mark.processes
@pytest.mark.parametrize("processes", ["0", "2"])
def test_quick_leaves_out_what_takes_long_and_all_leaves_out_nothing(tmp_path: Path, processes: str) -> None:
    (tmp_path / "pytest.ini").write_text(CONFIGURATION)
    for path, text in {"conftest.py": CONFTEST, **TESTS}.items():
        file = tmp_path / "tests" / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    quick = {"test_quick", "test_light[1]", "test_light[2]", "test_light[3]", "test_cases[1]"}
    quick |= {f"test_flow_{n}" for n in range(8)}
    thorough = {"test_thorough", "test_cases[2]", "test_cases[3]", "test_cases[4]", "test_flow_8", "test_flow_9"}
    everything = quick | thorough | {"test_marked", "test_forking", "test_command"}
    assert run(tmp_path, "-n", processes) == quick
    assert run(tmp_path, "-n", processes, "--all") == everything
    assert run(tmp_path, "-n", processes, "-m", "processes") == {"test_marked", "test_forking"}
    assert run(tmp_path, "-n", processes, "-m", "thorough and not processes") == thorough
    assert run(tmp_path, "-n", processes, "tests/acceptance") == {"test_command"}
