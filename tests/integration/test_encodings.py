"""Databases that are not UTF-8: what they can store comes back as it was, the rest is refused in a sentence."""

from collections.abc import AsyncIterator, Iterator
from uuid import uuid4

import psycopg
import pytest
from psycopg import sql
from psycopg.conninfo import make_conninfo

from pgflow_prefect.database.connection import connect, open_pool
from pgflow_prefect.database.consumer_store import ConsumerStore
from pgflow_prefect.database.schema import install_schema
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import ResultInvalidError, UnstorableTextError
from pgflow_prefect.models import ClaimRequest, Completion, Status, TaskKey
from tests.conftest import Connection, execute
from tests.engine import CHAIN, define, get_state, run_workflow, value
from tests.integration.conftest import TENURE
from tests.json_values import decode

pytestmark = pytest.mark.anyio

ADVICE = "a database that was created with ENCODING 'UTF8' stores every character"


@pytest.fixture(params=["LATIN1", "WIN1252", "ISO_8859_5"])
def encoding(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def encoded_dsn(server_dsn: str, encoding: str) -> Iterator[str]:
    """A database in this encoding, with nothing in it."""
    name = sql.Identifier(f"test_{uuid4().hex[:12]}")
    create = "CREATE DATABASE {} TEMPLATE template0 ENCODING {} LC_COLLATE 'C' LC_CTYPE 'C'"
    execute(server_dsn, sql.SQL(create).format(name, sql.Literal(encoding)))
    yield make_conninfo(server_dsn, dbname=name.as_string().strip('"'))
    execute(server_dsn, sql.SQL("DROP DATABASE {} WITH (FORCE)").format(name))


@pytest.fixture
async def encoded(encoded_dsn: str) -> AsyncIterator[Store]:
    """The store of such a database."""
    async with await connect(encoded_dsn, timeout=10) as connection:
        await install_schema(connection)
    async with open_pool(encoded_dsn, size=1, timeout=10) as pool:
        yield Store(pool, TENURE)


@pytest.fixture
def latin_db(encoded_dsn: str) -> Iterator[Connection]:
    with psycopg.connect(encoded_dsn, autocommit=True, client_encoding="utf8") as db:
        yield db


async def test_what_the_encoding_has_comes_back_as_it_was(encoded: Store, latin_db: Connection, encoding: str) -> None:
    text = "\u042e\u0440\u0438\u0439" if encoding == "ISO_8859_5" else "J\u00fcrgen"
    define(latin_db, text, {"a": [], text: ["a"]})
    run_id, task_run_id = uuid4(), uuid4()
    epoch = await encoded.create_run(text, f'{{"name": "{text}"}}', run_id, uuid4())
    assert epoch is not None
    claim = await encoded.claim_step(run_id, epoch, ClaimRequest(TaskKey("a"), task_run_id, None, with_payload=True))
    assert decode(claim.payload) == {"name": text}
    await encoded.complete_step(run_id, epoch, Completion(TaskKey("a"), f'"{text}"', 1, task_run_id))
    claim = await encoded.claim_step(run_id, epoch, ClaimRequest(TaskKey(text), task_run_id, None, with_payload=True))
    assert decode(claim.upstream_results) == {"a": text}
    assert (await encoded.load_definition(text)).deps == (("a", text),)


@pytest.mark.parametrize("written", ["\u6f22", "\\u6f22"], ids=["as itself", "escaped in JSON"])
async def test_what_the_encoding_lacks_is_refused_in_a_sentence(
    encoded: Store, latin_db: Connection, written: str
) -> None:
    define(latin_db, "chain", CHAIN)
    with pytest.raises(ResultInvalidError) as refused:
        await encoded.create_run("chain", f'{{"name": "{written}"}}', uuid4())
    assert ADVICE in str(refused.value)
    if written == "\u6f22":
        assert str(refused.value).startswith("the database's encoding does not have the character '\u6f22'")
    assert value(latin_db, "SELECT count(*) FROM pgflow.runs") == 0


async def test_a_result_that_the_encoding_lacks_is_refused_and_the_failure_is_stored(
    encoded: Store, latin_db: Connection
) -> None:
    define(latin_db, "chain", CHAIN)
    run_id, task_run_id = uuid4(), uuid4()
    epoch = await encoded.create_run("chain", "{}", run_id, uuid4())
    assert epoch is not None
    await encoded.claim_step(run_id, epoch, ClaimRequest(TaskKey("a"), task_run_id, None, with_payload=True))
    with pytest.raises(UnstorableTextError) as refused:
        await encoded.complete_step(run_id, epoch, Completion(TaskKey("a"), '"\u6f22"', 1, task_run_id))

    await encoded.note_state(run_id, TaskKey("a"), task_run_id=task_run_id, state_name="Failed", message="no \u6f22")
    fence = {"epoch": epoch, "attempt": 1, "task_run_id": task_run_id}
    report = await encoded.fail_step(run_id, TaskKey("a"), str(refused.value), state_name="Failed", **fence)
    assert report.status is Status.FAILED
    assert "does not have the character '\\u6f22'" in str(get_state(latin_db, run_id, "a").error_message)
    await encoded.reopen_run(run_id)
    await encoded.cancel_run(run_id, "cancelled: \u6f22")
    assert (await encoded.read_run(run_id)).error_message == "cancelled: \\u6f22"


async def test_a_queue_worker_reports_a_failure_that_the_encoding_lacks(
    encoded: Store, latin_db: Connection, encoded_dsn: str
) -> None:
    define(latin_db, "chain", CHAIN)
    run_id = run_workflow(latin_db, "chain").id
    latin_db.execute("SELECT pgflow.claim_step(%s, 'a')", [run_id])
    consumer = ConsumerStore(encoded_dsn, connect_timeout=10, patience=5)
    assert await consumer.fail(run_id, TaskKey("a"), 1, "no \u6f22") is Status.FAILED
    assert get_state(latin_db, run_id, "a").error_message == "no \\u6f22"
