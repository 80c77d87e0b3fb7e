"""A manifest of dbt, written by dbt for the project in tests/dbt, and manifests that are odd."""

import json
from pathlib import Path
from typing import Any

import pytest

from pgflow_prefect.definitions.dbt import DbtProject, read_manifest
from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.deployment.code_generation import import_workflow
from pgflow_prefect.deployment.handler_files import find_workflow, load_module
from pgflow_prefect.errors import InvalidDefinitionError, UsageError
from tests.unit.test_code_generation import run_ruff

MANIFEST = Path(__file__).parents[1] / "dbt" / "manifest.json"


def read(manifest: object) -> DbtProject:
    return read_manifest(json.dumps(manifest).encode(), "manifest.json")


def make_node(name: str, *above: str, kind: str = "model", **fields: Any) -> dict[str, Any]:
    return {"resource_type": kind, "name": name, "package_name": "shop", "depends_on": {"nodes": [*above]}, **fields}


def make_manifest(version: object = 12, **nodes: dict[str, Any]) -> dict[str, Any]:
    schema = f"https://schemas.getdbt.com/dbt/manifest/v{version}.json"
    named = {f"{node['resource_type']}.shop.{key}": node for key, node in nodes.items()}
    return {"metadata": {"dbt_schema_version": schema, "project_name": "shop"}, "nodes": named}


def list_upstream(project: DbtProject) -> dict[str, list[str]]:
    graph = build_graph(project.definition)
    return {slug: sorted(graph.predecessors(slug)) for slug in graph}


def test_models_seeds_snapshots_and_tests_become_steps() -> None:
    project = read_manifest(MANIFEST.read_bytes(), "manifest.json")
    assert project.definition.slug == "jaffle"
    assert (project.definition.when_failed, project.definition.failed_by) == ("continue", "steps")
    assert list_upstream(project) == {
        "raw_customers": [],
        "raw_orders": [],
        "stg_customers": ["raw_customers"],
        "customers": ["raw_orders", "stg_customers"],  # through the ephemeral model stg_orders
        "big_customers": ["customers"],
        "events": [],
        "customers_history": ["customers"],
        "unique_customers_customer_id": ["customers"],
        "not_null_customers_customer_id": ["customers"],
        "not_null_stg_customers_name": ["stg_customers"],
        "nothing_is_negative": ["customers"],
        "spends_add_up": ["customers"],
    }


def test_the_ledger_has_the_lines_that_were_expected_of_the_project() -> None:
    project = read_manifest(MANIFEST.read_bytes(), "manifest.json")
    lines = [(line.about, line.topic, line.is_done) for line in project.ledger.lines]
    assert [each[1:] for each in lines if each[0] is None] == [
        ("source", True),
        ("failure", True),
        ("one command a step", False),
        ("threads", False),
        ("tests", False),
        ("ephemeral", True),
        ("hooks", False),
        ("sources", False),
        ("others", True),
        ("schedule", False),
    ]
    assert sorted(each for each in lines if each[0] in {"big_customers", "not_null_stg_customers_name"}) == [
        ("big_customers", "incremental", False),
        ("big_customers", "model", False),
        ("big_customers", "tags", False),
        ("not_null_stg_customers_name", "severity", True),
        ("not_null_stg_customers_name", "test", False),
    ]


def test_a_stub_names_the_command_that_executes_it_and_no_secret(tmp_path: Path) -> None:
    project = read_manifest(MANIFEST.read_bytes(), "manifest.json")
    path = tmp_path / "jaffle.py"
    import_workflow(project.definition, path, project.origin)
    source = path.read_text(encoding="utf-8")
    for command in (
        "dbt run --select customers",
        "dbt seed --select raw_orders",
        "dbt snapshot --select customers_history",
        "dbt test --select nothing_is_negative",
    ):
        assert f"    It runs: {command}\n" in source
    assert "What each customer has spent." in source
    assert "hunter2" not in source + project.ledger.write()
    workflow = find_workflow(load_module(str(path)), "jaffle", str(path))
    assert sorted(workflow.stubs) == sorted(project.definition.steps)
    run_ruff("check", "--isolated", str(path))
    run_ruff("format", "--isolated", "--check", "--diff", str(path))


