"""The commands on a database of the released pgflow: what works, and what says that it does not."""

import json
from collections.abc import Iterator
from uuid import uuid4

import pytest

from tests.acceptance.conftest import CommandLine, PrefectView, Services, kill, wait_until
from tests.conftest import route
from tests.released_lab import FAKE, PACKAGE, ReleasedFlows, install_released, open_flows, read_objects

pytestmark = pytest.mark.once

MAPPED = {"list_photos": [], "resize": ["list_photos"], "report": ["resize"]}
LIMITED = (
    "the schema of the released pgflow (pgflow.dev). On that, these commands work: `list`, `graph`, `runs`, `status`"
)
REFUSED = {
    "cancel latest": "pgflow has no function that cancels a run",
    "credentials": "no row of a binding was made by an older version",
    "diff photos": "pgflow compiles flows from TypeScript",
    "logs latest": "pgflow's workers log where they run",
    "prune --older-than 30d": "pgflow.delete_flow_and_data",
    "push flows/photos.py": "pgflow compiles flows from TypeScript",
    "retry latest": "pgflow has no function that reopens a failed run",
    "shadow photos": "this program does not compare with the results of pgflow's workers yet",
    "skip latest report": "pgflow has no function that skips a step by hand",
}
"""Commands, and why each does not work."""

UNMOVED = (
    "deploy photos",
    "run photos",
    "run --resume latest",
    "serve flows/photos.py",
    "worker flows/photos.py",
)
"""Commands that work on flows that were moved to Prefect."""


@pytest.fixture
def flows(empty_dsn: str) -> Iterator[ReleasedFlows]:
    """A database of the released pgflow, before `init`."""
    install_released(empty_dsn, PACKAGE)
    with open_flows(empty_dsn) as opened:
        yield opened


def test_init_and_the_commands_that_look(outside: CommandLine, empty_dsn: str, flows: ReleasedFlows) -> None:
    outside = on(outside, empty_dsn)
    before = read_objects(flows.db)
    refused = outside("runs")
    assert (refused.code, refused.find_error().count("run `pgflow-prefect init` first")) == (1, 1)
    installed = outside("init")
    assert installed.code == 0
    assert "installed in database" in installed.out
    assert LIMITED in installed.out
    again = json.loads(outside("init", "--json").out)
    assert (again["schema"], again["outcome"]) == ("released", "current")
    assert read_objects(flows.db) == before, "nothing of pgflow's was changed"

    assert "no runs: start one with SELECT pgflow.start_flow" in outside("runs").out
    flows.define("photos", MAPPED, maps=["resize"])
    before_flows = read_objects(flows.db)
    run_id = flows.start("photos", {"album": 7})
    flows.work("photos", lambda step, index: [1, 2, 3])
    flows.work("photos", lambda step, index: index, at_most=2)

    assert "photos\t3\t2\t1\t0\t0\t-\t-" in outside("list").lines
    assert "resize\tlist_photos\texternal\t" in outside("list", "photos").lines
    assert "list_photos -> resize -> report" in outside("graph", "photos").out
    [listed] = [line for line in outside("runs", "--workflow", "photos").lines if str(run_id) in line]
    assert "\tpending\t" in listed
    assert listed.split("\t")[5] == "1/3"
    shown = outside("status", "latest").out
    assert "pgflow's own workers execute it" in shown
    assert "resize\trunning (pending)\t\t1\t" in shown
    assert "2 of 3 tasks" in shown
    assert "2 of 3 tasks" in outside("graph", "--run", "latest").out

    flows.work("photos", lambda step, index: index)
    flows.work("photos", lambda step, index: "sent")
    ended = json.loads(outside("status", str(run_id)[:8], "--json").out)
    assert (ended["run"]["status"], ended["run"]["payload"]) == ("completed", {"album": 7})
    [resized] = [each for each in ended["steps"] if each["step_slug"] == "resize"]
    assert (resized["tasks"], resized["step_result"]) == (3, [0, 1, 2])
    assert outside("status", "latest", "--watch").code == 0
    for picture in ("mermaid", "svg", "dot", "json"):
        assert "3 tasks" in outside("graph", "--run", "latest", "--format", picture).out or picture == "json"
    assert "removed from database" in outside("init", "--remove").out
    assert read_objects(flows.db) == before_flows
    assert "has nothing of this program" in outside("init", "--remove").out
    assert "run `pgflow-prefect init` first" in outside("runs").find_error()


