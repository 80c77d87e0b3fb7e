"""Secrets: from the environment, and from a block of Prefect's; no step returns one."""

import hashlib
import os
from typing import Any

from prefect.blocks.system import Secret
from pydantic import SecretStr

from pgflow_prefect import Workflow

workflow = Workflow("secrets")
PASSWORD = SecretStr(os.environ["SHOP_PASSWORD"])


@workflow.step
def sign(payload: dict[str, str]) -> str:
    return hashlib.sha256((payload["text"] + PASSWORD.get_secret_value()).encode()).hexdigest()


@workflow.step
async def check(payload: dict[str, str], sign: str) -> bool:
    key: Any = await Secret.aload(payload["block"])
    return hashlib.sha256((payload["text"] + key.get()).encode()).hexdigest() == sign


flow = workflow.flow
