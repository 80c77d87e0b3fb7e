"""`diff`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgflow_prefect.cli.console import print_json, print_table
from pgflow_prefect.cli.deploy import check_server, find_enabled
from pgflow_prefect.cli.options import AsJson, Dsn, Handlers, make_settings

if TYPE_CHECKING:
    from pgflow_prefect.deployment.deployments.plan import Plan
    from pgflow_prefect.deployment.drift import Difference
    from pgflow_prefect.settings import Settings


def diff(*workflows: str, handlers: Handlers = None, json: AsJson = False, dsn: Dsn = None) -> int:
    """Name differences between the definition in Postgres, the handlers in the file and the deployment in Prefect.

    If they agree, as after `deploy`, nothing is printed. The exit code is 2 if something differs.

    Example: `pgflow-prefect diff email_campaign`

    Parameters
    ----------
    workflows
        The workflows' slugs. By default: all that have handlers here, and all deployments of this database's
        workflows.
    """
    from pgflow_prefect.execution.process.signals import run_event_loop

    check_server()
    found = run_event_loop(_diff, make_settings(dsn), tuple(dict.fromkeys(workflows)) or None, handlers)
    if json:
        print_json([each.to_json() for each in found])
    elif found:
        rows = [(each.workflow_slug, str(each.part), each.message) for each in found]
        print_table(("workflow", "part", "difference"), rows)
    return 2 if found else 0


async def _diff(settings: Settings, slugs: tuple[str, ...] | None, handlers: str | None) -> list[Difference]:
    from pgflow_prefect.cli.candidates import CONNECTIONS, choose, describe_all, raise_all
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.deployment.deployments.apply import open_plans
    from pgflow_prefect.deployment.deployments.wanted import Options
    from pgflow_prefect.deployment.drift import (
        compare_automation,
        compare_deployment,
        compare_enabling,
        compare_handlers,
    )
    from pgflow_prefect.workflow import to_flow_name

    async with open_store(settings, size=CONNECTIONS) as store:
        chosen = await choose(store, slugs, handlers)
        raise_all(chosen.errors)
        installation = await store.read_installation()
        payloads = await store.list_schedules([each.slug for each in chosen.candidates])
        wanted = describe_all(chosen.candidates, Options(), installation, payloads)

        async def list_known() -> list[str]:
            return [each.slug for each in chosen.candidates]

        async with open_plans(wanted, installation, list_known if slugs is None else None) as opened:
            plans: dict[str, Plan] = {plan.name: plan for plan in opened.plans}
        enabled = await find_enabled(store)
        slugs_now = await store.list_slugs()
        defined = {to_flow_name(slug) for slug in slugs_now}
    found: list[Difference] = []
    for each in chosen.candidates:
        found += compare_handlers(each.workflow, each.definition, each.problems)
        found += compare_deployment(plans.pop(each.deployment_name), defined)
        found += compare_enabling(each.slug, enabled)
    for plan in plans.values():  # of workflows that are gone, or have no handlers here
        found += compare_deployment(plan, defined)
    for automation in opened.automations:
        found += compare_automation(automation, slugs_now)
    return found
