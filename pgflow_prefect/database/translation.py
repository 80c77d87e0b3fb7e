"""From PostgreSQL's errors to ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import psycopg
from psycopg import errors

from pgflow_prefect.database.sqlstates import Verdict, Whose, judge
from pgflow_prefect.errors import (
    DatabaseReadOnlyError,
    DatabaseUnavailableError,
    PgflowPrefectError,
    ResultInvalidError,
    RunHeldError,
    RunNotPendingError,
    SchemaMissingError,
    SupersededError,
    UsageError,
)


class TransientError(DatabaseUnavailableError):
    """PostgreSQL could not answer at this moment; the same statement may succeed in the next."""


def is_transient(error: psycopg.Error) -> bool:
    """Tell whether the same statement of ours may succeed a moment later."""
    return judge(error, Whose.REPORT) is Verdict.AGAIN


class ReadOnlyError(TransientError, DatabaseReadOnlyError):
    """PostgreSQL can't write at this moment: it is a standby, or set to be read-only."""


@contextmanager
def translate_errors(run_id: UUID | None = None) -> Iterator[None]:
    """Raise what PostgreSQL refuses as an error of this package, its cause attached."""
    try:
        yield
    except psycopg.Error as error:
        raise _translate(error, run_id) from error
    except UnicodeEncodeError as error:  # a lone surrogate, which Python's str can hold and UTF-8 can't
        raise ResultInvalidError(str(error)) from error


def _translate(error: psycopg.Error, run_id: UUID | None) -> PgflowPrefectError:
    message = error.diag.message_primary or str(error) or type(error).__name__
    if error.diag.message_hint:
        message = f"{message}. {error.diag.message_hint}"
    translated: PgflowPrefectError
    if isinstance(error, errors.ReadOnlySqlTransaction):
        translated = ReadOnlyError(f"PostgreSQL: {message}")
    elif is_transient(error):
        translated = TransientError(f"PostgreSQL: {message}")
    elif isinstance(error, errors.ObjectNotInPrerequisiteState) and error.diag.constraint_name == "owners_lease":
        translated = RunHeldError(message)
    elif isinstance(error, errors.ObjectNotInPrerequisiteState) and error.diag.constraint_name:
        superseded = run_id if error.diag.constraint_name == "runs_epoch" else None
        translated = SupersededError(superseded) if superseded else RunNotPendingError(message)
    elif isinstance(error, errors.UndefinedTable | errors.UndefinedFunction | errors.InvalidSchemaName):
        translated = SchemaMissingError(f"{message}: run `pgflow-prefect init` first")
    elif isinstance(error, errors.InsufficientPrivilege):
        translated = PgflowPrefectError(f'the database user may not do this: {message}; see "Rights" in the README')
    elif isinstance(error, errors.InvalidParameterValue | errors.NoDataFound):
        translated = UsageError(message)
    elif isinstance(error, psycopg.DataError | errors.ProgramLimitExceeded):
        detail = error.diag.message_detail
        translated = ResultInvalidError(f"{message} ({detail})" if detail else message)
    else:
        translated = PgflowPrefectError(f"PostgreSQL: {message}")
    return translated
