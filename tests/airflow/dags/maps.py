"""Mapped tasks of each kind. Ledger:

- source
- schedule
x end of a run
- dates
- list_files: Python
- load: Python
x load: retries
x load: map
- copy: shell
- copy: map
- total: Python
- total: map above
- pairs: Python
- pairs: map
- again: Python
x again: map
- again: map above
- objects: Python
- objects: map
- done: empty
x done: trigger rule
- done: map above
- done: map above
- done: map above
- done: map above
"""

from both import BEGIN, DAG, BashOperator, EmptyOperator, task

with DAG("maps", schedule="@hourly", start_date=BEGIN, catchup=False):

    @task
    def list_files():
        return ["a", "b"]

    @task(retries=1)
    def load(file, mode):
        return len(file)

    @task
    def total(sizes):
        return sum(sizes)

    @task
    def pairs(left, right):
        return [left, right]

    @task
    def again(size):
        return size * 2

    @task
    def objects(a, b):
        return a + b

    files = list_files()
    loaded = load.partial(mode="fast").expand(file=files)
    copied = BashOperator.partial(task_id="copy").expand(bash_command=["cp a b", "cp c d"])
    added = total(loaded)
    crossed = pairs.expand(left=files, right=[1, 2])
    doubled = again.expand(size=loaded)
    given = objects.expand_kwargs([{"a": 1, "b": 2}])
    done = EmptyOperator(task_id="done", trigger_rule="all_done")
    [added, crossed, doubled, given, copied] >> done
