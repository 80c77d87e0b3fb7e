"""`timeline`: when each step of a run worked, on a terminal, on a pipe and in documents."""

import json
import re
from uuid import UUID

import pytest

from tests.acceptance.conftest import CommandLine
from tests.acceptance.test_terminal import watch
from tests.conftest import Connection
from tests.engine import DIAMOND, cancel, claim, complete, define, run_workflow
from tests.unit.runs import read_svg

pytestmark = pytest.mark.once

TIMES = {"a": (0.5, 1.0), "b": (1.0, 4.0), "c": (1.0, 2.0), "d": (4.25, 5.0)}


@pytest.fixture
def diamond(db: Connection) -> UUID:
    """A completed run whose steps took so many seconds, from its beginning on."""
    define(db, "diamond", DIAMOND)
    run_id = run_workflow(db, "diamond", {}).id
    for step, times in TIMES.items():
        claim(db, run_id, step)
        complete(db, run_id, step, 1)
        db.execute(
            """
            UPDATE pgflow.step_states s
            SET started_at = r.created_at + make_interval(secs => %s),
                finished_at = r.created_at + make_interval(secs => %s)
            FROM pgflow.runs r WHERE r.id = %s AND s.run_id = r.id AND s.step_slug = %s
            """,
            [*times, run_id, step],
        )
    return run_id


def test_a_pipe_gets_rows_with_tabs_in_the_order_of_the_beginnings(cli: CommandLine, diamond: UUID) -> None:
    shown = cli("timeline", str(diamond))

    assert (shown.code, shown.err) == (0, "")
    assert [line.split("\t") for line in shown.lines] == [
        ["step", "start", "seconds", "attempts", "state", "critical"],
        ["a", "0.500", "0.500", "1", "completed", "yes"],
        ["b", "1.000", "3.000", "1", "completed", "yes"],
        ["c", "1.000", "1.000", "1", "completed", "no"],
        ["d", "4.250", "0.750", "1", "completed", "yes"],
    ]


def test_json_has_the_critical_path(cli: CommandLine, diamond: UUID) -> None:
    shown = json.loads(cli("timeline", str(diamond), "--json").out)

    assert (shown["run"], shown["workflow"], shown["status"]) == (str(diamond), "diamond", "completed")
    assert shown["critical_path"] == ["a", "b", "d"]
    assert shown["steps"][2] == {
        "step": "c",
        "start": 1.0,
        "first_start": 1.0,
        "seconds": 1.0,
        "attempts": 1,
        "state": "completed",
        "critical": False,
    }


def test_top_shows_only_the_longest_steps(cli: CommandLine, diamond: UUID) -> None:
    shown = cli("timeline", str(diamond), "--top", "2")

    assert [line.split("\t")[0] for line in shown.lines[1:]] == ["b", "c"]


def test_an_svg_picture_is_written_into_a_file(cli: CommandLine, diamond: UUID) -> None:
    written = cli("timeline", str(diamond), "--format", "svg", "--output", "run.svg")

    assert (written.code, written.out, written.err) == (0, "", "")
    drawn = (cli.directory / "run.svg").read_text(encoding="utf-8")
    read_svg(drawn)
    assert len(re.findall('class="row completed critical"', drawn)) == 3


def test_a_terminal_shows_bars_as_wide_as_it_is(cli: CommandLine, diamond: UUID) -> None:
    code, coloured = watch(cli, "timeline", str(diamond))
    _, drawn = watch(cli, "timeline", str(diamond), NO_COLOR="1", COLUMNS="60")

    assert code == 0
    assert "\x1b[32m█" in coloured
    lines = re.sub(r"\x1b\[[0-9;]*m", "", drawn).splitlines()
    bars = {line[1]: line.rstrip() for line in lines[1:5]}
    assert [line[0] for line in lines[1:5]] == ["*", "*", " ", "*"]
    assert len(bars["b"]) <= 60
    assert bars["b"].count("█") > 2 * bars["c"].count("█")
    assert bars["d"].index("█") > bars["b"].rindex("█")
    assert lines[-1] == "* critical path: a -> b -> d"


def test_a_run_under_way_has_bars_until_now_by_the_clock_of_the_database(
    cli: CommandLine, db: Connection, diamond: UUID
) -> None:
    run_id = run_workflow(db, "diamond", {}).id
    claim(db, run_id, "a")
    db.execute("UPDATE pgflow.step_states SET started_at = started_at - interval '1 hour' WHERE run_id = %s", [run_id])

    steps = {step["step"]: step for step in json.loads(cli("timeline", str(run_id), "--json").out)["steps"]}

    assert steps["a"]["state"] == "running"
    assert 3600 <= steps["a"]["seconds"] < 7200
    assert (steps["b"]["state"], steps["b"]["start"], steps["b"]["seconds"]) == ("waiting", None, None)


def test_steps_without_times_have_no_bar(cli: CommandLine, db: Connection, diamond: UUID) -> None:
    run_id = run_workflow(db, "diamond", {}).id
    complete(db, run_id, "a", 1)  # by a worker that claims nothing
    cancel(db, run_id)

    rows = [line.split("\t") for line in cli("timeline", str(run_id)).lines[1:]]
    code, _ = watch(cli, "timeline", str(run_id))

    assert code == 0
    assert rows == [
        ["a", "", "", "0", "completed", "yes"],
        ["b", "", "", "0", "cancelled", "no"],
        ["c", "", "", "0", "cancelled", "no"],
        ["d", "", "", "0", "waiting", "no"],
    ]


def test_a_thousand_steps_are_all_there(cli: CommandLine, db: Connection) -> None:
    define(db, "wide", {f"step_{number:04}": [] for number in range(1000)})
    run_id = run_workflow(db, "wide", {}).id

    assert len(cli("timeline", str(run_id)).lines) == 1001
    _, drawn = watch(cli, "timeline", str(run_id), NO_COLOR="1")
    lines = re.sub(r"\x1b\[[0-9;]*m", "", drawn).splitlines()
    assert sum(re.fullmatch(r" step_\d{4} +● pending", line) is not None for line in lines) == 1000


def test_runs_says_how_many_steps_are_completed(cli: CommandLine, db: Connection, diamond: UUID) -> None:
    pending = run_workflow(db, "diamond", {}).id
    complete(db, pending, "a", 1)

    rows = {line.split("\t")[0]: line.split("\t") for line in cli("runs").lines}

    assert rows[str(diamond)][5] == "4/4"
    assert rows[str(pending)][5] == "1/4"
