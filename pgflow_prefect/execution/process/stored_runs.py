"""Lists and deletes the folders of runs in a storage. Prefect's blocks can't, so each kind of block has its own way."""

import shutil
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol
from uuid import UUID

from prefect.filesystems import LocalFileSystem, RemoteFileSystem

from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.process.storages import BlockStorage
from pgflow_prefect.handlers.references import find_folder
from pgflow_prefect.handlers.threads import run_in_thread

_KEYS_DELETED = 1000  # objects that one request to S3 deletes at most


class RunFolders(Protocol):
    """The folders of an installation's runs in a storage. Each method blocks."""

    def list_names(self) -> Iterator[str]:
        """Yield the names of the folders; a storage without any yields none."""

    def delete(self, run_id: UUID) -> int:
        """Delete a run's folder, and return how many objects it had."""


class LocalFolders:
    """Folders of a `LocalFileSystem`."""

    def __init__(self, block: LocalFileSystem, folder: str) -> None:
        self._root = Path(block.basepath or ".").expanduser().resolve() / folder

    def list_names(self) -> Iterator[str]:
        """Yield the names of the folders."""
        if self._root.is_dir():
            yield from (each.name for each in self._root.iterdir() if each.is_dir() and not each.is_symlink())

    def delete(self, run_id: UUID) -> int:
        """Delete a run's folder, and return how many objects it had."""
        folder = self._root / str(run_id)
        count = sum(1 for each in folder.iterdir() if each.is_file())
        shutil.rmtree(folder)
        return count


class RemoteFolders:
    """Folders of a `RemoteFileSystem`, by fsspec."""

    def __init__(self, block: RemoteFileSystem, folder: str) -> None:
        self._system: Any = block.filesystem
        self._root = f"{block.basepath.rstrip('/')}/{folder}"

    def list_names(self) -> Iterator[str]:
        """Yield the names of the folders."""
        self._system.invalidate_cache()  # other processes write
        try:
            found = self._system.ls(self._root, detail=False)
        except FileNotFoundError:
            return
        for path in found:
            yield str(path).rstrip("/").rpartition("/")[2]

    def delete(self, run_id: UUID) -> int:
        """Delete a run's folder, and return how many objects it had."""
        path = f"{self._root}/{run_id}"
        found = self._system.find(path)
        self._system.rm(path, recursive=True)
        return len(found)


class BucketFolders:
    """Folders of prefect-aws's `S3Bucket`, by its own client."""

    def __init__(self, block: Any, folder: str) -> None:  # noqa: ANN401  this package does not need prefect-aws
        self._client: Any = block.credentials.get_s3_client()
        self._bucket = str(block.bucket_name)
        base = str(block.bucket_folder or "").strip("/")
        self._root = f"{base}/{folder}/" if base else f"{folder}/"

    def list_names(self) -> Iterator[str]:
        """Yield the names of the folders."""
        pages = self._client.get_paginator("list_objects_v2")
        for page in pages.paginate(Bucket=self._bucket, Prefix=self._root, Delimiter="/"):
            for each in page.get("CommonPrefixes", []):
                yield str(each["Prefix"]).rstrip("/").rpartition("/")[2]

    def delete(self, run_id: UUID) -> int:
        """Delete a run's folder, and return how many objects it had."""
        pages = self._client.get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self._bucket, Prefix=f"{self._root}{run_id}/")
        keys = ({"Key": each["Key"]} for page in found for each in page.get("Contents", []))
        count = 0
        while batch := [*islice(keys, _KEYS_DELETED)]:
            answer = self._client.delete_objects(Bucket=self._bucket, Delete={"Objects": batch, "Quiet": True})
            if refused := answer.get("Errors"):
                raise PermissionError(f"{len(refused)} objects are refused: {refused[0].get('Message')}")
            count += len(batch)
        return count


async def open_run_folders(storage: BlockStorage, installation: UUID) -> RunFolders:
    """Return the folders of an installation's runs in a storage.

    Raises:
        UsageError: the kind of storage can't be listed.
        NotRetriableError: there is no such block.
    """
    block = await storage.find_block()
    folder = find_folder(installation)
    if isinstance(block, LocalFileSystem):
        return LocalFolders(block, folder)
    if isinstance(block, RemoteFileSystem):
        return RemoteFolders(block, folder)
    if hasattr(block, "bucket_folder") and hasattr(getattr(block, "credentials", None), "get_s3_client"):
        return await run_in_thread(partial(BucketFolders, block, folder))
    raise UsageError(
        f"the results in {storage.name} can't be listed, because a {type(block).__name__} has no way to do that: use a "
        f"URL of fsspec, or a rule of the storage that deletes old objects below {folder}/"
    )
