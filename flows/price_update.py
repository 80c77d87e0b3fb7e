"""Price some thousand products anew: a workflow with a step of every kind.

    load_costs                 an SQL function, in the transaction that completes its step
    price_books, …             Python, a fan-out over the categories: each prices its rows exactly once
    check_margins              an HTTP endpoint, such as a Supabase Edge Function (here `price_update/endpoint.py`)
    sign_off                   a person, who calls `pgflow.complete_step`
    print_labels               a worker of a Redis queue      (`price_update/consumers.py`)
    tell_shops                 a worker of a RabbitMQ queue
    update_search              a worker of a pgqueuer queue, in the same PostgreSQL
    report                     Python again, a join

Where things are comes from the environment, so that the same file serves a laptop and a cluster. Tables, SQL function
and workflow are in `price_update/workflow.sql`.
"""

import os
from decimal import Decimal

from pydantic import BaseModel

from pgflow_prefect import External, HttpEndpoint, Queue, SqlFunction, StepContext, Workflow

MARGIN = {"books": Decimal("1.20"), "garden": Decimal("1.55"), "tools": Decimal("1.40"), "toys": Decimal("1.35")}
"""Prices are costs times this."""

workflow = Workflow("price_update", description="Price all products, have the prices checked, announce them.")


class Priced(BaseModel):
    """What became of one category."""

    category: str
    products: int
    cost: Decimal
    revenue: Decimal


class Report(BaseModel):
    """What became of the update."""

    products: int
    told: list[str]


workflow.bind("load_costs", SqlFunction("shop.load_costs", timeout_seconds=60))
workflow.bind(
    "check_margins",
    HttpEndpoint(os.environ.get("MARGINS_URL", "http://127.0.0.1:8099/check"), token_env="MARGINS_TOKEN"),  # noqa: S106  a name
)
workflow.bind("sign_off", External())
workflow.bind("print_labels", Queue(os.environ.get("LABELS_QUEUE", "redis://127.0.0.1/0?queue=labels")))
workflow.bind(
    "tell_shops",
    Queue(os.environ.get("SHOPS_QUEUE", "amqp://127.0.0.1//?queue=shops"), login_env="SHOPS_LOGIN"),
)
workflow.bind("update_search", Queue("pgqueuer:search"))


@workflow.step
def price_books(context: StepContext) -> Priced:
    """Price the books."""
    return _price("books", context)


@workflow.step
def price_garden(context: StepContext) -> Priced:
    """Price what goes into gardens."""
    return _price("garden", context)


@workflow.step
def price_tools(context: StepContext) -> Priced:
    """Price the tools."""
    return _price("tools", context)


@workflow.step
def price_toys(context: StepContext) -> Priced:
    """Price the toys."""
    return _price("toys", context)


@workflow.step
def report(print_labels: int, tell_shops: int, update_search: int, context: StepContext) -> Report:
    """Count what was done."""
    told = {"labels": print_labels, "shops": tell_shops, "search": update_search}
    [products] = context.connection.execute("SELECT count(*) FROM shop.products WHERE price IS NOT NULL").fetchone()
    return Report(products=products, told=[f"{whom}: {count}" for whom, count in told.items()])


def _price(category: str, context: StepContext) -> Priced:
    """Price one category's rows. They commit with the step: after a crash all of them are priced once, or none."""
    row = context.connection.execute(
        """
        WITH priced AS (
            UPDATE shop.products SET price = round(cost * %s, 2), priced_times = priced_times + 1
            WHERE category = %s RETURNING cost, price
        ) SELECT count(*), coalesce(sum(cost), 0), coalesce(sum(price), 0) FROM priced
        """,
        (MARGIN[category], category),
    ).fetchone()
    products, cost, revenue = row
    context.logger.info("%d %s cost %s and bring %s", products, category, cost, revenue)
    return Priced(category=category, products=products, cost=cost, revenue=revenue)


flow = workflow.flow
