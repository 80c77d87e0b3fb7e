"""A database that lives for one run. Ledger:

- source
- schedule
x end of a run
- dates
- setup
- teardown
- pause
- create: SQL
x create: setup
- create: connection
- fill: SQL
- fill: connection
- fill: priority
- fill: depends_on_past
- look: branch
- small: empty
- large: shell
- drop: SQL
x drop: trigger rule
x drop: teardown
- drop: connection
"""

from both import BEGIN, DAG, BashOperator, EmptyOperator, SQLExecuteQueryOperator, task

with DAG("databases", schedule="@once", start_date=BEGIN, catchup=False, max_consecutive_failed_dag_runs=3) as dag:
    create = SQLExecuteQueryOperator(task_id="create", conn_id="lab", sql="CREATE DATABASE lab").as_setup()
    fill = SQLExecuteQueryOperator(
        task_id="fill",
        conn_id="lab",
        sql="CALL fill()",
        weight_rule="absolute",
        depends_on_past=True,
        wait_for_downstream=False,
    )

    @task.branch
    def look():
        return "small"

    small, large = EmptyOperator(task_id="small"), BashOperator(task_id="large", bash_command="large")
    drop = SQLExecuteQueryOperator(task_id="drop", conn_id="lab", sql="DROP DATABASE lab")
    create >> fill >> look() >> [small, large] >> drop.as_teardown(setups=create)
