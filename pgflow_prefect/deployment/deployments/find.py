"""Reads deployments, work pools and blocks from Prefect, with few requests for many."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from uuid import UUID

from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterName,
    DeploymentFilterTags,
    FlowFilter,
    FlowFilterId,
    FlowFilterName,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.sorting import DeploymentSort
from prefect.exceptions import ObjectNotFound

from pgflow_prefect.deployment.deployments.wanted import DEPLOYMENT
from pgflow_prefect.errors import UsageError
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ownership import OWNERSHIP_PREFIX
from pgflow_prefect.wording import suggest

_BATCH = 100  # names in one request
_PAGE = 200  # deployments in one answer: a server gives no more by default


@dataclass(frozen=True)
class FoundDeployments:
    """The deployments of some flows.

    Attributes:
        chosen: by flow name: the one called `pgflow`, else the only one.
        ambiguous: by flow name: the names of several deployments, if none is called `pgflow`.
    """

    chosen: Mapping[str, DeploymentResponse]
    ambiguous: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class FoundFlows:
    """Prefect's data on some flows.

    Attributes:
        ids: of the existing flows, by name.
        own: their deployments called `pgflow`, by the flow's name.
    """

    ids: Mapping[str, UUID]
    own: Mapping[str, DeploymentResponse]


async def find_deployments(client: PrefectClient, flow_names: Iterable[str]) -> FoundDeployments:
    """Return the deployment of each flow that has one.

    Raises:
        PrefectUnavailableError: the API does not answer.
    """
    chosen: dict[str, DeploymentResponse] = {}
    ambiguous: dict[str, tuple[str, ...]] = {}
    _, deployments_of = await _read_all(client, flow_names, None)
    for flow_name, deployments in deployments_of.items():
        own = [each for each in deployments if each.name == DEPLOYMENT]
        if own or len(deployments) == 1:
            chosen[flow_name] = (own or deployments)[0]
        else:
            ambiguous[flow_name] = tuple(sorted(each.name for each in deployments))
    return FoundDeployments(chosen, ambiguous)


async def find_flows(client: PrefectClient, flow_names: Iterable[str]) -> FoundFlows:
    """Return the flows of these names, and our deployment of each.

    Raises:
        PrefectUnavailableError: the API does not answer.
    """
    ids, own = await _read_all(client, flow_names, DeploymentFilter(name=DeploymentFilterName(any_=[DEPLOYMENT])))
    return FoundFlows(ids, {name: deployments[0] for name, deployments in own.items()})


async def find_owned(client: PrefectClient, ownership_tag: str) -> dict[str, DeploymentResponse]:
    """Return the deployments that belong to this database only, by their flow's name.

    Raises:
        PrefectUnavailableError: the API does not answer.
    """
    tagged = DeploymentFilter(
        name=DeploymentFilterName(any_=[DEPLOYMENT]), tags=DeploymentFilterTags(all_=[DEPLOYMENT, ownership_tag])
    )
    owned = {
        each.flow_id: each
        for each in await _read_pages(client, None, tagged)
        if sum(tag.startswith(OWNERSHIP_PREFIX) for tag in each.tags) == 1
    }
    found: dict[str, DeploymentResponse] = {}
    ids = [*owned]
    for start in range(0, len(ids), _BATCH):
        chosen = FlowFilter(id=FlowFilterId(any_=ids[start : start + _BATCH]))
        with ask_prefect("a look at the flows"):
            flows = await client.read_flows(flow_filter=chosen, limit=_BATCH)
        found |= {flow.name: owned[flow.id] for flow in flows}
    return found


async def check_work_pool(client: PrefectClient, name: str) -> None:
    """Check that a work pool exists.

    Raises:
        UsageError: it does not; the message lists the existing ones.
    """
    with ask_prefect("a look at the work pools"):
        chosen = WorkPoolFilter(name=WorkPoolFilterName(any_=[name]))
        if await client.read_work_pools(work_pool_filter=chosen):
            return
        known = sorted(pool.name for pool in await client.read_work_pools())
    there = f"there are {', '.join(map(repr, known))}" if known else "there is none yet"
    raise UsageError(
        f"unknown work pool {name!r}{suggest(name, known)}: {there}; "
        f"create it with `prefect work-pool create {name} --type process`"
    )


async def check_block(client: PrefectClient, kind: str, name: str, advice: str) -> None:
    """Check that a block exists, without reading its content.

    Args:
        client: of Prefect's API.
        kind: the slug of the block's type.
        name: of the block.
        advice: for the message if it does not exist.

    Raises:
        UsageError: it does not exist.
    """
    with ask_prefect("a look at the blocks"):
        try:
            await client.read_block_document_by_name(name, kind, include_secrets=False)
        except ObjectNotFound:
            raise UsageError(f"unknown block {kind}/{name}: {advice}") from None


async def _read_all(
    client: PrefectClient, names: Iterable[str], wanted: DeploymentFilter | None
) -> tuple[dict[str, UUID], dict[str, list[DeploymentResponse]]]:
    """Return flows and their deployments by flow name, with a few requests for each hundred names."""
    flow_names = list(dict.fromkeys(names))
    ids: dict[str, UUID] = {}
    found: dict[str, list[DeploymentResponse]] = {}
    for start in range(0, len(flow_names), _BATCH):
        chosen = FlowFilter(name=FlowFilterName(any_=flow_names[start : start + _BATCH]))
        with ask_prefect("a look at the flows"):
            names_by_id = {flow.id: flow.name for flow in await client.read_flows(flow_filter=chosen, limit=_BATCH)}
        ids |= {name: flow_id for flow_id, name in names_by_id.items()}
        for each in await _read_pages(client, chosen, wanted):
            if each.flow_id in names_by_id:  # otherwise it was created between the two requests
                found.setdefault(names_by_id[each.flow_id], []).append(each)
    return ids, found


async def _read_pages(
    client: PrefectClient, flows: FlowFilter | None, wanted: DeploymentFilter | None
) -> list[DeploymentResponse]:
    found: list[DeploymentResponse] = []
    page: list[DeploymentResponse] = []
    offset = 0
    while offset == 0 or len(page) == _PAGE:
        with ask_prefect("a look at the deployments"):
            page = await client.read_deployments(
                flow_filter=flows,
                deployment_filter=wanted,
                sort=DeploymentSort.CREATED_DESC,
                limit=_PAGE,
                offset=offset,
            )
        found += page
        offset += _PAGE
    return found
