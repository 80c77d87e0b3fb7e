"""`prune --results` deletes stored results of runs that are gone, of this installation, in each kind of storage."""

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import anyio
import boto3
import pytest
from moto.server import ThreadedMotoServer
from prefect.filesystems import LocalFileSystem, RemoteFileSystem
from prefect.serializers import PickleSerializer

from pgflow_prefect import Workflow
from pgflow_prefect.database.pruning import Swept
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import ForeignInstallationError, StorageError, UsageError
from pgflow_prefect.execution.process.storages import BlockStorage
from pgflow_prefect.execution.process.stored_runs import LocalFolders
from pgflow_prefect.execution.result_options import make_result_options
from pgflow_prefect.handlers.references import parse_reference
from pgflow_prefect.services.stored_results import find_storages, sweep
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import run_workflow
from tests.integration.conftest import Define, make_slug, read_run
from tests.integration.waiting import TIMEOUT

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("pgflow_dsn", "prefect_api")]

BINARY = bytes(range(256))


@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """The address of an S3 server on loopback."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["folder", "fsspec URL", "fsspec block", "S3Bucket"])
def block(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A storage block, or what `result_storage=` makes one of."""
    if request.param == "folder":
        return LocalFileSystem(basepath=str(tmp_path))
    address, bucket = request.getfixturevalue("s3"), f"bucket-{uuid4().hex[:8]}"
    keys = {"aws_access_key_id": "tests", "aws_secret_access_key": "of-no-use-elsewhere", "region_name": "us-east-1"}
    boto3.client("s3", endpoint_url=address, **keys).create_bucket(Bucket=bucket)
    if request.param == "fsspec URL":
        for name, text in {**keys, "region": "us-east-1", "endpoint_url": address}.items():
            monkeypatch.setenv(name.upper() if name.startswith("aws_") else f"AWS_{name.upper()}", text)
        return f"s3://{bucket}/results"
    if request.param == "fsspec block":
        known = {"key": "tests", "secret": "of-no-use-elsewhere", "client_kwargs": {"endpoint_url": address}}
        return RemoteFileSystem(basepath=f"s3://{bucket}/results", settings=known)
    aws = pytest.importorskip("prefect_aws", reason="Prefect loads every collection that is installed, in all tests")
    parameters = pytest.importorskip("prefect_aws.client_parameters").AwsClientParameters(endpoint_url=address)
    credentials = aws.AwsCredentials(**keys, aws_client_parameters=parameters)
    return aws.S3Bucket(bucket_name=bucket, bucket_folder="results", credentials=credentials)


def make_workflow(define: Define, block: Any) -> Workflow:
    workflow = Workflow(make_slug(), result_storage=block, result_serializer="pickle")
    define(workflow.slug, ["make", "take"], [("make", "take")])

    @workflow.step
    def make() -> bytes:
        return BINARY

    @workflow.step
    def take(make: bytes) -> bytes:
        return make[::-1]

    return workflow


async def read_results(store: Store, storage: BlockStorage, run_id: UUID) -> list[object]:
    """Return what the storage has for the steps of a run."""
    rows = [each.step_result for each in await store.list_step_states(run_id)]
    found = [parse_reference(row) for row in rows if row is not None]
    return [PickleSerializer().loads(await storage.read(each.key)) for each in found if each is not None]


