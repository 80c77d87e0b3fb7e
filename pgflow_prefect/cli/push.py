"""`push`."""

from __future__ import annotations

import sys
from collections.abc import Collection
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pgflow_prefect.cli.console import err, out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, make_settings
from pgflow_prefect.errors import UnknownWorkflowError, UsageError

if TYPE_CHECKING:
    from pgflow_prefect.definitions.difference import Difference
    from pgflow_prefect.definitions.model import StepRules, WorkflowDefinition
    from pgflow_prefect.settings import Settings

DIFFERENT = 2
"""The exit code if a difference was shown and not written, for a plan in CI."""


class Change(NamedTuple):
    """A workflow as the database defines it, if it does, and as a file defines it."""

    old: WorkflowDefinition | None
    new: WorkflowDefinition

    @property
    def is_needed(self) -> bool:
        """Whether there is anything to write."""
        return self.old is None or self.old.definition_hash != self.new.definition_hash


def push(
    *sources: str,
    workflow: str | None = None,
    dry_run: Annotated[bool, Flag] = False,
    yes: Annotated[bool, Flag] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> int:
    """Show how the database's workflows differ from those that a Python file defines, and write them.

    Each handler or binding is a step. It waits for the steps that its handler's arguments and `after=[…]` name. You can
    push `Workflow` objects of pgflow_prefect, but not Prefect flows.

    `push` asks before it writes. Without a terminal, and with --json, it writes only with --yes. The exit code is 0 if
    the database agrees with the file in the end, 2 if a difference was only shown, and 1 if you said no.

    Example: `pgflow-prefect push flows/email_campaign.py --dry-run`

    Parameters
    ----------
    sources
        Files or modules.
    workflow
        Only the workflow of this slug.
    dry_run
        Only show.
    yes
        Write without asking.
    """
    import anyio

    if not sources:
        raise UsageError("which file? name one with a Workflow, or a module: flows/greeting.py")
    if dry_run and yes:
        raise UsageError("--dry-run and --yes exclude each other: name one")
    from pgflow_prefect.definitions.children import sort_by_children
    from pgflow_prefect.deployment.handler_files import load_workflows

    found = load_workflows(sources)
    chosen = [*found] if workflow is None else [_choose(found, workflow)]
    settings = make_settings(dsn)
    definitions = sort_by_children([found[slug][0].definition for slug in chosen])
    changes = anyio.run(_compare, settings, definitions)
    needed = [each for each in changes if each.is_needed]
    if not json:
        for each in changes:
            _print_change(each)
    may_ask = not (dry_run or json) and sys.stdin.isatty() and sys.stdout.isatty()
    is_wanted = bool(needed) and (yes or (may_ask and _confirm()))
    if is_wanted:
        anyio.run(_write, settings, needed, json)
    if json:
        print_json([_to_json(each, written=is_wanted and each.is_needed) for each in changes])
    if is_wanted or not needed:
        return 0
    if not dry_run:
        err.print("nothing was written" if may_ask else "nothing was written: --yes writes it")
    return 1 if may_ask else DIFFERENT


def _choose(found: Collection[str], slug: str) -> str:
    from pgflow_prefect.wording import suggest

    if slug not in found:
        listed = ", ".join(map(repr, found))
        raise UsageError(f"no file has workflow {slug!r}{suggest(slug, found)}: there is {listed}")
    return slug


async def _compare(settings: Settings, definitions: list[WorkflowDefinition]) -> list[Change]:
    from pgflow_prefect.database.store import open_store

    changes = []
    async with open_store(settings, size=1) as store:
        for new in definitions:
            old = None
            with suppress(UnknownWorkflowError):
                old = await store.load_definition(new.slug)
            changes.append(Change(old, new))
    return changes


async def _write(settings: Settings, changes: list[Change], quiet: bool) -> None:
    from pgflow_prefect.database.store import open_store

    async with open_store(settings, size=1) as store:
        for old, new in changes:
            await store.replace_definition(old, new)
            if not quiet:  # at once, because the next one may fail
                out.print(f"wrote workflow {new.slug!r}", markup=False)


def _confirm() -> bool:
    try:
        answer = out.input("write this into the database? \\[y/N] ")
    except EOFError:
        out.print()
        return False
    return answer.strip().lower() in {"y", "yes"}


def _print_change(change: Change) -> None:
    from pgflow_prefect.definitions.difference import compare_definitions

    name = f"workflow {change.new.slug!r}"
    if not change.is_needed:
        out.print(f"{name}: nothing to change", markup=False)
        return
    out.print(f"{name} {'is new' if change.old is None else 'differs'}:", markup=False)
    difference = compare_definitions(*change)
    for line in _describe(difference, change.new):
        style = {"+": "green", "-": "red"}.get(line[0], "yellow")
        out.print(f"  {line}", style=style, markup=False)


def _describe(difference: Difference, new: WorkflowDefinition) -> list[str]:
    return [
        *(f"+ step {slug!r}" for slug in difference.steps_added),
        *(f"- step {slug!r}" for slug in difference.steps_removed),
        *(f"+ dep {upstream!r} -> {downstream!r}" for upstream, downstream in difference.deps_added),
        *(f"- dep {upstream!r} -> {downstream!r}" for upstream, downstream in difference.deps_removed),
        *(f"~ {name} = {getattr(new, name)!r}" for name in difference.workflow_changed),
        *(f"~ step {slug!r}: {_describe_rules(new.find_rules(slug))}" for slug in difference.rules_changed),
    ]


def _describe_rules(rules: StepRules) -> str:
    return ", ".join(f"{name} = {each!r}" for name, each in rules.said.items()) or "no rules"


def _to_json(change: Change, *, written: bool) -> dict[str, object]:
    from pgflow_prefect.definitions.difference import compare_definitions

    return {
        "workflow": change.new.slug,
        "definition_hash": change.new.definition_hash,
        "new": change.old is None,
        **vars(compare_definitions(*change)),
        "written": written,
    }
