"""Names and texts that break a careless generator, and operators of the team's own. Ledger:

- source
- schedule
x end of a run
- dates
x tags
- größe: operator
- größe: template
- größe: date
- class: operator
- class: connection
- with-dash.and.dots: operator
- quote: shell
- script: shell
- query: SQL
- query: connection
- payload: Python
- payload: user
- payload: executor
"""

from both import BEGIN, DAG, BaseOperator, BashOperator, PythonOperator, SQLExecuteQueryOperator


class Measure(BaseOperator):
    """An operator of the team's own, with an argument that is no template."""

    template_fields = ("source", "target_conn_id")

    def __init__(self, *, source=None, target_conn_id=None, secret_sauce=None, **options):
        super().__init__(**options)
        self.source = source
        self.target_conn_id = target_conn_id
        self.secret_sauce = secret_sauce

    def execute(self, context):
        pass


def say():
    pass


with DAG(
    "odd",
    schedule="0 0 * * 0",
    start_date=BEGIN,
    catchup=False,
    tags=['it\'s "odd"'],
    description='ends with """ and \\',
):
    size = Measure(task_id="größe", source={"of": ["{{ ds }}", {"password": "hunter2"}]}, secret_sauce="s3cret")
    word = Measure(task_id="class", target_conn_id="lake")
    dots = Measure(task_id="with-dash.and.dots", source=("a", 1, None))
    quote = BashOperator(task_id="quote", bash_command='echo """\nimport os\nos.abort()\n"""; echo \'\\N{x}\' \\')
    script = BashOperator(task_id="script", bash_command="scripts/run.sh")
    query = SQLExecuteQueryOperator(task_id="query", conn_id="lake", sql="queries/sizes.sql")
    payload = PythonOperator(
        task_id="payload", python_callable=say, run_as_user="etl", executor_config={"memory": "2G"}
    )
    size >> word >> dots >> [quote, script] >> query >> payload
