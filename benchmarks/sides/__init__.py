"""Who executes the graphs: a module a side, each in a process of its own, with the same interface.

A module has `open_side(dsn)`, a context manager that opens what stays open between measurements, and yields a function
that prepares runs of one graph: what a user's file would say when it is imported. Only `Job.run` is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.engine import Graph
from benchmarks.shapes import Trace


@dataclass(frozen=True)
class Job:
    """One graph, ready to be run again and again.

    Attributes:
        run: executes it once, to its end.
        check: asserts that the last run left behind what it should have.
    """

    run: Callable[[], object]
    check: Callable[[], None] = lambda: None


Prepare = Callable[[str, Graph, float, Trace], Job]
"""Called with a name, the graph, how long its handlers sleep in seconds, and where they note what they do."""
