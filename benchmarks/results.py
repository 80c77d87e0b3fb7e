"""`RESULTS.md`: what was measured last, subject by subject, each with the machine that it was measured on."""

import os
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import machine, python_version

import psutil
import psycopg

from benchmarks.measure import Report

RESULTS = Path(__file__).parent / "RESULTS.md"

PACKAGES = ("prefect", "psycopg", "dbos", "pgqueuer")

HEAD = """# Results

Written by `python -m benchmarks`; how it measures is in [README.md](README.md). A subject that is measured
again replaces its own section.
"""

_SECTION = re.compile(r"^## (?P<subject>\w+)\n(?P<text>.*?)(?=^## |\Z)", re.MULTILINE | re.DOTALL)


def describe_machine(server: str) -> str:
    """Return the date, the machine, how busy it was, and the versions of what is compared."""
    with psycopg.connect(server) as connection:
        [postgres] = connection.execute("SHOW server_version").fetchone() or ["?"]
    memory = psutil.virtual_memory().total / 2**30
    load, *_ = os.getloadavg()
    versions = [f"Python {python_version()}", f"PostgreSQL {postgres}", *map(_find_version, PACKAGES)]
    return (
        f"{datetime.now(UTC):%Y-%m-%d}: {_find_cpu()}, {psutil.cpu_count()} cores, {memory:.0f} GiB, "
        f"load {load:.1f} before it began; {', '.join(versions)}."
    )


def write_results(measured: Mapping[str, Sequence[Report]], description: str) -> None:
    """Write the sections of the subjects that were measured, and leave the others as they are."""
    text = RESULTS.read_text() if RESULTS.exists() else ""
    sections = {section["subject"]: section["text"].strip() for section in _SECTION.finditer(text)}
    for subject, reports in measured.items():
        sections[subject] = "\n\n".join([description, *(report.markdown() for report in reports)])
    RESULTS.write_text("\n".join([HEAD, *(f"## {subject}\n\n{body}\n" for subject, body in sections.items())]))


def _find_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), machine())


def _find_version(package: str) -> str:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"
