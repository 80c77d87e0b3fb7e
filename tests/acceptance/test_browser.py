"""Prefect's UI in a real browser shows a run as PostgreSQL has it: these steps, names and arrows, all of it green."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from uuid import uuid4

import pytest
from playwright.sync_api import Browser, expect

from tests.acceptance.browser import PATIENCE, Screen, open_browser, open_screen
from tests.acceptance.conftest import CommandLine, PrefectView
from tests.conftest import Connection
from tests.engine import DIAMOND, define

pytestmark = pytest.mark.once

WIDE_AND_DEEP = """
WITH slugs (from_step_slug, to_step_slug) AS (
    SELECT 'begin', 'wide_' || n FROM generate_series(1, 96) n
    UNION ALL SELECT 'wide_' || n, 'join' FROM generate_series(1, 96) n
    UNION ALL SELECT 'join', 'split'
    UNION ALL SELECT 'split', format('chain_%%s_1', chain) FROM generate_series(1, 4) chain
    UNION ALL SELECT format('chain_%%s_%%s', chain, n - 1), format('chain_%%s_%%s', chain, n)
        FROM generate_series(1, 4) chain, generate_series(2, 25) n
    UNION ALL SELECT format('chain_%%s_25', chain), 'meet' FROM generate_series(1, 4) chain
), workflow AS (
    INSERT INTO pgflow.workflows (slug) VALUES (%(workflow)s) RETURNING slug
), steps AS (
    INSERT INTO pgflow.steps (workflow_slug, slug)
    SELECT DISTINCT slug, step FROM workflow, slugs, LATERAL (VALUES (from_step_slug), (to_step_slug)) both_ends (step)
    RETURNING workflow_slug
)
INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug)
SELECT workflow_slug, from_step_slug, to_step_slug FROM slugs, (SELECT DISTINCT workflow_slug FROM steps) defined
"""
"""200 steps: a fan-out over 96 and its join, then four chains of 25 each, which meet again.

After a join of so many, one step only: Prefect counts an arrow from there 96 times, and its UI hides the arrows of a
graph that has more than 500.
"""

HANDLERS = '''
"""A handler for each step; none of them does anything."""

from pgflow_prefect import Workflow

workflow = Workflow({workflow!r})

for slug in {steps!r}:

    @workflow.step(slug)
    async def work() -> None:
        pass
'''


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as found:
        yield found


@pytest.fixture
def screen(browser: Browser, prefect_api: str, tmp_path: Path) -> Iterator[Screen]:
    with open_screen(browser, tmp_path / "pictures", here=prefect_api.removesuffix("api")) as found:
        yield found


def write_handlers(cli: CommandLine, workflow: str, steps: Sequence[str]) -> None:
    cli.write(f"flows/{workflow}.py", HANDLERS.format(workflow=workflow, steps=[*steps]))


def read_definition(db: Connection, workflow: str) -> tuple[list[str], list[tuple[str, str]]]:
    """Return the steps and the deps of a workflow, in alphabetical order."""
    steps = db.execute("SELECT slug FROM pgflow.steps WHERE workflow_slug = %s", [workflow])
    deps = db.execute("SELECT from_step_slug, to_step_slug FROM pgflow.deps WHERE workflow_slug = %s", [workflow])
    return sorted(str(slug) for [slug] in steps), sorted((str(begin), str(end)) for begin, end in deps)


def run_to_its_end(cli: CommandLine, prefect: PrefectView, workflow: str, steps: Sequence[str]) -> str:
    """Run a workflow, and return the page that `run` names, once Prefect has recorded all of it."""
    ran = cli("run", workflow)
    assert (ran.code, ran.err) == (0, "")
    prefect.await_task_states(ran.find_run_id(), dict.fromkeys(steps, "Completed"))
    [url] = [line.removeprefix("in Prefect: ") for line in ran.lines if line.startswith("in Prefect: ")]
    return url


def choose_version_2(url: str) -> str:
    """Return the same page in version 2 of Prefect's UI, whose scene can be read."""
    return url.replace("/runs/", "/v2/runs/")


