"""What starting a command takes: its help, a list, and a run of one step beside a Prefect flow of one task."""

import os
import resource
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial

from benchmarks.commands import Site, open_site
from benchmarks.engine import define
from benchmarks.measure import Report, Row, Sample, Target, interleave, ratio, seconds

REPETITIONS = int(os.environ.get("BENCHMARK_REPETITIONS", "9"))

WORKFLOW = "single"

HANDLERS = f"""
from pgflow_prefect import Workflow

workflow = Workflow({WORKFLOW!r})


@workflow.step
async def only() -> int:
    return 1
"""

BARE = """
import asyncio

from prefect import flow, task


@task
async def only() -> int:
    return 1


@flow
async def bare() -> int:
    return await only()


if __name__ == "__main__":
    asyncio.run(bare())
"""


def measure_startup(server: str) -> Iterator[Report]:
    """Measure whole processes in turn, each from its start to its end, against a Prefect server that has served."""
    with ExitStack() as stack:
        site = stack.enter_context(open_site(server))
        define(site.db, WORKFLOW, {"only": []})
        (site.directory / "flows" / f"{WORKFLOW}.py").write_text(HANDLERS)
        (site.directory / "bare.py").write_text(BARE)
        calls = Calls(site)
        ours = [sys.executable, "-m", "pgflow_prefect"]
        commands = {
            "python": [sys.executable, "-c", "pass"],
            "help": [*ours, "--help"],
            "run help": [*ours, "run", "--help"],
            "list": [*ours, "list"],
            "run": [*ours, "run", WORKFLOW],
            "bare": [sys.executable, "bare.py"],
        }
        sides = {name: partial(calls.measure, name, command) for name, command in commands.items()}
        for side in sides.values():  # Python's cache of compiled modules is filled, and both flows are known
            side()
        calls.cpu.clear()
        measured = interleave(sides, "s", REPETITIONS)
    yield Report(
        "Start: whole processes, on a Prefect server that is warm",
        [
            Row("pgflow-prefect --help", measured["help"], Target(at_most=0.3)),
            Row("pgflow-prefect run --help", measured["run help"], Target(at_most=0.5)),
            Row("pgflow-prefect list", measured["list"]),
            Row("of each: starting Python", measured["python"]),
            Row("pgflow-prefect run, a workflow of one step", measured["run"]),
            Row("a script with a Prefect flow of one task", measured["bare"]),
            Row("ratio", ratio(measured["run"], measured["bare"]), Target(at_most=1.3)),
            Row("CPU time of --help", calls.find("help")),
            Row("CPU time of run --help", calls.find("run help")),
            Row("CPU time of list", calls.find("list")),
            Row("CPU time of run", calls.find("run")),
            Row("CPU time of the script", calls.find("bare")),
            Row("ratio of these two", ratio(calls.find("run"), calls.find("bare"))),
        ],
    )


class Calls:
    """Whole processes in a site: how long each took, and its CPU time, which says the same on a busy machine.

    Attributes:
        cpu: user and system time of each call, in seconds, by name.
    """

    def __init__(self, site: Site) -> None:
        self._directory = site.directory
        # Python keeps what it has compiled, as it does where a user installs the package.
        compiled = {"PYTHONPYCACHEPREFIX": str(site.directory / "compiled"), "PYTHONDONTWRITEBYTECODE": ""}
        self._environment = {**site.environment, **compiled}
        self.cpu: defaultdict[str, list[float]] = defaultdict(list)

    def measure(self, name: str, command: list[str]) -> float:
        """Return how long a command takes, from its start to its end, in seconds."""
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = seconds(lambda: self._call(command))
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        self.cpu[name].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        return took

    def find(self, name: str) -> Sample:
        """Return the CPU times of the calls of a name."""
        return Sample(tuple(self.cpu[name]), "s")

    def _call(self, command: list[str]) -> None:
        with (self._directory / "commands.log").open("ab") as output:
            subprocess.run(
                command,
                cwd=self._directory,
                env=self._environment,
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
