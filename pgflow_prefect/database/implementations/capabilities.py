"""The capabilities in which implementations of the contract differ."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Implementation:
    """A folder of SQL that implements `sql/CONTRACT.md`, and what it can do.

    Attributes:
        name: also of its folder.
        scripts: below `sql/`, in the order in which `init` runs them; the last one sets the version.
        executes: Prefect executes its runs. Otherwise the commands only read, or work on flows that were moved.
        moves_flows: other workers execute a flow until it is moved to Prefect, as a whole.
        tasks_per_step: a step may have several tasks.
        skips: a step may be skipped, with a reason.
        retries_in_sql: the database decides whether a failed report is tried again.
        definition_is_editable: a definition can be edited while runs are pending.
        can_reopen: a failed run can be made pending again.
        can_cancel: a pending run can be ended.
        how_to_define: tells people how workflows get into the database.
        how_to_start: tells people how to start a run.
    """

    name: str
    scripts: tuple[str, ...]
    executes: bool
    moves_flows: bool
    tasks_per_step: bool
    skips: bool
    retries_in_sql: bool
    definition_is_editable: bool
    can_reopen: bool
    can_cancel: bool
    how_to_define: str
    how_to_start: str
