"""Nothing that a row, a payload or an endpoint says reaches a terminal or a log as a command.

The parties: `run`, whose reasons of cancelling are shown; `define`, whose slugs are; and a hostile endpoint.
"""

import io
import json
import logging
import subprocess
import sys
from uuid import UUID, uuid4

import pytest
from rich.table import Table
from rich.text import Text

from pgflow_prefect import HttpEndpoint, Workflow
from pgflow_prefect.cli.console import CleanConsole
from pgflow_prefect.wording import CleanFormatter, clean, clean_lines, escape_json
from tests.acceptance.conftest import CommandLine, Services, find_only_run, wait_until
from tests.acceptance.test_terminal import watch
from tests.conftest import Connection
from tests.engine import get_run, run_workflow
from tests.http_server import HttpServer
from tests.integration.conftest import insert_workflow, make_slug, read_run
from tests.integration.supabase import RUN
from tests.security.conftest import EndUser, Party

CLIPBOARD = "\x1b]52;c;ZXZpbA==\x07"
CLEAR = "\x1b[2J\x1b[H"
C1 = "\x9b2J"
BIDI = "\u202egnp.exe\u202c"
FORGED = "\n2026-01-01 00:00:00,000 INFO ready: everything is fine"
RETURN = "good\rbad"
HOSTILE = f"evil {CLIPBOARD}{CLEAR}{C1}{BIDI}\x00\x7f{RETURN}{FORGED}".replace("\x00", "")

OBEYED = ("\x1b]", "\x1b[2J", "\x1b[H", "\x07", "\x9b", "\u202e", "\u202c", "\x7f", "good\rbad")
"""What a terminal would obey, and what no output of ours has on its own account."""


def assert_clean(written: str, *, plain: bool = True) -> None:
    assert [each for each in OBEYED if each in written] == []
    assert not plain or "\x1b" not in written


@pytest.mark.parametrize(
    "text", [CLIPBOARD, CLEAR, C1, BIDI, "\x85", "\u2028", "\u2066", "\u061c", "\ud800", "\x08", "\t", "\n"]
)
def test_each_character_that_is_obeyed_has_a_stand_in(text: str) -> None:
    assert clean(f"a{text}b") != f"a{text}b"
    assert len(clean(text)) == len(text)
    assert clean(text).isprintable()


def test_what_people_write_stays_as_it_is() -> None:
    for text in ("größe 🚀 工程", "a 👩‍🚀 b", "naïve “quoted”", "שלום", "مرحبا"):
        assert clean(text) == text
    assert clean_lines("two\n\tlines") == "two\n\tlines"


@pytest.mark.parametrize("text", [HOSTILE, "\U000e0001\u2028", "\ud83d"])
def test_json_has_the_same_value_and_no_character_that_is_obeyed(text: str) -> None:
    written = escape_json(json.dumps({"a": text, text: 1}, ensure_ascii=False))
    assert json.loads(written) == {"a": text, text: 1}
    assert_clean(written)


@pytest.mark.parametrize("terminal", [True, False])
def test_a_console_writes_no_escape_sequence_but_its_own(terminal: bool) -> None:
    console = CleanConsole(file=io.StringIO(), force_terminal=terminal, width=60, legacy_windows=False)
    table = Table("name")
    table.add_row(HOSTILE)
    for shown in (HOSTILE, Text(HOSTILE), table, f"[red]{HOSTILE}[/red]"):
        console.print(shown)
    console.print(HOSTILE, markup=False, soft_wrap=True, style="dim")
    assert isinstance(console.file, io.StringIO)
    assert_clean(console.file.getvalue(), plain=not terminal)


