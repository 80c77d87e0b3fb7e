"""Setups inside each other, around steps that join; a pool; a sensor. Ledger:

- source
- schedule
x end of a run
- dates
- setup
- teardown
x group
- wait: sensor of another DAG
- wait: pool
- start: shell
x start: setup
- open: shell
x open: setup
- work.left: shell
- work.left: params
- work.left: template
- work.left: date
- work.right: shell
- work.right: template
- work.right: date
- work.join: shell
- close: shell
x close: trigger rule
x close: teardown
x close: teardown
- stop: shell
x stop: trigger rule
x stop: teardown
x stop: teardown
- tell: trigger
x tell: trigger rule
- tell: setup above
"""

from both import BEGIN, DAG, BashOperator, ExternalTaskSensor, TaskGroup, TriggerDagRunOperator

with DAG("warehouse", schedule="0 1 * * *", start_date=BEGIN, catchup=False):
    wait = ExternalTaskSensor(task_id="wait", external_dag_id="billing", pool="sensors")
    start, opened = (
        BashOperator(task_id="start", bash_command="start"),
        BashOperator(task_id="open", bash_command="open"),
    )
    with TaskGroup("work") as work:
        left = BashOperator(task_id="left", bash_command="left {{ params.size }} {{ ds }}")
        right = BashOperator(task_id="right", bash_command="right {{ ds }}")
        join = BashOperator(task_id="join", bash_command="join")
        [left, right] >> join
    close, stop = BashOperator(task_id="close", bash_command="close"), BashOperator(task_id="stop", bash_command="stop")
    tell = TriggerDagRunOperator(task_id="tell", trigger_dag_id="mail", trigger_rule="all_done")
    wait >> start >> opened >> work >> close.as_teardown(setups=opened)
    close >> stop.as_teardown(setups=start)
    join >> tell
