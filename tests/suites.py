"""Which tests `python -m pytest` runs, and how many at a time.

Without arguments it runs the quick suite, several tests at a time. `--all` runs every test. Paths that are named
on the command line run as pytest runs them: those tests, one after the other.

The quick suite leaves out two kinds of tests that stand among its own. A test that starts commands, workers or clusters
has the marker `processes`: by hand, or because it uses a fixture that starts some. The marker `thorough` has what takes
a processor for more than a second, or waits as long. Further tests that need a server get it by themselves: of each
test the quick suite runs the first case, and of each file the first eight tests that need Prefect.
"""

import os
from collections import Counter

import pytest

WHOLE = "tests"
"""Every folder of tests: what `--all` collects."""

PROCESSES = "processes"
"""The marker of tests that start commands, workers or clusters, or that disturb tests beside them."""

THOROUGH = "thorough"
"""The marker of tests that take long, and of further tests that need a server."""

_STARTERS = {"forker", "cluster"}
"""Fixtures that start them."""

_PREFECT = "prefect_api"
"""The fixture of Prefect's server. A test with it takes a processor for 0.4 s, and often waits for a second."""

_SERVERS = {"server_dsn", _PREFECT}
"""Fixtures of servers. A test with PostgreSQL alone takes a processor for 0.1 s."""

_TESTS_WITH_PREFECT = 8
"""Tests of one file with Prefect that the quick suite runs."""

_COUNTS = pytest.StashKey[Counter[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all",
        action="store_true",
        dest="run_all",
        help="run every test: the quick suite, the commands (tests/acceptance) and the faults (tests/faults)",
    )
    parser.addoption(
        "--airflow", action="store_true", help="also compare with a real Airflow, which is installed for it"
    )
    parser.addoption("--big", action="store_true", help="also run the tests on millions of rows that are named")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Choose the tests and the number of processes before pytest-xdist reads its options."""
    if _are_paths_named(config):
        if config.getoption("run_all"):
            raise pytest.UsageError("--all runs every test: name no paths with it")
        return
    # pytest-xdist's own processes choose again: they are told the arguments only, and they are who collects.
    if config.getoption("run_all"):
        config.args[:] = [WHOLE]
    elif not config.option.markexpr:
        config.option.markexpr = f"not {PROCESSES} and not {THOROUGH}"
    if not hasattr(config, "workerinput"):
        _choose_processes(config)


def _choose_processes(config: pytest.Config) -> None:
    if config.getoption("numprocesses") is None and not config.getoption("usepdb"):
        config.option.numprocesses = count_processes()
    if config.option.numprocesses and config.option.dist == "no":
        config.option.dist = "worksteal"  # tests differ a hundredfold in their length


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what starts processes by way of a fixture, and further tests that need a server."""
    if not isinstance(item, pytest.Function):
        return
    if _STARTERS.intersection(item.fixturenames):
        item.add_marker(PROCESSES)
    if item.get_closest_marker(PROCESSES) or item.get_closest_marker(THOROUGH):
        return
    if _SERVERS.intersection(item.fixturenames) and _is_further(item):
        item.add_marker(THOROUGH)


def _is_further(item: pytest.Function) -> bool:
    """Count a test that needs a server, and return whether the quick suite has enough of its kind."""
    counts = item.session.stash.setdefault(_COUNTS, Counter())
    counts[name := item.nodeid.partition("[")[0]] += 1
    if counts[name] > 1:
        return True
    if _PREFECT not in item.fixturenames:
        return False
    counts[file := item.nodeid.partition("::")[0]] += 1
    return counts[file] > _TESTS_WITH_PREFECT


def pytest_report_header(config: pytest.Config) -> list[str]:
    if _are_paths_named(config):
        return []
    if config.getoption("run_all"):
        return ["suite: all tests; see CONTRIBUTING.md for what some of them need"]
    return ["suite: quick; `python -m pytest --all` also runs the commands, the faults and what else takes long"]


def count_processes() -> int:
    """Return how many tests run at a time: three for each processor, as most tests wait for servers."""
    return min(8, 3 * (os.cpu_count() or 1))


def _are_paths_named(config: pytest.Config) -> bool:
    return config.args_source is not pytest.Config.ArgsSource.TESTPATHS
