"""The commands on a database of the released pgflow: what works, and what says that it does not yet."""

import json
from collections.abc import Iterator

import pytest

from tests.acceptance.conftest import CommandLine
from tests.conftest import route
from tests.released_lab import PACKAGE, ReleasedFlows, install_released, open_flows, read_objects

pytestmark = pytest.mark.once

MAPPED = {"list_photos": [], "resize": ["list_photos"], "report": ["resize"]}
LIMITED = "the schema of the released pgflow (pgflow.dev): of the commands, only `list`, `graph`, `runs` and `status`"
REFUSED = (
    "bind photos report --http https://example.org/send",
    "bridge",
    "cancel latest",
    "credentials",
    "deploy photos",
    "diff photos",
    "disable photos",
    "enable photos",
    "export photos",
    "import photos",
    "init --moved",
    "init --new-installation",
    "observe photos",
    "prune --older-than 30d",
    "push flows/photos.py",
    "reconcile",
    "retry latest",
    "run --resume latest",
    "run photos",
    "serve flows/photos.py",
    "shadow photos",
    "timeline latest",
    "validate photos",
    "worker",
)


@pytest.fixture
def flows(empty_dsn: str) -> Iterator[ReleasedFlows]:
    """A database of the released pgflow, before `init`."""
    install_released(empty_dsn, PACKAGE)
    with open_flows(empty_dsn) as opened:
        yield opened


def test_init_and_the_four_commands_that_look(outside: CommandLine, empty_dsn: str, flows: ReleasedFlows) -> None:
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


def test_every_other_command_says_in_a_sentence_that_it_does_not_work_yet(
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
    assert flows.db.execute("SELECT DISTINCT status FROM pgflow.runs").fetchall() == [("started",)]


def test_doctor_names_the_schema(outside: CommandLine, empty_dsn: str, flows: ReleasedFlows) -> None:
    checks = json.loads(on(outside, empty_dsn)("doctor", "--no-flow-run", "--json").out)
    [found] = [each for each in checks if each["check"] == "schema"]
    assert (found["outcome"], LIMITED in found["message"]) == ("fault", True)


def on(outside: CommandLine, dsn: str) -> CommandLine:
    """Return the command line with this database."""
    return CommandLine(
        outside.directory, {**outside.environment, "PGFLOW_DSN": route(dsn)}, outside.forker, outside.started
    )