async def test_results_go_with_their_run_and_all_others_stay(
    db: Connection, store: Store, define: Define, block: Any
) -> None:
    workflow = make_workflow(define, block)
    [storage] = find_storages([workflow], Settings())
    runs = [run_workflow(db, workflow.slug).id for _ in range(3)]
    for run_id in runs:
        await workflow.flow(run_id=run_id)
    key = f"pgflow/{uuid4()}/{uuid4()}/of-another-installation"
    installation = await store.read_installation()
    await storage.write(key, b"1")
    await storage.write(f"pgflow/{installation}/notes/no-run", b"1")

    swept = Swept()
    await sweep(store, storage, swept, lambda: None)
    assert (swept.runs, swept.objects) == (0, 0), "every run has a row"

    gone, *left = runs
    await store.prune_run(gone)
    await sweep(store, storage, swept := Swept(), lambda: None, dry_run=True)
    assert (swept.runs, swept.objects) == (1, 0)
    await sweep(store, storage, swept := Swept(), lambda: None)
    assert (swept.runs, swept.objects) == (1, 2)
    await sweep(store, storage, swept := Swept(), lambda: None)
    assert swept.runs == 0
    for run_id in left:
        assert await read_results(store, storage, run_id) == [BINARY, BINARY[::-1]]
    assert await storage.read(key) == b"1"
    assert await storage.read(f"pgflow/{installation}/notes/no-run") == b"1"


async def test_a_missing_object_is_named_in_each_kind_of_storage(block: Any) -> None:
    storage = BlockStorage(make_result_options(block, None).storage)
    with pytest.raises(FileNotFoundError):
        await storage.read(f"pgflow/{uuid4()}/{uuid4()}/nothing")
    assert "of-no-use-elsewhere" not in storage.name


async def test_a_storage_without_results_has_nothing_to_delete(store: Store, block: Any) -> None:
    storage = BlockStorage(make_result_options(block, None).storage)
    await sweep(store, storage, swept := Swept(), lambda: None)
    assert swept == Swept()


async def test_a_copy_of_a_database_deletes_nothing(
    db: Connection, store: Store, define: Define, tmp_path: Path
) -> None:
    workflow = make_workflow(define, tmp_path)
    await workflow.flow()
    [storage] = find_storages([workflow], Settings())
    run_id = read_run(db)[2]
    [first, second] = [
        reference.key
        for each in await store.list_step_states(run_id)
        if each.step_result is not None and (reference := parse_reference(each.step_result)) is not None
    ]
    await store.prune_run(run_id)
    db.execute("UPDATE pgflow_prefect.installation SET stamp = '1/1'")
    with pytest.raises(ForeignInstallationError):
        await sweep(store, storage, Swept(), lambda: None)
    assert await storage.read(first) != await storage.read(second)


async def test_a_block_that_can_not_be_listed_is_refused_with_what_to_do(store: Store) -> None:
    storage = BlockStorage("odd/block")
    storage._block = object()
    with pytest.raises(UsageError, match="the results in odd/block can't be listed"):
        await sweep(store, storage, Swept(), lambda: None)


async def test_a_storage_that_refuses_is_named_without_its_secrets(store: Store) -> None:
    known = {
        "key": "tests",
        "secret": "of-no-use-elsewhere",
        "client_kwargs": {"endpoint_url": "http://127.0.0.1:9"},
        "config_kwargs": {"retries": {"max_attempts": 0}},
    }
    storage = BlockStorage(RemoteFileSystem(basepath="s3://nowhere/results", settings=known))
    with pytest.raises(StorageError, match="the results in s3://nowhere/results can't be deleted") as refused:
        await sweep(store, storage, Swept(), lambda: None)
    assert "of-no-use-elsewhere" not in str(refused.value)


async def test_an_interrupted_deletion_does_not_wait_for_a_storage_that_hangs(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, gate, passed = threading.Event(), threading.Event(), threading.Event()

    def hang(folders: LocalFolders) -> Iterator[str]:
        begun.set()
        gate.wait(TIMEOUT)
        passed.set()
        yield from ()

    monkeypatch.setattr(LocalFolders, "list_names", hang)
    storage = BlockStorage(LocalFileSystem(basepath=str(tmp_path)))
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(sweep, store, storage, Swept(), lambda: None)
            while not begun.is_set():
                await anyio.sleep(0.01)
            group.cancel_scope.cancel()
        assert not passed.is_set(), "the listing still hangs"
    finally:
        gate.set()
