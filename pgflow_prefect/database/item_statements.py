"""The store's statements about the items of maps."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

from pydantic_core import to_json

from pgflow_prefect.database.connection import Row
from pgflow_prefect.database.statements import Statements, escape
from pgflow_prefect.errors import SupersededError, UnstorableTextError
from pgflow_prefect.models import ClaimedItem, ItemReport, MapState, Report
from pgflow_prefect.raw_json import RawJson


@dataclass(frozen=True, slots=True)
class FailedItem:
    """A failed item of a map.

    Attributes:
        index: its place in the array.
        attempts: how often it was executed.
        error_message: why the last attempt has failed.
    """

    index: int
    attempts: int
    error_message: str


class ItemStatements(Statements):
    """Claims and reports of items."""

    async def work_items(
        self,
        run_id: UUID,
        step_slug: str,
        epoch: int,
        reports: Sequence[ItemReport],
        *,
        wanted: int,
        held: Collection[int] | None = None,
    ) -> MapState:
        """Report on items of a map, and claim others, in one statement.

        Args:
            run_id: the run.
            step_slug: the map.
            epoch: from `take_run`.
            reports: the first report on an item wins.
            wanted: how many items to claim at most.
            held: where the answer to a claim may be lost: the items that this process has. All others that it has
                claimed in this epoch can be claimed again.

        Raises:
            SupersededError: another owner has taken the run.
            ResultInvalidError: jsonb can't hold one of the results.
        """
        given = {
            "step_slug": step_slug,
            "epoch": epoch,
            "wanted": wanted,
            "held": None if held is None else [*held],
        }
        try:
            rows = await self._fetch("work_items", run_id=run_id, reports=write_reports(reports), **given)
        except UnstorableTextError:
            escaped = [each._replace(message=escape(each.message)) if each.message else each for each in reports]
            rows = await self._fetch("work_items", run_id=run_id, reports=write_reports(escaped), **given)
        *claimed, last = rows
        if last["status"] is None:
            raise SupersededError(run_id)
        return MapState.model_validate(
            {**last, "report": Report.model_validate(last), "items": tuple(map(_to_item, claimed))}
        )

    async def list_returned_items(self, run_id: UUID, step_slug: str, item_indexes: Sequence[int]) -> list[int]:
        """Return which of these items were given back, to be executed again, and have not been handed over since.

        Another item that can be claimed again was handed over to a program that has not reported it in time.
        """
        rows = await self._fetch(
            "list_returned_items", run_id=run_id, step_slug=step_slug, item_indexes=list(item_indexes)
        )
        return [int(str(row["item_index"])) for row in rows]

    async def list_failed_items(self, run_id: UUID, step_slug: str, limit: int) -> list[FailedItem]:
        """Return the first failed items of a map, by their places."""
        rows = await self._fetch("list_failed_items", run_id=run_id, step_slug=step_slug, limit=limit)
        return [
            FailedItem(int(str(row["item_index"])), int(str(row["attempts"])), str(row["error_message"] or ""))
            for row in rows
        ]


def write_reports(reports: Sequence[ItemReport]) -> str:
    """Return reports as a JSON array; their results are JSON text already."""
    return f"[{','.join(map(_write_report, reports))}]"


def _write_report(report: ItemReport) -> str:
    fields = {
        "item_index": report.item_index,
        "attempt": report.attempt,
        "do": report.doing,
        "message": report.message,
        "pause": report.pause,
    }
    text = to_json({name: value for name, value in fields.items() if value is not None}).decode()
    return text if report.result is None else f'{text.removesuffix("}")},"result":{report.result}}}'


def _to_item(row: Row) -> ClaimedItem:
    return ClaimedItem(int(str(row["item_index"])), int(str(row["attempt"])), RawJson(str(row["item"])))
