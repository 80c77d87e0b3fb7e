"""Short circuits of both kinds, and what runs only in the latest interval. Ledger:

- source
- schedule
x end of a run
- dates
x skip beside a failure
- is_weekday: short circuit
- has_rows: short circuit
- latest: latest only
- load: shell
- load: callback
- mail: empty
- mail: notification
- always: empty
x always: trigger rule
"""

from both import BEGIN, DAG, BashOperator, EmptyOperator, LatestOnlyOperator, ShortCircuitOperator, task


def is_weekday():
    return True


def tell(context):
    print(context)


with DAG("short_circuits", schedule="30 5 * * 1-5", start_date=BEGIN, catchup=False):
    weekday = ShortCircuitOperator(
        task_id="is_weekday", python_callable=is_weekday, ignore_downstream_trigger_rules=False
    )

    @task.short_circuit
    def has_rows():
        return 1

    latest = LatestOnlyOperator(task_id="latest")
    load = BashOperator(task_id="load", bash_command="load", on_failure_callback=tell)
    mail = EmptyOperator(task_id="mail", email="team@example.com", email_on_failure=True)
    always = EmptyOperator(task_id="always", trigger_rule="all_done")
    weekday >> has_rows() >> load >> mail
    latest >> mail
    mail >> always
