"""Rows that bind steps, their changes, and comparisons of handlers."""

from datetime import datetime

from pydantic import BaseModel, ConfigDict, JsonValue


class StepBinding(BaseModel):
    """A row of `pgflow_prefect.bindings`."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    kind: str
    target: str | None
    options: dict[str, JsonValue]


class BindingChange(BaseModel):
    """A row of `pgflow_prefect.binding_changes`; `before` and `after` are None where there was no row."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    before: dict[str, JsonValue] | None
    after: dict[str, JsonValue] | None
    changed_at: datetime
    changed_by: str
    undone_at: datetime | None
    undone_by: str | None


class ShadowSummary(BaseModel):
    """Comparisons of a step's handler with an external worker."""

    model_config = ConfigDict(frozen=True)

    step_slug: str
    same: int
    different: int
    failed: int
    seconds: float | None
    """The median time of the handler."""
    details: list[str]
    """The differences of the latest comparison that was not the same."""
