"""A chain of steps, each of which takes what the one before it returns as a model."""

import datetime as dt
from dataclasses import dataclass
from decimal import Decimal
from enum import Enum
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from pgflow_prefect import Workflow

workflow = Workflow("models")


class Currency(Enum):
    EURO = "EUR"
    YEN = "JPY"


class Card(BaseModel):
    kind: Literal["card"] = "card"
    number: str


class Transfer(BaseModel):
    kind: Literal["transfer"] = "transfer"
    iban: str


class Order(BaseModel):
    id: int
    at: dt.datetime
    total: Decimal
    currency: Currency
    payment: Annotated[Card | Transfer, Field(discriminator="kind")]


@dataclass(frozen=True)
class Invoice:
    order: Order
    due: dt.date
    lines: tuple[str, ...]


@workflow.step
def order(payload: Order) -> Order:
    return payload


@workflow.step
def invoice(order: Order) -> Invoice:
    return Invoice(order, order.at.date() + dt.timedelta(days=14), (f"{order.total} {order.currency.value}",))


@workflow.step
def remind(invoice: Invoice) -> str:
    assert isinstance(invoice.order.payment, Transfer)
    assert isinstance(invoice.order.currency, Currency)
    return f"{invoice.lines[0]} from {invoice.order.payment.iban} by {invoice.due:%Y-%m-%d}"


flow = workflow.flow
