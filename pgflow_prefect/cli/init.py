"""`init`."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, NamedTuple

from pgflow_prefect.cli.console import err, out, print_json
from pgflow_prefect.cli.options import AsJson, Dsn, Flag, make_settings
from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from uuid import UUID

    from pgflow_prefect.settings import Settings


def init(
    *,
    dry_run: Annotated[bool, Flag] = False,
    new_installation: Annotated[bool, Flag] = False,
    moved: Annotated[bool, Flag] = False,
    remove: Annotated[bool, Flag] = False,
    json: AsJson = False,
    dsn: Dsn = None,
) -> None:
    """Install or upgrade the schema in the database.

    It creates the schemas `pgflow` (the engine) and `pgflow_prefect` (the adapter's tables). A database that was made
    with pgflow's own tables is upgraded, and keeps its rows. Running `init` again changes nothing.

    In a database with the schema of the released pgflow (pgflow.dev), it creates only `pgflow_prefect`, and changes
    nothing in `pgflow`; `pgflow-prefect guide released` says what works there.

    Example: `pgflow-prefect init --dsn postgresql://postgres@localhost/app`

    Parameters
    ----------
    dry_run
        Print the SQL and do nothing.
    new_installation
        This database is a copy that works beside the original. Give it its own id in Prefect, and forget the original's
        flow runs. Workers take the runs that are pending now only with --adopt. Stop its services first.
    moved
        This database replaces the original, after a restore or pg_upgrade. It goes on with the original's flow runs in
        Prefect.
    remove
        Take everything of this program out of a database of the released pgflow again. What Prefect shows stays there.
    """
    import anyio

    from pgflow_prefect.database.schema import read_scripts

    if sum((dry_run, new_installation, moved, remove)) > 1:
        raise UsageError("--dry-run, --new-installation, --moved and --remove exclude each other: name one")
    if remove:
        database, removed = anyio.run(_remove, make_settings(dsn))
        if json:
            print_json({"database": database, "outcome": "removed" if removed else "current"})
        elif removed:
            out.print(f"removed from database {database!r}: the schema pgflow_prefect", markup=False)
        else:
            out.print(f"database {database!r} has nothing of this program", markup=False)
        return
    if dry_run:
        if json:
            print_json({"sql": read_scripts()})
        else:
            sys.stdout.write(read_scripts())
        return
    done = anyio.run(_init, make_settings(dsn), new_installation, moved)
    if json:
        print_json(done.to_json())
    else:
        _print(done)


class _Installed(NamedTuple):
    """What `init` did.

    Attributes:
        database: its name.
        implementation: the schema that it has: classic or released.
        before: the versions of engine and adapter that it had, 0 for none.
        after: the versions that it has now.
        new_id: the id of the new installation, after --new-installation.
        stayed: --moved was given, but the database has not moved.
        is_copy: it is a copy that workers refuse.
        renamed: rows with a name that rows can no longer use: workflow, step and name.
    """

    database: str
    implementation: str
    before: tuple[int, int]
    after: tuple[int, int]
    new_id: UUID | None
    stayed: bool
    is_copy: bool
    renamed: list[tuple[str, str, str]]

    @property
    def outcome(self) -> str:
        """Installed, upgraded or current."""
        if self.before == self.after:
            return "current"
        return "upgraded" if any(self.before) else "installed"

    def to_json(self) -> dict[str, object]:
        """Return the JSON value for scripts."""
        names = ("pgflow", "pgflow_prefect")
        return {
            "database": self.database,
            "schema": self.implementation,
            "outcome": self.outcome,
            "before": dict(zip(names, self.before, strict=True)),
            "after": dict(zip(names, self.after, strict=True)),
            "new_installation": self.new_id and str(self.new_id),
            "is_copy": self.is_copy,
            "credentials_to_rename": [
                {"workflow": workflow, "step": step, "name": name} for workflow, step, name in self.renamed
            ],
        }


def _print(done: _Installed) -> None:
    from pgflow_prefect.database.implementations import CLASSIC
    from pgflow_prefect.database.installation import COPIED
    from pgflow_prefect.database.schema import describe_limited_schema

    if done.implementation == CLASSIC.name:
        versions = f"pgflow {done.after[0]}, pgflow_prefect {done.after[1]}"
    else:
        versions = f"pgflow_prefect {done.after[1]}; it has {describe_limited_schema()}"
    if done.outcome == "current":
        out.print(f"database {done.database!r} is current: {versions}")
    else:
        out.print(f"{done.outcome} in database {done.database!r}: {versions}")
    if done.stayed:
        out.print(f"database {done.database!r} has not moved: nothing to do", markup=False)
    if done.new_id is not None:
        out.print(f"database {done.database!r} is now the installation {done.new_id}", markup=False)
        out.print("Its deployments belong to the original. Make its own with `pgflow-prefect deploy`", markup=False)
    if done.is_copy:
        err.print(f"database {done.database!r} is a copy: workers refuse it. {COPIED}", markup=False)
    for workflow, step, name in done.renamed:
        out.print(
            f"workflow {workflow!r}, step {step!r}: its row names {name!r}, which a row may "
            "not name any more: `pgflow-prefect credentials --rename` renames it and says what to set",
            markup=False,
        )


async def _remove(settings: Settings) -> tuple[str, bool]:
    from pgflow_prefect.database.connection import connect, find_dsn
    from pgflow_prefect.database.schema import remove_schema

    async with await connect(find_dsn(settings), timeout=settings.connect_timeout) as connection:
        return connection.info.dbname, await remove_schema(connection)


async def _init(settings: Settings, new_installation: bool, moved: bool) -> _Installed:
    from pgflow_prefect.database.connection import connect, find_dsn
    from pgflow_prefect.database.installation import find_copy, move_installation, start_installation
    from pgflow_prefect.database.schema import install_schema, read_versions, refuse_hidden_rows

    async with await connect(find_dsn(settings), timeout=settings.connect_timeout) as connection:
        before = await read_versions(connection)
        await refuse_hidden_rows(connection)
        implementation = await install_schema(connection)
        after = await read_versions(connection)
        database = connection.info.dbname
        new_id = await start_installation(connection) if new_installation else None
        stayed = moved and not await move_installation(connection)
        is_copy = await find_copy(connection) is not None
    renamed = await _list_old_credentials(settings) if any(before) and implementation.executes else []
    return _Installed(database, implementation.name, before, after, new_id, stayed, is_copy, renamed)


async def _list_old_credentials(settings: Settings) -> list[tuple[str, str, str]]:
    """Return names in rows of an older version that rows can no longer use."""
    from pgflow_prefect.database.store import open_store
    from pgflow_prefect.deployment.row_credentials import list_row_credentials

    async with open_store(settings, size=1) as store:
        found = await list_row_credentials(store)
    named = [(each.workflow_slug, each.step_slug, each.variable or each.block, each.name) for each in found]
    return [(workflow, step, str(name)) for workflow, step, name, known in named if name != known]