def test_a_flow_is_drawn_exported_imported_and_checked(
    outside: CommandLine, empty_dsn: str, flows: ReleasedFlows
) -> None:
    outside = on(outside, empty_dsn)
    outside("init")
    flows.define("photos", MAPPED, maps=["resize"])
    flows.start("photos", {"album": 7})
    flows.work("photos", lambda step, index: [1, 2, 3])
    assert "resize  (for each of list_photos)" in outside("graph", "photos").out
    assert "report\t" in outside("timeline", "latest").out
    exported = outside("export", "photos").out
    assert "SELECT pgflow.add_step('photos', 'resize', ARRAY['list_photos']::text[], step_type => 'map');" in exported
    assert "workflow 'photos' is valid" in outside("validate", "photos").out
    assert outside("import", "photos").code == 0
    stub = '@workflow.map(over="list_photos", unimplemented=True)\nasync def resize(item: JsonValue) -> JsonValue:'
    assert stub in (outside.directory / "flows/photos.py").read_text(encoding="utf-8")
    checked = outside("validate", "photos")
    assert checked.code == 0
    assert "workflow 'photos' is valid" in checked.out

    told = outside("enable", "photos").out
    assert "`pgflow-prefect observe` shows its runs begun since" in told
    assert "1 run goes on and began before that: `pgflow-prefect observe --adopt` shows it" in told
    assert "photos\t3\t2\t1\t0\t0\tyes\t-" in outside("list").lines


def test_every_other_command_says_why_it_does_not_work(
    outside: CommandLine, empty_dsn: str, flows: ReleasedFlows
) -> None:
    outside = on(outside, empty_dsn)
    flows.define("photos", MAPPED, maps=["resize"])
    flows.start("photos", {})
    outside("init")
    functions = "".join(f"@workflow.step\nasync def {step}(): ...\n" for step in MAPPED)
    head = "from pgflow_prefect import Workflow\nworkflow = Workflow('photos')\nflow = workflow.flow\n"
    outside.write("flows/photos.py", head + functions)
    # Some ask first whether there is a server that stays; the database is opened before it is asked anything.
    answers = {command: outside(*command.split(), PREFECT_API_URL="http://127.0.0.1:1/api") for command in REFUSED}
    assert {command: answer.code for command, answer in answers.items()} == dict.fromkeys(REFUSED, 1)
    assert [command for command, answer in answers.items() if LIMITED not in answer.find_error()] == []
    assert [command for command, reason in REFUSED.items() if reason not in answers[command].err] == []
    unmoved = {command: outside(*command.split(), PREFECT_API_URL="http://127.0.0.1:1/api") for command in UNMOVED}
    assert {command: answer.code for command, answer in unmoved.items()} == dict.fromkeys(UNMOVED, 2)
    advice = "pgflow's own workers execute flow 'photos'. Move it first: `pgflow-prefect bind photos --python`"
    assert [command for command, answer in unmoved.items() if advice not in answer.find_error()] == []
    assert flows.db.execute("SELECT DISTINCT status FROM pgflow.runs").fetchall() == [("started",)]


def test_doctor_tells_the_version_the_workers_and_the_tasks_that_wait(
    outside: CommandLine, empty_dsn: str, flows: ReleasedFlows
) -> None:
    outside = on(outside, empty_dsn)

    def examine() -> dict[str, tuple[str, str]]:
        checks = json.loads(outside("doctor", "--no-flow-run", "--json").out)
        return {each["check"]: (each["outcome"], each["message"]) for each in checks}

    assert examine()["schema"] == ("fault", "there is no schema pgflow_prefect")
    outside("init")
    flows.define("photos", MAPPED, maps=["resize"])
    flows.start("photos", {})
    found = examine()
    assert found["schema"][0] == "ok"
    assert found["pgflow"] == (
        "warning",
        "the released pgflow, 0.7 or later: the task of a worker that vanishes stays begun for ever",
    )
    assert "photos has 1 queued and 0 begun, it has never had one" in found["workers"][1]
    assert found["queues"] == ("ok", "1 task queued in 1 flow")
    assert {"rights", "triggers", "snapshots", "listen", "deployments", "runs"}.isdisjoint(found)
    flows.claim("photos")
    assert examine()["workers"] == ("ok", "live workers: 1 of photos")
    late = "UPDATE pgflow.step_tasks SET queued_at = now() - interval '1 h', started_at = now() - interval '1 h'"
    flows.db.execute(late.replace("1 h'", "1 hour'").encode())
    assert examine()["stalled tasks"][0] == "warning"


