"""Which tests `python -m pytest` runs, and how many at a time.

Without arguments it runs the quick suite, several tests at a time. `--all` runs every test. Paths that are named
on the command line run as pytest runs them: those tests, one after the other.

A test that starts commands, workers or clusters takes seconds. Where it stands among the quick ones, it has the marker
`processes`: by hand, or because it uses a fixture that starts some. The quick suite leaves it out.
"""

import os

import pytest

WHOLE = "tests"
"""Every folder of tests: what `--all` collects."""

PROCESSES = "processes"
"""The marker of tests that start commands, workers or clusters."""

_STARTERS = {"forker", "cluster"}
"""Fixtures that start them."""


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
        config.option.markexpr = f"not {PROCESSES}"
    if not hasattr(config, "workerinput"):
        _choose_processes(config)


def _choose_processes(config: pytest.Config) -> None:
    if config.getoption("numprocesses") is None and not config.getoption("usepdb"):
        config.option.numprocesses = count_processes()
    if config.option.numprocesses and config.option.dist == "no":
        config.option.dist = "worksteal"  # tests differ a hundredfold in their length


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark what starts processes by way of a fixture."""
    if isinstance(item, pytest.Function) and _STARTERS.intersection(item.fixturenames):
        item.add_marker(PROCESSES)


def pytest_report_header(config: pytest.Config) -> list[str]:
    if _are_paths_named(config):
        return []
    if config.getoption("run_all"):
        return ["suite: all tests; see CONTRIBUTING.md for what some of them need"]
    return ["suite: quick; `python -m pytest --all` runs the commands, the faults and what else starts processes, too"]


def count_processes() -> int:
    """Return how many tests run at a time: two more than there are processors, as most tests wait for servers."""
    return min(8, (os.cpu_count() or 1) + 2)


def _are_paths_named(config: pytest.Config) -> bool:
    return config.args_source is not pytest.Config.ArgsSource.TESTPATHS
