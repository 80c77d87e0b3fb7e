"""`guide`: pages of reference, without a database or a server."""

import re
from pathlib import Path

import pytest

from tests.acceptance.conftest import CommandLine

pytestmark = pytest.mark.once

PAGES = sorted(path.stem for path in Path("pgflow_prefect/guide").glob("*.md"))


def test_the_pages_are_listed(outside: CommandLine) -> None:
    lines = outside("guide").lines
    assert [line.split("\t")[0] for line in lines] == ["page", *PAGES]
    about = dict(line.split("\t") for line in lines[1:])
    assert all(each[0].isupper() and each.endswith(".") and len(each.split()) > 5 for each in about.values()), about


def test_an_error_about_rights_leads_to_a_page_that_has_them() -> None:
    assert "`pgflow-prefect guide engine`" in Path("pgflow_prefect/database/translation.py").read_text(encoding="utf-8")
    assert "**Rights.**" in Path("pgflow_prefect/guide/engine.md").read_text(encoding="utf-8")


def test_a_page_is_shown(outside: CommandLine) -> None:
    assert outside("guide", "engine").out.startswith("# The engine\n")


def test_a_page_that_is_not_there_is_named_with_the_nearest(outside: CommandLine) -> None:
    refused = outside("guide", "scalin")
    assert refused.code == 2
    assert "the guide has no page 'scalin' (did you mean 'scaling'?): it has airflow," in refused.find_error()


@pytest.mark.parametrize(
    "page", [Path("README.md"), Path("flows/README.md"), *Path("pgflow_prefect/guide").glob("*.md")]
)
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\((?!https?://)([^)#]*)", page.read_text(encoding="utf-8")):
        assert not link or (page.parent / link).exists(), link
