"""A container after a branch, with a pool. Ledger:

- source
x schedule
x end of a run
- dates
- look: branch
- train: container
- train: pool
- train: concurrency
- reuse: empty
- deploy: shell
x deploy: trigger rule
- deploy: template
- tell: Python
x tell: trigger rule
"""

from both import BEGIN, DAG, BashOperator, BranchPythonOperator, DockerOperator, EmptyOperator, task


def look():
    return "train"


with DAG("training", schedule=None, start_date=BEGIN, catchup=False):
    decide = BranchPythonOperator(task_id="look", python_callable=look)
    train = DockerOperator(task_id="train", image="train", command="train", pool="gpu", max_active_tis_per_dag=1)
    reuse = EmptyOperator(task_id="reuse")
    deploy = BashOperator(
        task_id="deploy", bash_command="deploy {{ run_id }}", trigger_rule="none_failed_min_one_success"
    )

    @task(trigger_rule="one_failed")
    def tell():
        print("something failed")

    decide >> [train, reuse] >> deploy
    [train, deploy] >> tell()
