"""Checks, their results, and running many of them."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

import anyio
from prefect.client.orchestration import PrefectClient
from pydantic import BaseModel, ConfigDict

from pgflow_prefect.database.diagnosis import DiagnosisStatements
from pgflow_prefect.database.implementations import CLASSIC
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.settings import Settings

PATIENCE = 10.0
"""Seconds for a check without a limit of its own: Prefect's client tries for a minute if no server answers."""


class Outcome(StrEnum):
    """How a check went."""

    OK = "ok"
    WARNING = "warning"
    """It works, but could work better."""
    FAULT = "fault"
    """Runs do not work, or Prefect does not show them, until this is repaired."""
    SKIPPED = "skipped"
    """The check could not run."""


class Verdict(NamedTuple):
    """The result of a check.

    Attributes:
        outcome: how it went.
        message: one sentence.
        advice: the setting or command that helps; None if there is nothing to do.
        details: the complete list, if the message has only a part of it.
    """

    outcome: Outcome
    message: str
    advice: str | None = None
    details: tuple[str, ...] = ()


class Finding(BaseModel):
    """A verdict, and the name of its check."""

    model_config = ConfigDict(frozen=True)

    check: str
    outcome: Outcome
    message: str
    advice: str | None
    details: tuple[str, ...]


@dataclass
class Patient:
    """The subject of the checks, with the connections that the first checks opened for the later ones.

    Attributes:
        settings: of this process.
        source: where the connection string comes from, for people.
        resources: closed at the end.
        dsn: of the database.
        database: the open database, after its check.
        client: Prefect's API, after its check.
        api_settings: the server's own settings; empty if it does not show them.
        schema: the implementation that the database has: classic, unless the check of the schema has found another.
    """

    settings: Settings
    source: str
    resources: AsyncExitStack
    dsn: str = ""
    database: DiagnosisStatements | None = None
    client: PrefectClient | None = None
    api_settings: dict[str, object] = field(default_factory=dict)
    schema: str = CLASSIC.name

    @property
    def reached(self) -> DiagnosisStatements:
        """The database, for checks that need `database`."""
        assert self.database is not None
        return self.database

    @property
    def prefect(self) -> PrefectClient:
        """Prefect's API, for checks that need `prefect api`."""
        assert self.client is not None
        return self.client


@dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
        name: for people and scripts.
        examine: runs it; an error is a fault.
        needs: the names of checks that must succeed first; otherwise it is skipped.
        patience: seconds that it may take.
        schema: the implementation that it is about; None: any.
    """

    name: str
    examine: Callable[[Patient], Awaitable[Verdict]]
    needs: tuple[str, ...] = ()
    patience: float = PATIENCE
    schema: str | None = None


async def carry_out(checks: Iterable[Check], patient: Patient, begin: Callable[[str], None]) -> AsyncGenerator[Finding]:
    """Run checks in their order, and yield the result of each; `begin` gets the name before."""
    gone_well: set[str] = set()
    for check in checks:
        if check.schema not in (None, patient.schema):
            continue
        begin(check.name)
        if unmet := [name for name in check.needs if name not in gone_well]:
            verdict = Verdict(Outcome.SKIPPED, f"needs what {unmet[0]!r} looks at")
        else:
            verdict = await _examine(check, patient)
        if verdict.outcome in {Outcome.OK, Outcome.WARNING}:
            gone_well.add(check.name)
        yield Finding(check=check.name, **verdict._asdict())


async def _examine(check: Check, patient: Patient) -> Verdict:
    with anyio.move_on_after(check.patience):
        try:
            return await check.examine(patient)
        except Exception as error:  # noqa: BLE001  whatever it is, the others go on
            message, _, advice = describe_error(error).partition("\n")
            return Verdict(Outcome.FAULT, message.strip(), advice.strip() or None)
    return Verdict(Outcome.FAULT, f"no answer in {check.patience:g} s", "look whether it is overloaded, or cut off")
