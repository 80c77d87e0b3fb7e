"""A container of TaskFlow beside others, in groups inside each other. Ledger:

- source
- schedule
x end of a run
- dates
x group
x group
x group
- prepare: empty
- images.resize.small: container
- images.resize.large: container
- images.label: container
- images.label: template
- images.label: date
- done: empty
x done: trigger rule
"""

from both import BEGIN, DAG, DockerOperator, EmptyOperator, TaskGroup, timedelta

with DAG("images", schedule=timedelta(hours=4), start_date=BEGIN, catchup=False):
    prepare = EmptyOperator(task_id="prepare")
    with TaskGroup("images") as images:
        with TaskGroup("resize") as resize:
            DockerOperator(task_id="small", image="resize", command="resize 100")
            DockerOperator(task_id="large", image="resize", command="resize 1000")
        label = DockerOperator(task_id="label", image="label", command="label {{ data_interval_start }}")
        resize >> label
    with TaskGroup("plain", prefix_group_id=False) as plain:
        done = EmptyOperator(task_id="done", trigger_rule="all_done")
    prepare >> images >> plain
