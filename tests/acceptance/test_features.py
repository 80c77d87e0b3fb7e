"""Workflows that skip, branch, nest, clean up and map, as users write them; each file of `features/flows` is one.

On `run` and on each service: what becomes of a step must not depend on who executes the run.
"""

import asyncio
import http.server
import json
import re
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from pgflow_prefect.consumer import perform
from tests.acceptance.conftest import CommandLine, Services, wait_until
from tests.conftest import Connection
from tests.engine import get_run, get_state, run_workflow, value
from tests.integration.queues.test_pgqueuer import pgqueuer_tables

pytestmark = pytest.mark.once

FILES = Path(__file__).parent / "features" / "flows"
DONE = ("completed", None)
FAILED = ("failed", None)


@dataclass(frozen=True)
class Expected:
    """What one run of a workflow becomes.

    Attributes:
        payload: of the run.
        results: of some of its steps.
        others: status and skip_reason of the steps that were not executed to a result.
        status: of the run.
    """

    payload: object
    results: Mapping[str, object]
    others: Mapping[str, tuple[str, str | None]]
    status: str = "completed"


ARTICLES = [
    {"name": "tea", "cents": 3},
    {"name": "air", "cents": 0},
    {"name": "shy", "cents": 4},
    {"name": "debt", "cents": -1},
]

EXPECTED = {
    "delta_load": Expected({"rows": []}, {"report": "0 rows"}, {"load": ("completed", "requested")}),
    "shipping": Expected(
        {"kilograms": 5},
        {"choose": 5, "tell": "on its way: courier with 5 kg"},
        {"letter": ("completed", "branch_not_taken")},
    ),
    "customs": Expected(
        {"country": "DE", "goods": ["glass", "tin"]},
        {"send": "wrapped, not declared"},
        {"fill_in_form": ("completed", "condition_unmet"), "declare": ("completed", "dependency_skipped")},
    ),
    "exchange_rate": Expected({"amount": 4}, {"convert": 6.0}, {"ask_service": ("completed", "handler_failed")}),
    "night_shift": Expected(
        {},
        {"alarm": ["count: the scanner is off"], "archive": "archived"},
        {"count": FAILED, "publish": ("failed", "dependency_failed")},
        "failed",
    ),
    "cluster": Expected(
        {},
        {"stop": "cluster 7 is stopped"},
        {"compute": ("completed", "handler_failed"), "store": ("completed", "dependency_skipped")},
    ),
    "price_list": Expected({"articles": ARTICLES}, {"print_list": "1. tea: 6\n2. shy: 8"}, {}),
    "parcels": Expected(
        {"parcels": ["a", "bb", "ccc"]},
        {"weigh": [1, 2, 3], "label": ["<1>", "<2>", "<3>"], "sign": "1 gone, 2 gone, 3 gone"},
        {},
    ),
    "daily_sales": Expected(
        {"shops": ["north", "south"]},
        {
            "find_days": ["2026-01-04", "2026-01-05"],
            "publish": ["north from 2026-01-04", "south from 2026-01-04"],
        },
        {},
    ),
    "orders": Expected(
        {"is_monday": True, "orders": [1, -2, 3]},
        {"choose": [1, -2, 3], "clear_desk": "clear"},
        {
            "small": ("completed", "branch_not_taken"),
            "invoice": FAILED,
            "send": ("failed", "dependency_failed"),
        },
        "failed",
    ),
    "tour": Expected(
        {"traveller": "Ada", "places": ["Bern", "Basel", "Ghent"]},
        {
            "protect": {"insure": "Ada is insured"},
            "tell": "Ada is insured, a ticket to Bern, a ticket to Basel, a ticket to Ghent",
        },
        {},
    ),
}
"""Of each workflow, by its file."""

ITEMS = {
    ("price_list", "price"): [(DONE, 1), (("completed", "requested"), 1), (DONE, 2), (FAILED, 2)],
    ("orders", "invoice"): [(DONE, 1), (FAILED, 1), (DONE, 1)],
    ("parcels", "hand_over"): [(DONE, 1)] * 3,
}
"""Of some maps, how each item ends, and after how many attempts."""


@contextmanager
def open_label_printer() -> Iterator[str]:
    """Answer requests for labels."""

    class Printer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(f"<{given['input']['item']}>").encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Printer)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def carry(given: dict[str, Any]) -> str:
    """Do what the worker of the queue does with a parcel."""
    return f"{given['item'].strip('<>')} gone"


@contextmanager
def open_queue(dsn: str) -> Iterator[None]:
    """Let a worker of pgqueuer take parcels, until the block ends."""
    ready, over = threading.Event(), threading.Event()

    async def work() -> None:
        from pgqueuer.qm import QueueManager  # noqa: PLC0415  an extra
        from pgqueuer.types import QueueExecutionMode  # noqa: PLC0415  an extra

        async with pgqueuer_tables(dsn) as queries:
            ready.set()
            while not over.is_set():
                manager = QueueManager(queries)

                @manager.entrypoint("parcels")
                async def parcels(job: Any) -> None:
                    await perform(job.payload, carry, dsn)

                await manager.run(mode=QueueExecutionMode.drain)
                await asyncio.sleep(0.2)

    with ThreadPoolExecutor(1) as thread:
        working = thread.submit(asyncio.run, work())
        try:
            wait_until(lambda: ready.is_set() or working.done(), "the queue is there")
            yield
        finally:
            over.set()
            working.result()


