"""What the ledger says of each thing that a task or a DAG may say beside its work."""

from collections.abc import Mapping
from typing import NamedTuple


class Sentence(NamedTuple):
    """What the ledger says of one attribute.

    Attributes:
        topic: what kind of thing it is, in a few words.
        says: sentences; `{value}` stands for what Airflow's document has.
        is_done: nothing is left to do.
    """

    topic: str
    says: str
    is_done: bool = False


OF_TASKS: Mapping[str, Sentence] = {
    "pool": Sentence(
        "pool",
        "{value}. There are no pools here. Give the steps a tag, and limit the tag in Prefect.",
    ),
    "pool_slots": Sentence("pool", "{value} slots of its pool. There are no pools here."),
    "priority_weight": Sentence("priority", "priority_weight {value}. Steps here have no priority."),
    "weight_rule": Sentence("priority", "weight_rule {value}. Steps here have no priority."),
    "queue": Sentence("queue", "{value}. Here a binding or a work pool decides where the step is executed."),
    "executor": Sentence("executor", "{value}. Here a binding or a work pool decides where the step is executed."),
    "executor_config": Sentence(
        "executor", "executor_config {value}. Here a binding or a work pool decides where the step is executed."
    ),
    "run_as_user": Sentence("user", "run_as_user {value}. The step is executed as the user of its process."),
    "resources": Sentence("executor", "resources {value}. Here a work pool decides on them."),
    "depends_on_past": Sentence(
        "depends_on_past", "Not kept. Let one run be executed at a time: a backfill starts its dates in order."
    ),
    "depends_on_previous_tasks": Sentence(
        "depends_on_past", "depends_on_previous_tasks {value}. Not kept. Let one run be executed at a time."
    ),
    "wait_for_downstream": Sentence(
        "depends_on_past", "wait_for_downstream is not kept. Let one run be executed at a time."
    ),
    "wait_for_past_depends_before_skipping": Sentence(
        "depends_on_past", "wait_for_past_depends_before_skipping is not kept."
    ),
    "do_xcom_push": Sentence("XCom", "Airflow keeps no result of it. Return None."),
    "multiple_outputs": Sentence(
        "XCom", "multiple_outputs: each key of the result is an XCom, too. The result is one value here."
    ),
    "email": Sentence(
        "notification", "It sends mail ({value}). Use an automation of Prefect, or a step with rule one_failed."
    ),
    "sla": Sentence("SLA", "{value} seconds. Use an automation of Prefect on runs that take too long."),
    "inlets": Sentence("assets", "It reads {value}. Assets are not kept."),
    "outlets": Sentence("assets", "It updates {value}. What waits for it in Airflow does not start by itself here."),
    "max_active_tis_per_dag": Sentence(
        "concurrency", "At most {value} at a time in all runs. Give the steps a tag, and limit the tag in Prefect."
    ),
    "max_active_tis_per_dagrun": Sentence("concurrency", "At most {value} items at a time in one run."),
    "start_date": Sentence("dates", "It begins at {value}. Steps here have no dates of their own."),
    "end_date": Sentence("dates", "It ends at {value}. Steps here have no dates of their own."),
    "params": Sentence("params", "It has parameters of its own: {value}. Give them in the payload."),
    "start_from_trigger": Sentence("deferrable", "It starts in Airflow's triggerer. Write it as an async function."),
    "map_index_template": Sentence("map", "map_index_template {value}. Items are known by their index here."),
    "has_retry_policy": Sentence(
        "retries", "retry_policy. Its code is not imported. Write it as retry_condition_fn of the step."
    ),
    "has_on_execute_callback": Sentence("callback", "on_execute_callback. Its code is not imported."),
    "has_on_failure_callback": Sentence(
        "callback",
        "on_failure_callback. Its code is not imported. Add a step with rule one_failed, or an automation of Prefect.",
    ),
    "has_on_success_callback": Sentence(
        "callback", "on_success_callback. Its code is not imported. Add a step, or an automation of Prefect."
    ),
    "has_on_retry_callback": Sentence(
        "callback", "on_retry_callback. Its code is not imported. Use an automation of Prefect."
    ),
    "has_on_skipped_callback": Sentence(
        "callback", "on_skipped_callback. Its code is not imported. Use an automation of Prefect."
    ),
}
"""By the names of `definitions.airflow.tasks.DEFAULTS`."""

OF_DAGS: Mapping[str, Sentence] = {
    "catchup": Sentence(
        "catchup",
        "Airflow makes up for missed dates. Here `pgflow-prefect backfill` does.",
    ),
    "max_active_runs": Sentence(
        "concurrency",
        "At most {value} runs at a time. Give the same number to `pgflow-prefect deploy --concurrency-limit`.",
    ),
    "max_active_tasks": Sentence(
        "concurrency", "At most {value} tasks at a time. Give the steps a tag, and limit the tag in Prefect."
    ),
    "max_consecutive_failed_dag_runs": Sentence(
        "pause",
        "Airflow pauses the DAG after {value} failed runs. Use an automation of Prefect that pauses the deployment.",
    ),
    "dagrun_timeout": Sentence(
        "time-out", "A run may take {value} seconds. Steps have time-outs here, runs have none."
    ),
    "start_date": Sentence("dates", "It begins at {value}. Deploy the schedule when it is to begin."),
    "end_date": Sentence("dates", "It ends at {value}. Take the schedule away by then."),
    "params": Sentence("params", "Defaults of the run's parameters: {value}. Give them in the payload.", is_done=False),
    "deadline": Sentence("deadline", "{value}. Use an automation of Prefect on runs that take too long."),
    "sla_miss_callback": Sentence("SLA", "sla_miss_callback. Use an automation of Prefect on runs that take too long."),
    "has_on_success_callback": Sentence(
        "callback", "on_success_callback of the DAG. Its code is not imported. Add a hook to the flow."
    ),
    "has_on_failure_callback": Sentence(
        "callback", "on_failure_callback of the DAG. Its code is not imported. Add a hook to the flow."
    ),
    "is_paused_upon_creation": Sentence(
        "pause", "is_paused_upon_creation {value}. A workflow runs once it is deployed.", is_done=True
    ),
    "allowed_run_types": Sentence("runs", "Only runs of these kinds: {value}. Runs here can always be started."),
}
"""By the names of `definitions.airflow.dag.DEFAULTS`."""
