"""A mapped group, a map of a map's filtered result, and a plain map. Ledger:

- source
x schedule
x end of a run
- dates
- mapped group
- regions: Python
- region.fetch: Python
- region.fetch: argument
- region.store: Python
x region.store: retries
- lengths: Python
x lengths: map
- last: Python
- last: map
- last: map above
x last: trigger rule
"""

from both import BEGIN, DAG, task, task_group

with DAG("map_groups", schedule=None, start_date=BEGIN, catchup=False):

    @task
    def regions():
        return ["eu", "us"]

    @task
    def fetch(name):
        return name

    @task(retries=2)
    def store(name):
        return name

    @task_group
    def region(name):
        return store(fetch(name))

    @task
    def lengths(name):
        return len(name)

    @task(trigger_rule="none_failed")
    def last(length):
        return length

    found = regions()
    region.expand(name=found)
    last.expand(length=lengths.expand(name=found).map(lambda size: size + 1))