def test_no_message_forges_a_record_of_the_log() -> None:
    written = io.StringIO()
    handler = logging.StreamHandler(written)
    handler.setFormatter(CleanFormatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.Logger("of this test")
    logger.addHandler(handler)
    logger.info("cancelled: %s", HOSTILE)
    logger.error("failed: %s", HOSTILE, exc_info=ValueError(HOSTILE))
    assert_clean(written.getvalue())
    records = [line for line in written.getvalue().splitlines() if not line.startswith("    ")]
    assert [record.split()[2] for record in records] == ["INFO", "ERROR"]


@pytest.fixture
def hostile(kit: Connection, party: Party) -> tuple[str, UUID]:
    """A workflow with a hostile slug, and a run of it that was cancelled with a hostile reason."""
    kit.execute("DELETE FROM pgflow.step_states; DELETE FROM pgflow.runs; DELETE FROM pgflow.deps")
    kit.execute("DELETE FROM pgflow.steps; DELETE FROM pgflow.workflows")
    slug = f"{BIDI}-{make_slug()}"
    kit.execute("SET session_replication_role = replica")  # as a row of a version that did not refuse it
    insert_workflow(kit, slug, [f"a{CLIPBOARD}{C1}", "b"], [(f"a{CLIPBOARD}{C1}", "b")])
    kit.execute("RESET session_replication_role")
    run_id = run_workflow(kit, slug).id
    party("run").execute("SELECT pgflow_api.cancel_run(%s, %s)", [run_id, HOSTILE])
    return slug, run_id


COMMANDS = [
    ["list"], ["list", "SLUG"], ["validate", "SLUG"], ["runs"], ["status", "RUN"], ["status", "RUN", "--json"],
    ["graph", "SLUG"], ["graph", "SLUG", "--format", "dot"], ["graph", "SLUG", "--format", "mermaid"],
    ["graph", "SLUG", "--format", "svg"], ["graph", "SLUG", "--format", "json"], ["timeline", "RUN"],
    ["export", "SLUG"], ["bind", "SLUG"], ["retry", "RUN", "--dsn", "x\x1b]52;c;x\x07=1"], ["status", HOSTILE],
]  # fmt: skip


def test_no_command_writes_what_a_terminal_obeys_into_a_pipe(cli: CommandLine, hostile: tuple[str, UUID]) -> None:
    slug, run_id = hostile
    for command in COMMANDS:
        ended = cli(*[{"SLUG": slug, "RUN": str(run_id)}.get(word, word) for word in command])
        assert_clean(ended.out + ended.err)
        assert ended.out or ended.err, command
    assert "\t" in cli("runs").out


@pytest.mark.parametrize("role", ["define", "run", "work", "end user"])
def test_what_each_party_may_write_is_shown_without_what_a_terminal_obeys(
    role: str, cli: CommandLine, kit: Connection, party: Party, end_user: EndUser
) -> None:
    slug, run_id = "chain", RUN
    if role == "define":
        slug = f"{BIDI}-{make_slug()}"  # a slug has no control character; this one turns text round
        insert_workflow(author := party("define"), slug, [f"a{BIDI}", "b"], [(f"a{BIDI}", "b")])
        url = f"https://example.org/{BIDI}"
        author.execute("SELECT pgflow_prefect.bind_step(%s, 'b', 'http', %s)", [slug, url])
        run_id = uuid4()
        kit.execute("SELECT pgflow.run_workflow(%s, '{}', %s)", [slug, run_id])
    elif role == "run":
        runner, hostile = party("run"), json.dumps({"note": HOSTILE, HOSTILE: 1})
        run_id = uuid4()
        runner.execute("SELECT pgflow_api.run_workflow(%s, %s, %s)", [slug, hostile, run_id])
        runner.execute("SELECT pgflow_api.cancel_run(%s, %s)", [run_id, HOSTILE])
    elif role == "work":
        party("work").execute("SELECT pgflow.fail_step(%s, 'a', %s)", [run_id, HOSTILE])
    else:
        end_user().execute("SELECT pgflow_api.cancel_run(%s, %s)", [run_id, HOSTILE])
    for command in COMMANDS:
        ended = cli(*[{"SLUG": slug, "RUN": str(run_id)}.get(word, word) for word in command])
        assert_clean(ended.out + ended.err)
        assert ended.out or ended.err, command


@pytest.mark.parametrize("command", [["list"], ["runs"], ["status", "RUN"], ["graph", "SLUG"], ["timeline", "RUN"]])
def test_no_command_writes_what_a_terminal_obeys_at_a_terminal(
    cli: CommandLine, hostile: tuple[str, UUID], command: list[str]
) -> None:
    slug, run_id = hostile
    _, drawn = watch(cli, *[{"SLUG": slug, "RUN": str(run_id)}.get(word, word) for word in command])
    assert_clean(drawn, plain=False)


def test_a_worker_writes_one_line_for_a_hostile_reason(
    cli: CommandLine, services: Services, chain: str, db: Connection
) -> None:
    cli.write(f"flows/{chain}.py", HANDLERS.replace("SLUG", chain))
    worker = services.start("worker")
    run_id = run_workflow(db, chain).id
    wait_until(lambda: get_run(db, run_id).status == "failed", "the run fails")
    worker.await_line(f"run {run_id} of '{chain}': Failed")
    written = worker.log.read_text(encoding="utf-8")
    assert_clean(written)
    assert not [line for line in written.splitlines() if line.startswith("2026-01-01")]


HANDLERS = f"""
from pgflow_prefect import Workflow

workflow = Workflow("SLUG")


@workflow.step
def a() -> None:
    print("said by the handler: " + {HOSTILE!r})
    raise ValueError({HOSTILE!r})


@workflow.step
def b() -> None: ...


@workflow.step
def c() -> None: ...


flow = workflow.flow
"""


@pytest.mark.parametrize("console", ["Prefect's", "one of the user's", "JSON"])
def test_a_flow_in_a_process_of_its_own_writes_nothing_that_a_terminal_obeys(
    console: str, cli: CommandLine, chain: str, db: Connection
) -> None:
    """As Prefect's pool workers execute it: Prefect's own console handler writes what the handler raised."""
    cli.write(f"flows/{chain}.py", HANDLERS.replace("SLUG", chain))
    run = f"import asyncio\nfrom flows.{chain} import flow\nasyncio.run(flow({{}}, return_state=True))"
    setup = "import logging\nlogging.basicConfig(level='INFO', force=True)\n" if console == "one of the user's" else ""
    more = {"PREFECT_LOGGING_HANDLERS_CONSOLE_FORMATTER": "json"} if console == "JSON" else {}
    ended = subprocess.run(
        [sys.executable, "-c", setup + run],
        cwd=cli.directory,
        env={**cli.environment, **more},
        capture_output=True,
        check=True,
        text=True,
    )
    assert get_run(db, find_only_run(db)).status == "failed"
    assert "evil" in ended.stderr
    assert_clean(ended.stdout + ended.stderr)
    assert not [line for line in ended.stderr.splitlines() if line.startswith("2026-01-01")]


def test_a_process_of_serve_writes_nothing_that_a_terminal_obeys(
    cli: CommandLine, services: Services, chain: str, db: Connection
) -> None:
    cli.write(f"flows/{chain}.py", HANDLERS.replace("SLUG", chain))
    serve = services.start("serve")
    run_id = run_workflow(db, chain).id
    wait_until(lambda: get_run(db, run_id).status == "failed", "the run fails")
    serve.await_line("said by the handler: evil")
    serve.await_line("step a: Task run failed with exception")
    written = serve.log.read_text(encoding="utf-8")
    assert_clean(written)
    assert not [line for line in written.splitlines() if line.startswith("2026-01-01")]


@pytest.mark.anyio
@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
async def test_the_body_of_an_error_is_stored_and_shown_without_escape_sequences(
    db: Connection, endpoint: HttpServer
) -> None:
    endpoint.respond(404, HOSTILE.encode())
    workflow = Workflow(make_slug())
    insert_workflow(db, workflow.slug, ["ask"])
    workflow.bind("ask", HttpEndpoint(endpoint.url))
    state = await workflow.flow(return_state=True)
    assert_clean(read_run(db)[1])
    assert_clean(state.message or "")
