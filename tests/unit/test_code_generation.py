"""The file that an import writes: it runs, fits its definition, and passes the checks that Python projects have."""

import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import JsonValue

from pgflow_prefect import Workflow
from pgflow_prefect.definitions.model import MapRules, StepRules, WhenUnmet, WorkflowDefinition, to_identifier
from pgflow_prefect.deployment.code_generation import MOST_ARGUMENTS, ImportReport, import_workflow
from pgflow_prefect.deployment.handler_files import find_workflow, load_module
from tests.unit.definitions import define

CAMPAIGN = define(
    {"prepare_list": [], "send-emails": ["prepare_list"], "report": ["send-emails", "prepare_list"]}, "campaign"
)
ODD_SLUGS = [
    "",
    " ",
    "'",
    '"',
    '"""',
    "'\"\\",
    "\\",
    "\\N{x}",
    "a\nb",
    "\r",
    "{slug}",
    "{0}%s",
    "class",
    "payload",
    "flow",
    "workflow",
    "Workflow",
    "JsonValue",
    "dict",
    "NotImplementedError",
    "__debug__",
    "größe",
    "🚀",
    "\u2028",
    "\ufeff",
    "# type: ignore",
]


def load(definition: WorkflowDefinition, path: Path) -> Workflow:
    return find_workflow(load_module(str(path)), definition.slug, str(path))


def write(definition: WorkflowDefinition, path: Path) -> str:
    import_workflow(definition, path)
    return path.read_text(encoding="utf-8")


def find_real_problems(definition: WorkflowDefinition, path: Path) -> list[str]:
    """Return what is wrong with a file beside its being made of stubs."""
    return [problem for problem in load(definition, path).find_problems(definition) if "is a stub" not in problem]


