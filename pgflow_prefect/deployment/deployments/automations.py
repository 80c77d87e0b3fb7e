"""Automations that tell of failed runs: one for each workflow, with a notification block of Prefect.

`pgflow-prefect deploy --on-failure BLOCK` makes them. An automation of ours carries the tags of our deployments. It
belongs to the workflow that its trigger matches.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import BlockDocument
from prefect.events import (
    Automation,
    AutomationCore,
    EventTrigger,
    Posture,
    ResourceSpecification,
    SendNotification,
)
from prefect.exceptions import ObjectNotFound

from pgflow_prefect.deployment.deployments.change import Change
from pgflow_prefect.deployment.deployments.plan import Outcome
from pgflow_prefect.deployment.deployments.wanted import DEPLOYMENT, NO_BLOCK, Wanted
from pgflow_prefect.errors import PrefectRefusedError, UsageError
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ownership import find_foreign_tags, is_owned, make_ownership_tag
from pgflow_prefect.wording import clean

FAILED = "pgflow.run.failed"
"""The event that the automations wait for."""

_WORKFLOW = "pgflow.workflow"
_PAGE = 200  # automations in one answer
_ONCE = timedelta(minutes=15)
"""For this long, a second event of a run is not told: a process may have sent it again."""

_SUBJECT = "Workflow {{ event.resource['pgflow.workflow'] }} has failed"
_BODY = """\
Run {{ event.resource['pgflow.run'] }} of workflow {{ event.resource['pgflow.workflow'] }} has failed: \
{{ event.payload['message'] }}

