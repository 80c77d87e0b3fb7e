"""Write an invoice for each order of the payload, then add them up.

The workflow itself is SQL (`order_invoices/workflow.sql`); here is what its steps do. `invoice` is a map: the worker
executes it once for each order, and each order has its own retries and its own end.
"""

from decimal import Decimal

from pydantic import BaseModel, Field

from pgflow_prefect import AsyncItemContext, NotRetriableError, Skip, Workflow

CENT = Decimal("0.01")

workflow = Workflow("order_invoices")


class Order(BaseModel):
    """An element of the payload's `orders`."""

    number: int
    country: str
    net: Decimal = Field(ge=0)
    cancelled: bool = False


class Invoice(BaseModel):
    """What the customer owes for one order."""

    order: int
    tax: Decimal
    total: Decimal


class Summary(BaseModel):
    """All invoices of a run."""

    invoices: int
    total: Decimal


@workflow.step
def tax_rates() -> dict[str, Decimal]:
    """Return the tax of each country, in percent."""
    return {"AT": Decimal(20), "CH": Decimal("8.1"), "DE": Decimal(19)}


@workflow.map(over="payload.orders", at_once=10, retries=3, retry_delay_seconds=[1, 10], when_item_fails="continue")
async def invoice(item: Order, tax_rates: dict[str, Decimal], context: AsyncItemContext) -> Invoice:
    """Write the invoice of one order. A cancelled order has none."""
    if item.cancelled:
        raise Skip(f"order {item.number} was cancelled")
    if item.country not in tax_rates:
        raise NotRetriableError(f"order {item.number}: there is no tax rate for {item.country!r}")
    tax = (item.net * tax_rates[item.country] / 100).quantize(CENT)
    context.logger.info("order %d, attempt %d: the tax is %s", item.number, context.attempt, tax)
    return Invoice(order=item.number, tax=tax, total=item.net + tax)


@workflow.step
def summary(invoice: list[Invoice]) -> Summary:
    """Add up the invoices, which come in the order of the orders."""
    return Summary(invoices=len(invoice), total=sum((each.total for each in invoice), Decimal(0)))


flow = workflow.flow
