"""Importing a workflow again: new steps get a stub, and what a person wrote stays as it is, to the letter."""

import re
from pathlib import Path
from textwrap import dedent

import pytest
from pydantic import JsonValue

from pgflow_prefect.deployment.code_generation import ImportReport, import_workflow
from pgflow_prefect.deployment.handler_files import find_workflow, load_module
from pgflow_prefect.errors import UsageError
from tests.unit.definitions import define

CAMPAIGN = define({"prepare": [], "send": ["prepare"]}, "campaign")
GROWN = define({"prepare": [], "send": ["prepare"], "archive": ["send"], "report": ["send"]}, "campaign")

WRITTEN = '''\
    #!/usr/bin/env python
    """My campaign.\x0c"""

    from  datetime import date   # my own way to write

    import pgflow_prefect as pp
    wf = pp.Workflow(
      'campaign')


    def helper(): return "\u2028 one line to Python, two to others"


    @wf.step(retries = 3)
    async def prepare(payload: dict[str, int]) -> list[int]:
        return [payload['n']]

    @wf.step
    def send(prepare: list[int]) -> date:
        return date.today()
        # the end of send
    OTHER = {
        "kept": 1 }
    flow = wf.flow



'''


# Before and after the last import, and from what follows the handlers on.
IN_PARTS = re.compile(r"(?<=as pp\n)|(?<=as pp\r\n)|(?=OTHER)")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that a person has worked on."""
    path = tmp_path / "campaign.py"
    path.write_text(dedent(WRITTEN), encoding="utf-8")
    return path


def test_importing_again_changes_no_byte(tmp_path: Path) -> None:
    path = tmp_path / "campaign.py"
    import_workflow(GROWN, path)
    written = path.read_bytes()
    report = import_workflow(GROWN, path)
    assert path.read_bytes() == written
    assert report == ImportReport(
        path, created=False, added=(), gone=(), stubs=("prepare", "send", "archive", "report")
    )


def test_a_file_whose_handlers_are_written_stays_as_it_is(path: Path) -> None:
    written = path.read_bytes()
    assert import_workflow(CAMPAIGN, path) == ImportReport(path, created=False, added=(), gone=(), stubs=())
    assert path.read_bytes() == written


def test_new_steps_are_added_after_the_last_handler_and_nothing_else_changes(path: Path) -> None:
    imports, between, after = IN_PARTS.split(path.read_text(encoding="utf-8"))
    report = import_workflow(GROWN, path)
    assert report == ImportReport(
        path, created=False, added=("archive", "report"), gone=(), stubs=("archive", "report")
    )
    text = path.read_text(encoding="utf-8")
    assert text.startswith(
        imports + "from pydantic import JsonValue\n" + between + "\n\n@wf.step(unimplemented=True)\n"
    )
    assert text.endswith('raise NotImplementedError("step report")\n\n\n' + after)
    workflow = find_workflow(load_module(str(path)), "campaign", str(path))
    assert list(workflow.handlers) == ["prepare", "send"]
    assert workflow.stubs == ["archive", "report"]


def test_what_a_stub_needs_is_imported_once_and_above_it(path: Path) -> None:
    path.write_text(path.read_text(encoding="utf-8") + "import string\n", encoding="utf-8")
    wide = [f"part{number}" for number in range(9)]
    grown = {"prepare": (), "send": ["prepare"], **{each: ["send"] for each in wide}}
    import_workflow(define(grown, "campaign"), path)
    import_workflow(define(grown | {"join": wide}, "campaign"), path)
    assert path.read_text(encoding="utf-8").count("import JsonValue\n") == 1
    module = load_module(str(path))
    assert module.part0.__annotations__ == {"send": JsonValue, "return": JsonValue}
    assert module.join.__annotations__ == {"upstream": dict[str, JsonValue], "return": JsonValue}


def test_a_stub_does_without_the_name_that_means_something_else_in_the_file(path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("OTHER =", "JsonValue =")
    path.write_text(text, encoding="utf-8")
    import_workflow(GROWN, path)
    module = load_module(str(path))
    assert module.JsonValue == {"kept": 1}
    assert module.archive.__annotations__ == {"send": object, "return": object}


def test_a_stub_takes_no_name_that_the_file_uses(path: Path) -> None:
    grown = define({"prepare": [], "send": ["prepare"], "date": ["send"], "helper": ["send"]}, "campaign")
    import_workflow(grown, path)
    text = path.read_text(encoding="utf-8")
    assert '@wf.step("date", unimplemented=True)\nasync def date_(' in text
    assert '@wf.step("helper", unimplemented=True)\nasync def helper_(' in text
    assert load_module(str(path)).helper().endswith("others")


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
def test_line_endings_and_byte_order_mark_stay_as_they_are(path: Path, ending: str, start: bytes) -> None:
    written = start + dedent(WRITTEN).replace("\n", ending).encode()
    path.write_bytes(written)
    import_workflow(GROWN, path)
    content = path.read_bytes()
    _, between, after = IN_PARTS.split(written.decode())
    assert content.startswith(start)
    assert between.encode() in content
    assert content.endswith(after.encode())
    assert content.replace(b"\r\n", b"").count(b"\r") == 0
    assert content.count(b"\n") == content.count(ending.encode())
    load_module(str(path))


def test_a_file_without_a_last_newline_and_without_handlers_gets_stubs_at_its_end(tmp_path: Path) -> None:
    path = tmp_path / "campaign.py"
    written = 'from pgflow_prefect import Workflow\n\nworkflow = Workflow("campaign")'
    path.write_text(written)
    import_workflow(CAMPAIGN, path)
    text = path.read_text().replace("from pydantic import JsonValue\n", "")
    assert text.startswith(written + "\n\n\n@workflow.step(unimplemented=True)\nasync def prepare(")
    assert text.endswith('NotImplementedError("step send")\n')
    assert find_workflow(load_module(str(path)), "campaign", str(path)).stubs == ["prepare", "send"]


def test_steps_that_the_database_no_longer_has_are_named_and_left_alone(path: Path) -> None:
    written = path.read_bytes()
    report = import_workflow(define({"send": []}, "campaign"), path)
    assert (report.added, report.gone) == ((), ("prepare",))
    assert path.read_bytes() == written


def test_a_filled_in_stub_is_a_handler_and_is_not_added_again(tmp_path: Path) -> None:
    path = tmp_path / "campaign.py"
    import_workflow(CAMPAIGN, path)
    path.write_text(path.read_text().replace("unimplemented=True", "", 1).replace("raise NotImpl", "return NotImpl", 1))
    report = import_workflow(CAMPAIGN, path)
    assert (report.added, report.stubs) == ((), ("send",))


def test_a_file_keeps_its_mode_and_a_link_stays_a_link(path: Path) -> None:
    path.chmod(0o750)
    link = path.with_name("link.py")
    link.symlink_to(path)
    import_workflow(GROWN, link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o750
    assert "archive" in path.read_text(encoding="utf-8")
    assert {each.name for each in path.parent.iterdir()} - {"__pycache__"} == {"campaign.py", "link.py"}


def test_a_file_of_another_workflow_is_refused_and_left_alone(path: Path) -> None:
    written = path.read_bytes()
    with pytest.raises(UsageError, match=r"no handlers of workflow 'campaigns' \(did you mean 'campaign'\?\)"):
        import_workflow(define({"prepare": []}, "campaigns"), path)
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        ("import nothing_like_this", "ModuleNotFoundError: No module named 'nothing_like_this'"),
        ("def broken(:", "SyntaxError: invalid syntax"),
        ("raise SystemExit('usage: …')", "SystemExit: usage: …"),
        ("workflow.step('send')(print)", "UsageError: the handler of step 'send' takes *args"),
        ("__import__('json').loads('{')", "JSONDecodeError: Expecting property name"),
    ],
)
def test_a_file_that_can_t_be_imported_is_refused_with_its_place_and_left_alone(
    tmp_path: Path, broken: str, reason: str
) -> None:
    path = tmp_path / "campaign.py"
    path.write_text(f"from pgflow_prefect import Workflow\nworkflow = Workflow('campaign')\n{broken}\nflow = 1\n")
    written = path.read_bytes()
    with pytest.raises(UsageError) as refused:
        import_workflow(GROWN, path)
    assert str(refused.value).startswith(f"{path} can't be imported: {reason}")
    assert str(refused.value).endswith("campaign.py, line 3)")
    assert path.read_bytes() == written


def test_a_place_that_can_t_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"campaign\.py can't be written: "):
        import_workflow(CAMPAIGN, tmp_path / "file" / "campaign.py")
