"""Settings, read from environment variables that begin with `PGFLOW_`."""

from enum import StrEnum
from uuid import UUID

from pydantic import Field, SecretStr, TypeAdapter, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from pgflow_prefect.origins import parse_credential_origins, parse_origins
from pgflow_prefect.recording import RecordLater, parse_recordings

BLOCK_TYPE = "pgflow-database"
"""What Prefect calls the kind of block that says where a database is."""


_SHORTEST_BOUND = 5.0
"""Seconds: less than that is no sign of a dead connection."""


class Events(StrEnum):
    """Which events Prefect is told of."""

    ALL = "all"
    ENDS = "ends"
    RUNS = "runs"
    NONE = "none"


class Artifacts(StrEnum):
    """Which runs Prefect's UI gets artifacts of."""

    ALL = "all"
    NOTABLE = "notable"
    NONE = "none"


_FORMER_ARTIFACTS = TypeAdapter(bool)
"""What the setting was in former versions: made for each run, or for none."""


class HttpBody(StrEnum):
    """What the body of a request to an endpoint is."""

    INPUT = "input"
    FLAT = "flat"


class Settings(BaseSettings):
    """What can be set without touching code.

    Example: `PGFLOW_DSN=postgresql://app@db/app PGFLOW_CONCURRENCY=20 pgflow-prefect run my_workflow`
    """

    model_config = SettingsConfigDict(env_prefix="PGFLOW_", frozen=True)

    dsn: SecretStr | None = None
    """How to connect to PostgreSQL, as a URI or as `key=value` pairs. Without it libpq's own `PG*` variables count."""

    block: str | None = None
    """The Prefect block `pgflow-database/…` that says how to connect, where `dsn` does not."""

    pool_size: int = Field(default=5, ge=1)
    """Connections that one run of a flow opens at most."""

    concurrency: int = Field(default=100, ge=1)
    """Steps of one run that execute at the same time."""

    connect_timeout: float = Field(default=10, gt=0)
    """Seconds to wait for PostgreSQL to answer before a command gives up."""

    report_timeout: float = Field(default=60, gt=0)
    """Seconds for which a claim or a report is tried again while PostgreSQL can't be reached.

    A third of it is the bound of every single statement of ours: what is not answered by then is tried again on another
    connection. A process that gets no answer at all for this long lets its leases run out.
    """

    @property
    def statement_bound(self) -> float:
        """Seconds without an answer to one statement, after which its connection counts as dead."""
        return max(_SHORTEST_BOUND, self.report_timeout / 3)

    lease: float = Field(default=15, ge=1)
    """Seconds after which a run whose process has vanished may be taken by another one."""

    max_recoveries: int = Field(default=3, ge=0)
    """Owners in a row that may vanish while no further step completes, before the run fails."""

    sweep_interval: float = Field(default=2, gt=0)
    """Seconds after which a worker or bridge looks for pending runs without having been told of one."""

    reconcile_interval: float = Field(default=30, gt=0)
    """Seconds after which a worker or bridge compares PostgreSQL with Prefect and repairs what differs."""

    result_limit: int = Field(default=16 * 1024 * 1024, ge=1)
    """Bytes of JSON that a step's result may have, as its handler writes it: larger things belong in storage.

    The table `pgflow.limits` bounds what PostgreSQL stores, whichever role writes it.
    """

    http_allow: str = ""
    """Origins that rows may bind steps to though these lead to loopback, private addresses or Prefect, by commas."""

    credential_origins: str = ""
    """Where each credential may go that a row names: `NAME=ORIGIN`, by commas; a name may stand there repeatedly."""

    http_body: HttpBody = HttpBody.INPUT
    """What endpoints get: `input`, `{"input": {…}}`; or `flat`, the input as the whole body, for this version only."""

    function_owners: str = ""
    """Roles, by commas, whose SQL functions rows may bind steps to, beside superusers and the owner of `pgflow`."""

    queue_key: SecretStr | None = Field(default=None, min_length=16)
    """What messages for queues are signed with, the same for workers and consumers; at least 16 characters."""

    events: Events = Events.ENDS
    """Events that Prefect is told of, for automations: all; of runs and of how steps end; of runs only; none."""

    artifacts: Artifacts = Artifacts.NOTABLE
    """Runs of which Prefect's UI gets a table of the steps, a link to the run, and the progress of a long one.

    `all` runs; `notable` ones, which did not complete or took longer than ten seconds; `none`. `true` and `false`, of
    former versions, mean `all` and `none`.
    """

    run_url: str | None = None
    """The address of a run's page, for a link in Prefect's UI. `{run_id}` and `{workflow}` are filled in."""

    record_later: str = ""
    """Workflows whose runs a worker executes in PostgreSQL only, and shows in Prefect later: slugs, by commas.

    `orders:100:10` shows one in 100 of the completed runs of `orders`, and each run once it takes longer than 10 s.
    Both numbers may be left out. It wins over what a handlers' file says, and it is the only way for a workflow that
    has no file. The operator who sets the worker's environment decides. No row can: a role that may write definitions
    or bindings could otherwise hide its runs from Prefect.
    """

    @property
    def recordings(self) -> dict[str, RecordLater]:
        """What `record_later` says, by slug."""
        return parse_recordings(self.record_later)

    @property
    def queue_key_bytes(self) -> bytes | None:
        """The key of messages for queues; None where they are not signed."""
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

    @field_validator("record_later")
    @classmethod
    def _check_recordings(cls, text: str) -> str:
        parse_recordings(text)
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
