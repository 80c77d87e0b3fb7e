"""Ten workflows as users write them, on the three services; each file of `ten/flows` is one."""

import http.server
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, Envelope, Session

from tests.acceptance.conftest import CommandLine, PrefectView, Services, wait_until
from tests.acceptance.test_handler_files import save_secret
from tests.conftest import Connection
from tests.engine import column, get_run, get_state, run_workflow, value

pytestmark = pytest.mark.once

FILES = Path(__file__).parent / "ten" / "flows"
ORDERS = [
    {"sku": "a", "price": 1.5, "amount": 2},
    {"sku": "b", "price": 4.0, "amount": 1},
    {"sku": "a", "price": 1.5, "amount": 1},
]
PASSWORD = "sesame"  # noqa: S105  not a real one
WITH_PANDAS = find_spec("pandas") is not None

LEAVES = {
    "etl": ("load", 2),
    "training": ("choose", {"rate": 0.1, "loss": None}),
    "thumbnails": ("measure", {f"{number}.small.pgm": "2 2" for number in range(3)}),
    "mailing": ("send", 2),
    "generated": ("total", 2 * sum(range(300))),
    "approval": ("book", "Ada approved 90"),
    "nightly": ("report", True),
    "secrets": ("check", True),
    "models": ("remind", "12.50 EUR from DE02 by 2026-07-15"),
    "pool": ("find", [2, 3, 5, 7, 11, 13, 17, 19]),
}
"""Of each workflow its last step, and what that returns."""


class Postbox:
    """Takes mails."""

    def __init__(self) -> None:
        self.takers: list[str] = []

    async def handle_DATA(self, server: SMTP, session: Session, envelope: Envelope) -> str:  # noqa: N802
        self.takers += envelope.rcpt_tos
        return "250 taken"


@dataclass(frozen=True)
class Project:
    """A user's folder, whose workflows are in the database.

    Attributes:
        cli: the command, in this folder.
        slugs: of each workflow, by its file.
        payloads: of one run of each.
    """

    cli: CommandLine
    slugs: Mapping[str, str]
    payloads: Mapping[str, object]


