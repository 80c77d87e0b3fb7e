"""What a role that only reads may say."""

from tests.acceptance.conftest import CommandLine, PrefectView
from tests.acceptance.test_reconcile import make_old
from tests.conftest import Connection
from tests.engine import value
from tests.security.conftest import PartyDsn


def test_an_observer_compares_and_is_told_that_it_may_not_repair(
    kit: Connection, party_dsn: PartyDsn, cli: CommandLine, chain: str, prefect: PrefectView
) -> None:
    assert isinstance(cli.environment, dict)
    cli.environment["PGFLOW_LEASE"] = "1"
    run_id = cli("run", chain).find_run_id()
    prefect.await_task_states(run_id, {"a": "Completed", "b": "Completed", "c": "Completed"})
    make_old(kit)
    cli.environment["PGFLOW_DSN"] = party_dsn("observe")

    looked = cli("reconcile")
    assert (looked.code, looked.lines, looked.err) == (0, ["PostgreSQL and Prefect agree"], "")
    assert value(kit, "SELECT count(*) FROM pgflow_prefect.owners WHERE settled") == 0
    assert cli("reconcile", "--all", "--json").code == 0

    refused = cli("reconcile", "--apply")
    assert (refused.code, refused.out) == (1, "")
    assert "the database user may not do this: permission denied" in refused.find_error()
    assert value(kit, "SELECT count(*) FROM pgflow_prefect.owners WHERE settled") == 0
