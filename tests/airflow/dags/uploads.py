"""A map over a literal list, with a Variable and a connection; assets. Ledger:

- source
- schedule
x end of a run
- dates
- send: Python
- send: map
- send: concurrency
- publish: SQL
- publish: connection
- publish: template
- publish: Variable
- publish: assets
- publish: map above
"""

from both import BEGIN, DAG, Asset, SQLExecuteQueryOperator, task

with DAG("uploads", schedule=[Asset("s3://raw/files")], start_date=BEGIN, catchup=False):

    @task(max_active_tis_per_dagrun=4)
    def send(name):
        return name

    publish = SQLExecuteQueryOperator(
        task_id="publish",
        conn_id="warehouse",
        sql="CALL publish('{{ var.value.schema }}')",
        outlets=[Asset("s3://clean/files")],
    )
    send.expand(name=["a", "b", "c"]) >> publish
