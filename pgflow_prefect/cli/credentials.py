"""`credentials`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pgflow_prefect.cli.console import out, print_json, print_table
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, make_settings

if TYPE_CHECKING:
    from pgflow_prefect.deployment.row_credentials import RowCredential
    from pgflow_prefect.settings import Settings


def credentials(
    *,
    rename: Annotated[bool, Flag] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Show which credentials the rows name, where each would go, and which settings allow that.

    A row can only name environment variables that begin with `PGFLOW_TOKEN_`, and Prefect Secret blocks that begin with
    `pgflow-`. The settings of the process that executes the step say which hosts may get a credential. Any role that
    can define workflows can write these rows. Check each line before you set it.

    Example: `pgflow-prefect credentials --rename`

    Parameters
    ----------
    rename
        Add the required prefix to names in rows of older installations.
    """
    import anyio

    found, lines = anyio.run(_look, make_settings(dsn), rename)
    if json:
        rows = [
            {"workflow": each.workflow_slug, "step": each.step_slug, "credential": each.variable or each.block,
             "name": each.name, "origin": str(each.origin) if each.origin else None}
            for each in found
        ]  # fmt: skip
        print_json({"renamed": rename, "rows": rows, "settings": lines})
        return
    if not found:
        out.print("no row needs another name" if rename else "no row names an endpoint or a queue")
        return
    print_table(("workflow", "step", "sends", "to", "renamed" if rename else "note"), [_show(each) for each in found])
    if lines:
        out.print("\nCheck each line, then set these where steps are executed:\n")
        for line in lines:
            out.print(line, markup=False, soft_wrap=True)


async def _look(settings: Settings, rename: bool) -> tuple[list[RowCredential], list[str]]:
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.deployment.row_credentials import advise, list_row_credentials, rename_credentials
    from pgflow_prefect.execution.process.resources import make_row_policy

    async with open_store(settings, size=1) as store:
        found = await (rename_credentials(store) if rename else list_row_credentials(store))
    return found, await advise(found, make_row_policy(settings))


def _show(found: RowCredential) -> tuple[str, str, str, str, str]:
    named = found.variable or found.block
    note = ""
    if named is not None and named != found.name:
        note = f"is to be {found.name}: --rename" if found.name else "can't be a name: bind the step anew"
    return found.workflow_slug, found.step_slug, named or "-", str(found.origin or "this database"), note
