"""Writes the files of a workflow that was defined elsewhere: its stubs, and the ledger of what differs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pgflow_prefect.definitions.addition import Addition
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.definitions.origin import Ledger, LedgerChange, LedgerLine, Origin, merge_ledger
from pgflow_prefect.deployment.code_generation import ImportReport, PlannedImport, plan_import, replace_file
from pgflow_prefect.errors import UsageError

_MOST_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class ForeignWorkflow:
    """A workflow that was defined elsewhere.

    Attributes:
        definition: its steps, deps and rules.
        origin: what its stubs say of where they come from.
        ledger: what differs.
        source: what to call its place: `Airflow`.
    """

    definition: WorkflowDefinition
    origin: Origin
    ledger: Ledger
    source: str


@dataclass(frozen=True)
class ForeignImport:
    """An import that is planned, and checked as far as that is possible without writing.

    Attributes:
        old: the definition in the database; None if there is none.
        addition: what the database gets.
        stubs: what the file of handlers gets.
        ledger_path: the ledger's file.
        ledger: what the ledger gets.
        whole: the ledger of this import.
    """

    old: WorkflowDefinition | None
    addition: Addition
    stubs: PlannedImport
    ledger_path: Path
    ledger: LedgerChange
    whole: Ledger

    def add_lines(self, lines: Sequence[LedgerLine]) -> "ForeignImport":
        """Return the same with further lines of the ledger, which were found after the import."""
        whole = replace(self.whole, lines=(*self.whole.lines, *lines))
        return replace(self, ledger=merge_ledger(_read_page(self.ledger_path), whole), whole=whole)

    def write_files(self) -> ImportReport:
        """Write the handlers' file and the ledger.

        Raises:
            UsageError: one of them can't be written.
        """
        report = self.stubs.write()
        if self.ledger.text is not None:
            replace_file(self.ledger_path, self.ledger.text.encode("utf-8", "replace"))
        return report


def plan_foreign(
    workflow: ForeignWorkflow, old: WorkflowDefinition | None, addition: Addition, path: Path
) -> ForeignImport:
    """Return what the import of a workflow would write.

    Args:
        workflow: as it is elsewhere.
        old: the definition in the database; None if there is none.
        addition: what the database would get.
        path: of the handlers' file; the ledger stands beside it.

    Raises:
        UsageError: the file of handlers or the ledger can't be read.
    """
    ledger_path = path.with_suffix(".ledger.md")
    return ForeignImport(
        old=old,
        addition=addition,
        stubs=plan_import(addition.definition, path, workflow.origin),
        ledger_path=ledger_path,
        ledger=merge_ledger(_read_page(ledger_path), workflow.ledger),
        whole=workflow.ledger,
    )


def _read_page(path: Path) -> str | None:
    try:
        if not path.exists():
            return None
        if path.stat().st_size > _MOST_BYTES:
            raise UsageError(f"{path} has more than {_MOST_BYTES:,} bytes: move it away, and import again")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text in UTF-8"
        raise UsageError(f"{path} can't be read: {reason}") from error