{{ flow_run|ui_url }}
pgflow-prefect status {{ event.resource['pgflow.run'] }}
"""


@dataclass(frozen=True)
class AutomationPlan:
    """The planned change of a workflow's automation.

    Attributes:
        workflow_slug: its workflow.
        outcome: created, updated and so on.
        id: Prefect's id of it; None if it does not exist yet.
        before: the block that it has, as `TYPE/NAME`; None without an automation.
        after: the block that it is to have; None to delete it.
        trouble: why it can't tell of failures; None if it can.
        content: what to send to Prefect; None to delete it, or to leave it.
        is_of_none: the database no longer has its workflow.
    """

    workflow_slug: str
    outcome: Outcome
    id: UUID | None = None
    before: str | None = None
    after: str | None = None
    trouble: str | None = None
    content: AutomationCore | None = field(default=None, repr=False)
    is_of_none: bool = False

    @property
    def name(self) -> str:
        """What people read of it."""
        return f"automation {_name(self.workflow_slug)!r}"

    @property
    def changes(self) -> tuple[Change, ...]:
        """The differences, for people."""
        if self.outcome is Outcome.UNCHANGED:
            return ()
        return (Change("on failure", self.before, self.after),)


def check_block_reference(text: str) -> str:
    """Check what `--on-failure` names.

    Raises:
        UsageError: it is not the type and the name of a block.
    """
    kind, slash, name = text.partition("/")
    if not (kind and slash and name) or "/" in name:
        raise UsageError(
            f"--on-failure {text!r} names no block: write TYPE/NAME, as `prefect block ls` shows it, such as "
            "slack-webhook/alerts"
        )
    return text


async def plan_automations(
    client: PrefectClient, wanted: Sequence[Wanted], installation: UUID, kept: Collection[str] | None = None
) -> list[AutomationPlan]:
    """Compare the automations of this installation with what a command asks for; change nothing.

    Args:
        client: of Prefect's API.
        wanted: the deployments of the command.
        installation: the id of the database.
        kept: the slugs of the workflows whose automations stay; None: those of other workflows are not looked at.

    Raises:
        UsageError: there is no such block, or it can't send notifications.
        PrefectUnavailableError: Prefect's API does not answer.
    """
    found = await _find_automations(client)
    blocks = _Blocks(client)
    made = [await _plan(each, found, installation, blocks) for each in wanted]
    plans = [each for each in made if each is not None]
    if kept is not None:
        names = {clean(slug) for slug in kept}
        plans += [
            AutomationPlan(slug, Outcome.DELETED, each.id, await blocks.describe(each), is_of_none=True)
            for each in found
            if is_owned(each.tags, installation) and (slug := _find_workflow(each)) is not None and slug not in names
        ]
    return plans


async def write_automation(client: PrefectClient, plan: AutomationPlan) -> None:
    """Execute a plan.

    Raises:
        PrefectRefusedError: Prefect refuses it.
        PrefectUnavailableError: Prefect's API does not answer.
    """
    try:
        with ask_prefect(plan.name):
            if plan.outcome is Outcome.DELETED and plan.id is not None:
                await client.delete_automation(plan.id)
            elif plan.id is None and plan.content is not None:
                await client.create_automation(plan.content)
            elif plan.content is not None and plan.id is not None:
                await client.update_automation(plan.id, plan.content)
    except (ObjectNotFound, httpx.HTTPStatusError) as error:
        raise PrefectRefusedError(f"{plan.name} was deleted in Prefect just now: deploy it again") from error


async def _plan(
    wanted: Wanted, found: Sequence[Automation], installation: UUID, blocks: "_Blocks"
) -> AutomationPlan | None:
    wish, slug = wanted.options.on_failure, wanted.workflow_slug
    if wish and wish != NO_BLOCK:
        _refuse_pattern(slug)
    existing = _find_existing(wanted, found, installation)
    if existing is None:
        if not wish:  # there is nothing to remove
            return None
        content = _make(slug, await blocks.find(wish), installation)
        return AutomationPlan(slug, Outcome.CREATED, after=wish, content=content)
    before = await blocks.describe(existing)
    if wish == NO_BLOCK:
        return AutomationPlan(slug, Outcome.DELETED, existing.id, before)
    if wish is None:
        return AutomationPlan(slug, Outcome.UNCHANGED, existing.id, before, before, await blocks.find_trouble(existing))
    block = await blocks.find(wish)
    is_ours = is_owned(existing.tags, installation)
    if is_ours and any(each.block_document_id == block.id for each in _list_notifications(existing)):
        return AutomationPlan(slug, Outcome.UNCHANGED, existing.id, before, before)
    content = _exchange(existing, block, installation)
    return AutomationPlan(slug, Outcome.UPDATED, existing.id, before, wish, content=content)


def _refuse_pattern(slug: str) -> None:
    """Refuse a slug that Prefect would not match as it is: it would tell of the runs of other workflows."""
    if clean(slug).startswith("!") or clean(slug).endswith("*"):
        raise UsageError(
            f"--on-failure can't tell of workflow {slug!r}: Prefect reads '!' at the beginning of a slug and '*' at "
            "its end as a pattern. Rename the workflow, or make the automation in Prefect's UI"
        )


def _find_existing(wanted: Wanted, found: Iterable[Automation], installation: UUID) -> Automation | None:
    """Return the automation of a workflow: this installation's, or the one that it takes over."""
    those = [each for each in found if _find_workflow(each) == clean(wanted.workflow_slug)]
    own = [each for each in those if is_owned(each.tags, installation)]
    if not own and wanted.options.take_over:
        own = [each for each in those if find_foreign_tags(each.tags, installation)]
    return own[0] if own else None


def _make(slug: str, block: BlockDocument, installation: UUID) -> AutomationCore:
    return AutomationCore(
        name=_name(slug),
        description=f"Tells when a run of the workflow {clean(slug)!r} has failed. Made by `pgflow-prefect deploy`.",
        tags=[DEPLOYMENT, make_ownership_tag(installation)],
        trigger=EventTrigger(
            expect={FAILED},
            match={"prefect.resource.id": "pgflow.run.*", _WORKFLOW: clean(slug)},
            for_each={"prefect.resource.id"},  # one bucket for each run: it is told of once
            posture=Posture.Reactive,
            threshold=1,
            within=_ONCE,
        ),
        actions=[SendNotification(block_document_id=block.id, subject=_SUBJECT, body=_BODY)],
    )


def _exchange(existing: Automation, block: BlockDocument, installation: UUID) -> AutomationCore:
    """Return an automation with another block. What people have set in Prefect stays: a pause, texts, other actions."""
    others = [each for each in existing.actions if not isinstance(each, SendNotification)]
    former = _list_notifications(existing)
    made = SendNotification(block_document_id=block.id, subject=_SUBJECT, body=_BODY)
    if former:
        made = former[0].model_copy(update={"block_document_id": block.id})
    foreign = find_foreign_tags(existing.tags, installation)
    tags = [each for each in existing.tags if each not in foreign]
    own = make_ownership_tag(installation)
    # The server refuses fields that it alone sets.
    content = AutomationCore.model_validate(existing.model_dump(exclude={"id", "created", "updated", "owner_resource"}))
    return content.model_copy(update={"actions": [made, *others], "tags": [*tags, *([] if own in tags else [own])]})


