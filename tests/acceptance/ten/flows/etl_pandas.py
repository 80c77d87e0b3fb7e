"""The same with pandas: tables stay within a step, rows travel between steps."""

import io
from typing import Any

import httpx
import pandas as pd

from pgflow_prefect import Workflow

workflow = Workflow("etl_pandas")


@workflow.step
def extract(payload: dict[str, str]) -> list[dict[str, Any]]:
    text = httpx.get(f"{payload['url']}/orders").raise_for_status().text
    rows: list[dict[str, Any]] = pd.read_json(io.StringIO(text)).to_dict("records")
    return rows


@workflow.step
def transform(extract: list[dict[str, Any]]) -> dict[str, float]:
    frame = pd.DataFrame(extract)
    frame["value"] = frame["price"] * frame["amount"]
    sums: dict[str, float] = frame.groupby("sku")["value"].sum().to_dict()
    return sums


flow = workflow.flow
