"""What a slug or a URL of a row may become: no file that hides a package, no markup, no secret that others read."""

import json
import tomllib
from pathlib import Path
from urllib.parse import quote
from uuid import uuid4

import httpx
import pytest

from pgflow_prefect import Workflow
from pgflow_prefect.bindings import check_url
from pgflow_prefect.wording import write_code
from pgflow_prefect.workflow import to_flow_name
from tests.acceptance.conftest import TIMEOUT, CommandLine
from tests.conftest import Connection
from tests.engine import define, refused
from tests.security.conftest import Party


@pytest.mark.parametrize("slug", ["networkx", "statistics", "prefect", "sys", "json", "pgflow_prefect", "psycopg"])
def test_import_writes_no_file_that_hides_a_package(cli: CommandLine, party: Party, slug: str) -> None:
    author = party("define")
    define(author, "fine", {"a": []})
    define(author, slug, {"a": []})
    told = cli("import", "fine", slug)
    assert told.code == 2
    assert f"would hide the module '{slug}'" in told.find_error()
    assert not (cli.directory / "flows").exists(), "nothing is half done"


def test_import_goes_on_with_a_file_that_is_there(cli: CommandLine, db: Connection) -> None:
    define(db, "statistics", {"a": []})
    cli.write("flows/statistics.py", 'from pgflow_prefect import Workflow\n\nworkflow = Workflow("statistics")\n')
    assert cli("import", "statistics").code == 0
    define(db, "a-workflow", {"a": []})
    cli.write("a_workflow.py", "")  # the user's own, beside flows/
    assert cli("import", "a-workflow").code == 0


@pytest.mark.parametrize(
    "slug", ["[x](javascript:alert(1))", "<img src=x>", "![](https://evil.example/p.png)", "a`b``c", "`"]
)
def test_a_slug_is_no_markup_in_a_description(slug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "__doc__", None)  # the docstring of its file would be the description
    described = Workflow(slug).flow.description
    assert described is not None
    assert described.startswith(f"The workflow {write_code(slug)} of pgflow.")
    fence = write_code(slug)[: len(write_code(slug)) - len(write_code(slug).lstrip("`"))]
    assert fence not in slug.replace(fence + "`", "")


@pytest.mark.parametrize("slug", ["[x](javascript:alert(1))", "<img src=x onerror=alert(1)>", "a`b``c"])
def test_the_slug_of_a_definer_is_no_markup_on_prefect_s_page(cli: CommandLine, party: Party, slug: str) -> None:
    slug = f"{slug}{uuid4().hex[:8]}"
    author = party("define")
    define(author, slug, {"a": []})
    author.execute("SELECT pgflow_prefect.bind_step(%s, 'a', 'external', NULL)", [slug])
    deployed = cli("deploy", slug, "--json")
    assert deployed.code == 0, deployed
    [told] = json.loads(deployed.out)
    url = f"{cli.environment['PREFECT_API_URL']}/deployments/name/{quote(to_flow_name(slug), safe='')}/pgflow"
    shown = httpx.get(url, timeout=TIMEOUT).raise_for_status().json()
    assert write_code(slug) in shown["description"], told
    assert shown["description"].replace(write_code(slug), "").count(slug) == 0


CHECK = "23514"  # a constraint says so

SECRETS = [
    "?code=x", "?auth=x", "?pwd=x", "?db_pwd=x", "?a=1&access_code=x", "?AUTH=x", "?pass=x", "?jwt=x", "?sas=x",
    "?credentials=x", "?oauth=x", "?%63ode=x", "?a=1;auth=x", "#auth=x", "?key=x", "?api-token=x",
]  # fmt: skip


@pytest.mark.parametrize("query", SECRETS)
def test_a_url_with_a_secret_is_refused_by_python_and_by_the_row(party: Party, query: str) -> None:
    url = f"https://example.org/{query}"
    with pytest.raises(ValueError, match="looks like a secret"):
        check_url(url)
    if "%" not in query:
        with refused(CHECK, "secret"):
            party("define").execute("SELECT pgflow_prefect.bind_step('chain', 'a', 'http', %s)", [url])


@pytest.mark.parametrize(
    "query", ["?zipcode=1", "?country_code=CH", "?author=x", "?bypass=1", "?decode=1", "?monkeys=2"]
)
def test_a_parameter_that_only_looks_a_little_like_one_is_taken(party: Party, query: str) -> None:
    url = f"https://example.org/{query}"
    assert check_url(url) == url
    party("define").execute("SELECT pgflow_prefect.bind_step('chain', 'a', 'http', %s)", [url])


def test_versions_of_jinja_that_let_templates_out_of_the_sandbox_are_not_allowed() -> None:
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert [each for each in project["dependencies"] if each.startswith("jinja2")] == ["jinja2>=3.1.6,<4"]
