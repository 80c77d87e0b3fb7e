"""The consumer's statements: whether a step still has to be done, and reports of its end."""

from dataclasses import dataclass, field
from time import monotonic
from uuid import UUID

import anyio
from pydantic_core import to_json

from pgflow_prefect.database.connection import Row, connect, find_dsn
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.schema import check_schema
from pgflow_prefect.database.statements import escape
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.errors import (
    DatabaseUnavailableError,
    ResultInvalidError,
    TransientError,
    UnknownRunError,
    UnstorableTextError,
    UsageError,
)
from pgflow_prefect.models import AnyOutcome, ItemKey, Status, StepInput, TaskKey
from pgflow_prefect.settings import Settings
from pgflow_prefect.waiting import Pauses

_FIRST_PAUSE = 0.1  # seconds
_LONGEST_PAUSE = 5.0  # seconds

_CHECKED: set[str] = set()
"""The databases whose version this process has checked, once for all messages."""


@dataclass(frozen=True)
class Handover:
    """What PostgreSQL knows of an attempt, independent of the message.

    Attributes:
        workflow_slug: of the run.
        handler: for which the attempt was claimed, such as `queue redis://host/0?queue=mails`; None if unknown.
    """

    workflow_slug: str
    handler: str | None


@dataclass(frozen=True)
class ConsumerStore:
    """Statements about one step, each on a connection of its own, so that none is open during the work.

    Every method tries again, for `patience` seconds, while PostgreSQL can't answer.

    Attributes:
        dsn: from `find_dsn`.
        connect_timeout: seconds to wait for the server.
        patience: in seconds.
    """

    dsn: str = field(repr=False)
    connect_timeout: float
    patience: float

    @classmethod
    def open(cls, settings: Settings) -> "ConsumerStore":
        """Return the store of the settings' database.

        Raises:
            UsageError: the settings name no usable database.
        """
        return cls(find_dsn(settings), settings.connect_timeout, settings.report_timeout)

    async def find_handover(self, run_id: UUID, task: TaskKey, attempt: int) -> Handover | None:
        """Return the handler that an attempt was claimed for; None if no process waits for its report any more.

        Raises:
            SchemaMissingError: the database has no pgflow schema, or an old one.
            SchemaNewerError: it has one of a later version.
        """
        row = await self._fetch("find_handover", run_id=run_id, attempt=attempt, **task.as_parameters())
        if row is None or row["awaited"] is not True:
            return None
        return Handover(str(row["workflow_slug"]), None if row["handler"] is None else str(row["handler"]))

    async def read_input(self, run_id: UUID, task: TaskKey) -> StepInput:
        """Return what a step's input is made of."""
        row = await self._fetch("read_input", run_id=run_id, upstream=None, **task.as_parameters())
        assert row is not None
        return StepInput.model_validate(row)

    async def complete(
        self, run_id: UUID, task: TaskKey, attempt: int, result: str, outcome: AnyOutcome | None = None
    ) -> Status:
        """Store a task's result and return the step's status: that of the first report.

        Args:
            run_id: the run.
            task: of the run.
            attempt: of the message.
            result: JSON text.
            outcome: that the step is skipped, or which branches it takes.

        Raises:
            ResultInvalidError: jsonb can't hold the result, or no step waits for this one that is a taken branch.
        """
        said = None if outcome is None else to_json(outcome).decode()
        try:
            return await self._report("report_completion", run_id, task, attempt, result=result, outcome=said)
        except UsageError as error:
            if outcome is None or "taken" not in outcome or isinstance(error, UnknownRunError):
                raise
            raise ResultInvalidError(str(error)) from error  # it would be refused each time

    async def fail(self, run_id: UUID, task: TaskKey, attempt: int, message: str) -> Status:
        """Fail a task, its step and the run, and return the step's status: that of the first report."""
        # Text in PostgreSQL has neither NUL nor half a character.
        text = message.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
        try:
            return await self._report("report_failure", run_id, task, attempt, error_message=text)
        except UnstorableTextError:
            return await self._report("report_failure", run_id, task, attempt, error_message=escape(text))

    async def find_item_handover(self, run_id: UUID, item: ItemKey, attempt: int) -> Handover | None:
        """Do as `find_handover`, for an item of a map."""
        row = await self._fetch("find_item_handover", run_id=run_id, attempt=attempt, **item.as_parameters())
        if row is None or row["awaited"] is not True:
            return None
        return Handover(str(row["workflow_slug"]), None if row["handler"] is None else str(row["handler"]))

    async def read_item_input(self, run_id: UUID, item: ItemKey) -> StepInput:
        """Do as `read_input`, for an item of a map: the item is a member of the results."""
        row = await self._fetch("read_item_input", run_id=run_id, **item.as_parameters())
        assert row is not None
        return StepInput.model_validate(row)

    async def complete_item(
        self, run_id: UUID, item: ItemKey, attempt: int, result: str, outcome: AnyOutcome | None = None
    ) -> Status:
        """Store an item's result, or leave it out of its map's, and return the map's status.

        Raises:
            ResultInvalidError: jsonb can't hold the result, or the outcome is none of an item.
        """
        if outcome is not None and "taken" in outcome:
            raise ResultInvalidError(f"{item} can't take branches: only a whole step does")
        said = None if outcome is None else to_json(outcome).decode()
        return await self._report_item(run_id, item, attempt, result=result, outcome=said)

    async def fail_item(self, run_id: UUID, item: ItemKey, attempt: int, message: str) -> Status:
        """Fail an item, and return its map's status."""
        text = message.replace("\0", "\N{REPLACEMENT CHARACTER}").encode(errors="replace").decode()
        try:
            return await self._report_item(run_id, item, attempt, error_message=text)
        except UnstorableTextError:
            return await self._report_item(run_id, item, attempt, error_message=escape(text))

    async def _report_item(self, run_id: UUID, item: ItemKey, attempt: int, **what: str | None) -> Status:
        given = {"result": None, "outcome": None, "error_message": None} | what
        row = await self._fetch("report_item", run_id=run_id, attempt=attempt, **item.as_parameters(), **given)
        assert row is not None
        return Status(str(row["status"]))

    async def _report(self, query: str, run_id: UUID, task: TaskKey, attempt: int, **what: str | None) -> Status:
        row = await self._fetch(query, run_id=run_id, attempt=attempt, **task.as_parameters(), **what)
        assert row is not None
        return Status(str(row["status"]))

    async def _fetch(self, query: str, **parameters: object) -> Row | None:
        deadline = monotonic() + self.patience
        pauses = Pauses(_FIRST_PAUSE, _LONGEST_PAUSE)
        while True:
            try:
                # One bound for the whole: a server may also hang.
                with anyio.fail_after(max(deadline - monotonic(), self.connect_timeout)):
                    return await self._fetch_once(query, parameters)
            except TimeoutError:
                raise TransientError(f"PostgreSQL has not answered for {self.patience:g} s") from None
            except DatabaseUnavailableError:
                if monotonic() + (pause := pauses.draw()) > deadline:
                    raise
                await anyio.sleep(pause)

    async def _fetch_once(self, query: str, parameters: dict[str, object]) -> Row | None:
        connection = await connect(self.dsn, timeout=self.connect_timeout)
        async with connection:
            if self.dsn not in _CHECKED:
                await check_schema(connection, executes_moved=True)
                _CHECKED.add(self.dsn)
            with translate_errors():
                cursor = await connection.execute(QUERIES[query], parameters)
                return await cursor.fetchone()
