"""The kinds of steps: what a row of `pgflow_prefect.bindings`, or `Workflow.bind`, binds a step to."""

import re
from collections.abc import Mapping
from dataclasses import KW_ONLY, asdict, field, fields
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, get_args
from urllib.parse import unquote, urlsplit

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, ValidationError
from pydantic.dataclasses import dataclass

from pgflow_prefect.errors import UsageError
from pgflow_prefect.programs import SKIPPED, Arguments, Environment, ExitCode, Pool, Program, Variables, check_name

_CONFIG = ConfigDict(extra="forbid")

_SECRET_IN_QUERY = re.compile(
    r"[?&;#]([\w-]*(?:key|token|secret|password|passwd|signature|sig|pwd|jwt|credentials?)"
    r"|(?:[\w-]*[_-])?(?:o?auth|pass|sas)|(?:(?:access|api|auth|function|secret)[_-]?)?code)=",
    re.IGNORECASE,
)
"""Parameters of a URL that carry what no reader of a row should see."""

_IDENTIFIER = re.compile(r'"(?:[^"]|"")+"|[^\W\d][\w$]*')
_FUNCTION = re.compile(rf"(?:{_IDENTIFIER.pattern})\.(?:{_IDENTIFIER.pattern})")


class Kind(StrEnum):
    """How the work of a step is done."""

    PYTHON = "python"
    EXTERNAL = "external"
    SQL = "sql"
    HTTP = "http"
    QUEUE = "queue"
    COMMAND = "command"
    WORK_POOL = "work-pool"
    CHILD = "child"


def check_url(url: str) -> str:
    """Return a URL that has no secret in it.

    Raises:
        ValueError: it has a password, or a parameter that is one.
    """
    try:
        parts = urlsplit(url)
    except ValueError:  # whose message has a part of it
        raise ValueError("it is no URL") from None
    if not parts.scheme:
        raise ValueError("it has no scheme, such as https:// or redis://")
    if "@" in parts.netloc:
        raise ValueError(
            "it has credentials, which every reader of the row would see. Name an environment "
            "variable or a Prefect block instead"
        )
    if secret := _SECRET_IN_QUERY.search(unquote(url)):
        raise ValueError(
            f"its parameter {secret[1]!r} looks like a secret, which every reader of the row would "
            "see. Name an environment variable or a Prefect block instead"
        )
    return url


def parse_function(name: str) -> tuple[str, str]:
    """Return schema and name of a function, as SQL reads `schema.function` or `"Schema"."Function"`.

    Raises:
        ValueError: it is not both.
    """
    parts = _IDENTIFIER.findall(name)
    if len(parts) != 2 or not _FUNCTION.fullmatch(name):  # noqa: PLR2004  schema and function
        raise ValueError("it is not the name of a function with its schema, such as app.send_mails")
    schema, function = (part[1:-1].replace('""', '"') if part[0] == '"' else part.lower() for part in parts)
    return schema, function


def check_function(name: str) -> str:
    """Return the name of a function that has a schema.

    Raises:
        ValueError: it is none.
    """
    parse_function(name)
    return name


Url = Annotated[str, AfterValidator(check_url)]
Function = Annotated[str, AfterValidator(check_function)]
Name = Annotated[str, AfterValidator(check_name)]
Seconds = Annotated[float, Field(gt=0)]
Delay = Annotated[float, Field(ge=0)]
Delays: TypeAlias = Delay | tuple[Delay, ...]


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Binding:
    """The options of every kind.

    Attributes:
        kind: how the work is done.
        target_field: the field that has the target in the binding's row; None for a kind without a target.
        retries: attempts after the first one.
        retry_delay_seconds: the delay before each retry, or one for each. The last one repeats.
        retry_jitter_factor: spreads a delay at random, by up to this factor.
        timeout_seconds: the limit of each attempt, including the wait for a report. None for no limit.
    """

    kind: ClassVar[Kind]
    target_field: ClassVar[str | None] = None

    retries: Annotated[int, Field(ge=0)] = 0
    retry_delay_seconds: Delays = 0
    retry_jitter_factor: Annotated[float, Field(ge=0)] | None = None
    timeout_seconds: Seconds | None = None

    @property
    def target(self) -> str | None:
        """The target in its row: the name of a function or of a program, or a URL."""
        return None if self.target_field is None else str(getattr(self, self.target_field))

    @property
    def options(self) -> dict[str, JsonValue]:
        """The options in its row: all other fields that differ from the defaults."""
        defaults = {each.name: each.default for each in fields(self)}
        chosen = {name: value for name, value in asdict(self).items() if value != defaults[name]}
        chosen.pop(self.target_field or "", None)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in chosen.items()}

    def __str__(self) -> str:
        return f"{self.kind} {self.target}" if self.target else str(self.kind)


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class Python(Binding):
    """The function in the file of handlers. A row with this kind overrides `Workflow.bind`.

    Retries and time-out are those of the function's decorator.
    """

    kind = Kind.PYTHON


