"""`python -m benchmarks [SUBJECT …]`: exits with 1 when a target was missed."""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from benchmarks.bridge import measure_bridge
from benchmarks.deploy import measure_deploy
from benchmarks.engine import measure_engine
from benchmarks.measure import Report
from benchmarks.translation import measure_translation
from benchmarks.worker import measure_worker
from pgflow_prefect.database.embedded import start_embedded, stop_embedded

# Each gets the connection string of a server that it may fill as it likes.
SUBJECTS: dict[str, Callable[[str], Iterator[Report]]] = {
    "engine": measure_engine,
    "translation": measure_translation,
    "worker": measure_worker,
    "bridge": measure_bridge,
    "deploy": measure_deploy,
}


def main() -> int:
    """Measure the subjects asked for, all of them if none is; return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("subjects", nargs="*", metavar="SUBJECT", help=f"one of: {', '.join(SUBJECTS)} (default: all)")
    subjects = parser.parse_args().subjects or [*SUBJECTS]
    if unknown := set(subjects) - set(SUBJECTS):
        parser.error(f"unknown subject: {', '.join(sorted(unknown))}")

    console, missed = Console(), False
    with tempfile.TemporaryDirectory(prefix="pgflow-") as directory:
        server = start_embedded(Path(directory) / "data")
        try:
            for subject in subjects:
                for report in SUBJECTS[subject](server.get_uri()):
                    console.print(report.table(), "")
                    missed |= report.is_missed
        finally:
            stop_embedded(server)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
