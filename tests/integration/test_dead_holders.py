"""Owners that are processes of this machine: the kernel tells at once that one is dead, and no lease has to run out."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from pgflow_prefect.database.process_identity import ProcessIdentity, find_identity, is_dead
from pgflow_prefect.database.store import Store
from pgflow_prefect.models import Held
from tests.conftest import Connection
from tests.engine import define, run_workflow

pytestmark = pytest.mark.anyio  # of those that are coroutines

HERE = find_identity()

needs_linux = pytest.mark.skipif(HERE is None, reason="this system tells no identity of a process: run it on Linux")


@pytest.fixture
def run_id(db: Connection) -> UUID:
    define(db, "one", {"only": []})
    return run_workflow(db, "one").id


@pytest.fixture
def other() -> Iterator["subprocess.Popen[bytes]"]:
    """A process that lives until the test kills it."""
    process = subprocess.Popen(["sleep", "600"])
    yield process
    process.kill()
    process.wait()


def identify(process: "subprocess.Popen[bytes]") -> ProcessIdentity:
    assert HERE is not None
    stat = Path(f"/proc/{process.pid}/stat").read_bytes()
    started = int(stat.rpartition(b") ")[2].split()[19])
    return HERE.model_copy(update={"pid": process.pid, "started": started})


def held_by(store: Store, holder: ProcessIdentity | None) -> Store:
    """Return the same database as another process sees it."""
    noted = holder.model_dump_json() if holder is not None else None
    return Store(store._pool, store.lease_terms._replace(holder=noted, held_by="the other"))


@needs_linux
async def test_a_dead_process_of_this_machine_holds_nothing(
    store: Store, run_id: UUID, other: "subprocess.Popen[bytes]"
) -> None:
    await held_by(store, identify(other)).take_run(run_id, uuid4())
    assert await store.expire_dead_holders() == []
    assert (await store.read_run(run_id)).held is Held.LEASED
    assert not await store.has_dead_holder(run_id)
    other.kill()
    other.wait()
    assert await store.has_dead_holder(run_id)
    assert (await store.read_run(run_id)).held is Held.LEASED, "who looks changes nothing"
    assert await store.expire_dead_holders() == [run_id]
    assert (await store.read_run(run_id)).held is Held.EXPIRED
    assert await store.take_run(run_id, uuid4()) is not None


@needs_linux
def test_a_killed_process_that_its_parent_has_not_reaped_is_dead(other: "subprocess.Popen[bytes]") -> None:
    assert HERE is not None
    holder = identify(other)
    assert not is_dead(holder.model_dump(), HERE)
    other.kill()
    os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
    assert is_dead(holder.model_dump(), HERE)


@needs_linux
@pytest.mark.parametrize(
    "different",
    [{"host": "elsewhere"}, {"boot_id": "another"}, {"pid_namespace": "pid:[1]"}],
    ids=["host", "boot", "pid namespace"],
)
async def test_a_process_of_another_machine_keeps_its_lease(
    store: Store, run_id: UUID, different: dict[str, str]
) -> None:
    assert HERE is not None
    gone = HERE.model_copy(update={"pid": 2**31 - 1, **different})
    await held_by(store, gone).take_run(run_id, uuid4())
    assert await store.expire_dead_holders() == []
    assert (await store.read_run(run_id)).held is Held.LEASED


@needs_linux
async def test_a_pid_that_is_used_again_is_another_process(store: Store, run_id: UUID) -> None:
    assert HERE is not None
    former = HERE.model_copy(update={"started": HERE.started - 1})
    await held_by(store, former).take_run(run_id, uuid4())
    assert await store.expire_dead_holders() == [run_id]


@needs_linux
async def test_an_owner_that_tells_no_identity_keeps_its_lease(store: Store, run_id: UUID) -> None:
    assert HERE is not None
    dead = HERE.model_copy(update={"pid": 2**31 - 1})
    epoch = await held_by(store, dead).take_run(run_id, uuid4())
    assert epoch is not None
    await store.release_run(run_id, epoch)
    await held_by(store, None).take_run(run_id, uuid4())
    assert await store.expire_dead_holders() == [], "what was noted is of the owner before"


@needs_linux
async def test_a_run_that_was_taken_meanwhile_is_left_to_its_new_owner(
    store: Store, run_id: UUID, db: Connection
) -> None:
    assert HERE is not None
    dead = HERE.model_copy(update={"pid": 2**31 - 1})
    epoch = await held_by(store, dead).take_run(run_id, uuid4())
    await held_by(store, HERE).take_run(run_id, uuid4(), force=True)
    expired = "SELECT pgflow_prefect.expire_lease(%s, %s, %s::jsonb)"
    assert db.execute(expired, [run_id, epoch, dead.model_dump_json()]).fetchone() == (None,)
    assert await store.expire_dead_holders() == []


@needs_linux
@pytest.mark.parametrize("pid", [0, -1, 2**31, "1", None, 1.5])
def test_a_process_with_an_invalid_identity_does_not_count_as_dead(pid: object) -> None:
    assert HERE is not None
    assert not is_dead({**HERE.model_dump(), "pid": pid}, HERE)
