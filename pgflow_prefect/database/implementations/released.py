"""The schema of the released pgflow (pgflow.dev): the scripts of `sql/released/`. Its own workers execute its flows."""

from pgflow_prefect.database.implementations.capabilities import Implementation

RELEASED = "released"
"""Its name."""

COMMANDS = (
    "list",
    "graph",
    "runs",
    "status",
    "timeline",
    "export",
    "import",
    "validate",
    "observe",
    "enable",
    "disable",
    "record",
    "open",
    "doctor",
    "bind",
    "run",
    "worker",
    "serve",
    "bridge",
    "deploy",
    "reconcile",
)
"""What works on it."""

_NAMES = [f"`{name}`" for name in COMMANDS]
WORKING = f"{', '.join(_NAMES[:-1])} and {_NAMES[-1]}"
"""The commands that work on it, for a sentence."""

REASONS = {
    "push": "pgflow compiles flows from TypeScript: change the flow there, and its worker writes the definition",
    "diff": "pgflow compiles flows from TypeScript, and Prefect has no deployment of them: there is nothing to compare",
    "retry": "pgflow has no function that reopens a failed run: begin a new one with pgflow.start_flow",
    "cancel": "pgflow has no function that cancels a run: it goes on until its tasks have ended",
    "skip": "pgflow has no function that skips a step by hand: its conditions and `when_exhausted` do that",
    "prune": "pgflow's guide has SQL that deletes old runs; pgflow.delete_flow_and_data deletes a flow with its runs",
    "logs": "pgflow's workers log where they run: this program does not see it",
    "shadow": "this program does not compare with the results of pgflow's workers yet: move the step, and undo it",
    "credentials": "no row of a binding was made by an older version of this program",
}
"""Why a command does not work on it, by its name."""


def describe_released(*, skips: bool) -> Implementation:
    """Return what can be done with it.

    Args:
        skips: this version of pgflow can skip steps.
    """
    return Implementation(
        name=RELEASED,
        scripts=(
            "released/pgflow_prefect.sql",
            "released/moving.sql",
            "released/steps.sql",
            "released/executing.sql",
            "released/bindings.sql",
            "released/observing.sql",
        ),
        executes=False,
        moves_flows=True,
        tasks_per_step=True,
        skips=skips,
        retries_in_sql=True,
        definition_is_editable=False,
        can_reopen=False,
        can_cancel=False,
        how_to_define="compile one with pgflow's own tools",
        how_to_start="start one with SELECT pgflow.start_flow(…)",
    )
