"""Plan a tour, insure it, and book each of its legs: the insurance and the legs are runs of their own."""

from pydantic import BaseModel

from pgflow_prefect import Child, Workflow


class Wish(BaseModel):
    """The payload of a run."""

    traveller: str
    places: list[str]


insurance = Workflow("insurance")


@insurance.step
async def insure(payload: str) -> str:
    return f"{payload} is insured"


leg = Workflow("tour_leg")


@leg.step
async def reserve(payload: str) -> str:
    return payload


@leg.step
async def pay(reserve: str) -> str:
    return f"a ticket to {reserve}"


workflow = Workflow("tour")


@workflow.step
async def plan(payload: Wish) -> list[str]:
    return payload.places


workflow.bind("protect", Child("insurance", payload="payload.traveller"))
workflow.bind_map("book", Child("tour_leg", payload="item", max_children=2), over="plan")


@workflow.step
async def tell(protect: dict[str, str], book: list[dict[str, str]]) -> str:
    return ", ".join([protect["insure"], *(each["pay"] for each in book)])


flow = workflow.flow
