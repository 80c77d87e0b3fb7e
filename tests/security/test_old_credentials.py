"""Rows of an older version name credentials without the prefix: what says so, and the command that mends it."""

from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection
from tests.engine import value
from tests.integration.conftest import insert_workflow, make_slug

BIND = """
    SELECT pgflow_prefect.bind_step(%s, 'ask', 'http', %s, jsonb_build_object('token_env', %s::text, 'retries', 0))
"""


def define_bound(db: Connection, url: str, variable: str) -> str:
    """Define a workflow whose only step is bound by a row, as an older version lets it."""
    slug = make_slug()
    insert_workflow(db, slug, ["ask"])
    db.execute(BIND, [slug, url, variable])
    return slug


def test_a_command_refuses_a_name_without_the_prefix(cli: CommandLine, db: Connection) -> None:
    slug = define_bound(db, "https://example.org", "PGFLOW_TOKEN_SEND")
    refused = cli("bind", slug, "ask", "--http", "https://example.org", "--token-env", "SEND_TOKEN")
    assert refused.code == 2
    assert "names the environment variable 'SEND_TOKEN'" in refused.find_error()


def test_an_older_installation_is_told_what_to_set_and_goes_on_after_one_command(
    cli: CommandLine, db: Connection
) -> None:
    slug = define_bound(db, "http://localhost:9/", "OLD_TOKEN")
    told = cli("init")
    assert "its row names 'OLD_TOKEN'" in told.out
    refused = cli("run", slug)
    assert refused.code == 2
    assert "`pgflow-prefect credentials --rename`" in refused.find_error()

    renamed = cli("credentials", "--rename")
    assert renamed.code == 0
    assert [line for line in renamed.lines if line.startswith("export ")] == [
        'export PGFLOW_TOKEN_OLD_TOKEN="$OLD_TOKEN"',
        "export PGFLOW_CREDENTIAL_ORIGINS=PGFLOW_TOKEN_OLD_TOKEN=http://localhost:9",
        "export PGFLOW_HTTP_ALLOW=http://localhost:9",
    ]
    assert value(db, "SELECT options ->> 'token_env' FROM pgflow_prefect.bindings") == "PGFLOW_TOKEN_OLD_TOKEN"
    ran = cli(
        "run",
        slug,
        PGFLOW_TOKEN_OLD_TOKEN="x",  # noqa: S106
        PGFLOW_CREDENTIAL_ORIGINS="PGFLOW_TOKEN_OLD_TOKEN=http://localhost:9",
        PGFLOW_HTTP_ALLOW="http://localhost:9",
    )
    assert "localhost:9/ can't be reached" in ran.out + ran.err, "the request was sent"


def test_a_name_that_a_shell_would_execute_is_not_printed_for_one(cli: CommandLine, db: Connection) -> None:
    define_bound(db, "https://example.org/", 'X"; touch /tmp/x; "')
    renamed = cli("credentials", "--rename")
    assert (renamed.code, renamed.out.strip()) == (0, "no row needs another name")
    assert "can't be a name" in cli("credentials").out
