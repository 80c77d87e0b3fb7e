"""The data that rooms pass to each other: runs, step states, claims, reports. All are frozen."""

from pgflow_prefect.models.bindings import BindingChange, ShadowSummary, StepBinding
from pgflow_prefect.models.claims import Claim, ClaimRequest, StepInput
from pgflow_prefect.models.installation import Installation
from pgflow_prefect.models.keys import ItemKey, TaskKey
from pgflow_prefect.models.maps import ClaimedItem, Doing, ItemReport, MapState
from pgflow_prefect.models.outcomes import (
    AnyOutcome,
    BranchOutcome,
    CachedOutcome,
    CachedResult,
    CacheOutcome,
    SkipOutcome,
    find_source,
    is_skipping,
)
from pgflow_prefect.models.pools import PoolAttempt, PoolInput, PoolProgress
from pgflow_prefect.models.reports import Completion, Failure, Report, TaskElement
from pgflow_prefect.models.runs import LinkedRun, LinkRequest, Relative, Run, RunEnd, TakenRun
from pgflow_prefect.models.status import CANCELLED, NOT_RUN, EndedAs, Ending, Held, Shown, Status
from pgflow_prefect.models.steps import AwaitedStep, Outcome, StepEnd, StepFailure, StepState
from pgflow_prefect.models.workflows import Enabled, WorkflowSummary

__all__ = [
    "CANCELLED",
    "NOT_RUN",
    "AnyOutcome",
    "AwaitedStep",
    "BindingChange",
    "BranchOutcome",
    "CacheOutcome",
    "CachedOutcome",
    "CachedResult",
    "Claim",
    "ClaimRequest",
    "ClaimedItem",
    "Completion",
    "Doing",
    "Enabled",
    "EndedAs",
    "Ending",
    "Failure",
    "Held",
    "Installation",
    "ItemKey",
    "ItemReport",
    "LinkRequest",
    "LinkedRun",
    "MapState",
    "Outcome",
    "PoolAttempt",
    "PoolInput",
    "PoolProgress",
    "Relative",
    "Report",
    "Run",
    "RunEnd",
    "ShadowSummary",
    "Shown",
    "SkipOutcome",
    "Status",
    "StepBinding",
    "StepEnd",
    "StepFailure",
    "StepInput",
    "StepState",
    "TakenRun",
    "TaskElement",
    "TaskKey",
    "WorkflowSummary",
    "find_source",
    "is_skipping",
]
