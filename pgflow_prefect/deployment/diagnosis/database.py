"""Checks of PostgreSQL."""

from datetime import UTC, datetime

import anyio

from pgflow_prefect.database.connection import find_dsn
from pgflow_prefect.database.diagnosis import hears_notifications, open_diagnosis
from pgflow_prefect.database.implementations import CLASSIC
from pgflow_prefect.database.implementations.released import RELEASED
from pgflow_prefect.database.installation import COPIED
from pgflow_prefect.database.schema import (
    ADAPTER_VERSION,
    ENGINE_VERSION,
    describe_foreign_schema,
)
from pgflow_prefect.deployment.diagnosis.findings import Check, Outcome, Patient, Verdict
from pgflow_prefect.errors import DatabaseReadOnlyError, ForeignInstallationError, PgflowPrefectError

_OLDEST = 130000  # PostgreSQL 13, as pgflow.sql requires
_CLOCK_TOLERANCE = 2.0  # seconds
_HEARING = 2.0  # seconds that a notification may take
_NAMED = 3  # missing rights in the sentence; all of them are in the details


async def _reach(patient: Patient) -> Verdict:
    # In a thread: without a connection string it starts an embedded server.
    patient.dsn = await anyio.to_thread.run_sync(find_dsn, patient.settings)
    patient.database = await patient.resources.enter_async_context(open_diagnosis(patient.dsn, patient.settings))
    server = await patient.database.read_server()
    return Verdict(Outcome.OK, f"database {server.database!r} answers user {server.user!r}, by {patient.source}")


async def _check_version(patient: Patient) -> Verdict:
    server = await patient.reached.read_server()
    if server.number < _OLDEST:
        return Verdict(Outcome.FAULT, f"PostgreSQL {server.version} is too old", "use PostgreSQL 13 or later")
    return Verdict(Outcome.OK, f"PostgreSQL {server.version}")


async def _check_writing(patient: Patient) -> Verdict:
    try:
        await patient.reached.check_writable()
    except DatabaseReadOnlyError as error:
        advice = "wait for the failover to end, or name the primary: target_session_attrs=read-write finds it"
        return Verdict(Outcome.FAULT, f"{error}: nothing can be executed", advice)
    return Verdict(Outcome.OK, "the database can be written")


async def _check_schema(patient: Patient) -> Verdict:
    versions = dict(zip(("pgflow", "pgflow_prefect"), await patient.reached.find_versions(), strict=True))
    wanted = {"pgflow": ENGINE_VERSION, "pgflow_prefect": ADAPTER_VERSION}
    if (refused := await _refuse_schema(patient)) is not None:
        return refused
    if patient.schema == RELEASED:
        del versions["pgflow"], wanted["pgflow"]
    if missing := [name for name, version in versions.items() if version is None]:
        return Verdict(
            Outcome.FAULT, f"there is no schema {' and no schema '.join(missing)}", "run `pgflow-prefect init`"
        )
    found = {name: version or 0 for name, version in versions.items()}
    described = ", ".join(f"{name} {version}" for name, version in found.items())
    if any(found[name] < version for name, version in wanted.items()):
        return Verdict(
            Outcome.FAULT,
            f"the schemas are older than this program: {described}",
            "run `pgflow-prefect init` to upgrade them",
        )
    if any(found[name] > version for name, version in wanted.items()):
        advice = "upgrade the program, which refuses this database: `pip install --upgrade pgflow-prefect`"
        return Verdict(Outcome.FAULT, f"the schemas are newer than this program: {described}", advice)
    if (copied := await _find_copy(patient)) is not None:
        return Verdict(Outcome.FAULT, f"{described}; {copied}", COPIED)
    return Verdict(Outcome.OK, f"current: {described}")


async def _refuse_schema(patient: Patient) -> Verdict | None:
    """Note which schema the database has; return the verdict where this program can't use it at all."""
    found = await patient.reached.find_schema()
    if found.foreign_table is not None:
        advice = "to execute runs, create another database and name it in PGFLOW_DSN"
        return Verdict(Outcome.FAULT, describe_foreign_schema(found.foreign_table), advice)
    if found.unknown:
        named = ", ".join(f"pgflow.{each}" for each in found.unknown)
        advice = "upgrade the program, which refuses this database: `pip install --upgrade pgflow-prefect`"
        return Verdict(Outcome.FAULT, f"this program does not know this version of pgflow: {named}", advice)
    if found.implementation is not None:
        patient.schema = found.implementation.name
    return None


async def _find_copy(patient: Patient) -> str | None:
    """Return why workers refuse this database as a copy; None if they don't, or if this user may not read it."""
    try:
        await patient.reached.read_installation()
    except ForeignInstallationError:
        return "this database is a copy of another one, and workers refuse it"
    except PgflowPrefectError:
        return None  # the next check names the missing right
    return None


