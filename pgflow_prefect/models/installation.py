"""A database among those that share a Prefect server."""

from uuid import UUID

from pydantic import BaseModel, ConfigDict


class Installation(BaseModel):
    """One of the databases that share a Prefect server.

    Attributes:
        id: the tag of its objects in Prefect has this id.
        stamp: identifies the database that was stamped.
        current_stamp: identifies the database that this row is in now.
        former_stamps: identify the databases that it was moved from.
        fits: whether both stamps identify one database; otherwise this database is a copy.
        is_used: whether it has written to Prefect.
    """

    model_config = ConfigDict(frozen=True)

    id: UUID
    stamp: str | None
    current_stamp: str
    former_stamps: tuple[str, ...]
    fits: bool
    is_used: bool
