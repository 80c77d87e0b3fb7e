"""`init`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings

if TYPE_CHECKING:
    from pgflow_prefect.settings import Settings


def init(
    *,
    dry_run: Annotated[bool, Parameter(negative="", show_default=False)] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Install or upgrade the schema in the database.

    Creates the schemas `pgflow`, the engine, and `pgflow_prefect`, what the adapter keeps. A database that was made
    with pgflow's own tables is upgraded, and keeps its rows. Running it again changes nothing.

    Example: `pgflow-prefect init --dsn postgresql://postgres@localhost/app`

    Parameters
    ----------
    dry_run
        Print the SQL and do nothing.
    """
    import anyio

    from pgflow_prefect.database.schema import read_scripts

    if dry_run:
        if json:
            print_json({"sql": read_scripts()})
        else:
            sys.stdout.write(read_scripts())
        return
    done = anyio.run(_init, make_settings(dsn))
    if json:
        print_json(done.to_json())
    else:
        _print(done)


class _Installed(NamedTuple):
    """What was done.

    Attributes:
        database: its name.
        before: the versions of engine and adapter that it had; 0 for none.
        after: the versions that it has.
        renamed: rows that name what a row may not name any more: workflow, step, and the name.
    """

    database: str
    before: tuple[int, int]
    after: tuple[int, int]
    renamed: list[tuple[str, str, str]]

    @property
    def outcome(self) -> str:
        """Installed, upgraded or current."""
        if self.before == self.after:
            return "current"
        return "upgraded" if any(self.before) else "installed"

    def to_json(self) -> dict[str, object]:
        """Return what scripts get."""
        names = ("pgflow", "pgflow_prefect")
        return {
            "database": self.database,
            "outcome": self.outcome,
            "before": dict(zip(names, self.before, strict=True)),
            "after": dict(zip(names, self.after, strict=True)),
            "credentials_to_rename": [
                {"workflow": workflow, "step": step, "name": name} for workflow, step, name in self.renamed
            ],
        }


def _print(done: _Installed) -> None:
    versions = f"pgflow {done.after[0]}, pgflow_prefect {done.after[1]}"
    if done.outcome == "current":
        out.print(f"database {done.database!r} is current: {versions}")
    else:
        out.print(f"{done.outcome} in database {done.database!r}: {versions}")
    for workflow, step, name in done.renamed:
        out.print(
            f"workflow {workflow!r}, step {step!r}: its row names {name!r}, which a row may "
            "not name any more: `pgflow-prefect credentials --rename` renames it and says what to set",
            markup=False,
        )


async def _init(settings: Settings) -> _Installed:
    from pgflow_prefect.database.connection import connect, find_dsn
    from pgflow_prefect.database.schema import install_schema, read_versions

    async with await connect(find_dsn(settings), timeout=settings.connect_timeout) as connection:
        before = await read_versions(connection)
        await install_schema(connection)
        after = await read_versions(connection)
        database = connection.info.dbname
    return _Installed(database, before, after, await _list_old_credentials(settings) if any(before) else [])


async def _list_old_credentials(settings: Settings) -> list[tuple[str, str, str]]:
    """Return what rows of an older version name that rows may name no more."""
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.deployment.row_credentials import list_row_credentials

    async with open_store(settings, size=1) as store:
        found = await list_row_credentials(store)
    named = [(each.workflow_slug, each.step_slug, each.variable or each.block, each.name) for each in found]
    return [(workflow, step, str(name)) for workflow, step, name, known in named if name != known]