@dataclass(frozen=True, kw_only=True, config=_CONFIG)
class External(Binding):
    """An external worker does the work and calls `complete_step`. Prefect waits, and shows it.

    Attributes:
        shadow: the function in the file of handlers runs beside it, and their results are compared.
    """

    kind = Kind.EXTERNAL

    shadow: bool = False


@dataclass(frozen=True, config=_CONFIG)
class SqlFunction(Binding):
    """A function in the database, `schema.function(jsonb) returns jsonb`.

    Its argument is `{"payload": …, "<upstream step>": …}`. It runs in one transaction with the step's completion.

    Attributes:
        function: its name, with its schema.
        batch: of a map: how many items one call gets, as `items`, whose results it returns as an array; None: each call
            gets one `item`.
    """

    kind = Kind.SQL
    target_field = "function"

    function: Function
    _: KW_ONLY
    batch: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, config=_CONFIG)
class HttpEndpoint(Binding):
    """An HTTP endpoint, such as a Supabase Edge Function: the step's input is POSTed to it, its answer is the result.

    Attributes:
        url: without any secret.
        token_env: the environment variable with the bearer token.
        token_block: the Prefect Secret block with it.
        request_timeout_seconds: for the request; `timeout_seconds` is for the whole attempt, where the endpoint answers
            202 and the endpoint reports later.
        batch: of a map: how many items one request has, as `items`, whose results the answer has as an array; None:
            each request has one `item`.
    """

    kind = Kind.HTTP
    target_field = "url"

    url: Url
    _: KW_ONLY
    token_env: str | None = None
    token_block: str | None = None
    batch: Annotated[int, Field(ge=1)] | None = None
    request_timeout_seconds: Seconds = 60
    retries: Annotated[int, Field(ge=0)] = 3
    retry_delay_seconds: Delays = (1, 10, 60)


@dataclass(frozen=True, config=_CONFIG)
class Queue(Binding):
    """A queue, whose worker does the work and calls `complete_step` or `fail_step`.

    Attributes:
        url: without any secret: `pgqueuer:NAME`, `amqp://HOST/VHOST?queue=NAME`, `redis://HOST/DB?queue=NAME`.
        login_env: the environment variable with `USER:PASSWORD`.
        login_block: the Prefect Secret block with it.
    """

    kind = Kind.QUEUE
    target_field = "url"

    url: Url
    _: KW_ONLY
    login_env: str | None = None
    login_block: str | None = None
    retries: Annotated[int, Field(ge=0)] = 3
    retry_delay_seconds: Delays = (1, 10, 60)


@dataclass(frozen=True, config=_CONFIG)
class NamedCommand(Binding):
    """A program that the settings of the worker name: `PGFLOW_COMMANDS`. A row can't name a program in another way.

    Attributes:
        name: of the program in those settings.
    """

    kind = Kind.COMMAND
    target_field = "name"

    name: Name
    _: KW_ONLY


@dataclass(frozen=True, config=ConfigDict(extra="forbid", hide_input_in_errors=True))
class Command(Binding):
    """A program: it gets the step's input as JSON on stdin. The last line of its output is the result.

    Its environment has the variables that `env` and `pass_env` name, and those of the step (`STEP_…`), and no others.

    Example: `Command(["dbt", "run", "--select", "orders"], pass_env=["PATH", "DBT_TOKEN"], cwd="/srv/dbt")`

    Attributes:
        argv: the program and its arguments. No shell reads them. A program without a slash is looked up in the worker's
            `PATH`.
        env: variables of its environment, with their values.
        pass_env: names of variables that it gets from the worker's environment. Its output is logged without their
            values.
        cwd: its working directory; by default, the worker's.
        skip_exit_code: the exit code that skips the step, instead of failing it; None for no such code.
    """

    kind = Kind.COMMAND

    argv: Arguments = field(repr=False)
    _: KW_ONLY
    env: Environment = field(default_factory=dict, repr=False)
    pass_env: Variables = ()
    cwd: str | None = None
    skip_exit_code: ExitCode | None = SKIPPED

    @property
    def program(self) -> Program:
        """The program, as settings have it, too."""
        return Program(self.argv, self.env, self.pass_env, self.cwd, self.skip_exit_code)

    def __str__(self) -> str:
        return f"{self.kind} {self.program.label}"