def test_a_step_is_moved_its_lost_messages_are_named_and_everything_is_removed(
    outside: CommandLine, empty_dsn: str, flows: ReleasedFlows
) -> None:
    outside = on(outside, empty_dsn)
    flows.define("photos", {"list": [], "report": []})
    before = read_objects(flows.db)
    flows.start("photos", {})
    outside("init")
    moved = outside("bind", "photos", "list", "--python")
    assert "Prefect executes step 'list' of flow 'photos', and pgflow's own workers do the others" in moved.out
    assert flows.work("photos", lambda step, index: 1) == [("report", 0)]
    check = find_check(outside, "messages")
    assert (check["outcome"], "'list' of photos (1 waiting)" in str(check["message"])) == ("ok", True)
    flows.db.execute("DROP SCHEMA pgflow_prefect CASCADE")
    outside("init")
    check = find_check(outside, "messages")
    assert check["outcome"] == "fault"
    assert "step 'list'[0] of run" in str(check["message"])
    assert outside("init", "--remove").code == 0
    assert read_objects(flows.db) == before
    assert flows.work("photos", lambda step, index: 1) == [("list", 0)]
    outside("init")
    outside("bind", "photos", "report", "--sql", "public.nothing")
    assert outside("bind", "photos", "report", "--python").code == 0
    back = outside("bind", "photos", "--external")
    assert "start its Edge Function" not in back.out, "it has never stopped"


def find_check(outside: CommandLine, name: str) -> dict[str, object]:
    """Return what `doctor` says of one of its checks."""
    checks = json.loads(outside("doctor", "--no-flow-run", "--json").out)
    [check] = [each for each in checks if each["check"] == name]
    return dict(check)


def test_observe_shows_what_pgflows_workers_execute_and_record_what_they_have_executed(
    cli: CommandLine, empty_dsn: str, flows: ReleasedFlows, prefect_api: str
) -> None:
    cli = on(cli, empty_dsn)
    cli("init")
    prefect = PrefectView(prefect_api, flows.db)
    slug = f"photos_{uuid4().hex[:8]}"
    flows.define(slug, MAPPED, maps=["resize"])
    old = flows.start(slug, {})
    work(flows, slug)
    services = Services(cli)
    try:
        services.start("observe", slug)
        run_id = flows.start(slug, {})
        find = "SELECT flow_run_id FROM pgflow_prefect.flow_runs WHERE run_id = %s"
        wait_until(lambda: flows.db.execute(find, [run_id]).fetchone() is not None, "the run is shown")
        [[flow_run_id]] = flows.db.execute(find, [run_id]).fetchall()
        assert prefect.read_flow_run(flow_run_id)["state_name"] == "Running"
        work(flows, slug)
        wait_until(lambda: prefect.read_flow_run(flow_run_id)["state_name"] == "Completed", "its end is shown")
        assert str(flow_run_id) in cli("open", "latest").out
    finally:
        services.stop()
    assert cli("record", str(old)).lines == ["shown in Prefect: 1 run"]
    [[recorded]] = flows.db.execute(find, [old]).fetchall()
    assert prefect.read_flow_run(recorded)["state_name"] == "Completed"
    assert "is disabled" in cli("disable", slug).out


HANDLERS = """
import time
from pathlib import Path
from pgflow_prefect import StepContext, Workflow

workflow = Workflow("SLUG")

@workflow.step
def list_photos(context: StepContext) -> list[int]:
    with Path("attempts").open("a") as attempts:
        attempts.write(f"{context.attempt}\\n")
    while not Path("gate").exists():
        time.sleep(0.05)
    return [1, 2]

@workflow.map(over="list_photos")
def resize(item: int) -> int:
    return item * 10

@workflow.step
def report(resize: list[int]) -> int:
    return sum(resize)

flow = workflow.flow
"""


