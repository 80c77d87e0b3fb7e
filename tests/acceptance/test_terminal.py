"""What a user sees at a terminal: colours, and a run as it goes on."""

import os
import pty
import re
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest

from pgflow_prefect.cli import console, demo
from tests.acceptance.chain import CHAIN_HANDLERS
from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection
from tests.engine import column, run_workflow

pytestmark = pytest.mark.once


def watch(
    cli: CommandLine,
    *arguments: str,
    typed: str = "",
    on_drawn: Callable[[str], None] | None = None,
    **environment: str,
) -> tuple[int, str]:
    """Run a command at a pseudo-terminal, where something is typed; return its exit code and all that was drawn.

    Args:
        cli: where it runs.
        arguments: of the command.
        typed: what is typed before it starts.
        on_drawn: called with all that was drawn so far, each time that more is drawn.
        environment: variables that it gets besides.
    """
    ours, theirs = pty.openpty()
    os.write(ours, typed.encode())
    process = subprocess.Popen(
        [sys.executable, "-m", "pgflow_prefect", *arguments],
        cwd=cli.directory,
        env={**cli.environment, "COLUMNS": "100", "LINES": "30", **environment},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    last_resort = threading.Timer(120, process.kill)
    last_resort.start()
    drawn = b""
    while chunk := _read(ours):
        drawn += chunk
        if on_drawn is not None:
            on_drawn(drawn.decode(errors="replace"))
    os.close(ours)
    last_resort.cancel()
    return process.wait(), drawn.decode()


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # the last one who wrote to it is gone
        return b""


def is_drawn_over_itself(drawn: str) -> bool:
    return "\x1b[1A" in drawn or "\x1b[2K" in drawn


def test_a_run_is_drawn_while_it_goes_on_and_ends_with_its_final_state(
    cli: CommandLine, db: Connection, chain: str
) -> None:
    gate = cli.write("gate")

    def open_gate_once_redrawn(drawn: str) -> None:
        if "Running" in drawn and is_drawn_over_itself(drawn):
            gate.unlink(missing_ok=True)

    code, drawn = watch(cli, "run", chain, on_drawn=open_gate_once_redrawn)

    assert code == 0
    assert "\x1b[32mCompleted" in drawn, "in green"
    assert is_drawn_over_itself(drawn)
    last = drawn[drawn.rindex("a  ") :]
    assert [f"{step}  \x1b[32mCompleted" in last for step in "abc"] == [True, True, True]
    assert "3/3" in last
    assert "completed in" in last
    assert not re.search(r"\d:\d\d:\d\d", last), "one duration, and that of the run"
    assert column(db, "SELECT status FROM pgflow.runs") == ["completed"]

    _, table = watch(cli, "runs")
    assert "\x1b[32mcompleted" in table
    _, plain = watch(cli, "runs", NO_COLOR="1")
    assert "\x1b[32m" not in plain


def test_a_failed_run_ends_with_its_error_below_the_picture(cli: CommandLine, chain: str) -> None:
    cli.write("broken")

    code, drawn = watch(cli, "run", chain)

    assert code == 1
    assert "\x1b[31mFailed" in drawn
    error = drawn[drawn.rindex("error:") :]
    assert "RuntimeError: the disk is full" in error
    assert "1/3" in drawn


def test_push_asks_before_it_writes(cli: CommandLine, db: Connection) -> None:
    cli.write("chain.py", CHAIN_HANDLERS)

    refused, asked = watch(cli, "push", "chain.py", typed="\n")
    ended, _ = watch(cli, "push", "chain.py", typed="\x04")  # Ctrl-D
    assert (refused, ended) == (1, 1)
    assert "\x1b[32m  + dep 'a' -> 'b'" in asked
    assert "write this into the database? [y/N]" in asked
    assert "nothing was written" in asked
    assert column(db, "SELECT slug FROM pgflow.workflows") == []

    code, drawn = watch(cli, "push", "chain.py", typed="y\n")
    assert code == 0
    assert "wrote workflow 'chain'" in drawn
    assert column(db, "SELECT slug FROM pgflow.steps ORDER BY 1") == ["a", "b", "c"]


@pytest.mark.parametrize("columns", ["60", "80", "120"])
def test_a_run_s_id_is_whole_in_a_table_of_any_width(
    cli: CommandLine, db: Connection, chain: str, columns: str
) -> None:
    run_id = run_workflow(db, chain, {}).id
    db.execute("SELECT pgflow.fail_step(%s, 'a', %s)", [run_id, "broken, " * 30])

    _, drawn = watch(cli, "runs", COLUMNS=columns)

    [line] = [line for line in drawn.splitlines() if str(run_id) in line]
    assert "failed" in line


def test_text_for_copying_is_never_wrapped(capsys: pytest.CaptureFixture[str]) -> None:
    """A hard line break in a command, a URL or an `export` makes two of it."""
    dsn = "postgresql://postgres:@/postgres?host=/tmp/" + "a-long-directory/" * 9
    narrow = type(console.out)(width=40, force_terminal=True, highlight=False)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(demo, "out", narrow)
        demo.print_variables(dsn, "http://127.0.0.1:4200/api")
    narrow.print(f"in Prefect: http://127.0.0.1:4200/{'run' * 30}", markup=False)
    drawn = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert drawn.splitlines() == [
        f"export PGFLOW_DSN='{dsn}'",
        "export PREFECT_API_URL=http://127.0.0.1:4200/api",
        f"in Prefect: http://127.0.0.1:4200/{'run' * 30}",
    ]


def test_the_page_of_a_run_is_one_link_on_a_narrow_terminal(cli: CommandLine, chain: str) -> None:
    _, drawn = watch(cli, "run", chain, COLUMNS="40")
    assert re.search(r"^in Prefect: http://\S+/runs/flow-run/[0-9a-f-]{36}\r?$", drawn, re.MULTILINE)
