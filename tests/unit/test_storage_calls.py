"""A storage that hangs: a cancelled step does not wait for it, and every wait for it has an end."""

import threading
from collections.abc import Iterator
from typing import Any

import anyio
import pytest

from pgflow_prefect.errors import StorageError
from pgflow_prefect.execution.process import storages
from pgflow_prefect.execution.process.storages import BlockStorage

pytestmark = pytest.mark.anyio

TIMEOUT = 60.0  # seconds; a wait that ends so late has failed


class HangingBlock:
    """A block of which each call hangs until the test ends."""

    def __init__(self) -> None:
        self.begun, self.gate = threading.Event(), threading.Event()
        self.passed = 0

    def _hang(self) -> None:
        self.begun.set()
        self.gate.wait(TIMEOUT)
        self.passed += 1

    def read_path(self, path: str) -> bytes:
        self._hang()
        return path.encode()

    def write_path(self, path: str, content: bytes) -> None:
        self._hang()

    @staticmethod
    def get_block_type_slug() -> str:
        return "hanging"


class AsyncHangingBlock(HangingBlock):
    """The same with async methods."""

    async def read_path(self, path: str) -> bytes:  # type: ignore[override]
        self.begun.set()
        await anyio.sleep(TIMEOUT)
        self.passed += 1
        return path.encode()

    async def write_path(self, path: str, content: bytes) -> None:  # type: ignore[override]
        await self.read_path(path)


@pytest.fixture(params=[HangingBlock, AsyncHangingBlock])
def block(request: pytest.FixtureRequest) -> Iterator[Any]:
    made = request.param()
    yield made
    made.gate.set()


async def ask(storage: BlockStorage, method: str) -> None:
    if method == "read":
        await storage.read("key")
    else:
        await storage.write("key", b"1")


@pytest.fixture(autouse=True)
def _named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storages, "name_block", lambda block: block.get_block_type_slug())


@pytest.mark.parametrize("method", ["read", "write"])
async def test_a_cancelled_step_does_not_wait_for_a_storage_that_hangs(block: Any, method: str) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(ask, BlockStorage(block), method)
        while not block.begun.is_set():
            await anyio.sleep(0.01)
        group.cancel_scope.cancel()
    assert not block.passed, "the call still hangs"


@pytest.mark.parametrize("method", ["read", "write"])
async def test_the_wait_for_a_storage_that_hangs_has_an_end(
    block: Any, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storages, "ANSWER_TIMEOUT", 0.05)
    what = "read" if method == "read" else "written"
    with pytest.raises(StorageError, match=rf"the result can't be {what} in hanging: no answer in 0\.05 s"):
        await ask(BlockStorage(block), method)
    assert not block.passed, "the call still hangs"


async def test_many_hanging_calls_leave_threads_to_other_storages() -> None:
    block = HangingBlock()
    quick = HangingBlock()
    quick.gate.set()
    try:
        async with anyio.create_task_group() as group:
            for _ in range(50):
                group.start_soon(ask, BlockStorage(block), "read")
            await anyio.wait_all_tasks_blocked()
            with anyio.move_on_after(TIMEOUT):
                await BlockStorage(quick).write("key", b"1")
            group.cancel_scope.cancel()
        assert (quick.passed, block.passed) == (1, 0)
    finally:
        block.gate.set()
