"""Ship an order by one of two ways, and tell the customer which way it went."""

from pgflow_prefect import Branch, Workflow

workflow = Workflow("shipping")


@workflow.step
async def choose(payload: dict[str, int]) -> Branch[int]:
    return Branch("courier" if payload["kilograms"] > 2 else "letter", result=payload["kilograms"])


@workflow.step
async def letter(choose: int) -> str:
    return f"letter of {choose} kg"


@workflow.step
async def courier(choose: int) -> str:
    return f"courier with {choose} kg"


@workflow.step(rule="none_failed_min_one_success")
async def tell(letter: str | None = None, courier: str | None = None) -> str:
    return f"on its way: {letter or courier}"


flow = workflow.flow
