"""A process that is killed in the middle of a step leaves a run that another process can finish."""

import mailbox

from pgflow_prefect.shipped import shipped_path
from tests.acceptance.conftest import CommandLine, PrefectView, find_only_run, wait_until
from tests.conftest import Connect, Connection
from tests.engine import column, get_run, get_state, statuses

LATE_REPORT = """
CREATE FUNCTION wait_for_the_test() RETURNS trigger LANGUAGE plpgsql AS
$$ BEGIN PERFORM pg_advisory_xact_lock(1); RETURN new; END $$;
CREATE TRIGGER late_report BEFORE UPDATE ON pgflow.step_states FOR EACH ROW
WHEN (new.step_slug = 'send_emails' AND new.status = 'completed') EXECUTE FUNCTION wait_for_the_test();
"""
"""Keeps the report that the mails are sent from arriving, for as long as the test holds the lock."""

WAITING = """
SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND NOT granted
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())
"""


def test_a_run_whose_process_was_killed_goes_on_where_it_was(
    cli: CommandLine, db: Connection, prefect: PrefectView, chain: str
) -> None:
    gate = cli.write("gate")
    process = cli.start("run", chain)
    wait_until(lambda: "b" in cli.executions(), "b executes")

    process.kill()
    process.wait()

    run_id = find_only_run(db)
    assert get_run(db, run_id).status == "pending"
    assert statuses(db, run_id) == {"a": "completed", "b": "pending"}
    assert get_state(db, run_id, "b").attempts == 1

    gate.unlink()
    resumed = cli("run", "--resume", str(run_id))

    assert resumed.code == 0, resumed.err  # it may have said that it waits for the lease to run out
    assert cli.executions() == ["a", "b", "b", "c"], "what was completed is not executed again"
    assert get_run(db, run_id).status == "completed"
    assert [get_state(db, run_id, step).attempts for step in "abc"] == [1, 2, 1]
    assert prefect.find_flow_run(run_id)["state_name"] == "Completed"
    prefect.await_task_states(run_id, {"a": "Cached", "b": "Completed", "c": "Completed"})


def test_mails_that_were_sent_before_a_crash_are_not_sent_again(
    cli: CommandLine, connect: Connect, db: Connection
) -> None:
    db.execute(shipped_path("flows", "email_campaign", "workflow.sql").read_bytes())
    db.execute(LATE_REPORT)
    handlers = ("--handlers", str(shipped_path("flows", "email_campaign.py")))
    holder = connect()
    holder.execute("SELECT pg_advisory_lock(1)")
    process = cli.start("run", "email_campaign", "--payload", '{"campaign_id": 7}', *handlers)
    wait_until(lambda: bool(column(db, WAITING)), "all mails are sent")

    process.kill()
    process.wait()
    db.execute("SELECT pg_terminate_backend(%s)", column(db, WAITING))
    holder.execute("SELECT pg_advisory_unlock(1)")

    run_id = find_only_run(db)
    assert len(mailbox.Maildir(cli.directory / "Maildir", create=False)) == 20
    assert get_state(db, run_id, "send_emails").status == "pending"

    resumed = cli("run", "--resume", str(run_id), *handlers)

    assert resumed.code == 0
    assert len(mailbox.Maildir(cli.directory / "Maildir", create=False)) == 20, "each recipient has one"
    sent = get_state(db, run_id, "send_emails")
    assert sent.attempts == 2
    assert isinstance(sent.step_result, dict)
    assert (sent.step_result["sent"], len(sent.step_result["already_there"])) == ([], 20)
