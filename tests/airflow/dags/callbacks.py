"""Callbacks of the DAG and of a task, fail_fast, and a time-out of the run. Ledger:

- source
- schedule
x end of a run
- fail_fast
- dates
- dates
- time-out
- callback
- callback
- concurrency
- read: Python
- read: callback
- read: XCom
- write: Python
- write: XCom
"""

from both import BEGIN, DAG, PythonOperator, datetime, timedelta


def tell(context):
    print(context)


def read(ti):
    ti.xcom_push("rows", 3)


def write(rows):
    print(rows)


options = {"schedule": "0 0 1 */3 *", "start_date": BEGIN, "end_date": datetime(2030, 1, 1), "catchup": False}
try:
    dag = DAG("callbacks", fail_fast=True, **options)
except TypeError:
    dag = DAG("callbacks", fail_stop=True, **options)
dag.dagrun_timeout = timedelta(hours=2)
dag.max_active_tasks = 4
dag.on_success_callback = dag.on_failure_callback = tell
dag.has_on_success_callback = dag.has_on_failure_callback = True
with dag:
    first = PythonOperator(task_id="read", python_callable=read, on_execute_callback=tell, do_xcom_push=False)
    last = PythonOperator(
        task_id="write", python_callable=write, op_args=["{{ ti.xcom_pull(task_ids='read', key='rows') }}"]
    )
    first >> last
