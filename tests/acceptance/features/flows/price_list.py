"""Price each article, leave out what can't be priced, and write a line for each price: a map over a map."""

from pydantic import BaseModel

from pgflow_prefect import AsyncItemContext, ItemContext, Skip, Workflow

workflow = Workflow("price_list")


class Article(BaseModel):
    name: str
    cents: int


@workflow.step
async def rates() -> dict[str, int]:
    return {"factor": 2}


@workflow.map(over="payload.articles", retries=1, at_once=3, when_item_fails="skip")
async def price(item: Article, rates: dict[str, int], context: AsyncItemContext) -> Article:
    if item.cents == 0:
        raise Skip("it is free")
    if item.cents < 0:
        raise ValueError(f"article {context.item_index} costs less than nothing")
    if context.attempt == 1 and item.name == "shy":
        raise ConnectionError("try again")
    return Article(name=item.name, cents=item.cents * rates["factor"])


@workflow.map(over="price")
def line(item: Article, context: ItemContext) -> str:
    return f"{context.item_index + 1}. {item.name}: {item.cents}"


@workflow.step
def print_list(line: list[str]) -> str:
    return "\n".join(line)


flow = workflow.flow
