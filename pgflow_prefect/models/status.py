"""How runs and steps stand, and how they end."""

from enum import StrEnum
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from pgflow_prefect.wording import clean_lines

Shown = Annotated[str, AfterValidator(clean_lines)]
"""A text of a row that Prefect shows in its pages and in terminals. It is cleaned when it is read."""


class Held(StrEnum):
    """How a run's latest owner holds it."""

    LEASED = "leased"
    """The owner executes the run, or will begin now."""

    QUEUED = "queued"
    """The owner's flow run waits in Prefect."""

    EXPIRED = "expired"
    """The lease has expired, and another owner may take the run."""

    RELEASED = "released"
    """The owner has released the run, or has lost it."""


class Status(StrEnum):
    """The status of a run, and of a step's state."""

    PENDING = "pending"
    FAILED = "failed"
    COMPLETED = "completed"


class Ending(StrEnum):
    """How a run or a step ended. This tells more than its status."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    """`pgflow.cancel_run` ended it; its status is `failed`."""


NOT_RUN = "dependency_failed"
"""The skip_reason of a failed step that was not executed, because one that it waits for has failed."""


CANCELLED = Ending.CANCELLED.value
"""The reason of a cancellation without a reason."""


def _find_ending(noted: object, info: ValidationInfo) -> Ending | None:
    """Return how it ended. The column `ended_as` counts only if the status is `failed`."""
    status = info.data.get("status")
    if status not in (Status.COMPLETED, Status.FAILED):
        return None
    return Ending.CANCELLED if status is Status.FAILED and noted == Ending.CANCELLED else Ending(status)


EndedAs = Annotated[Ending | None, BeforeValidator(_find_ending)]
"""How a row ended, None while it is pending. Its model has `status` before it."""
