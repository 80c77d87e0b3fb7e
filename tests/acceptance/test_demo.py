"""`demo`: everything once, and nothing left behind."""

import re
import signal
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import httpx
import psutil
import pytest

from tests.acceptance.conftest import TIMEOUT, CommandLine, wait_until

pytestmark = pytest.mark.once


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A temporary directory of the demo's own; its path is short, because a socket's has at most 107 characters."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        yield Path(name)


@pytest.fixture
def visitor(outside: CommandLine, temporary: Path) -> CommandLine:
    """A user who has just installed the package."""
    kept = {name: text for name, text in outside.environment.items() if name != "XDG_RUNTIME_DIR"}
    return replace(outside, environment={**kept, "TMPDIR": str(temporary)})


def find_processes(directory: Path) -> list[str]:
    """Return what runs in a directory, or was started with it as the temporary directory."""
    return [str(each) for each in psutil.process_iter() if _belongs_to(each, str(directory))]


def _belongs_to(process: psutil.Process, directory: str) -> bool:
    try:
        words = [process.cwd(), *process.cmdline(), *process.environ().values()]
        has_ended = process.status() == psutil.STATUS_ZOMBIE
    except psutil.Error:  # it is gone, or another user's
        return False
    return not has_ended and any(directory in word for word in words)


def test_the_demo_shows_a_run_and_leaves_nothing_behind(visitor: CommandLine, temporary: Path) -> None:
    process = visitor.start("demo")
    out, err = process.communicate(timeout=TIMEOUT * 2)

    assert process.returncode == 0
    assert err.endswith("INFO send_emails: sent 20 mails, 0 were there already\n"), err
    assert err.count("\n") == 1, err
    lines = out.splitlines()
    assert "$ pgflow-prefect init" in lines
    assert "INSERT INTO pgflow.workflows (slug) VALUES ('email_campaign');" in lines
    assert any(line.startswith("completed in ") for line in lines)
    columns = lines.index("step_slug\tstatus\tattempts\tstep_result")
    rows = [line.split("\t") for line in lines[columns + 1 : -1]]
    assert lines[-1].startswith("- the servers are stopped. To see the run")
    assert "export" not in out, "where would it lead?"
    assert [row[:3] for row in rows] == [
        ["prepare_list", "completed", "1"],
        ["send_emails", "completed", "1"],
        ["generate_report", "completed", "1"],
    ]
    assert '"delivered": 20' in rows[2][3]
    assert list(temporary.iterdir()) == []
    assert find_processes(temporary) == []


def test_the_demo_keeps_its_servers_until_it_is_interrupted(visitor: CommandLine, temporary: Path) -> None:
    process = visitor.start("demo", "--keep")
    assert process.stdout is not None
    told = ""
    while "Prefect's UI: " not in told:
        line = process.stdout.readline()
        assert line, told
        told += line
    begun, _, left = told.partition("Ctrl-C stops them")
    exports = re.findall(r"^export [A-Z_]+=\S+$", begun, re.MULTILINE)
    assert [each.partition("=")[0] for each in exports] == [
        "export PGFLOW_DSN",
        "export PREFECT_API_URL",
        "export PREFECT_API_AUTH_STRING",
    ]
    assert re.findall(r"^export .*$", left, re.MULTILINE) == exports, "said again where the terminal is looked at"
    [link] = re.findall(r"^in Prefect: (http\S+)$", told, re.MULTILINE)
    page = httpx.get(link, headers={"Accept": "text/html"}, timeout=TIMEOUT, follow_redirects=True)
    assert "<!DOCTYPE html>" in page.text
    api = exports[1].partition("=")[2]
    [ui] = re.findall(r"^Prefect's UI: (http\S+)$", left, re.MULTILINE)
    assert api == f"{ui}/api"
    assert link.startswith(ui)
    assert re.search(r'^SQL: \S*psql "\$PGFLOW_DSN"$', left, re.MULTILINE)
    answer = f"{api}/flow_runs/{link.rpartition('/')[2]}"
    access = exports[2].partition("=")[2]
    user, _, password = access.partition(":")
    flow_run = httpx.get(answer, timeout=TIMEOUT, auth=(user, password)).json()
    assert flow_run["state_name"] == "Completed"
    assert f"its password: {access}" in told + str(process.stdout.readline())
    assert httpx.get(answer, timeout=TIMEOUT).status_code == 401, "a web page does not know the password"
    asked = httpx.get(answer, timeout=TIMEOUT, auth=(user, password), headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in asked.headers
    [private] = temporary.glob("*/private")
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    assert {"server.log", "Maildir"}.isdisjoint(path.name for path in private.parent.iterdir())
    assert find_processes(temporary) != []

    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=TIMEOUT)

    assert process.returncode == 0
    assert err.endswith("INFO send_emails: sent 20 mails, 0 were there already\n"), err
    assert err.count("\n") == 1, err
    assert list(temporary.iterdir()) == []
    wait_until(lambda: find_processes(temporary) == [], "all that it had started is gone")
    with pytest.raises(httpx.ConnectError):
        httpx.get(link)
