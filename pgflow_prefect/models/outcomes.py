"""What a completed step means for other steps."""

from typing import TypeAlias
from uuid import UUID

from pydantic import BaseModel, ConfigDict
from typing_extensions import TypedDict

from pgflow_prefect.raw_json import RawJson


class SkipOutcome(TypedDict):
    """That a step is skipped.

    Attributes:
        skip: true.
        note: why, for people.
        cascade: whether what is below it is skipped, too, unless its rule says otherwise.
    """

    skip: bool
    note: str | None
    cascade: bool


class BranchOutcome(TypedDict):
    """That a step is completed, and that some of the steps that wait for it are skipped.

    Attributes:
        taken: the slugs of those that are not.
        whole: whether what is below the others is skipped, too, whatever its rules say.
    """

    taken: list[str]
    whole: bool


class CacheOutcome(TypedDict):
    """That a step is completed, and that steps of later runs may take over its result.

    Attributes:
        cache_key: a hash: a later step with the same one takes the result over.
        expires_in: seconds after the step's end until that is over; None for never.
    """

    cache_key: str
    expires_in: float | None


class CachedOutcome(TypedDict):
    """That a step is completed by the result of an earlier run.

    Attributes:
        cached_from: that run.
    """

    cached_from: str


AnyOutcome: TypeAlias = SkipOutcome | BranchOutcome | CacheOutcome | CachedOutcome


def is_skipping(outcome: AnyOutcome | None) -> bool:
    """Tell whether some of the next steps are skipped."""
    return outcome is not None and ("skip" in outcome or "taken" in outcome)


def find_source(outcome: AnyOutcome | None) -> str | None:
    """Return the run whose result a step takes over, if it takes one over."""
    found: dict[str, object] = {**outcome} if outcome is not None else {}
    return str(found["cached_from"]) if "cached_from" in found else None


class CachedResult(BaseModel):
    """The result of an earlier run that a step takes over.

    Attributes:
        run_id: that run.
        result: what its row has.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    result: RawJson