async def _check_rights(patient: Patient) -> Verdict:
    user = (await patient.reached.read_server()).user
    missing = await patient.reached.list_missing_rights()
    if not missing and (power := await patient.reached.find_power()):
        return Verdict(
            Outcome.WARNING,
            f"user {user!r} is {power}: SQL functions that rows bind steps to get all its rights",
            "let workers log in as a role of their own that gets no more than GRANT pgflow_work",
        )
    if not missing:
        return Verdict(Outcome.OK, f"user {user!r} may do all that executing runs needs")
    more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
    advice = f'GRANT pgflow_work TO "{user}", which has them'
    if not await patient.reached.has_work_role():
        advice = f"run sql/supabase/api.sql and sql/supabase/roles.sql as the tables' owner, then {advice}"
    if any(each.startswith("BYPASSRLS") for each in missing):  # no role gets these by membership
        advice += f""". Then ALTER ROLE "{user}" SET role = 'pgflow_work', so that no policy hides a row"""
    return Verdict(
        Outcome.FAULT, f"user {user!r} lacks {', '.join(missing[:_NAMED])}{more}", advice, details=tuple(missing)
    )


async def _check_triggers(patient: Patient) -> Verdict:
    disabled = await patient.reached.list_disabled_triggers()
    if not disabled:
        return Verdict(Outcome.OK, "all triggers of pgflow and pgflow_prefect are enabled")
    more = f" and {len(disabled) - _NAMED} more" if len(disabled) > _NAMED else ""
    names = ", ".join(each.trigger for each in disabled[:_NAMED])
    advice = "; ".join(each.command for each in disabled)
    if any(each.sees_edits for each in disabled):
        # No version that a run could begin with has the edits of that time.
        advice += "; then, as the tables' owner, SELECT pgflow.raise_version(array_agg(slug)) FROM pgflow.workflows"
    return Verdict(
        Outcome.FAULT,
        f"triggers are disabled: {names}{more}. Edits may go unseen, and rows unchecked",
        advice,
        details=tuple(each.command for each in disabled),
    )


async def _check_snapshots(patient: Patient) -> Verdict:
    unlike = await patient.reached.list_unlike_snapshots()
    if not unlike:
        return Verdict(Outcome.OK, "runs begin with the steps and dependencies that the rows have")
    more = f" and {len(unlike) - _NAMED} more" if len(unlike) > _NAMED else ""
    names = ", ".join(repr(each) for each in unlike[:_NAMED])
    return Verdict(
        Outcome.FAULT,
        f"runs begin with a former definition of {names}{more}: it was edited while no trigger saw it",
        "as the tables' owner, SELECT pgflow.raise_version(array_agg(slug)) FROM "
        "pgflow_prefect.list_unlike_snapshots() AS slug",
        details=tuple(unlike),
    )


async def _check_hearing(patient: Patient) -> Verdict:
    settings = patient.settings
    if await hears_notifications(patient.dsn, timeout=settings.connect_timeout, patience=_HEARING):
        return Verdict(Outcome.OK, "LISTEN works: workers and bridges hear of a run at once")
    return Verdict(
        Outcome.WARNING,
        f"LISTEN hears nothing, as behind a pooler in transaction mode: runs wait for {settings.sweep_interval:g} s",
        "give worker and bridge a direct or session-mode connection, or a shorter PGFLOW_SWEEP_INTERVAL",
    )


async def _check_clock(patient: Patient) -> Verdict:
    before = datetime.now(UTC)
    theirs = (await patient.reached.read_server()).now
    after = datetime.now(UTC)
    # A time between the two, so that the way of the answer makes no difference.
    apart = max((before - theirs).total_seconds(), (theirs - after).total_seconds(), 0.0)
    if apart > _CLOCK_TOLERANCE:
        return Verdict(
            Outcome.WARNING,
            f"the clocks of the database and of this machine are {apart:.1f} s apart",
            "let both follow NTP: Prefect's times are this machine's, PostgreSQL's its own",
        )
    return Verdict(Outcome.OK, "the clocks of the database and of this machine agree")


DATABASE_CHECKS = (
    Check("database", _reach, patience=60),  # libpq's own connect_timeout comes first; an embedded server has to start
    Check("writing", _check_writing, needs=("database",)),
    Check("server version", _check_version, needs=("database",)),
    Check("schema", _check_schema, needs=("database", "server version")),
    Check("rights", _check_rights, needs=("schema",), schema=CLASSIC.name),
    Check("triggers", _check_triggers, needs=("schema",), schema=CLASSIC.name),
    Check("snapshots", _check_snapshots, needs=("schema",), schema=CLASSIC.name),
    Check("listen", _check_hearing, needs=("database",), patience=30, schema=CLASSIC.name),
    Check("clock", _check_clock, needs=("database",)),
)
