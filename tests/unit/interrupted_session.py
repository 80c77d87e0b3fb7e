"""Tests that wait until a signal ends their session: `test_termination.py` runs them, and no suite does."""

import os
import threading
from pathlib import Path

import anyio
import pytest

from tests.conftest import PREFECT_HOME, Connection


def tell(db: Connection, number: int) -> None:
    """Tell what this process keeps: the process and the directories of its server."""
    [[data]] = db.execute("SHOW data_directory").fetchall()
    server = Path(str(data), "postmaster.pid").read_text(encoding="utf-8").split()[0]
    told = Path(os.environ["PGFLOW_TEST_TOLD"])
    (told / f".{number}").write_text(f"{server}\n{data}\n{PREFECT_HOME}\n", encoding="utf-8")
    (told / f".{number}").rename(told / str(number))


@pytest.mark.parametrize("number", range(2))
def test_that_blocks(db: Connection, number: int) -> None:
    tell(db, number)
    threading.Event().wait()


@pytest.mark.anyio
@pytest.mark.parametrize("number", range(2))
async def test_on_an_event_loop(db: Connection, number: int) -> None:
    tell(db, number)
    await anyio.sleep_forever()


def test_with_a_prefect_server(prefect_api: str) -> None:
    """Tell the address of the server."""
    told = Path(os.environ["PGFLOW_TEST_TOLD"])
    (told / ".prefect").write_text(prefect_api, encoding="utf-8")
    (told / ".prefect").rename(told / "prefect")
    threading.Event().wait()
