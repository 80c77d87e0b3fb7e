"""Keys of results in a storage: no two processes write to the same one, and a row can't send a reader elsewhere."""

from dataclasses import replace
from uuid import uuid4

import pytest

from pgflow_prefect.errors import StoredResultError
from pgflow_prefect.handlers.codecs import JsonCodec
from pgflow_prefect.handlers.references import Reference, ResultAddress, parse_reference
from pgflow_prefect.handlers.stored import ResultPlace, StepResults
from pgflow_prefect.raw_json import RawJson

pytestmark = pytest.mark.anyio

# Not random: the names of tests contain them, and each process of pytest has to find the same names.
FIRST, SECOND = "68a84be9fe144271a74fd9952dc31d0b", "eac01e4022fc45b6b0a8a01fae484abc"


class Memory:
    """A storage in this process."""

    name = "memory"

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}

    async def read(self, key: str) -> bytes:
        if key not in self.objects:
            raise FileNotFoundError
        return self.objects[key]

    async def write(self, key: str, data: bytes) -> None:
        self.objects[key] = data


@pytest.fixture
def memory() -> Memory:
    return Memory()


@pytest.fixture
def results(memory: Memory) -> StepResults:
    place = ResultPlace(memory, JsonCodec(), always=True)
    return StepResults(ResultAddress(uuid4(), uuid4(), "heavy"), 1, 100, lambda slug: place)


def parse(text: str) -> Reference:
    reference = parse_reference(RawJson(text))
    assert reference is not None
    return reference


@pytest.mark.parametrize(("accepted", "late"), [(SECOND, FIRST), (FIRST, SECOND)])
async def test_a_late_process_of_a_work_pool_does_not_change_the_result_of_another_one(
    results: StepResults, accepted: str, late: str
) -> None:
    row = await replace(results, holder=accepted).save(b'"accepted"')
    await replace(results, holder=late).save(b'"late"')
    read = await results.resolve(RawJson(f'{{"heavy":{row}}}'))
    assert read.results.decode() == {"heavy": "accepted"}


async def test_a_result_without_a_work_pool_has_the_key_that_it_had(results: StepResults, memory: Memory) -> None:
    row = await results.save(b"1")
    assert "holder" not in row
    [key] = memory.objects
    assert key.endswith("-0-1")
    assert (await results.resolve(RawJson(f'{{"heavy":{row}}}'))).results.decode() == {"heavy": 1}


async def test_a_reader_refuses_the_key_of_another_holder(results: StepResults) -> None:
    written = parse(await replace(results, holder=FIRST).save(b"1"))
    row = written.model_copy(update={"holder": SECOND}).write()
    with pytest.raises(StoredResultError, match="which is no result of that step"):
        await results.resolve(RawJson(f'{{"heavy":{row}}}'))


@pytest.mark.parametrize("holder", ["../../../other", "", FIRST.upper(), f"{FIRST}0", f"{FIRST}\n"])
async def test_a_holder_that_is_no_process_is_no_reference(results: StepResults, holder: str) -> None:
    written = parse(await replace(results, holder=FIRST).save(b"1"))
    assert parse_reference(RawJson(written.model_copy(update={"holder": holder}).write())) is None
