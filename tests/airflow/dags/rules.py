"""Every trigger rule of Airflow, below a task that succeeds, one that fails and one that is skipped. Ledger:

- source
x schedule
x end of a run
- dates
x skip beside a failure
- choose: branch
- ok: empty
- skipped: empty
- broken: shell
- all_success: empty
- all_failed: empty
x all_failed: trigger rule
- all_done: empty
x all_done: trigger rule
- all_skipped: empty
x all_skipped: trigger rule
- always: empty
x always: trigger rule
- none_failed: empty
x none_failed: trigger rule
- none_failed_min_one_success: empty
x none_failed_min_one_success: trigger rule
- none_skipped: empty
x none_skipped: trigger rule
- one_done: empty
x one_done: trigger rule
- one_failed: empty
x one_failed: trigger rule
- one_success: empty
x one_success: trigger rule
"""

from both import BEGIN, DAG, BashOperator, EmptyOperator, task

RULES = [
    "all_success",
    "all_failed",
    "all_done",
    "all_skipped",
    "always",
    "none_failed",
    "none_failed_min_one_success",
    "none_skipped",
    "one_done",
    "one_failed",
    "one_success",
]

with DAG("rules", schedule=None, start_date=BEGIN, catchup=False):

    @task.branch
    def choose():
        return "ok"

    above = [
        EmptyOperator(task_id="ok"),
        EmptyOperator(task_id="skipped"),
        BashOperator(task_id="broken", bash_command="false"),
    ]
    choose() >> above[:2]
    for rule in RULES:
        above >> EmptyOperator(task_id=rule, trigger_rule=rule)
