"""The documentation site, as far as it can be tested without building it."""

import ast
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from cyclopts import CycloptsError, MissingArgumentError

from pgflow_prefect.cli.app import COMMANDS, app
from pgflow_prefect.settings import Settings
from tests.site.api import find_undocumented, write_api
from tests.site.commands import write_commands
from tests.site.pages import complete_nav, find_figures, finish_page, list_guide, make_pages
from tests.site.places import ROOT, find_place, lead_links
from tests.site.settings import write_settings
from tests.site.sources import find_foreign, list_foreign

PAGES = [Path("README.md"), *sorted(Path("pgflow_prefect/guide").glob("*.md"))]


def find_blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def find_commands() -> Iterator[tuple[str, bool]]:
    """Yield the commands that the pages have, and whether one stands in a block to be typed as it is."""
    for page in PAGES:
        lines = [(line, True) for block in find_blocks(page, "(?:bash|sh)") for line in block.splitlines()]
        lines += [(line, False) for line in re.findall(r"(?<!\|)`(pgflow-prefect [^`\n|]*)`", page.read_text("utf-8"))]
        for line, whole in lines:
            found = re.search(r"(?:^|\s|&&)pgflow-prefect ([^|&>…]*)", line)
            if found and "[" not in found[1]:
                yield found[1].strip(), whole and "…" not in line


@pytest.mark.parametrize(("command", "whole"), sorted(set(find_commands())))
def test_each_command_of_the_pages_exists_with_its_options(command: str, whole: bool) -> None:
    words = shlex.split(command, comments=True)
    if words and words[0] in COMMANDS:
        try:
            app.parse_args(words, exit_on_error=False, print_error=False)
        except CycloptsError as error:
            if whole or not isinstance(error, MissingArgumentError):
                pytest.fail(f"{command}: {error}")
    else:
        assert words in ([], ["--help"], ["--version"]) or words[0] == "COMMAND", command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_of_the_pages_is_python(page: Path) -> None:
    for block in find_blocks(page, "python"):
        ast.parse(block)


def test_links_to_files_of_the_repository_lead_to_pages_of_the_site() -> None:
    text = (
        "[a](../../sql/pgflow.sql), [b](../../benchmarks/RESULTS.md#scale), [c](scaling.md), [d](https://example.org/x)"
    )
    assert lead_links(text, "engine.md", {}) == (
        "[a](source/sql/pgflow.sql.md), [b](benchmarks/results.md#scale), [c](scaling.md), [d](https://example.org/x)"
    )
    assert lead_links("[a](supabase/roles.sql)", "reference/contract.md", {}) == (
        "[a](../source/sql/supabase/roles.sql.md)"
    )


def test_a_mention_of_a_page_of_the_guide_is_a_link() -> None:
    text = "See `pgflow-prefect guide rules`.\n```\n`pgflow-prefect guide rules`\n```\n`pgflow-prefect guide PAGE`\n"
    assert lead_links(text, "reference/api.md", {"rules": "Skips"}) == (
        "See [Skips](../rules.md).\n```\n`pgflow-prefect guide rules`\n```\n`pgflow-prefect guide PAGE`\n"
    )


def test_a_link_that_leads_nowhere_is_left_for_the_build_to_refuse() -> None:
    assert lead_links("[a](../../sql/gone.sql)", "engine.md", {}) == "[a](../../sql/gone.sql)"
    assert find_place("sql/gone.sql") is None
    assert find_place("../outside.md") is None


def test_a_folder_is_its_readme() -> None:
    assert find_place("flows") == find_place("flows/README.md") == "reference/examples.md"


def test_a_page_gets_its_figures_from_the_results() -> None:
    text, about = finish_page("# A\n<!-- What it is. -->\n<!-- figures: Scale: one run in layers of 50 -->\n", "a.md")
    assert about == "What it is."
    assert "| measured | median |" in text
    with pytest.raises(LookupError, match="has no section 'Speed of light'"):
        find_figures("Speed of light")


