"""pgflow-prefect with its defaults, and handlers that are sync functions: they run in threads."""

from functools import partial

from benchmarks.sides import ours

open_side = partial(ours.open_side, sync=True)
