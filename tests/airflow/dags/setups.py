"""Setups and teardowns, one of which fails the run. Ledger:

- source
x schedule
x end of a run
- dates
- setup
- teardown
- create: Python
x create: setup
- fill: shell
- query: shell
- note: empty
x note: trigger rule
- note: setup above
- drop: Python
x drop: trigger rule
x drop: teardown
- connect: shell
x connect: setup
- use: shell
- close: shell
x close: trigger rule
x close: teardown
"""

from both import BEGIN, DAG, BashOperator, EmptyOperator, setup, teardown

with DAG("setups", schedule=None, start_date=BEGIN, catchup=False):

    @setup
    def create():
        return "cluster"

    @teardown
    def drop():
        pass

    fill = BashOperator(task_id="fill", bash_command="fill")
    query = BashOperator(task_id="query", bash_command="query")
    note = EmptyOperator(task_id="note", trigger_rule="all_done")
    created, dropped = create(), drop()
    created >> fill >> query >> dropped
    created >> dropped
    query >> note >> dropped
    connect = BashOperator(task_id="connect", bash_command="connect")
    use = BashOperator(task_id="use", bash_command="use")
    close = BashOperator(task_id="close", bash_command="close")
    connect >> use >> close.as_teardown(setups=connect, on_failure_fail_dagrun=True)