def test_a_moved_flow_is_executed_whichever_worker_dies_and_moved_back(
    cli: CommandLine, empty_dsn: str, flows: ReleasedFlows, prefect_api: str
) -> None:
    cli = on(cli, empty_dsn)
    cli("init")
    prefect = PrefectView(prefect_api, flows.db)
    slug = f"photos_{uuid4().hex[:8]}"
    flows.define(slug, MAPPED, maps=["resize"])
    flows.db.execute("UPDATE pgflow.flows SET opt_timeout = 3600")  # pgflow itself would wait for an hour
    flows.claim(slug)  # registers an Edge worker
    cli.write(f"flows/{slug}.py", HANDLERS.replace("SLUG", slug))
    moved = cli("bind", slug, "--python").lines
    assert moved[:2] == [
        f"Prefect executes flow {slug!r}",
        "told to stop: 1 of pgflow's workers. They end the tasks that they have begun",
    ]
    run_id = flows.start(slug, {})
    attempts = cli.directory / "attempts"
    services = Services(cli)
    try:
        first = services.start("worker", f"flows/{slug}.py")
        wait_until(attempts.exists, "the first worker has begun the step")
        kill(first)
        services.start("worker", f"flows/{slug}.py")
        wait_until(lambda: attempts.read_text() == "1\n1\n", "the second worker has taken the same attempt over")
        (cli.directory / "gate").touch()
        find = "SELECT status FROM pgflow.runs WHERE run_id = %s"
        wait_until(lambda: flows.db.execute(find, [run_id]).fetchone() == ("completed",), "the run has ended")
        takers = "SELECT flow_run_id FROM pgflow_prefect.run_flow_runs WHERE run_id = %s ORDER BY epoch DESC"
        [[flow_run_id], *former] = flows.db.execute(takers, [run_id]).fetchall()
        assert len(former) == 1
        wait_until(lambda: prefect.read_flow_run(flow_run_id)["state_name"] == "Completed", "its end is shown")
    finally:
        services.stop()
    output = flows.db.execute("SELECT output FROM pgflow.runs WHERE run_id = %s", [run_id]).fetchone()
    assert output == ({"report": 30},)
    executed = cli("run", slug, "--payload", '{"album": 7}')
    assert executed.code == 0, executed.err
    back = cli("bind", slug, "--external").lines
    assert back[0] == f"pgflow's own workers execute flow {slug!r}"
    flows.start(slug, {})
    work(flows, slug)
    assert flows.db.execute("SELECT count(*) FROM pgflow.runs WHERE status = 'completed'").fetchone() == (3,)


BRIDGED = """
from pgflow_prefect import Workflow

workflow = Workflow("SLUG")

@workflow.step
async def list_photos(): return []

@workflow.step
async def report(list_photos): return 0

flow = workflow.flow
"""


@pytest.mark.thorough
def test_a_bridge_alone_creates_flow_runs_and_reconcile_ends_a_task_that_pgflow_has_given_up(
    cli: CommandLine, empty_dsn: str, prefect_api: str
) -> None:
    """On a version that puts tasks back, which npm does not have yet."""
    install_released(empty_dsn, FAKE)
    with open_flows(empty_dsn) as flows:
        cli = on(cli, empty_dsn)
        assert cli("init").code == 0
        slug = f"photos_{uuid4().hex[:8]}"
        flows.define(slug, {"list_photos": [], "report": ["list_photos"]}, attempts=3)
        stuck = flows.start(slug, {})
        flows.claim(slug)  # by an Edge worker that vanishes
        flows.db.execute("UPDATE pgflow.step_tasks SET permanently_stalled_at = now(), requeued_count = 3")
        flows.db.execute("SELECT pgmq.archive(%s, message_id) FROM pgflow.step_tasks", [slug])

        named = cli("reconcile")
        assert (named.code, "given_up" in named.out) == (1, True), named.out
        find = "SELECT status FROM pgflow.runs WHERE run_id = %s"
        assert flows.db.execute(find, [stuck]).fetchone() == ("started",), "without --apply, it only tells"
        ended = cli("reconcile", "--apply")
        assert str(stuck) in ended.out, ended.out
        assert flows.db.execute(find, [stuck]).fetchone() == ("failed",)
        assert "given_up" not in cli("reconcile").out

        cli.write(f"flows/{slug}.py", BRIDGED.replace("SLUG", slug))
        assert cli("bind", slug, "--python").code == 0
        assert cli("deploy", slug).code == 0
        run_id = flows.start(slug, {})
        services = Services(cli)
        try:
            services.start("bridge")
            held = "SELECT flow_run_id FROM pgflow_prefect.run_owners WHERE run_id = %s AND lease_until = 'infinity'"
            wait_until(lambda: flows.db.execute(held, [run_id]).fetchone() is not None, "the run waits in Prefect")
            [[flow_run_id]] = flows.db.execute(held, [run_id]).fetchall()
            shown = PrefectView(prefect_api, flows.db).read_flow_run(flow_run_id)
            assert shown["state_type"] == "SCHEDULED", "no worker of Prefect executes it"
            assert flows.db.execute(find, [run_id]).fetchone() == ("started",)
        finally:
            services.stop()


def work(flows: ReleasedFlows, slug: str) -> None:
    """Do all tasks of the flow that wait, and those that become ready by that."""
    while flows.work(slug, lambda step, index: [1, 2]):
        pass


def on(outside: CommandLine, dsn: str) -> CommandLine:
    """Return the command line with this database."""
    return CommandLine(
        outside.directory, {**outside.environment, "PGFLOW_DSN": route(dsn)}, outside.forker, outside.started
    )
