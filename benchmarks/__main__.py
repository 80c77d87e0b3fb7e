"""`python -m benchmarks [SUBJECT …]`: exits with 1 when a target was missed."""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator

from rich.console import Console

from benchmarks.bridge import measure_bridge
from benchmarks.deploy import measure_deploy
from benchmarks.engine import measure_engine
from benchmarks.measure import Report
from benchmarks.overload import measure_overload
from benchmarks.released import measure_released
from benchmarks.results import describe_machine, write_results
from benchmarks.rules import measure_rules
from benchmarks.scale import measure_scale
from benchmarks.server import statistics_server
from benchmarks.small_runs import measure_small_runs
from benchmarks.startup import measure_startup
from benchmarks.translation import measure_translation
from benchmarks.visibility import measure_visibility
from benchmarks.worker import measure_worker
from benchmarks.workflows import ONLY, measure_workflows

# Each gets the connection string of a server that it may fill as it likes.
SUBJECTS: dict[str, Callable[[str], Iterator[Report]]] = {
    "engine": measure_engine,
    "rules": measure_rules,
    "released": measure_released,
    "translation": measure_translation,
    "worker": measure_worker,
    "small-runs": measure_small_runs,
    "overload": measure_overload,
    "bridge": measure_bridge,
    "deploy": measure_deploy,
    "startup": measure_startup,
    "workflows": measure_workflows,
    "visibility": measure_visibility,
    "scale": measure_scale,
}


def main() -> int:
    """Measure the subjects asked for, all of them if none is, and write them down; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"one of: {', '.join(SUBJECTS)} (default: all)")
    parser.add_argument("--write", action="store_true", help="write RESULTS.md where subjects are named, too")
    arguments = parser.parse_args()
    subjects = arguments.subjects or [*SUBJECTS]
    if unknown := set(subjects) - set(SUBJECTS):
        parser.error(f"unknown subject: {', '.join(sorted(unknown))}")

    is_written = arguments.write or not arguments.subjects
    if is_written and ONLY.pattern:
        parser.error("what BENCHMARK_ONLY measures is not written to RESULTS.md: name subjects, without --write")

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers end as well
    console = Console(width=None if sys.stdout.isatty() else 120)
    measured: dict[str, list[Report]] = {subject: [] for subject in subjects}
    with statistics_server() as server:
        description = describe_machine(server)
        for subject, reports in measured.items():
            for report in SUBJECTS[subject](server):
                console.print(report.table(), "")
                reports.append(report)
            if is_written:
                write_results({subject: reports}, description)
    return 1 if any(report.is_missed for reports in measured.values() for report in reports) else 0


if __name__ == "__main__":
    sys.exit(main())