@pytest.mark.parametrize("version", [7, 12, 20])
def test_the_versions_of_the_manifest_are_read(version: int) -> None:
    assert read(make_manifest(version, a=make_node("a"))).definition.steps == ("a",)


@pytest.mark.parametrize("version", [1, 6, 13, 21, 999])
def test_another_version_is_refused_by_name(version: int) -> None:
    with pytest.raises(UsageError, match=rf"manifest.json has version {version} of dbt's manifest: versions 7, 8"):
        read(make_manifest(version, a=make_node("a")))


@pytest.mark.parametrize(
    "value", [None, 3, [], {}, {"metadata": 3}, {"metadata": {"dbt_schema_version": "x"}, "nodes": {}}]
)
def test_what_is_no_manifest_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match=r"manifest\.json is no manifest of dbt: it is to be target/manifest\.json"):
        read(value)


def test_a_text_that_is_no_json_is_refused() -> None:
    for text in (b"", b"{", b"\xff", b"[" * 100_000):
        with pytest.raises(UsageError, match=r"manifest\.json (is no JSON|has lists and objects)"):
            read_manifest(text, "manifest.json")


def test_steps_of_packages_begin_with_their_name_and_versions_end_with_theirs() -> None:
    project = read(
        make_manifest(
            a=make_node("orders", version=2, fqn=["shop", "orders", "v2"]),
            b=make_node("orders", package_name="utils", fqn=["utils", "staging", "orders"]),
            c=make_node("orders", version=1, fqn=["shop", "orders", "v1"]),
        )
    )
    assert {node.slug: node.command[-1] for node in project.nodes} == {
        "orders.v1": "shop.orders.v1",
        "orders.v2": "shop.orders.v2",
        "utils.orders": "utils.staging.orders",
    }


def test_a_test_whose_name_is_taken_gets_its_hash() -> None:
    nodes = {
        "test.shop.orders.1a2b": make_node("orders", "model.shop.orders", kind="test", fqn=["shop", "orders"]),
        "model.shop.orders": make_node("orders"),
    }
    project = read(make_manifest() | {"nodes": nodes})
    assert list_upstream(project) == {"orders": [], "orders_1a2b": ["orders"]}


def test_a_chain_of_ephemeral_models_is_followed_to_what_is_executed() -> None:
    inlined: Any = {"config": {"materialized": "ephemeral"}}
    project = read(
        make_manifest(
            a=make_node("a"),
            b=make_node("b", "model.shop.a", "source.shop.raw.x", **inlined),
            c=make_node("c", "model.shop.b", "model.shop.a", **inlined),
            d=make_node("d", "model.shop.c", "model.shop.c"),
        )
    )
    assert list_upstream(project) == {"a": [], "d": ["a"]}


def test_a_cycle_and_a_project_without_steps_are_refused() -> None:
    with pytest.raises(InvalidDefinitionError, match="a -> b -> a"):
        read(make_manifest(a=make_node("a", "model.shop.b"), b=make_node("b", "model.shop.a")))
    with pytest.raises(InvalidDefinitionError, match="it has no steps"):
        read(make_manifest())


def test_no_text_of_a_manifest_becomes_code(tmp_path: Path) -> None:
    odd = '"""\nimport os\nos.abort()\n\\'
    node = make_node(odd, description=odd, original_file_path=odd, fqn=[odd], tags=[odd], config={"materialized": odd})
    with pytest.raises(InvalidDefinitionError, match="control character"):
        read(make_manifest(a=node))
    project = read(make_manifest(a=node | {"name": '"""; import os; os.abort() #\\'}))
    import_workflow(project.definition, tmp_path / "shop.py", project.origin)
    assert len(find_workflow(load_module(str(tmp_path / "shop.py")), "shop", "shop.py").stubs) == 1
    assert all("\n" not in line.write() for line in project.ledger.lines)
