"""Plans the changes of one deployment by comparing the existing one with the wanted one; changes nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from uuid import UUID

from prefect.client.schemas.responses import DeploymentResponse

from pgflow_prefect.deployment.deployments.change import Change
from pgflow_prefect.deployment.deployments.location import describe_steps, is_said
from pgflow_prefect.deployment.deployments.payloads import describe_payload
from pgflow_prefect.deployment.deployments.schedule_plan import SchedulePlan, plan_schedules
from pgflow_prefect.deployment.deployments.schedules import list_own
from pgflow_prefect.deployment.deployments.wanted import DEPLOYMENT, NO_LIMIT, Options, Wanted
from pgflow_prefect.prefect_api.ownership import find_foreign_tags


class Outcome(StrEnum):
    """What happened, or would happen, to a deployment of ours."""

    CREATED = "created"
    UPDATED = "updated"
    UNCHANGED = "unchanged"
    DELETED = "deleted"


@dataclass(frozen=True)
class Plan:
    """The planned changes of one deployment.

    Attributes:
        workflow_slug: its workflow.
        flow_name: the workflow's name in Prefect.
        id: Prefect's id of the deployment; None if it does not exist yet.
        outcome: created, updated and so on.
        changes: the differences, for people; none for a new deployment.
        work_pool: the pool whose workers execute its flow runs afterwards.
        wanted: the wanted deployment; None for a deletion.
        fields: the fields to send to Prefect.
        schedules: the changes of our schedules.
    """

    workflow_slug: str
    flow_name: str
    id: UUID | None
    outcome: Outcome
    changes: tuple[Change, ...] = ()
    work_pool: str | None = None
    wanted: Wanted | None = field(default=None, repr=False)
    fields: Mapping[str, Any] = field(default_factory=dict, repr=False)
    schedules: SchedulePlan = field(default=SchedulePlan(), repr=False)

    @property
    def name(self) -> str:
        """The deployment's name in Prefect's commands: `flow/deployment`."""
        return f"{self.flow_name}/{DEPLOYMENT}"

    @property
    def schedule(self) -> str | None:
        """Our schedule afterwards, in a few words."""
        return self.schedules.shown


def plan_deployment(wanted: Wanted, existing: DeploymentResponse | None) -> Plan:
    """Compare a deployment with the wanted one, and return the plan."""
    if existing is None:
        return _plan_creation(wanted)
    found = [
        *_compare_code(wanted, existing),
        *_compare_words(wanted, existing),
        *_compare_infrastructure(wanted, existing),
    ]
    fields = {name: value for _, sent in found for name, value in sent.items()}
    changes = [change for change, _ in found]
    options = wanted.options
    schedules = plan_schedules(options.schedule, wanted.schedule_rows, list_own(existing), prune=options.prune)
    changes += schedules.changes
    return Plan(
        wanted.workflow_slug,
        wanted.flow_name,
        existing.id,
        Outcome.UPDATED if changes else Outcome.UNCHANGED,
        tuple(changes),
        _find_pool(options, existing.work_pool_name),
        wanted,
        fields,
        schedules,
    )


def plan_deletion(flow_name: str, existing: DeploymentResponse) -> Plan:
    """Return the plan for deleting a deployment whose workflow is gone."""
    return Plan(flow_name, flow_name, existing.id, Outcome.DELETED, work_pool=existing.work_pool_name)


_Difference = tuple[Change, dict[str, Any]]  # for people, and for Prefect


def _plan_creation(wanted: Wanted) -> Plan:
    options = wanted.options
    fields: dict[str, Any] = {
        "version": wanted.version,
        "entrypoint": wanted.entrypoint,
        "pull_steps": wanted.pull_steps,
        "parameter_openapi_schema": wanted.schema,
        "enforce_parameter_schema": True,
        "description": wanted.first_description,
        "tags": [*wanted.tags],
        "work_pool_name": _find_pool(options, None),
        "job_variables": options.job_variables,
    }
    if options.concurrency_limit not in {None, NO_LIMIT}:
        fields["concurrency_limit"] = options.concurrency_limit
    return Plan(
        wanted.workflow_slug,
        wanted.flow_name,
        None,
        Outcome.CREATED,
        (),
        _find_pool(options, None),
        wanted,
        fields,
        plan_schedules(options.schedule, wanted.schedule_rows, {}, prune=options.prune),
    )


def _find_pool(options: Options, existing: str | None) -> str | None:
    """Return the work pool that a deployment has afterwards; None for none."""
    return existing if options.work_pool is None else options.work_pool or None


def _compare_code(wanted: Wanted, existing: DeploymentResponse) -> list[_Difference]:
    found: list[_Difference] = []
    if existing.version != wanted.version:
        found.append((Change("version", existing.version, wanted.version), {"version": wanted.version}))
    if existing.entrypoint != wanted.entrypoint:
        change = Change("entrypoint", existing.entrypoint, wanted.entrypoint)
        found.append((change, {"entrypoint": wanted.entrypoint}))
    stays = wanted.options.location is None and is_said(existing.pull_steps)
    if not stays and (existing.pull_steps or []) != wanted.pull_steps:
        change = Change("code", describe_steps(existing.pull_steps), describe_steps(wanted.pull_steps))
        found.append((change, {"pull_steps": wanted.pull_steps}))
    if existing.parameter_openapi_schema != wanted.schema:
        before, after = describe_payload(existing.parameter_openapi_schema), describe_payload(wanted.schema)
        change = Change("payload", before, after if before != after else f"{after}, otherwise in detail")
        found.append((change, {"parameter_openapi_schema": wanted.schema}))
    if not existing.enforce_parameter_schema:
        found.append((Change("payload is checked", "no", "yes"), {"enforce_parameter_schema": True}))
    return found


def _compare_words(wanted: Wanted, existing: DeploymentResponse) -> list[_Difference]:
    found: list[_Difference] = []
    if wanted.description and existing.description != wanted.description:
        change = Change("description", _shorten(existing.description), _shorten(wanted.description))
        found.append((change, {"description": wanted.description}))
    foreign = list_other_owners(wanted, existing) if wanted.options.take_over else []
    missing = [tag for tag in wanted.tags if tag not in existing.tags]
    sent = {"tags": [*(tag for tag in existing.tags if tag not in foreign), *missing]}
    if foreign:
        found.append((Change("installation", ", ".join(foreign), "this one"), sent))
    if missing:
        found.append((Change("tags", None, f"+ {', '.join(missing)}"), sent))
    return found


def list_other_owners(wanted: Wanted, existing: DeploymentResponse) -> list[str]:
    """Return the tags of the other installations that a deployment belongs to."""
    return [] if wanted.installation is None else find_foreign_tags(existing.tags, wanted.installation)


def _compare_infrastructure(wanted: Wanted, existing: DeploymentResponse) -> list[_Difference]:
    found: list[_Difference] = []
    options = wanted.options
    variables = _merge(existing.job_variables, options.job_variables)
    if variables != existing.job_variables:
        found += [
            (change, {"job_variables": variables})
            for change in _compare_variables(existing.job_variables, options.job_variables)
        ]
    pool = _find_pool(options, existing.work_pool_name)
    if pool != existing.work_pool_name:  # the same pool in the request would reset the queue
        # Prefect checks that the job variables fit the pool, and assumes empty ones if the request has none.
        sent = {"work_pool_name": pool, "job_variables": variables}
        found.append((Change("work pool", existing.work_pool_name, pool), sent))
    limit = existing.global_concurrency_limit.limit if existing.global_concurrency_limit else NO_LIMIT
    if options.concurrency_limit not in {None, limit}:
        change = Change("concurrency limit", str(limit or "none"), str(options.concurrency_limit or "none"))
        found.append((change, {"concurrency_limit": options.concurrency_limit or None}))
    return found


def _merge(existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Return job variables with some of them replaced or added."""
    merged = {**existing, **wanted}
    if "env" in wanted:
        merged["env"] = {**(existing.get("env") or {}), **wanted["env"]}
    return merged


def _compare_variables(existing: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[Change]:
    flat = {name: value for name, value in wanted.items() if name != "env"}
    changes = [Change(name, existing.get(name), value) for name, value in flat.items() if existing.get(name) != value]
    known = existing.get("env") or {}
    for name, value in wanted.get("env", {}).items():
        if known.get(name) != value:
            changes.append(Change(f"env.{name}", known.get(name), value))
    return changes


def _shorten(text: str | None) -> str | None:
    line = (text or "").strip().partition("\n")[0]
    return f"{line[:59]}…" if len(line) > 60 else line or None  # noqa: PLR2004  a line of a terminal