@pytest.fixture
def slugs(cli: CommandLine, db: Connection, dsn: str) -> Iterator[dict[str, str]]:
    """The slug of each workflow, in the database: they are this test's own, as all tests share Prefect's server."""
    suffix = uuid4().hex[:6]
    found = {name: f"{name}_{suffix}" for name in EXPECTED}
    db.execute("CREATE SCHEMA shop")
    db.execute("""
        CREATE FUNCTION shop.weigh(input jsonb) RETURNS jsonb LANGUAGE sql AS $$
            SELECT jsonb_agg(length(e.item) ORDER BY e.place)
            FROM jsonb_array_elements_text(input -> 'items') WITH ORDINALITY AS e (item, place)
        $$
    """)
    with open_label_printer() as url, open_queue(dsn):
        for name in found:
            text = (FILES / f"{name}.py").read_text(encoding="utf-8")
            text = re.sub(r'\b(Workflow|Child)\("(\w+)"', rf'\1("\2_{suffix}"', text)
            cli.write(f"flows/{name}.py", text.replace("http://labels.test/", url))
        pushed = cli("push", *(f"flows/{name}.py" for name in found), "--yes")
        assert pushed.code == 0, pushed.err
        db.execute("SELECT pgflow_prefect.enable_workflow(slug) FROM pgflow.workflows")
        yield found


def start_backfill(cli: CommandLine, db: Connection, slug: str, payload: object) -> UUID:
    """Start a run for a date of the past, and return it."""
    begun = cli(
        *("backfill", slug, "--from", "2026-01-05", "--to", "2026-01-05", "--every", "1d"),
        *("--payload", json.dumps(payload)),
    )
    assert begun.code == 0, begun.err
    return find_run(db, slug)


def find_run(db: Connection, slug: str) -> UUID:
    found = value(db, "SELECT id FROM pgflow.runs WHERE workflow_slug = %s", slug)
    assert isinstance(found, UUID)
    return found


def execute_by_run(cli: CommandLine, db: Connection, slugs: Mapping[str, str]) -> None:
    """Execute a run of each workflow by `run`, some at a time."""

    def run(name: str, *arguments: str) -> None:
        ended = cli("run", *arguments, "--handlers", f"flows/{name}.py")
        assert ended.code == (EXPECTED[name].status == "failed"), (name, ended.out, ended.err)

    dated = start_backfill(cli, db, slugs["daily_sales"], EXPECTED["daily_sales"].payload)
    with ThreadPoolExecutor(3) as several:
        working = [several.submit(run, "daily_sales", "--resume", str(dated))]
        working += [
            several.submit(run, name, slug, "--payload", json.dumps(EXPECTED[name].payload))
            for name, slug in slugs.items()
            if name != "daily_sales"
        ]
    for each in working:
        each.result()


def execute_by_service(cli: CommandLine, db: Connection, slugs: Mapping[str, str], service: str) -> None:
    """Start a run of each workflow in SQL, and let a service execute them."""
    services = Services(cli)
    try:
        services.start(service)
        dated = start_backfill(cli, db, slugs["daily_sales"], EXPECTED["daily_sales"].payload)
        runs = [
            run_workflow(db, slug, EXPECTED[name].payload).id for name, slug in slugs.items() if name != "daily_sales"
        ]
        wait_until(lambda: all(get_run(db, each).status != "pending" for each in [*runs, dated]), "all runs end")
    finally:
        services.stop()


@pytest.mark.timeout(600)
@pytest.mark.parametrize("executed_by", ["run", "worker", "serve"])
def test_workflows_skip_branch_map_nest_and_clean_up(
    cli: CommandLine, db: Connection, slugs: dict[str, str], executed_by: str
) -> None:
    if executed_by == "run":
        execute_by_run(cli, db, slugs)
    else:
        execute_by_service(cli, db, slugs, executed_by)

    for name, slug in slugs.items():
        check(db, find_run(db, slug), name)
    for (name, step), ends in ITEMS.items():
        found = db.execute(
            "SELECT status, skip_reason, attempts FROM pgflow.step_items WHERE run_id = %s AND step_slug = %s "
            "ORDER BY item_index",
            [find_run(db, slugs[name]), step],
        )
        assert [((status, reason), attempts) for status, reason, attempts in found] == ends, name
    children = db.execute(
        "SELECT r.parent_step_slug, r.parent_item, r.status, max(s.attempts) FROM pgflow.runs r "
        "JOIN pgflow.step_states s ON s.run_id = r.id WHERE r.parent_run_id IS NOT NULL GROUP BY r.id ORDER BY 1, 2"
    ).fetchall()
    assert children == [*(("book", item, "completed", 1) for item in range(3)), ("protect", None, "completed", 1)]


def check(db: Connection, run_id: UUID, name: str) -> None:
    expected = EXPECTED[name]
    run = get_run(db, run_id)
    assert run.status == expected.status, (name, run.error_message)
    results = {step: get_state(db, run_id, step).step_result for step in expected.results}
    assert results == expected.results, name
    ends = {
        str(step): (status, reason)
        for step, status, reason in db.execute(
            "SELECT step_slug, status, skip_reason FROM pgflow.step_states WHERE run_id = %s", [run_id]
        )
    }
    assert {step: end for step, end in ends.items() if end != DONE} == expected.others, name
