"""The classic schema: `sql/pgflow.sql`, and the scripts of `sql/classic/`."""

from pgflow_prefect.database.implementations.capabilities import Implementation

CLASSIC = Implementation(
    name="classic",
    scripts=(
        "pgflow.sql",
        "classic/pgflow_prefect.sql",
        "classic/definitions.sql",
        "classic/recording.sql",
        "classic/schedules.sql",
        "classic/backfills.sql",
        "classic/airflow_tasks.sql",
        "classic/mirror.sql",
        "classic/runs.sql",
    ),
    executes=True,
    moves_flows=False,
    tasks_per_step=False,
    skips=False,
    retries_in_sql=False,
    definition_is_editable=True,
    can_reopen=True,
    can_cancel=True,
    how_to_define="insert one into pgflow.workflows, pgflow.steps and pgflow.deps",
    how_to_start="start one with `pgflow-prefect run`, or SELECT pgflow.run_workflow(…)",
)