def run_ruff(*arguments: str) -> None:
    """Check a file as a project without any settings of its own does."""
    done = subprocess.run([sys.executable, "-m", "ruff", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_first_import_writes_a_stub_for_each_step(tmp_path: Path) -> None:
    path = tmp_path / "flows" / "campaign.py"
    report = import_workflow(CAMPAIGN, path)
    order = ("prepare_list", "send-emails", "report")
    assert report == ImportReport(path, created=True, added=order, gone=(), stubs=order)
    workflow = load(CAMPAIGN, path)
    assert workflow.stubs == list(order)
    assert workflow.handlers == {}
    assert find_real_problems(CAMPAIGN, path) == []


def test_a_stub_takes_the_payload_or_the_results_of_its_upstream_steps(tmp_path: Path) -> None:
    import_workflow(CAMPAIGN, tmp_path / "campaign.py")
    module = load_module(str(tmp_path / "campaign.py"))
    assert get_type_hints(module.prepare_list) == {"payload": JsonValue, "return": JsonValue}
    assert get_type_hints(module.report) == {
        "prepare_list": JsonValue,
        "send_emails": JsonValue,
        "return": JsonValue,
    }


def test_a_step_of_many_upstream_steps_gets_them_by_slug(tmp_path: Path) -> None:
    few = [f"part{number}" for number in range(MOST_ARGUMENTS)]
    definition = define(dict.fromkeys([*few, "one_more"], ()) | {"few": few, "many": [*few, "one_more"]})
    import_workflow(definition, tmp_path / "handlers.py")
    module = load_module(str(tmp_path / "handlers.py"))
    assert list(get_type_hints(module.few)) == [*few, "return"]
    assert get_type_hints(module.many) == {"upstream": dict[str, JsonValue], "return": JsonValue}


def test_a_stub_that_is_called_says_which_step_it_is(tmp_path: Path) -> None:
    import_workflow(CAMPAIGN, tmp_path / "campaign.py")
    stub = load_module(str(tmp_path / "campaign.py")).send_emails
    with pytest.raises(NotImplementedError, match="step send-emails"):
        stub(None).send(None)


@pytest.mark.parametrize(
    "definition",
    [
        CAMPAIGN,
        define({"only": []}, "one"),
        define(dict.fromkeys(ODD_SLUGS, ()) | {"all": ["class", "größe"]}, 'it\'s "odd"'),
        define({f"a_long_name_of_a_step_{n}": [f"a_long_name_of_a_step_{m}" for m in range(n)] for n in range(12)}),
        define({"a" * 70: [], "b-" * 60: ["a" * 70]}, "w" * 90),
    ],
    ids=["usual", "one", "odd", "wide", "long"],
)
def test_a_file_passes_linter_and_formatter(tmp_path: Path, definition: WorkflowDefinition) -> None:
    path = tmp_path / "handlers.py"
    import_workflow(definition, path)
    run_ruff("check", "--isolated", str(path))
    for length in ("88", "120"):
        run_ruff("format", "--isolated", "--check", "--diff", "--line-length", length, str(path))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory for many files, one after the other."""
    return tmp_path_factory.mktemp("drawn")


def one_per_name(slugs: list[str]) -> list[str]:
    """Leave out slugs that collide as Python names: a definition that has them is refused before."""
    return list({to_identifier(slug): slug for slug in slugs}.values())


# What PostgreSQL's text can hold: anything but NUL and surrogates.
slugs = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])) | st.sampled_from(ODD_SLUGS)


@pytest.mark.thorough
@settings(deadline=None)  # a machine may be busy
@given(st.lists(slugs, min_size=1, max_size=6).map(one_per_name), slugs, st.integers(0, 6))
@example(one_per_name(ODD_SLUGS), "odd", 3)
@example(one_per_name(ODD_SLUGS), 'ends with a quote"', 0)
def test_any_slugs_make_a_file_that_covers_the_definition_exactly(
    directory: Path, steps: list[str], slug: str, first: int
) -> None:
    path = directory / "handlers.py"
    path.unlink(missing_ok=True)
    definition = define({step: steps[:place] for place, step in enumerate(steps)}, slug)
    partly = define({step: steps[:place] for place, step in enumerate(steps[:first])}, slug)
    import_workflow(partly, path)
    import_workflow(definition, path)
    assert sorted(load(definition, path).stubs) == sorted(definition.steps)
    assert find_real_problems(definition, path) == []
    written = path.read_bytes()
    assert import_workflow(definition, path).added == ()
    assert path.read_bytes() == written


def test_a_step_called_as_something_in_the_file_leaves_that_alone(tmp_path: Path) -> None:
    text = write(define({"workflow": [], "flow": [], "print": [], "flow_": []}), tmp_path / "handlers.py")
    assert 'step("workflow", unimplemented=True)\nasync def workflow_(' in text
    assert 'step("print", unimplemented=True)\nasync def print_(' in text
    module = load_module(str(tmp_path / "handlers.py"))
    assert isinstance(module.workflow, Workflow)
    assert set(module.workflow.stubs) == {"workflow", "flow", "print", "flow_"}
    assert module.flow is module.workflow.flow


PHOTOS = define(
    {"list": [], "item": [], "resize": ["list", "item"], "sum": ["resize", "list"], "rows": []}, "photos"
).model_copy(
    update={
        "rules": {
            "list": StepRules(when_exhausted=WhenUnmet.SKIP),
            "resize": StepRules(map=MapRules(over="list", max_items=9, when_item_fails="skip"), only_if={"list": [1]}),
            "rows": StepRules(map=MapRules(over="payload", path=("a", "b"))),
        }
    }
)


def test_a_map_gets_an_item_and_what_may_be_skipped_is_optional(tmp_path: Path) -> None:
    text = write(PHOTOS, tmp_path / "photos.py")
    assert 'over="list",' in text
    assert 'when_item_fails="skip",' in text
    assert "async def resize(item: JsonValue, item_: JsonValue) -> JsonValue:" in text
    assert (
        '@workflow.map(over="payload.a.b", unimplemented=True)\nasync def rows(item: JsonValue) -> JsonValue:' in text
    )
    assert "async def sum_(list: JsonValue = None, resize: JsonValue = None) -> JsonValue:" in text
    workflow = load(PHOTOS, tmp_path / "photos.py")
    assert workflow.find_problems(PHOTOS) == []


def test_a_map_whose_row_does_not_say_its_source_has_no_problem(tmp_path: Path) -> None:
    said = {"again": StepRules(map=MapRules()), "rows": StepRules(map=MapRules())}
    definition = define({"rows": [], "again": ["rows"]}, "maps").model_copy(update={"rules": said})
    text = write(definition, tmp_path / "maps.py")
    assert '@workflow.map(over="payload", unimplemented=True)' in text
    assert '@workflow.map(over="rows", unimplemented=True)' in text
    assert load(definition, tmp_path / "maps.py").find_problems(definition) == []


def test_a_second_import_adds_its_stubs_behind_the_last_map(tmp_path: Path) -> None:
    path = tmp_path / "photos.py"
    write(define({"rows": []}, "photos").model_copy(update={"rules": {"rows": PHOTOS.rules["rows"]}}), path)
    path.write_text(path.read_text().replace("flow = workflow.flow", "# the last line\nflow = workflow.flow"))
    text = write(PHOTOS, path)
    assert text.index("def rows") < text.index("def resize") < text.index("# the last line")
    assert load(PHOTOS, path).find_problems(PHOTOS) == []
