"""What is known of a workflow beside its definition."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict


class WorkflowSummary(BaseModel):
    """One line of `pgflow-prefect list`."""

    model_config = ConfigDict(frozen=True)

    slug: str
    steps: int
    deps: int
    pending: int
    completed: int
    failed: int
    enabled: bool | None
    """Whether workers and bridges take its runs; None if it was never enabled or disabled."""
    bound: dict[str, int] | None = None
    """The number of steps that rows bind, by kind. The file of handlers does the other steps, or they are external."""


class Enabled(BaseModel):
    """Whether workers and bridges take a workflow's runs, and since when."""

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    enabled: bool
    since: datetime
