"""The file of a workflow's handlers: where it is looked for, how it is loaded, what is said when that fails."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from pgflow_prefect.deployment.handler_files import default_path, load_module, load_workflow
from pgflow_prefect.errors import UsageError

HANDLERS = "from pgflow_prefect import Workflow\n\nworkflow = Workflow('campaign')\n"


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory, from which this test alone imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    before = {*sys.modules}
    yield tmp_path
    for name in {*sys.modules} - before:
        del sys.modules[name]


def write(path: Path, text: str = HANDLERS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("slug", "path"),
    [("campaign", "flows/campaign.py"), ("e-mail/2", "flows/e_mail_2.py"), ("class", "flows/class_.py")],
)
def test_a_workflow_s_file_is_called_as_its_slug_is_in_python(slug: str, path: str) -> None:
    assert default_path(slug) == Path(path)


def test_without_a_name_the_file_in_flows_is_loaded(directory: Path) -> None:
    write(directory / "flows" / "campaign.py")
    workflow, source = load_workflow("campaign")
    assert workflow.slug == "campaign"
    assert source == "flows/campaign.py"


def test_without_a_file_in_flows_it_is_said_how_to_get_one() -> None:
    with pytest.raises(UsageError) as refused:
        load_workflow("campaign")
    assert str(refused.value) == (
        "workflow 'campaign' has no handlers here: flows/campaign.py does not exist; "
        "write it with `pgflow-prefect import campaign`, name another file with --handlers, or say "
        "who does its steps with `pgflow-prefect bind campaign`"
    )


@pytest.mark.parametrize("name", ["elsewhere/mine.py", "elsewhere/no_suffix"])
def test_a_file_may_be_named(directory: Path, name: str) -> None:
    write(directory / name)
    workflow, source = load_workflow("campaign", name)
    assert (workflow.slug, source) == ("campaign", name)


def test_a_module_may_be_named(directory: Path) -> None:
    write(directory / "acme" / "__init__.py", "")
    write(directory / "acme" / "mails.py")
    workflow, source = load_workflow("campaign", "acme.mails")
    assert (workflow.slug, source) == ("campaign", "acme.mails")


def test_a_file_called_as_a_package_that_exists_is_still_the_user_s(directory: Path) -> None:
    write(directory / "json.py")
    assert load_workflow("campaign", "json.py")[0].slug == "campaign"


def test_a_handlers_file_imports_what_is_beside_it(directory: Path) -> None:
    write(directory / "flows" / "mail_texts.py", "GREETING = 'Hello'\n")
    path = write(directory / "flows" / "campaign.py", f"{HANDLERS}from mail_texts import GREETING\n")
    assert load_module(str(path)).GREETING == "Hello"


def test_types_of_the_file_are_found_by_their_names(directory: Path) -> None:
    text = f"""
        from __future__ import annotations
        from dataclasses import KW_ONLY, dataclass
        {HANDLERS.replace(chr(10), chr(10) + " " * 8)}
        @workflow.step
        def send(payload: Recipient) -> Recipient: ...

        @dataclass
        class Recipient:
            name: str
            _: KW_ONLY
            born: int
    """
    write(directory / "mine.py", dedent(text))
    load_workflow("campaign", "mine.py")[0].handlers["send"].check_annotations()


def test_a_file_that_changed_is_loaded_as_it_is_now(directory: Path) -> None:
    path = write(directory / "mine.py")
    assert load_workflow("campaign", "mine.py")[0].slug == "campaign"
    write(path, HANDLERS.replace("campaign", "newsletter"))
    assert load_workflow("newsletter", "mine.py")[0].slug == "newsletter"


@pytest.mark.parametrize(
    ("handlers", "message"),
    [
        ("missing.py", "there is no file missing.py"),
        ("no_such_module", "there is no module 'no_such_module'. If it is a file, name it with its .py"),
        ("email.no_such_part", "there is no module 'email.no_such_part'. If it is a file, name it with its .py"),
    ],
)
def test_what_does_not_exist_is_named(handlers: str, message: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_workflow("campaign", handlers)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("written", "file"),
    [
        ("campaign", "flows/campaign.py"),
        ("spring-campaign", "flows/spring_campaign.py"),
        ("parts/mine", "parts/mine.py"),
    ],
)
def test_the_file_of_a_workflow_that_was_named_instead_is_suggested(directory: Path, written: str, file: str) -> None:
    write(directory / file)
    with pytest.raises(UsageError) as refused:
        load_workflow("campaign", written)
    assert str(refused.value) == f"there is no module {written!r}. Did you mean the file {file}?"


@pytest.mark.parametrize("handlers", ["broken.py", "broken"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("1 / 0", "ZeroDivisionError: division by zero"),
        ("def f(:", "SyntaxError: invalid syntax"),
    ],
)
def test_what_can_t_be_imported_is_refused_with_reason_and_place(
    directory: Path, handlers: str, line: str, reason: str
) -> None:
    write(directory / "broken.py", f"{HANDLERS}{line}\n")
    with pytest.raises(UsageError) as refused:
        load_workflow("campaign", handlers)
    assert str(refused.value).startswith(f"{handlers} can't be imported: {reason} (")
    assert str(refused.value).endswith("broken.py, line 4)")


def test_the_place_is_the_user_s_though_a_library_raised(directory: Path) -> None:
    write(directory / "beside.py", "import json\njson.loads('{')\n")
    write(directory / "mine.py", f"{HANDLERS}import beside\n")
    with pytest.raises(UsageError, match=r"JSONDecodeError: .* \(.*beside\.py, line 2\)"):
        load_workflow("campaign", "mine.py")


def test_handlers_of_another_workflow_are_told_apart(directory: Path) -> None:
    write(directory / "mine.py", f"{HANDLERS}other = Workflow('newsletter')\n")
    with pytest.raises(UsageError) as refused:
        load_workflow("campain", "mine.py")
    assert str(refused.value) == (
        "mine.py has no handlers of workflow 'campain' (did you mean 'campaign'?): "
        "it has those of 'campaign', 'newsletter'"
    )


def test_a_file_may_hold_several_workflows(directory: Path) -> None:
    write(directory / "mine.py", f"{HANDLERS}other = Workflow('newsletter')\n")
    assert load_workflow("newsletter", "mine.py")[0].slug == "newsletter"


def test_a_file_without_any_workflow_is_no_handlers_file(directory: Path) -> None:
    write(directory / "mine.py", "x = 1\n")
    with pytest.raises(UsageError, match=r"mine\.py has no handlers of workflow 'campaign': it has no Workflow at all"):
        load_workflow("campaign", "mine.py")


def test_a_file_that_was_changed_within_its_second_is_read_anew(tmp_path: Path) -> None:
    path = tmp_path / "handlers.py"
    for value in (1, 2):
        path.write_text(f"value = {value}\n", encoding="utf-8")
        os.utime(path, (1, 1))
        assert load_module(str(path)).value == value
