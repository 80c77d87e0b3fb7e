"""The commands on a database that carries other settings than PostgreSQL's defaults."""

import json

import pytest
from psycopg import sql

from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection

# The first has what makes values look different; the second, what makes statements behave differently.
CARRIED = {
    "looks": {
        "DateStyle": "SQL, DMY",
        "IntervalStyle": "sql_standard",
        "TimeZone": "<+0330>-03:30",
        "extra_float_digits": "-15",
        "client_encoding": "LATIN1",
        "bytea_output": "escape",
    },
    "behaviour": {
        "DateStyle": "German",
        "default_transaction_isolation": "serializable",
        "default_transaction_deferrable": "on",
        "standard_conforming_strings": "off",
        "search_path": "",
        "lock_timeout": "20s",
        "idle_in_transaction_session_timeout": "20s",
        "row_security": "off",
    },
}


@pytest.mark.parametrize("kind", CARRIED)
def test_every_command_works(cli: CommandLine, db: Connection, chain: str, kind: str) -> None:
    database = sql.Identifier(db.info.dbname)
    for name, text in CARRIED[kind].items():
        db.execute(sql.SQL("ALTER DATABASE {} SET {} = {}").format(database, sql.Identifier(name), sql.Literal(text)))

    def succeed(*arguments: str) -> str:
        ended = cli(*arguments)
        assert ended.code == 0, (arguments, ended.out, ended.err)
        assert ended.err.replace("ready", "") == "" or arguments[0] == "run", ended.err
        return ended.out

    assert "is current" in succeed("init")
    assert chain in succeed("list")
    succeed("validate", chain)
    payload = json.dumps({"J\u00fcrgen \u20ac": 1}, ensure_ascii=False)
    run_id = str(json.loads(succeed("run", chain, "--payload", payload, "--json"))["run"]["id"])
    assert json.loads(succeed("status", run_id, "--json"))["run"]["payload"] == {"J\u00fcrgen \u20ac": 1}
    assert run_id in succeed("runs", "--since", "1h")
    succeed("status", run_id)
    succeed("timeline", run_id)
    assert succeed("export", chain).count("INSERT INTO") == 3
    succeed("enable", chain)
    succeed("reconcile")
    assert "nothing is that old" in succeed("prune", "--older-than", "30d", "--dry-run")
    checks = json.loads(cli("doctor", "--no-flow-run", "--json").out)
    assert [each["message"] for each in checks if each["outcome"] == "fault"] == []
