"""Deletes stored results of runs that were deleted."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from typing import TypeVar
from uuid import UUID

from pgflow_prefect.database.pruning import Swept
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import PgflowPrefectError, StorageError
from pgflow_prefect.execution.process.storages import ANSWER_TIMEOUT, BlockStorage, bound_wait
from pgflow_prefect.execution.process.stored_runs import RunFolders, open_run_folders
from pgflow_prefect.execution.result_options import read_result_options
from pgflow_prefect.handlers.raised import describe
from pgflow_prefect.handlers.threads import run_in_thread
from pgflow_prefect.settings import Settings
from pgflow_prefect.workflow import Workflow

T = TypeVar("T")

_BATCH = 500  # runs that one statement looks up
_DELETION_TIMEOUT = 3600.0  # seconds for the folder of one run; a map may have left many thousand objects in it


def find_storages(workflows: Iterable[Workflow], settings: Settings) -> list[BlockStorage]:
    """Return the storages that these workflows and the settings name, each once.

    Raises:
        UsageError: the setting is no storage.
    """
    given = [read_result_options(settings).storage]
    given += [handler.results.storage for workflow in workflows for handler in workflow.handlers.values()]
    found = [BlockStorage(each) for each in given if each is not None]
    return [*{each.name: each for each in found}.values()]


async def sweep(
    store: Store, storage: BlockStorage, swept: Swept, tell: Callable[[], None], *, dry_run: bool = False
) -> None:
    """Delete the results of this installation's runs that have no row any more, and nothing else.

    An attempt writes its result while its run has a row. So a folder that is seen before its run is looked up, and
    whose run has no row then, belongs to a run that was deleted.

    Args:
        store: the database.
        storage: one of those that code or settings name.
        swept: what is done is added here.
        tell: called after each run.
        dry_run: count the runs, and delete nothing.

    Raises:
        ForeignInstallationError: the database is a copy, and the results may be those of the original.
        UsageError: the kind of storage can't be listed.
        StorageError: the storage does not answer, or refuses.
    """
    installation = await store.read_installation()
    with bound_wait(_describe(storage), ANSWER_TIMEOUT):
        folders = await open_run_folders(storage, installation)
    async for batch in _list_runs(folders, storage):
        swept.checked += len(batch)
        for run_id in await store.find_gone_runs(batch):
            swept.runs += 1
            if not dry_run:
                swept.objects += await _in_thread(storage, partial(folders.delete, run_id), _DELETION_TIMEOUT)
            tell()
        tell()


async def _list_runs(folders: RunFolders, storage: BlockStorage) -> AsyncIterator[list[UUID]]:
    names = folders.list_names()
    while batch := await _in_thread(storage, partial(_take, names)):
        yield [*_parse(batch)]


def _take(names: Iterator[str]) -> list[str]:
    return [*islice(names, _BATCH)]


def _parse(names: Iterable[str]) -> Iterator[UUID]:
    """Yield the runs that folders are named after. What has another name is not ours."""
    for name in names:
        try:
            run_id = UUID(name)
        except ValueError:
            continue
        if str(run_id) == name:
            yield run_id


def _describe(storage: BlockStorage) -> str:
    return f"the results in {storage.name} can't be deleted"


async def _in_thread(storage: BlockStorage, function: Callable[[], T], seconds: float = ANSWER_TIMEOUT) -> T:
    with bound_wait(_describe(storage), seconds):
        try:
            return await run_in_thread(function)
        except PgflowPrefectError:
            raise
        except Exception as error:  # noqa: BLE001  whatever the library of the storage raises
            raise StorageError(f"{_describe(storage)}: {describe(error)}") from None
    raise AssertionError("the wait returns or raises")
