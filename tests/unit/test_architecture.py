"""The rooms of the package: no circles, and a picture of them that is current."""

import re
import tomllib
from pathlib import Path

import grimp
import networkx as nx
import pytest

import pgflow_prefect
from tests.architecture import draw_rooms, find_rooms, list_packages, read_picture

KNOW_PREFECT = {"blocks", "deployment", "execution", "prefect_api", "services", "workflow"}


@pytest.mark.parametrize("package", list_packages())
def test_no_files_or_folders_of_a_package_import_each_other(package: str) -> None:
    assert nx.is_directed_acyclic_graph(find_rooms(package))


def test_the_picture_of_the_rooms_is_current() -> None:
    assert read_picture() == draw_rooms(), "python -m tests.architecture draws it anew"


def test_the_contracts_of_imports_name_every_room() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))
    layers, prefect, postgresql = project["tool"]["importlinter"]["contracts"]
    rooms = {*grimp.build_graph("pgflow_prefect").find_children("pgflow_prefect")} - {"pgflow_prefect.__main__"}
    know_prefect = {f"pgflow_prefect.{room}" for room in KNOW_PREFECT}

    assert {name for layer in layers["layers"] for name in re.split(r" \| ", layer)} == rooms
    assert {*prefect["source_modules"]} == rooms - know_prefect
    assert {*postgresql["source_modules"]} == rooms - {"pgflow_prefect.database"}


def test_requests_to_prefect_have_a_bound() -> None:
    package = Path(pgflow_prefect.__file__).parent
    users = {
        str(file.relative_to(package))
        for file in package.rglob("*.py")
        if "translate_prefect_errors(" in file.read_text(encoding="utf-8")
    }
    bounded_by_the_writer = {"services/submission.py"}

    assert users - bounded_by_the_writer == {"prefect_api/client.py", "prefect_api/errors.py"}, "use ask_prefect"