def check_answer(answer: Mapping[str, list[list[object]]], steps: Sequence[str], deps: Sequence[object]) -> None:
    """Check the graph that the page asked Prefect for."""
    nodes = {str(node["id"]): node for _, node in answer["nodes"] if isinstance(node, dict)}
    labels = {node_id: str(node["label"]) for node_id, node in nodes.items()}
    assert sorted(labels.values()) == steps
    assert {node["state_type"] for node in nodes.values()} == {"COMPLETED"}
    parents = [(labels[each["id"]], labels[key]) for key, node in nodes.items() for each in node["parents"]]
    children = [(labels[key], labels[each["id"]]) for key, node in nodes.items() for each in node["children"]]
    # Prefect names a step that follows a join once for each step that the join waits for.
    assert sorted(set(parents)) == sorted(set(children)) == deps


def list_task_runs(screen: Screen, count: int) -> list[str]:
    """Open the tab of the task runs, which are so many and completed, and return the names on all its pages."""
    page = screen.page
    page.get_by_role("tab", name="Task Runs").click()
    panel = page.get_by_role("tabpanel", name="Task Runs")
    expect(panel.get_by_text(f"{count} Task runs")).to_be_visible(timeout=PATIENCE)
    links = page.locator('main li a[href*="/runs/task-run/"]')
    place = page.get_by_text(re.compile(r"^Page \d+ of \d+$"))
    found: list[str] = []
    while True:
        current, last = map(int, re.findall(r"\d+", place.inner_text(timeout=PATIENCE)))
        names = links.all_inner_texts()
        expect(panel.get_by_text(f"({len(names)} Completed)")).to_be_visible(timeout=PATIENCE)
        found += names
        if current == last:
            return sorted(found)
        page.get_by_label("Go to next page").click()
        expect(links.first).not_to_have_text(names[0], timeout=PATIENCE)  # until then, it shows the page before


def test_a_diamond_is_drawn_as_it_is_defined(
    cli: CommandLine, db: Connection, prefect: PrefectView, screen: Screen
) -> None:
    workflow = f"diamond_{uuid4().hex[:8]}"
    define(db, workflow, DIAMOND)
    write_handlers(cli, workflow, [*DIAMOND])
    steps, deps = read_definition(db, workflow)
    url = run_to_its_end(cli, prefect, workflow, steps)

    answer = screen.open_graph(choose_version_2(url))
    drawing = screen.await_drawing(steps, deps)
    check_answer(answer, steps, deps)
    assert (drawing.steps, drawing.deps) == (steps, deps)
    screen.await_green_boxes(4)
    screen.keep_picture("diamond")
    assert list_task_runs(screen, len(steps)) == steps
    screen.keep_picture("diamond_task_runs")

    check_answer(screen.open_graph(url), steps, deps)
    screen.await_something_green()
    screen.keep_picture("diamond_in_version_1")


def test_two_hundred_steps_are_drawn_as_they_are_defined(
    cli: CommandLine, db: Connection, prefect: PrefectView, screen: Screen
) -> None:
    workflow = f"wide_and_deep_{uuid4().hex[:8]}"
    db.execute(WIDE_AND_DEEP, {"workflow": workflow})
    steps, deps = read_definition(db, workflow)
    assert (len(steps), len(deps)) == (200, 297)
    write_handlers(cli, workflow, steps)
    url = run_to_its_end(cli, prefect, workflow, steps)

    answer = screen.open_graph(choose_version_2(url))
    drawing = screen.await_drawing(steps, deps)
    check_answer(answer, steps, deps)
    assert (drawing.steps, drawing.deps) == (steps, deps)
    screen.await_green_boxes(190)  # a few are behind a button, the time or the bar at the bottom
    screen.keep_picture("two_hundred_steps")
    assert list_task_runs(screen, len(steps)) == steps
    screen.keep_picture("two_hundred_steps_task_runs")


def test_a_deployments_page_has_a_field_for_the_payload(
    cli: CommandLine, prefect: PrefectView, screen: Screen, chain: str
) -> None:
    assert cli("deploy", chain).code == 0
    deployment = prefect.find_deployment(chain)["id"]
    for version in ("", "/v2"):
        screen.open(f"{prefect.url.removesuffix('/api')}{version}/deployments/deployment/{deployment}/run")
        expect(screen.page.get_by_text(re.compile(r"^\s*payload\b")).first).to_be_visible(timeout=PATIENCE)
        screen.keep_picture(f"form{version.replace('/', '_')}")
