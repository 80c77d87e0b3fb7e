"""Settings, read from environment variables that begin with `PGFLOW_`."""

from enum import StrEnum
from uuid import UUID

from pydantic import Field, SecretStr, TypeAdapter, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pgflow_prefect.origins import parse_credential_origins, parse_origins
from pgflow_prefect.programs import Pool, Program, parse_pools, parse_programs
from pgflow_prefect.recording import RecordLater, parse_recordings

BLOCK_TYPE = "pgflow-database"
"""The slug of the type of block that has a database's address."""


_SHORTEST_BOUND = 5.0
"""In seconds. A shorter time without an answer does not mean that a connection is dead."""


class Events(StrEnum):
    """The events that Prefect gets."""

    ALL = "all"
    ENDS = "ends"
    RUNS = "runs"
    NONE = "none"


class Artifacts(StrEnum):
    """The runs that get artifacts in Prefect's UI."""

    ALL = "all"
    NOTABLE = "notable"
    NONE = "none"


_FORMER_ARTIFACTS = TypeAdapter(bool)
"""The type of the setting in former versions: true for all runs, false for none."""


class HttpBody(StrEnum):
    """The form of the body of a request to an endpoint."""

    INPUT = "input"
    FLAT = "flat"


class Settings(BaseSettings):
    """The settings of every command and every flow run.

    Example: `PGFLOW_DSN=postgresql://app@db/app PGFLOW_CONCURRENCY=20 pgflow-prefect run my_workflow`
    """

    model_config = SettingsConfigDict(env_prefix="PGFLOW_", frozen=True)

    dsn: SecretStr | None = None
    """The database, as a URI or as `key=value` pairs. Without it, libpq's own `PG*` variables count."""

    block: str | None = None
    """The Prefect block `pgflow-database/…` that has the database's address if `dsn` is not set."""

    airflow_dsn: SecretStr | None = None
    """Airflow's metadata database, for `import --from airflow` and `airflow mirror`. A role that only reads is enough.

    With it, workers and bridges follow the observed DAGs, too.
    """

    airflow_poll_interval: float = Field(default=2, gt=0)
    """Seconds between two looks at the runs in Airflow's database."""

    airflow_results: bool = True
    """Copy return values of Airflow's tasks. Set it to false if Airflow has an XCom backend of your own."""

    pool_size: int = Field(default=5, ge=1)
    """The most connections of one flow run."""

    concurrency: int = Field(default=100, ge=1)
    """The most steps of one run that execute at the same time."""

    item_task_runs: int = Field(default=100, ge=0)
    """The most items of a map that each have a task run in Prefect. A larger map has one, with its progress."""

    connect_timeout: float = Field(default=10, gt=0)
    """Seconds to wait for PostgreSQL to answer before a command gives up."""

    report_timeout: float = Field(default=60, gt=0)
    """Seconds for which a claim or a report is tried again while PostgreSQL can't be reached.

    A third of it bounds each statement of this package: without an answer, the statement is tried again on another
    connection. A process that gets no answer at all for this time lets its leases expire.
    """

    @property
    def statement_bound(self) -> float:
        """Seconds without an answer to a statement, after which its connection counts as dead."""
        return max(_SHORTEST_BOUND, self.report_timeout / 3)

    lease: float = Field(default=15, ge=1)
    """Seconds after which another process may take a run whose process has vanished."""

    max_recoveries: int = Field(default=3, ge=0)
    """The number of owners in a row that may vanish without progress before the run fails."""

    sweep_interval: float = Field(default=2, gt=0)
    """Seconds after which a worker or bridge looks for pending runs without a notification."""

    reconcile_interval: float = Field(default=30, gt=0)
    """Seconds after which a worker or bridge compares PostgreSQL with Prefect and repairs differences."""

    result_limit: int = Field(default=16 * 1024 * 1024, ge=1)
    """The most bytes of JSON of a step's result, as its handler writes it. A larger one needs `result_storage`.

    The table `pgflow.limits` bounds the results that PostgreSQL stores for any role.
    """

    result_storage: str | None = None
    """The storage of results that are too big for a row: a Prefect block such as `s3-bucket/results`, or a URL.

    It takes the results of steps that name a serializer and no storage, too. Code that names a storage wins over it.
    Only code and this setting name storages, never a row.
    """

    result_serializer: str | None = None
    """The form of these results: `json` or `compressed/json`. Only code can name another one, such as `pickle`."""

    http_allow: str = ""
    """Origins, separated by commas, that rows may name although they lead to loopback, private addresses or Prefect."""

    credential_origins: str = ""
    """Origins that may get rows' credentials: `NAME=ORIGIN`, separated by commas. A name may have several origins."""

    http_body: HttpBody = HttpBody.INPUT
    """The body for endpoints: `input` means `{"input": {…}}`; `flat` means the input alone, in this version only."""

    function_owners: str = ""
    """Roles, separated by commas. Rows may name their functions, and those of superusers and of `pgflow`'s owner."""

    commands: str = Field(default="", repr=False)
    """The programs that rows may name, as JSON: `{"stamp": ["/opt/stamp", "--fast"]}`.

    Instead of the list, an object may say more: `{"argv": [...], "env": {"MODE": "fast"}, "pass_env": ["STAMP_TOKEN"],
    "cwd": "/srv", "skip_exit_code": 99}`. A program gets the variables that `env` and `pass_env` name, and no others. A
    row holds a name of these only. So the operator of the worker decides what is started, and with which arguments.
    """

    @property
    def programs(self) -> dict[str, Program]:
        """The programs of `commands`, by name."""
        return parse_programs(self.commands)

    work_pools: str = ""
    """The work pools of Prefect that rows may name, as JSON: `{"gpu": "my-kubernetes-pool"}`.

    Instead of the name, an object may say more: `{"pool": "my-kubernetes-pool", "image": "registry/app:3",
    "job_variables": {"memory": "4Gi"}, "directory": "/app"}`. A row holds a name of these only. Prefect shows job
    variables to all its users, so they must have no secrets.
    """

    @property
    def pools(self) -> dict[str, Pool]:
        """The work pools of `work_pools`, by name."""
        return parse_pools(self.work_pools)

    queue_key: SecretStr | None = Field(default=None, min_length=16)
    """The key that signs messages for queues, the same for workers and consumers, at least 16 characters."""

    events: Events = Events.ENDS
    """The events that Prefect gets for automations: all, those of runs and of steps' ends, those of runs, or none."""

    artifacts: Artifacts = Artifacts.NOTABLE
    """The runs that get a table of their steps, a link and their progress in Prefect's UI.

    `all` means all runs, `none` no run. `notable` means runs that did not complete or took longer than ten seconds.
    `true` and `false`, the values of former versions, mean `all` and `none`.
    """

    run_url: str | None = None
    """The address of a run's page for a link in Prefect's UI, with `{run_id}` and `{workflow}` as placeholders."""

    record_later: str = ""
    """Workflows whose runs a worker executes in PostgreSQL only, and shows in Prefect later: slugs, by commas.

    `orders:100:10` shows one in 100 of the completed runs of `orders`, and each run once it takes longer than 10 s.
    Both numbers are optional. The setting wins over the file of handlers. It is the only way for a workflow without a
    file. So the operator of the worker decides. Rows can't: otherwise, a role that may write definitions or bindings
    could hide its runs from Prefect.
    """

    @property
    def recordings(self) -> dict[str, RecordLater]:
        """The policies of `record_later`, by slug."""
        return parse_recordings(self.record_later)

    @property
    def queue_key_bytes(self) -> bytes | None:
        """The key of messages for queues; None if they are not signed."""
        return None if self.queue_key is None else self.queue_key.get_secret_value().encode()

    @field_validator("artifacts", mode="before")
    @classmethod
    def _read_former_artifacts(cls, given: object) -> object:
        try:
            return Artifacts.ALL if _FORMER_ARTIFACTS.validate_python(given) else Artifacts.NONE
        except ValidationError:
            return given

    @field_validator("http_allow")
    @classmethod
    def _check_origins(cls, text: str) -> str:
        parse_origins(text)
        return text

    @field_validator("credential_origins")
    @classmethod
    def _check_credentials(cls, text: str) -> str:
        parse_credential_origins(text)
        return text

    @field_validator("result_serializer")
    @classmethod
    def _check_serializer(cls, name: str | None) -> str | None:
        if name not in {None, "json", "compressed/json"}:
            raise ValueError(
                "it can be json or compressed/json; a step's code names any other one, @workflow.step("
                "result_serializer=…), because reading pickle runs code"
            )
        return name

    @field_validator("record_later")
    @classmethod
    def _check_recordings(cls, text: str) -> str:
        parse_recordings(text)
        return text

    @field_validator("commands")
    @classmethod
    def _check_commands(cls, text: str) -> str:
        parse_programs(text)
        return text

    @field_validator("work_pools")
    @classmethod
    def _check_work_pools(cls, text: str) -> str:
        parse_pools(text)
        return text

    @property
    def trusted_owners(self) -> tuple[str, ...]:
        """The roles of `function_owners`."""
        return tuple(name for each in self.function_owners.split(",") if (name := each.strip()))

    @field_validator("run_url")
    @classmethod
    def _check_fields(cls, url: str | None) -> str | None:
        """Refuse what could not be filled in, before a run would find out."""
        try:
            (url or "").format(run_id=UUID(int=0), workflow="workflow")
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise ValueError(f"only {{run_id}} and {{workflow}} can be filled in, as they are: {error}") from error
        return url
