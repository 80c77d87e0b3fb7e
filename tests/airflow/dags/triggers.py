"""Starting other DAGs, with a run's parameters, and waiting for one. Ledger:

- source
x schedule
x end of a run
- dates
- params
- wait_for_sensors: sensor of another DAG
- wait_for_sensors: params
- wait_for_sensors: template
- start_billing: trigger
- start_billing: template
- start_billing: params
- start_etl: trigger
- note: shell
- note: template
- note: params
- note: Variable
"""

from both import BEGIN, DAG, BashOperator, ExternalTaskSensor, TriggerDagRunOperator

with DAG("triggers", schedule=None, start_date=BEGIN, catchup=False, params={"region": "eu", "limit": 10}):
    wait = ExternalTaskSensor(task_id="wait_for_sensors", external_dag_id="sensors_{{ params.region }}")
    billing = TriggerDagRunOperator(
        task_id="start_billing", trigger_dag_id="billing", conf={"region": "{{ params.region }}"}
    )
    etl = TriggerDagRunOperator(task_id="start_etl", trigger_dag_id="etl")
    note = BashOperator(
        task_id="note", bash_command="echo {{ dag_run.conf['region'] }} {{ var.json.settings.mail }} {{ params.limit }}"
    )
    wait >> [billing, etl] >> note