def test_every_command_has_its_section() -> None:
    page = write_commands()
    for name in COMMANDS:
        assert f"## pgflow-prefect {name}\n" in page
    assert "Continue this run instead of starting one" in page


def test_reading_the_commands_changes_nothing_of_their_help() -> None:
    former = {name: (app[name].help, app[name].help_format) for name in COMMANDS}
    write_commands()
    assert {name: (app[name].help, app[name].help_format) for name in COMMANDS} == former


def test_every_setting_has_its_section() -> None:
    page = write_settings()
    for name in Settings.model_fields:
        assert f"### `PGFLOW_{name.upper()}`\n\n" in page
    assert re.search(r"`PGFLOW_LEASE`\n\nSeconds after .*\n\n\*number; at least 1; default `15`", page)


def test_every_public_name_is_on_the_page_of_the_api_and_documented() -> None:
    assert "::: pgflow_prefect.Workflow\n" in write_api()
    assert "::: pgflow_prefect.consumer.perform\n" in write_api()
    assert find_undocumented() == []


def test_a_page_that_the_navigation_does_not_name_comes_last_among_the_how_tos() -> None:
    nav: list[object] = [{"Start": "index.md"}, {"How-tos": [{"Steps": ["handlers.md"]}]}]
    complete_nav(nav)
    [_, how_tos] = nav
    assert isinstance(how_tos, dict)
    assert how_tos["How-tos"][0] == {"Steps": ["handlers.md"]}
    assert set(how_tos["How-tos"][1:]) == {f"{name}.md" for name in list_guide()} - {"handlers.md"}


def test_files_that_pages_link_to_are_shown() -> None:
    pages = make_pages()
    assert "CREATE SCHEMA" in pages["source/sql/pgflow.sql.md"]
    assert "```mermaid" not in pages["index.md"] + pages["project/contributing.md"]


def test_the_wheel_has_no_pictures() -> None:
    assert not [path for path in (ROOT / "pgflow_prefect").rglob("*") if path.suffix in {".png", ".jpg", ".svg"}]


@pytest.mark.parametrize(
    "element",
    [
        '<script src="https://cdn.example.org/a.js"></script>',
        "<script async src=//cdn.example.org/a.js></script>",
        '<link rel="stylesheet" href="https://fonts.example.org/css?family=Roboto">',
        '<link rel="preconnect" href="https://fonts.example.org">',
        '<img alt="" src="HTTPS://img.example.org/badge.svg">',
        '<img alt="" src="a.png" srcset="a.png 1x, https://img.example.org/a.png 2x">',
        '<iframe src="https://video.example.org/1"></iframe>',
        "<style>@import 'https://fonts.example.org/a.css';</style>",
        '<p style="background: url(https://img.example.org/a.png)"></p>',
        '<svg><image xlink:href="https://img.example.org/a.png"/></svg>',
        '<pre class="mermaid"><code>flowchart LR</code></pre>',
    ],
)
def test_what_a_page_loads_from_elsewhere_is_found(element: str) -> None:
    assert len(list_foreign(f"<html><body>{element}</body></html>")) == 1


@pytest.mark.parametrize(
    "element",
    [
        '<a href="https://docs.prefect.io">Prefect</a>',
        '<link rel="canonical" href="https://example.org/page">',
        '<script src="assets/a.js"></script>',
        '<img alt="" src="data:image/png;base64,AAAA">',
        "<p>url(https://example.org)</p>",
        '<svg xmlns="http://www.w3.org/2000/svg"></svg>',
    ],
)
def test_what_a_page_only_names_is_no_fault(element: str) -> None:
    assert list_foreign(f"<html><body>{element}</body></html>") == []


def test_style_sheets_are_read_too(tmp_path: Path) -> None:
    (tmp_path / "a.css").write_text('@font-face { src: url("https://fonts.example.org/a.woff2") }', encoding="utf-8")
    (tmp_path / "b.css").write_text("p { background: url(b.png) }", encoding="utf-8")
    assert find_foreign(tmp_path) == ["a.css: https://fonts.example.org/a.woff2"]