def _name(slug: str) -> str:
    return f"pgflow: a run of {clean(slug)} has failed"


def _find_workflow(automation: Automation) -> str | None:
    """Return the slug that an automation of ours is for, as events have it; None for any other automation."""
    trigger = automation.trigger
    if DEPLOYMENT not in automation.tags or not isinstance(trigger, EventTrigger) or FAILED not in trigger.expect:
        return None
    slug = dict(trigger.match.model_dump() if isinstance(trigger.match, ResourceSpecification) else trigger.match).get(
        _WORKFLOW
    )
    if isinstance(slug, list):
        slug = slug[0] if len(slug) == 1 else None
    return slug if isinstance(slug, str) else None


def _list_notifications(automation: Automation) -> list[SendNotification]:
    return [each for each in automation.actions if isinstance(each, SendNotification)]


async def _find_automations(client: PrefectClient) -> list[Automation]:
    """Return the automations of ours, of all installations."""
    found: list[Automation] = []
    page: list[Any] = []
    while not found or len(page) == _PAGE:
        # Not the client's method, which knows no filter in earlier versions of Prefect.
        body = {"automations": {"tags": {"all_": [DEPLOYMENT]}}, "limit": _PAGE, "offset": len(found)}
        with ask_prefect("a look at the automations"):
            page = (await client.request("POST", "/automations/filter", json=body)).json()
        found += Automation.model_validate_list(page)
        if not page:
            break
    return [each for each in found if _find_workflow(each) is not None]


class _Blocks:
    """Prefect's notification blocks, each read once."""

    def __init__(self, client: PrefectClient) -> None:
        self._client = client
        self._named: dict[str, BlockDocument] = {}
        self._known: dict[UUID, BlockDocument | None] = {}

    async def find(self, reference: str) -> BlockDocument:
        """Return the block of this type and name.

        Raises:
            UsageError: there is no such block, or it can't send notifications.
        """
        if reference not in self._named:
            self._named[reference] = await self._read(reference)
        return self._named[reference]

    async def _read(self, reference: str) -> BlockDocument:
        kind, _, name = reference.partition("/")
        with ask_prefect("a look at the blocks"):
            try:
                found = await self._client.read_block_document_by_name(name, kind, include_secrets=False)
            except ObjectNotFound:
                raise UsageError(
                    f"unknown block {reference}: make it in Prefect's UI, or look for its type and name with "
                    "`prefect block ls`"
                ) from None
        if found.block_schema is None or "notify" not in found.block_schema.capabilities:
            raise UsageError(
                f"the block {reference} can't send notifications. Prefect's notification blocks can, such as "
                "slack-webhook, ms-teams-webhook, discord-webhook, pager-duty-webhook, sendgrid-email and "
                "custom-webhook"
            )
        return found

    async def describe(self, automation: Automation) -> str | None:
        """Return the block of an automation as `TYPE/NAME`, or what is wrong with it."""
        notifications = _list_notifications(automation)
        if not notifications:
            return "no notification"
        block = await self._look_up(notifications[0].block_document_id)
        return _describe(block) if block is not None else "a block that is gone"

    async def find_trouble(self, automation: Automation) -> str | None:
        """Return why an automation can't tell of failures; None if it can, or if a user has disabled it."""
        notifications = _list_notifications(automation)
        if notifications and await self._look_up(notifications[0].block_document_id) is not None:
            return None
        return "its block is gone" if notifications else "it sends no notification any more"

    async def _look_up(self, block_id: UUID) -> BlockDocument | None:
        if block_id not in self._known:
            with ask_prefect("a look at the blocks"):
                try:
                    found = await self._client.read_block_document(block_id, include_secrets=False)
                except ObjectNotFound:
                    self._known[block_id] = None
                else:
                    self._known[block_id] = found
        return self._known[block_id]


def _describe(block: BlockDocument) -> str:
    kind = block.block_type.slug if block.block_type is not None else "block"
    return f"{kind}/{block.name}"