@dataclass(frozen=True, config=_CONFIG)
class NamedWorkPool(Binding):
    """A work pool that the settings of the worker name: `PGFLOW_WORK_POOLS`. A row can't name one in another way.

    Attributes:
        name: of the work pool in those settings.
    """

    kind = Kind.WORK_POOL
    target_field = "name"

    name: Name
    _: KW_ONLY


@dataclass(frozen=True, config=_CONFIG)
class WorkPool(Binding):
    """A work pool of Prefect: the step's function in Python is executed there, in a flow run of its own.

    So Kubernetes, ECS and Docker stay Prefect's business. The process there needs the file of handlers, and
    `PGFLOW_DSN` or `PGFLOW_BLOCK`. `timeout_seconds` includes the time until the pool's worker has started it.

    Example: `WorkPool("my-kubernetes-pool", image="registry/app:3", job_variables={"memory": "4Gi"}, directory="/app")`

    Attributes:
        pool: its name in Prefect.
        image: the image in which the flow run is started, for pools that have images.
        job_variables: further job variables of the flow run. Prefect shows them: they must have no secrets.
        directory: the directory there that has the folder of handlers. By default, this process's working directory;
            with an image, the image's.
    """

    kind = Kind.WORK_POOL

    pool: Annotated[str, Field(min_length=1)]
    _: KW_ONLY
    image: str | None = None
    job_variables: Mapping[str, Any] = field(default_factory=dict)
    directory: str | None = None

    @property
    def place(self) -> Pool:
        """The work pool, as settings have it, too."""
        return Pool(self.pool, self.image, self.job_variables, self.directory)

    def __str__(self) -> str:
        return f"{self.kind} {self.pool}"


@dataclass(frozen=True, config=_CONFIG)
class Child(Binding):
    """Another workflow: the step is a run of it, its child, and ends with that run.

    PostgreSQL begins the run in the transaction that starts the step, and ends the step in the one that ends the run.
    So no process waits for it. The step's result has the results of the run's last steps, by slug. The definition says
    this, and no row of `pgflow_prefect.bindings` can.

    Example: `workflow.bind("settle", Child("settlement", payload="look.order"), after=["look"])`

    Attributes:
        workflow: its slug.
        payload: what of the step's input is the run's payload: a path such as `look.order`, `payload` or, in a map,
            `item`. By default all of it, as SQL functions get it: `{"payload": …, "<upstream step>": …}`.
        retries: how many further runs are begun after one that has failed; none after one that was cancelled.
        max_children: of a map, how many of its runs are under way at the same time; by default, 100.
        timeout_seconds: the limit for all runs of the step together. Then the run is cancelled, and the step fails.
    """

    kind = Kind.CHILD
    target_field = "workflow"

    workflow: Annotated[str, Field(min_length=1)]
    _: KW_ONLY
    payload: Annotated[str, Field(min_length=1)] | None = None
    retries: Annotated[int, Field(ge=0, le=1000)] = 0
    max_children: Annotated[int, Field(ge=1, le=10000)] | None = None
    retry_delay_seconds: Literal[0] = 0
    retry_jitter_factor: None = None


RowBinding: TypeAlias = Python | External | SqlFunction | HttpEndpoint | Queue | NamedCommand | NamedWorkPool
"""What a row may say. It names a program or a work pool, and never says what is started."""

AnyBinding: TypeAlias = RowBinding | Command | WorkPool | Child
"""What Python code may say."""

_CLASSES: dict[Kind, type[RowBinding]] = {each.kind: each for each in get_args(RowBinding)}


def parse_binding(kind: str, target: str | None, options: Mapping[str, Any]) -> RowBinding:
    """Return the binding of a row.

    Args:
        kind: one of `Kind`.
        target: a name or a URL, for the kinds that have one.
        options: the other fields of the kind's class.

    Raises:
        UsageError: the message names every problem.
    """
    if kind not in _CLASSES:
        raise UsageError(f"a step can't be bound to {kind!r}: the kinds are {', '.join(_CLASSES)}")
    bound = _CLASSES[Kind(kind)]
    given = dict(options)
    if bound.target_field is not None and target is not None:
        given[bound.target_field] = target
    elif target is not None:
        raise UsageError(f"a step that is bound to {kind!r} has no target, and this one has one")
    try:
        return bound(**given)
    except ValidationError as error:
        # Not pydantic's own message: that has the value, which may be the secret that is refused.
        problems = [f"{_place(each['loc'])}: {_reason(each['msg'])}" for each in error.errors(include_input=False)]
        raise UsageError(f"a step can't be bound to {kind} so: {'; '.join(problems)}") from None


def _place(place: tuple[int | str, ...]) -> str:
    return str(place[0]) if place else "it"


def _reason(message: str) -> str:
    return message.removeprefix("Value error, ")
