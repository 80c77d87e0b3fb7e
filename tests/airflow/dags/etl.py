"""A branch, a group, a template and a rule. Ledger:

- source
- schedule
x end of a run
x group
- extract: Python
x extract: retries
- stamp: shell
x stamp: retries
- stamp: template
- stamp: date
- transform: Python
x transform: retries
- choose: branch
x choose: retries
- load.big: empty
x load.big: retries
- load.small: shell
x load.small: retries
- load.small: template
- load.small: date
- done: empty
x done: trigger rule
x done: retries
- concurrency
- dates
"""

from both import BEGIN, DAG, BashOperator, EmptyOperator, PythonOperator, TaskGroup, task, timedelta


def extract(ds=None, **_):
    return {"day": ds, "rows": [3, 1, 2]}


with DAG(
    "etl",
    schedule="0 6 * * *",
    start_date=BEGIN,
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(seconds=1)},
):
    get = PythonOperator(task_id="extract", python_callable=extract)
    stamp = BashOperator(task_id="stamp", bash_command="echo {{ ds }}")

    @task
    def transform(rows):
        return sum(rows["rows"])

    @task.branch
    def choose(total):
        return "load.big" if total > 100 else "load.small"

    total = transform(get.output)
    with TaskGroup("load") as load:
        big = EmptyOperator(task_id="big")
        small = BashOperator(
            task_id="small", bash_command="echo small {{ ti.xcom_pull(task_ids='transform') }} {{ ds }}"
        )
    done = EmptyOperator(task_id="done", trigger_rule="none_failed_min_one_success")
    get >> stamp
    choose(total) >> load >> done
    stamp >> done
