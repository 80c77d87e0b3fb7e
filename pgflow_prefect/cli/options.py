"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from cyclopts.validators import Number

from pgflow_prefect.errors import UsageError

if TYPE_CHECKING:
    from pgflow_prefect.settings import Settings

Flag = Parameter(negative="", show_default=False)
"""A switch: `--name`, without a `--no-name`."""

Dsn = Annotated[str | None, Parameter(name="--dsn", help="The database: postgresql://USER@HOST/DATABASE.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON, for scripts.")]
Handlers = Annotated[
    str | None,
    Parameter(name="--handlers", help="The file or module of the handlers. The default is flows/WORKFLOW.py."),
]

HealthPort = Annotated[
    int | None,
    Parameter(
        name="--health-port",
        validator=Number(gte=1, lte=65535),
        help="Answer GET /live and GET /ready on this port of all addresses: 200, or 503 with the reason.",
    ),
]
HealthFile = Annotated[
    Path | None,
    Parameter(
        name="--health-file",
        help="Write this file every 5 s while the service lives: 'ready', or the reason why it is not ready.",
    ),
]
RunId = Annotated[str, Parameter(help="The run: its id, a unique beginning of its id, or latest.")]


def make_settings(dsn: str | None) -> Settings:
    """Return the settings of the environment, with this connection string if there is one.

    Raises:
        UsageError: a variable has an invalid value, or names a block that Prefect does not have.
        PrefectUnavailableError: a variable names a block, and Prefect's API does not answer.
    """
    from pydantic import SecretStr, ValidationError

    from pgflow_prefect.settings import Settings

    try:
        settings = Settings(dsn=SecretStr(dsn)) if dsn else Settings()
    except ValidationError as error:
        # pydantic's own message would show the value, which may be secret
        problems = [f"PGFLOW_{str(each['loc'][0]).upper()}: {each['msg']}" for each in error.errors()]
        raise UsageError(f"the settings can't be used: {'; '.join(problems)}") from None
    return _read_block(settings) if settings.dsn is None and settings.block is not None else settings


def _read_block(settings: Settings) -> Settings:
    import anyio

    from pgflow_prefect.execution.process.database_block import find_settings

    return anyio.run(find_settings, settings)
