"""Options that several commands have."""

from typing import Annotated

from cyclopts import Parameter
from pydantic import SecretStr

from pgflow_prefect.settings import Settings

Dsn = Annotated[str | None, Parameter(name="--dsn", help="The database: postgresql://USER@HOST/DATABASE.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON, for scripts.")]
Handlers = Annotated[
    str | None,
    Parameter(name="--handlers", help="The file or module of the handlers; flows/WORKFLOW.py where not given."),
]


def make_settings(dsn: str | None) -> Settings:
    """Return the settings of the environment, with this connection string where there is one."""
    return Settings(dsn=SecretStr(dsn)) if dsn else Settings()
