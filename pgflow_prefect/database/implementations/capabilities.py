"""What implementations of the contract differ in."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Implementation:
    """A folder of SQL that implements `sql/CONTRACT.md`, and what it can do.

    Attributes:
        name: also of its folder.
        scripts: what `init` runs, in this order, below `sql/`; the last one says which version is there.
        executes: Prefect can execute its runs. Otherwise the commands only look.
        tasks_per_step: a step may have several tasks.
        skips: a step may be skipped, with a reason.
        retries_in_sql: the database decides whether a failed report is tried again.
        definition_is_editable: a definition can be edited while runs are pending.
        can_reopen: a failed run can be made pending again.
        can_cancel: a pending run can be ended.
        how_to_define: says to a person how workflows get into the database.
        how_to_start: says to a person how a run is started.
    """

    name: str
    scripts: tuple[str, ...]
    executes: bool
    tasks_per_step: bool
    skips: bool
    retries_in_sql: bool
    definition_is_editable: bool
    can_reopen: bool
    can_cancel: bool
    how_to_define: str
    how_to_start: str
