"""A message on a queue is not believed. The party: who may write to one queue, and to nothing else."""

import json
from typing import Any
from uuid import UUID, uuid4

import pytest

from pgflow_prefect.consumer import StepMessage, consume, perform
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.queue import sign_message
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.engine import define, get_state, run_workflow, value
from tests.integration.queues.consumers import consuming, hand_over, put, wait_for

pytestmark = pytest.mark.anyio

MAILS, APPROVALS = "pgqueuer:mails", "pgqueuer:approvals"
STEPS: dict[str, list[str]] = {"up": [], "a": ["up"], "sign_off": ["up"]}


@pytest.fixture
def run(db: Connection) -> UUID:
    """A run whose step `a` is handed to the queue of mails, and whose step `sign_off` waits for a person."""
    define(db, "w", STEPS)
    run_id = run_workflow(db, "w", {"secret": "of the database"}).id
    db.execute("SELECT pgflow.complete_step(%s, 'up', '\"real\"')", [run_id])
    hand_over(db, run_id, MAILS)
    claim = """
        SELECT pgflow_prefect.claim_step(
            %s, 'sign_off', 0, gen_random_uuid(), NULL, true, 'external', false, 'external')
    """
    db.execute(claim, [run_id])
    return run_id


def forge(run_id: UUID, step: str = "a", attempt: int = 1, workflow: str = "w", **members: Any) -> bytes:
    message = {
        "run_id": str(run_id), "workflow_slug": workflow, "step_slug": step, "attempt": attempt,
        "idempotency_key": "forged", "input": {"payload": "forged", "up": "forged"},
    }  # fmt: skip
    return json.dumps(message | members).encode()


async def do(body: bytes, dsn: str, queue: str | None = MAILS) -> list[tuple[Any, StepMessage]]:
    seen: list[tuple[Any, StepMessage]] = []

    def work(given: Any, message: StepMessage) -> str:
        seen.append((given, message))
        return "done"

    await perform(body, work, dsn, queue=queue)
    return seen


@pytest.mark.parametrize(
    ("queue", "message"),
    [
        (MAILS, {"step": "sign_off", "attempt": 1}),
        (APPROVALS, {}),
        (None, {"step": "sign_off", "attempt": 1}),
        ("redis://127.0.0.1/0?queue=mails", {}),
        (MAILS, {"attempt": 2}),
        (MAILS, {"workflow": "another"}),
        (MAILS, {"step": "up"}),
    ],
)
async def test_a_message_for_what_was_not_handed_to_its_queue_changes_nothing(
    run: UUID, db: Connection, dsn: str, queue: str | None, message: dict[str, Any]
) -> None:
    before = db.execute("SELECT * FROM pgflow.step_states ORDER BY step_slug").fetchall()
    assert await do(forge(run, **message), dsn, queue) == []
    assert db.execute("SELECT * FROM pgflow.step_states ORDER BY step_slug").fetchall() == before


async def test_the_approval_of_a_person_is_not_given_by_a_message_after_it_left_a_queue(
    run: UUID, db: Connection, dsn: str
) -> None:
    """The step was on the queue at its first attempt; at its second one, another worker has claimed it."""
    db.execute("SELECT pgflow.claim_step(%s, 'a')", [run])
    assert get_state(db, run, "a").attempts == 2
    assert await do(forge(run, attempt=2), dsn) == []
    assert get_state(db, run, "a").status == "pending"


async def test_the_input_is_read_from_postgresql_and_not_from_the_message(run: UUID, db: Connection, dsn: str) -> None:
    [(given, message)] = await do(forge(run), dsn)
    assert given == message.input == {"payload": {"secret": "of the database"}, "up": "real"}
    assert get_state(db, run, "a").step_result == "done"


async def test_a_step_stays_on_its_queue_though_it_is_bound_to_another_meanwhile(
    run: UUID, db: Connection, dsn: str
) -> None:
    db.execute("UPDATE pgflow_prefect.task_runs SET state_name = 'Deferred' WHERE step_slug = 'a'")
    db.execute("SELECT pgflow_prefect.bind_step('w', 'a', 'queue', %s)", [APPROVALS])
    again = "SELECT waits FROM pgflow_prefect.claim_step(%s, 'a', 0, %s, NULL, true, 'queue', false, 'x')"
    assert value(db, again, run, uuid4()) is True
    assert await do(forge(run), dsn, APPROVALS) == []
    assert len(await do(forge(run), dsn, MAILS)) == 1


async def test_a_message_counts_if_its_signature_is_right_and_then_has_the_input(
    run: UUID, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "a key of this test's own"
    monkeypatch.setenv("PGFLOW_QUEUE_KEY", key)
    body = forge(run, input={"payload": "signed"})
    with pytest.raises(UsageError, match="not signed"):
        await do(body, dsn)
    for wrong in (
        sign_message(body, b"another key of some length"),
        sign_message(body, key.encode()).replace(b"signed", b"forged"),
        sign_message(body, key.encode()) + b" ",
        sign_message(body, key.encode()).replace(b'"attempt": 1', b'"attempt": 2'),
    ):
        with pytest.raises(UsageError, match=r"not signed|wrong signature"):
            await do(wrong, dsn)
    [(given, _)] = await do(sign_message(body, key.encode()), dsn)
    assert given == {"payload": "signed"}


async def test_a_signature_does_not_move_a_message_to_another_queue(
    run: UUID, dsn: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = "a key of this test's own"
    monkeypatch.setenv("PGFLOW_QUEUE_KEY", key)
    assert await do(sign_message(forge(run), key.encode()), dsn, APPROVALS) == []


def test_a_key_that_can_be_guessed_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 16"):
        Settings.model_validate({"queue_key": "short"})


def test_a_consumer_of_a_broker_skips_forged_messages_and_goes_on(
    db: Connection, dsn: str, redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    url, other = (f"{redis_url}?queue=q-{uuid4().hex[:8]}" for _ in range(2))
    define(db, "w", STEPS)
    runs = [run_workflow(db, "w", number).id for number in range(2)]
    for run_id, handed_to in zip(runs, (other, url), strict=True):
        db.execute("SELECT pgflow.complete_step(%s, 'up', '1')", [run_id])
        hand_over(db, run_id, handed_to)
        put(url, forge(run_id))
    with consuming(url, lambda given: given["payload"], dsn):
        wait_for(lambda: get_state(db, runs[1], "a").status == "completed")
    assert get_state(db, runs[1], "a").step_result == 1
    assert get_state(db, runs[0], "a").status == "pending"
    assert "it was not handed to this queue; skipped" in caplog.text


def test_a_consumer_that_reaches_the_broker_by_another_url_names_the_one_of_the_binding(
    db: Connection, dsn: str, redis_url: str
) -> None:
    queue = f"q-{uuid4().hex[:8]}"
    bound_to = f"redis://broker.internal/0?queue={queue}"
    define(db, "w", STEPS)
    run_id = run_workflow(db, "w").id
    db.execute("SELECT pgflow.complete_step(%s, 'up', '1')", [run_id])
    hand_over(db, run_id, bound_to)
    put(f"{redis_url}?queue={queue}", forge(run_id))
    with consuming(f"{redis_url}?queue={queue}", lambda _: None, dsn, bound_to=bound_to):
        wait_for(lambda: get_state(db, run_id, "a").status == "completed")
    with pytest.raises(UsageError, match="no kind that is known"):
        consume(f"{redis_url}?queue={queue}", print, dsn=dsn, bound_to="nowhere")
