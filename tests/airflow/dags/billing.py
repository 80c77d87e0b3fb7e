"""SQL with connections, dates and a pool; a callback; a delay that is not said. Ledger:

- source
- schedule
x end of a run
x tags
- dates
- load_invoices: SQL
x load_invoices: retries
- load_invoices: template
- load_invoices: date
- load_invoices: connection
- load_invoices: pool
- load_invoices: pool
- sum_up: SQL
x sum_up: retries
x sum_up: time-out
- sum_up: template
- sum_up: date
- sum_up: connection
- sum_up: priority
- report: Python
x report: retries
- report: callback
- report: callback
"""

from both import BEGIN, DAG, SQLExecuteQueryOperator, task, timedelta


def tell(context):
    print("failed", context)


with DAG(
    "billing",
    schedule="@daily",
    start_date=BEGIN,
    catchup=False,
    tags=["finance", "daily"],
    default_args={"retries": 3},
):
    load = SQLExecuteQueryOperator(
        task_id="load_invoices",
        conn_id="erp",
        sql="INSERT INTO invoices\nSELECT * FROM raw_invoices\nWHERE day = '{{ ds }}'",
        pool="erp_pool",
        pool_slots=2,
    )
    total = SQLExecuteQueryOperator(
        task_id="sum_up",
        conn_id="warehouse",
        sql="SELECT sum(amount) FROM invoices WHERE day BETWEEN '{{ data_interval_start }}' AND '{{ data_interval_end }}'",
        execution_timeout=timedelta(minutes=10),
        priority_weight=10,
    )

    @task(on_failure_callback=tell, on_success_callback=tell)
    def report(amounts):
        return amounts

    load >> total
    report(total.output)
