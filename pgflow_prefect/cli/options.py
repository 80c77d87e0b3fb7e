"""Options that several commands have."""

from typing import Annotated

from cyclopts import Parameter
from pydantic import SecretStr, ValidationError

from pgflow_prefect.errors import UsageError
from pgflow_prefect.settings import Settings

Dsn = Annotated[str | None, Parameter(name="--dsn", help="The database: postgresql://USER@HOST/DATABASE.")]
AsJson = Annotated[bool, Parameter(name="--json", negative="", show_default=False, help="Print JSON, for scripts.")]
Handlers = Annotated[
    str | None,
    Parameter(name="--handlers", help="The file or module of the handlers; flows/WORKFLOW.py where not given."),
]


def make_settings(dsn: str | None) -> Settings:
    """Return the settings of the environment, with this connection string where there is one.

    Raises:
        UsageError: a variable has a value that it can't have.
    """
    try:
        return Settings(dsn=SecretStr(dsn)) if dsn else Settings()
    except ValidationError as error:
        # Not pydantic's own message: that has the value.
        problems = [f"PGFLOW_{str(each['loc'][0]).upper()}: {each['msg']}" for each in error.errors()]
        raise UsageError(f"the settings can't be used: {'; '.join(problems)}") from None
