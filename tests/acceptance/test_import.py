"""`import`: a file of stubs, and what it leaves alone when it is there."""

import json

import pytest

from tests.acceptance.conftest import CommandLine
from tests.conftest import Connection
from tests.engine import CHAIN, define

pytestmark = pytest.mark.once

WRITTEN = '''
"""The person's own words."""

import os   # unsorted,  badly spaced, and theirs
from pgflow_prefect import Workflow

jobs = Workflow( 'chain' )

@jobs.step( "a" )
def whatever( ): return  os.sep

@jobs.step('gone')
async def gone(a): return a   # no longer in the database

flow = jobs.flow
'''


def test_import_writes_a_stub_for_each_step_and_a_stub_is_external(cli: CommandLine, db: Connection) -> None:
    define(db, "chain", {**CHAIN, "the-join": ["a", "c"]})

    imported = cli("import", "chain")
    again = cli("import", "chain")
    checked = cli("validate", "chain")

    assert imported.lines == ["wrote flows/chain.py: 4 stubs to fill in"]
    source = (cli.directory / "flows/chain.py").read_text(encoding="utf-8")
    assert "async def a(payload: JsonValue) -> JsonValue:" in source
    assert "async def b(a: JsonValue) -> JsonValue:" in source
    assert '@workflow.step("the-join", unimplemented=True)' in source
    assert "async def the_join(a: JsonValue, c: JsonValue) -> JsonValue:" in source
    assert again.lines == ["flows/chain.py has a handler for every step: nothing added"]
    assert checked.code == 0
    assert checked.lines[-1] == "4 steps are still stubs: they stay external until you remove `unimplemented=True`"
    assert checked.out.count("a in flows/chain.py") == 1, "each is named once"
    assert "complete_step" not in checked.out, "no external worker is meant to do it"


def test_importing_again_adds_the_new_steps_and_leaves_what_a_person_wrote(cli: CommandLine, db: Connection) -> None:
    define(db, "chain", CHAIN)
    file = cli.write("flows/chain.py", WRITTEN)

    imported = cli("import", "chain")

    assert imported.lines == [
        "added to flows/chain.py: b, c",
        "gone from the database, still in flows/chain.py: gone",
    ]
    source = file.read_text(encoding="utf-8")
    before, after = WRITTEN.split("\n\njobs = ")
    assert source.startswith(f"{before}\nfrom pydantic import JsonValue\n\njobs = "), "what the stubs need"
    assert after.removesuffix("flow = jobs.flow\n").rstrip() in source, "not a character of it changes"
    assert source.endswith("\n\n\nflow = jobs.flow\n")
    assert "@jobs.step(unimplemented=True)\nasync def b(a: JsonValue) -> JsonValue:" in source
    assert source.count("async def") == 3

    unchanged = cli("import", "chain", "--json")
    [report] = json.loads(unchanged.out)
    assert file.read_text(encoding="utf-8") == source
    assert report == {
        "path": "flows/chain.py",
        "created": False,
        "added": [],
        "gone": ["gone"],
        "stubs": ["b", "c"],
    }


def test_import_of_all_writes_a_file_for_each_workflow_where_it_is_told(cli: CommandLine, db: Connection) -> None:
    for slug in ("chain", "2nd-chain", "class"):
        define(db, slug, CHAIN)

    imported = cli("import", "--all", "--directory", "handlers")

    assert imported.code == 0
    written = ["_2nd_chain.py", "chain.py", "class_.py"]
    assert sorted(path.name for path in (cli.directory / "handlers").iterdir()) == written
    assert imported.lines == [f"wrote handlers/{name}: 3 stubs to fill in" for name in written]
    found = cli("validate", "2nd-chain", "--handlers", "handlers/_2nd_chain.py")
    assert found.lines[1].startswith("workflow '2nd-chain' is valid: 3 steps")


def test_import_without_a_workflow_is_refused(cli: CommandLine) -> None:
    refused = cli("import")

    assert refused.code == 2
    assert "name it, or say --all" in refused.find_error()
