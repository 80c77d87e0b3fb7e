"""`airflow`."""

from __future__ import annotations

import sys
from importlib.resources import files
from typing import Literal


def airflow(what: Literal["dump"], /) -> None:
    """Print the Python script that writes serialized DAGs as JSON. It runs where Airflow does.

    The script needs the standard library and that Airflow. It reads Airflow's database and executes no DAG file.
    `python dump.py etl > etl.json` writes a DAG, and `python dump.py --help` shows the options.

    Example: `pgflow-prefect airflow dump > dump.py`

    Parameters
    ----------
    what
        dump.
    """
    assert what == "dump"
    sys.stdout.write(files("pgflow_prefect.airflow").joinpath("dump_script.py").read_text(encoding="utf-8"))