@pytest.fixture
def postbox() -> Iterator[tuple[Postbox, int]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    postbox = Postbox()
    server = Controller(postbox, hostname="127.0.0.1", port=port)
    server.start()
    yield postbox, port
    server.stop()


@pytest.fixture
def shop_url() -> Iterator[str]:
    """An API that has orders."""

    class Shop(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(ORDERS).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Shop)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def project(cli: CommandLine, prefect_api: str, postbox: tuple[Postbox, int], shop_url: str) -> Project:
    """The ten files in a folder of this test's own, pushed under slugs of its own: all tests share Prefect's server."""
    suffix = uuid4().hex[:6]
    slugs = {name: f"{name}_{suffix}" for name in LEAVES}
    for path in FILES.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        cli.write(f"flows/{path.name}", text.replace(f'Workflow("{path.stem}"', f'Workflow("{path.stem}_{suffix}"'))
    (cli.directory / "images").mkdir()
    save_secret(prefect_api, f"shop-{suffix}", PASSWORD)
    own = replace(cli, environment={**cli.environment, "SHOP_PASSWORD": PASSWORD})
    pushed = own("push", *(f"flows/{name}.py" for name in LEAVES), "--yes")
    assert pushed.code == 0, pushed.err
    if not WITH_PANDAS:
        cli.remove("flows/etl_pandas.py")
    payloads = {
        "etl": {"url": shop_url, "day": "2026-07-01"},
        "thumbnails": {"folder": str(cli.directory / "images")},
        "mailing": {"port": postbox[1], "people": ["ada@example.com", "bob@example.com"]},
        "generated": {"factor": 2},
        "approval": {"price": 100},
        "secrets": {"text": "hello", "block": f"shop-{suffix}"},
        "models": {
            "id": 7,
            "at": "2026-07-01T12:00:00Z",
            "total": "12.50",
            "currency": "EUR",
            "payment": {"kind": "transfer", "iban": "DE02"},
        },
        "pool": {"limit": 400},
    }
    return Project(own, slugs, payloads)


def approve(db: Connection, run_id: UUID) -> None:
    """Be the person who approves."""
    wait_until(lambda: bool(find_waiting(db, run_id)), "a person has to approve")
    db.execute("SELECT pgflow.complete_step(%s, 'approve', %s)", (run_id, '{"by": "Ada"}'))


def find_waiting(db: Connection, run_id: UUID) -> object:
    waiting = "SELECT count(*) FROM pgflow.step_states WHERE run_id = %s AND step_slug = 'approve'"
    return value(db, waiting, run_id)


def check_result(db: Connection, name: str, run_id: UUID) -> None:
    run = get_run(db, run_id)
    assert run.status == "completed", (name, run.error_message)
    leaf, expected = LEAVES[name]
    result = get_state(db, run_id, leaf).step_result
    if name == "training":
        assert isinstance(result, dict)
        result = {**result, "loss": None}
    assert result == expected, name


@pytest.mark.timeout(600)
@pytest.mark.parametrize("service", ["worker", "serve"])
def test_ten_workflows_complete_on_a_service(
    project: Project, db: Connection, prefect: PrefectView, postbox: tuple[Postbox, int], service: str
) -> None:
    nightly = project.slugs["nightly"]
    deployed = project.cli(
        "deploy", nightly, "--handlers", "flows/nightly.py", "--cron", "0 3 * * *", "--timezone", "Europe/Berlin"
    )
    assert deployed.code == 0, deployed.err
    services = Services(project.cli)
    try:
        services.start(service)
        prefect.press_run(nightly, {})  # as its schedule does, at night
        runs = {
            name: run_workflow(db, slug, project.payloads.get(name, {})).id
            for name, slug in project.slugs.items()
            if name != "nightly"
        }
        approve(db, runs["approval"])
        runs["nightly"] = await_only_run(db, nightly)
        wait_until(lambda: all(get_run(db, each).status != "pending" for each in runs.values()), "all runs end")
    finally:
        services.stop()

    for name, run_id in runs.items():
        check_result(db, name, run_id)
    assert sorted(postbox[0].takers) == ["ada@example.com", "bob@example.com"]
    assert value(db, "SELECT sum(value) FROM turnover WHERE day = '2026-07-01'") == 8.5
    [schedule] = prefect.find_deployment(nightly)["schedules"]
    assert schedule["active"]
    assert schedule["schedule"]["cron"] == "0 3 * * *"
    assert PASSWORD not in str(value(db, "SELECT string_agg(s::text, '') FROM pgflow.step_states s"))


def await_only_run(db: Connection, slug: str) -> UUID:
    """Return the run of a workflow, once Prefect's button has begun it."""
    chosen = "SELECT id FROM pgflow.runs WHERE workflow_slug = %s"
    wait_until(lambda: len(column(db, chosen, slug)) == 1, f"{slug} has a run")
    [found] = column(db, chosen, slug)
    assert isinstance(found, UUID)
    return found


@pytest.mark.timeout(600)
def test_ten_workflows_complete_by_run(project: Project, db: Connection) -> None:
    def run(name: str) -> tuple[int, str]:
        payload = json.dumps(project.payloads.get(name, {}))
        ended = project.cli("run", project.slugs[name], "--handlers", f"flows/{name}.py", "--payload", payload)
        return ended.code, ended.out + ended.err

    with ThreadPoolExecutor(3) as several:
        approving = several.submit(run, "approval")
        approve(db, await_only_run(db, project.slugs["approval"]))
        others = {name: several.submit(run, name) for name in LEAVES if name != "approval"}
    for name, done in {**others, "approval": approving}.items():
        code, text = done.result()
        assert code == 0, (name, text)
        check_result(db, name, await_only_run(db, project.slugs[name]))


@pytest.mark.skipif(not WITH_PANDAS, reason="pandas is not installed: `pip install pandas` un-skips this")
def test_tables_of_pandas_stay_within_a_step(cli: CommandLine, db: Connection, shop_url: str) -> None:
    cli.write("flows/etl_pandas.py", (FILES / "etl_pandas.py").read_text(encoding="utf-8"))
    assert cli("push", "flows/etl_pandas.py", "--yes").code == 0
    ended = cli("run", "etl_pandas", "--payload", json.dumps({"url": shop_url}))
    assert ended.code == 0, ended.err
    assert get_state(db, ended.find_run_id(), "transform").step_result == {"a": 4.5, "b": 4.0}
