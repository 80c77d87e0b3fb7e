"""Prefect's own map without all that can be left out: results, caches, the line of the log that each task writes."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from benchmarks.sides import Prepare, task_map


@contextmanager
def open_side(dsn: str) -> Iterator[Prepare]:
    """Prefect keeps everything itself."""
    logging.getLogger("prefect.task_runs").setLevel(logging.WARNING)
    yield partial(task_map.prepare, bare=True)
