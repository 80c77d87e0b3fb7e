"""Book a trip: each of its legs is a run of a workflow of its own.

The workflows are SQL (`book_trip/workflow.sql`); here is what their steps do. `book` is a map of children: PostgreSQL
begins a run of `book_leg` for each leg. If one leg fails, its run is tried once more; the other legs go on.
"""

from decimal import Decimal

from pydantic import BaseModel

from pgflow_prefect import Child, NotRetriableError, StepContext, Workflow


class Leg(BaseModel):
    """A part of a trip."""

    start: str
    end: str
    price: Decimal


class Seat(BaseModel):
    """What was reserved for a leg."""

    leg: Leg
    number: int


class Ticket(BaseModel):
    """What was paid for a leg."""

    text: str
    price: Decimal


class Request(BaseModel):
    """The payload of a run of `book_trip`."""

    places: list[str]


leg = Workflow("book_leg", description="Reserve a seat for one leg, and pay it.")


@leg.step
def reserve(payload: Leg, context: StepContext) -> Seat:
    """Reserve a seat. The number follows from the run, so that a second attempt reserves the same one."""
    return Seat(leg=payload, number=context.run_id.int % 80 + 1)


@leg.step(retries=2, retry_delay_seconds=1)
def pay(reserve: Seat) -> Ticket:
    """Pay the seat."""
    return Ticket(text=f"{reserve.leg.start} - {reserve.leg.end}", price=reserve.leg.price)


trip = Workflow("book_trip", description="Plan a trip, and book all of its legs.")


@trip.step
def plan(payload: Request) -> list[Leg]:
    """Split the trip into legs."""
    if len(payload.places) < 2:  # noqa: PLR2004  from one to another
        raise NotRetriableError("a trip needs two places")
    pairs = zip(payload.places[:-1], payload.places[1:], strict=True)
    return [Leg(start=start, end=end, price=Decimal(10 * len(start + end))) for start, end in pairs]


trip.bind_map("book", Child("book_leg", payload="item", retries=1), over="plan")


@trip.step
def confirm(book: list[dict[str, Ticket]]) -> Ticket:
    """Add up the tickets. A child's result has the results of its last steps, by name."""
    tickets = [each["pay"] for each in book]
    return Ticket(
        text=", ".join(each.text for each in tickets), price=sum((each.price for each in tickets), Decimal(0))
    )


flow = trip.flow
