"""The schema of the released pgflow (pgflow.dev): the scripts of `sql/released/`, which only read so far."""

from pgflow_prefect.database.implementations.capabilities import Implementation

COMMANDS = ("list", "graph", "runs", "status")
"""What works on it."""

_NAMES = [f"`{name}`" for name in COMMANDS]
NOT_YET = f"of the commands, only {', '.join(_NAMES[:-1])} and {_NAMES[-1]} work on it yet"
"""The end of a sentence that says what does not."""


def describe_released(*, skips: bool) -> Implementation:
    """Return what can be done with it.

    Args:
        skips: this version of pgflow can skip steps.
    """
    return Implementation(
        name="released",
        scripts=("released/pgflow_prefect.sql",),
        executes=False,
        tasks_per_step=True,
        skips=skips,
        retries_in_sql=True,
        definition_is_editable=False,
        can_reopen=False,
        can_cancel=False,
        how_to_define="compile one with pgflow's own tools",
        how_to_start="start one with SELECT pgflow.start_flow(…)",
    )
