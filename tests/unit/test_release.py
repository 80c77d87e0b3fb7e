"""What `python -m tests.release` refuses."""

import re
import tomllib

import pytest

from tests.release import ROOT, ReleaseError, check_description, check_sdist, check_tag, check_wheel, read_version

WHEEL = [
    "pgflow_prefect/py.typed",
    "pgflow_prefect/guide/engine.md",
    "pgflow_prefect/_shipped/sql/pgflow.sql",
    "pgflow_prefect-1.2.3.dist-info/licenses/LICENSE",
]
CHANGELOG = "# Changelog\n\n## 1.2.3 - 2027-01-31\n\n### Added\n"


def test_a_tag_is_the_version_and_the_changelog_has_it() -> None:
    check_tag("v1.2.3", "1.2.3", CHANGELOG)


@pytest.mark.parametrize("tag", ["1.2.3", "v1.2.4", "v1.2.3.post1", "release-1.2.3"])
def test_another_tag_is_refused(tag: str) -> None:
    with pytest.raises(ReleaseError, match=f"the tag is {tag}, but pyproject.toml has"):
        check_tag(tag, "1.2.3", CHANGELOG)


@pytest.mark.parametrize("changelog", ["## Unreleased\n", "## 1.2.30\n", "see 1.2.3\n", "## 1x2x3\n"])
def test_a_version_that_the_changelog_does_not_have_is_refused(changelog: str) -> None:
    with pytest.raises(ReleaseError, match=r"has no section '## 1\.2\.3'"):
        check_tag("v1.2.3", "1.2.3", changelog)


def test_a_wheel_with_all_that_users_need_is_accepted() -> None:
    check_wheel(WHEEL)


@pytest.mark.parametrize(
    "odd", ["tests/conftest.py", "mkdocs.yml", "pgflow_prefect/guide/run.png", "pgflow_prefect/__pycache__/a.pyc"]
)
def test_a_wheel_with_files_that_are_not_for_users_is_refused(odd: str) -> None:
    with pytest.raises(ReleaseError, match=odd):
        check_wheel([*WHEEL, odd])


@pytest.mark.parametrize("missing", WHEEL)
def test_a_wheel_that_lacks_a_file_is_refused(missing: str) -> None:
    with pytest.raises(ReleaseError, match=r"the wheel lacks|the wheel has no licence"):
        check_wheel([name for name in WHEEL if name != missing])


def test_a_source_archive_without_its_tests_is_refused() -> None:
    with pytest.raises(ReleaseError, match=r"the source archive lacks .*tests/release\.py"):
        check_sdist(["README.md", "LICENSE"])


def test_the_version_is_static() -> None:
    assert read_version().count(".") == 2


def test_a_package_index_shows_readme_without_links_to_files() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    [rule] = project["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = re.sub(rule["pattern"], rule["replacement"], readme)
    with pytest.raises(ReleaseError, match=r"links to files, .*CONTRIBUTING\.md"):
        check_description(readme)
    check_description(shown)
    assert "CONTRIBUTING.md says what each part of the tests needs." in shown
    assert "[Prefect](https://docs.prefect.io)" in shown
