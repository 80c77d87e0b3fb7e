"""Containers with a delay that grows, a secret, and a connection. Ledger:

x schedule
- source
x end of a run
- catchup
- dates
- crawl: container
- crawl: retries
x crawl: time-out
- crawl: template
- crawl: date
- parse: container
x parse: retries
- parse: template
- parse: params
- publish: container
- publish: queue
- publish: Variable
- publish: template
"""

from both import BEGIN, DAG, DockerOperator, timedelta

with DAG("containers", schedule=None, start_date=BEGIN, catchup=True):
    crawl = DockerOperator(
        task_id="crawl",
        image="crawler:1.4",
        command="crawl --day {{ ds }} --password hunter2",
        environment={"API_TOKEN": "t0ps3cret", "MODE": "fast"},
        retries=4,
        retry_delay=timedelta(minutes=1),
        retry_exponential_backoff=True,
        max_retry_delay=timedelta(minutes=5),
        execution_timeout=timedelta(hours=1),
    )
    parse = DockerOperator(
        task_id="parse", image="parser:2", command=["parse", "--limit", "{{ params.limit }}"], retries=1
    )
    publish = DockerOperator(
        task_id="publish", image="publisher", command="publish {{ var.value.bucket }}", queue="big-machines"
    )
    crawl >> parse >> publish
