"""Declare goods that leave the country, which the rows decide: no handler looks at the country."""

from typing import Any

from pgflow_prefect import Workflow

workflow = Workflow("customs")


@workflow.step
def pack(payload: dict[str, Any]) -> dict[str, Any]:
    return {"weight": len(payload["goods"]), "fragile": "glass" in payload["goods"]}


@workflow.step(unless={"payload": {"country": "DE"}}, when_unmet="skip-cascade")
def fill_in_form(pack: dict[str, Any]) -> str:
    return f"{pack['weight']} things"


@workflow.step
def declare(fill_in_form: str) -> str:
    return f"declared: {fill_in_form}"


@workflow.step(only_if={"pack": {"fragile": True}})
def wrap(pack: dict[str, Any]) -> str:
    return "wrapped"


@workflow.step(rule="none_failed")
def send(wrap: str = "not wrapped", declare: str = "not declared") -> str:
    return f"{wrap}, {declare}"


flow = workflow.flow
