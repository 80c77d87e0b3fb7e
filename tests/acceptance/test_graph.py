"""`graph`: a workflow or a run of it, as every kind of picture, on the screen or in a file."""

import json
import re
from uuid import UUID, uuid4

import pytest

from tests.acceptance.conftest import CommandLine
from tests.acceptance.test_terminal import watch
from tests.conftest import Connection
from tests.engine import DIAMOND, claim, complete, define, run_workflow
from tests.unit.runs import read_svg

pytestmark = pytest.mark.once

FORMATS = ("text", "mermaid", "svg", "dot", "json")


@pytest.fixture
def half(db: Connection) -> UUID:
    """A run of a diamond, half way: a is completed, b is running in its second attempt, c was started."""
    define(db, "diamond", DIAMOND)
    run_id = run_workflow(db, "diamond", {}).id
    claim(db, run_id, "a")
    complete(db, run_id, "a", 1)
    claim(db, run_id, "b")
    claim(db, run_id, "b")
    return run_id


def test_every_picture_of_a_run_has_the_state_of_each_step(cli: CommandLine, half: UUID) -> None:
    drawn = {name: cli("graph", "--run", str(half), "--format", name) for name in FORMATS}

    assert {name: (ended.code, ended.err) for name, ended in drawn.items()} == dict.fromkeys(FORMATS, (0, ""))
    assert re.search(r"b  ▶ running \d+\.\d\d s, 2 attempts", drawn["text"].out)
    assert drawn["text"].lines[-2] == f"run {half}: pending, 1 of 4 steps completed"
    assert drawn["text"].lines[-1] == "critical path of the run: a -> b"
    assert re.search(r'step\d\["b<br/>▶ running, \d+\.\d\d s, 2 attempts"\]:::running', drawn["mermaid"].out)
    assert re.search(r'"b" \[label="b\\n▶ running, ', drawn["dot"].out)
    assert len(re.findall('class="step ', drawn["svg"].out)) == 4
    read_svg(drawn["svg"].out)
    states = {node["id"]: node["state"] for node in json.loads(drawn["json"].out)["nodes"]}
    assert states == {"a": "completed", "b": "running", "c": "pending", "d": "waiting"}


def test_a_run_is_drawn_as_it_began_whatever_was_edited_since(cli: CommandLine, db: Connection, half: UUID) -> None:
    db.execute("INSERT INTO pgflow.steps VALUES ('diamond', 'later')")

    assert "later" in cli("graph", "diamond").out
    assert "later" not in cli("graph", "diamond", "--run", str(half)).out


def test_a_picture_is_written_into_a_file(cli: CommandLine, db: Connection) -> None:
    define(db, "diamond", DIAMOND)

    written = cli("graph", "diamond", "--format", "svg", "--output", "picture.svg")

    assert (written.code, written.out, written.err) == (0, "", "")
    assert read_svg((cli.directory / "picture.svg").read_text(encoding="utf-8")).tag.endswith("svg")


def test_a_file_that_can_t_be_written_is_named(cli: CommandLine, db: Connection) -> None:
    define(db, "diamond", DIAMOND)

    refused = cli("graph", "diamond", "--output", "no/such/directory")

    assert refused.code == 2
    assert refused.find_error() == "--output 'no/such/directory' can't be written: No such file or directory"


def test_graph_without_a_clear_subject_is_refused(cli: CommandLine, db: Connection, half: UUID) -> None:
    define(db, "other", {"a": []})
    missing = uuid4()

    neither = cli("graph")
    both = cli("graph", "other", "--run", str(half))
    unknown = cli("graph", "--run", str(missing))

    assert [neither.code, both.code, unknown.code] == [2, 2, 2]
    assert neither.find_error() == "name a WORKFLOW to draw, or give --run RUN_ID to draw a run"
    assert both.find_error() == f"run {half} belongs to workflow 'diamond', not to 'other'. Name the run alone"
    assert unknown.find_error() == f"unknown run {missing}; `pgflow-prefect runs` shows the newest"


def test_json_is_the_same_as_a_format(cli: CommandLine, db: Connection) -> None:
    define(db, "diamond", DIAMOND)
    data = json.loads(cli("graph", "diamond", "--json").out)

    assert data == json.loads(cli("graph", "diamond", "--format", "json").out)
    assert {(edge["source"], edge["target"]) for edge in data["edges"]} == {
        *(("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"))
    }
    assert data["graph"] == {"slug": "diamond"}


def test_slugs_that_would_act_in_a_terminal_do_not(cli: CommandLine, db: Connection) -> None:
    slug = 'a\x1b[2J\n<b> & "c" [red]'
    db.execute("SET session_replication_role = replica")  # as a row of a version that took such a slug
    define(db, "odd", {slug: []})
    db.execute("RESET session_replication_role")
    run_id = run_workflow(db, "odd", {}).id

    for arguments in (["graph", "odd"], ["timeline", str(run_id)]):
        code, drawn = watch(cli, *arguments)
        assert code == 0
        assert "\x1b[2J" not in drawn
        assert 'a␛[2J␊<b> & "c" [red]' in drawn.replace("\x1b[0m", "")


def test_a_terminal_shows_states_in_colours(cli: CommandLine, half: UUID) -> None:
    _, drawn = watch(cli, "graph", "--run", str(half))
    assert "\x1b[32m✓ completed" in drawn
    assert "\x1b[36m▶ running" in drawn
