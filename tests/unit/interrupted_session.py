"""Tests that wait until a signal ends their session: `test_termination.py` runs them, and no suite does."""

import os
import threading
from pathlib import Path

import pytest

from tests.conftest import PREFECT_HOME, Connection


@pytest.mark.parametrize("number", range(4))
def test_that_waits_for_ever(db: Connection, number: int) -> None:
    """Tell what this process keeps: the directories and the process of its server."""
    [[data]] = db.execute("SHOW data_directory").fetchall()
    server = Path(str(data), "postmaster.pid").read_text(encoding="utf-8").split()[0]
    told = Path(os.environ["PGFLOW_TEST_TOLD"])
    (told / f".{number}").write_text(f"{server}\n{data}\n{PREFECT_HOME}\n", encoding="utf-8")
    (told / f".{number}").rename(told / str(number))
    threading.Event().wait()


def test_that_waits_with_a_prefect_server(prefect_api: str) -> None:
    """Tell the address of the server."""
    told = Path(os.environ["PGFLOW_TEST_TOLD"])
    (told / ".prefect").write_text(prefect_api, encoding="utf-8")
    (told / ".prefect").rename(told / "prefect")
    threading.Event().wait()
