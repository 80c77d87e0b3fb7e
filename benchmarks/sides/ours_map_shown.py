"""The same map, where each item has a task run in Prefect: by default only the items of small maps do."""

import os

from benchmarks.sides.ours_map import open_side

__all__ = ["open_side"]

os.environ["PGFLOW_ITEM_TASK_RUNS"] = "1000"
