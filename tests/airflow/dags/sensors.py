"""Waiting for other DAGs and for time. Ledger:

- source
- schedule
x end of a run
- dates
- concurrency
- wait_for_etl: sensor of another DAG
- wait_for_billing: sensor of another DAG
x wait_for_billing: retries
- pause: sensor
- join: shell
- join: depends_on_past
- trigger_report: trigger
"""

from both import BEGIN, DAG, BashOperator, ExternalTaskSensor, TimeDeltaSensor, TriggerDagRunOperator, timedelta

with DAG("sensors", schedule="0 8 * * *", start_date=BEGIN, catchup=False, max_active_runs=3):
    etl = ExternalTaskSensor(task_id="wait_for_etl", external_dag_id="etl", external_task_id="done", mode="reschedule")
    billing = ExternalTaskSensor(task_id="wait_for_billing", external_dag_id="billing", retries=2)
    pause = TimeDeltaSensor(task_id="pause", delta=timedelta(minutes=30))
    join = BashOperator(task_id="join", bash_command="join", depends_on_past=True)
    trigger = TriggerDagRunOperator(task_id="trigger_report", trigger_dag_id="report")
    [etl, billing, pause] >> join >> trigger
