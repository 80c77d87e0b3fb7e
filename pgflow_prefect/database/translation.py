"""Translates PostgreSQL's errors into ours."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from uuid import UUID

import psycopg
from psycopg import errors

from pgflow_prefect.database.sqlstates import Verdict, Whose, is_of_rows, judge
from pgflow_prefect.errors import (
    DatabaseReadOnlyError,
    HiddenRowsError,
    PgflowPrefectError,
    ResultInvalidError,
    RunHeldError,
    RunNotPendingError,
    SchemaMissingError,
    SupersededError,
    TransientError,
    UnstorableTextError,
    UsageError,
)
from pgflow_prefect.shipped import shipped_path

# A line of an error's context that names a function: only the words around the name are translated.
_FRAME = re.compile(r'^[^"(]{0,20}?PL/\w+[^"(]{0,20}?\s(?P<name>(?:"[^"]+"|[\w$]+)(?:\.(?:"[^"]+"|[\w$]+))?)\(')
_REPORT = re.compile(r"\bcomplete_(?:pending_)?(?:step|items)\(")
_PGFLOWS = {
    ("pgflow", name)
    for name in ("start_flow", "start_tasks", "complete_task", "fail_task", "start_ready_steps", "set_vt_batch")
}
"""Functions of the released pgflow that ours call: an error in them is no error of a user's function."""

_BYTES = re.compile(r"(?:0x[0-9a-f]{2} ?)+")


def is_transient(error: psycopg.Error) -> bool:
    """Tell whether the same statement of ours may succeed a moment later."""
    return judge(error, Whose.REPORT) is Verdict.AGAIN


class ReadOnlyError(TransientError, DatabaseReadOnlyError):
    """PostgreSQL can't write at this moment: it is a standby, or set to be read-only."""


@contextmanager
def translate_errors(run_id: UUID | None = None) -> Iterator[None]:
    """Raise PostgreSQL's errors as errors of this package, with their cause."""
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
    function = find_users_function(error.diag.context)
    if function is not None:
        message = f"{message}; your function {function} raised this"
    if isinstance(error, errors.ReadOnlySqlTransaction):
        return ReadOnlyError(f"PostgreSQL: {message}")
    if is_transient(error):
        return TransientError(f"PostgreSQL: {message}", is_of_rows=is_of_rows(error))
    if function is not None:  # usually a trigger: its error means something else than the same error of our functions
        return PgflowPrefectError(f"PostgreSQL: {message}")
    return _translate_refusal(error, message, run_id)


def _translate_refusal(error: psycopg.Error, message: str, run_id: UUID | None) -> PgflowPrefectError:
    translated: PgflowPrefectError
    if isinstance(error, errors.ObjectNotInPrerequisiteState) and error.diag.constraint_name == "owners_lease":
        translated = RunHeldError(message)
    elif isinstance(error, errors.ObjectNotInPrerequisiteState) and error.diag.constraint_name:
        superseded = run_id if error.diag.constraint_name == "runs_epoch" else None
        translated = SupersededError(superseded) if superseded else RunNotPendingError(message)
    elif isinstance(error, errors.UndefinedTable | errors.UndefinedFunction | errors.InvalidSchemaName):
        translated = SchemaMissingError(
            f"{message}: run `pgflow-prefect init` first; `pgflow-prefect doctor` tells what is there"
        )
    elif _is_of_encoding(error):
        translated = UnstorableTextError(_describe_character(error, message))
    elif isinstance(error, errors.InsufficientPrivilege) and (
        error.diag.constraint_name == "row_level_security" or "row-level security" in message
    ):
        translated = HiddenRowsError(f"{message}; `pgflow-prefect guide rights` says which roles see every row")
    elif isinstance(error, errors.InsufficientPrivilege):
        translated = PgflowPrefectError(
            f"the database user may not do this: {message}; `pgflow-prefect guide engine` says which rights it takes"
        )
    elif isinstance(error, errors.InvalidParameterValue | errors.NoDataFound):
        translated = UsageError(message)
    elif isinstance(error, psycopg.DataError | errors.ProgramLimitExceeded):
        detail = error.diag.message_detail
        translated = ResultInvalidError(f"{message} ({detail})" if detail else message)
    else:
        translated = PgflowPrefectError(f"PostgreSQL: {message}")
    return translated


def find_users_function(context: str | None) -> str | None:
    """Return the innermost function in an error's context that is not ours, such as a trigger's; None if there is none.

    Args:
        context: PostgreSQL's CONTEXT of an error, the innermost function first.
    """
    frames = [frame for line in (context or "").splitlines() if (frame := _FRAME.search(line)) is not None]
    names = [frame["name"].rpartition(".") for frame in frames]
    # PostgreSQL writes a name for the search_path in which it compiled the function. Ours that set their own path
    # have a bare name; the others of one session are all bare, or all qualified.
    hidden = {schema for schema, _, _ in names if schema}
    for frame, (schema, _, function) in zip(frames, names, strict=True):
        takes_nothing = frame.string[frame.end() :].startswith(")")  # as a trigger's function does
        ours = {each for each, name, empty in _list_our_functions() if (name, empty) == (function, takes_nothing)}
        if schema:
            is_ours = schema in ours or (schema, function) in _PGFLOWS or schema == "pgmq"
        else:
            is_ours = (function, takes_nothing) in _list_functions_with_a_path() or bool(ours - hidden)
        if not is_ours:
            return f"{frame['name']}()"
    return None


def is_of_report(error: PgflowPrefectError) -> bool:
    """Tell whether PostgreSQL raised an error inside a completion of ours, and not at the COMMIT, say."""
    cause = error.__cause__
    return isinstance(cause, psycopg.Error) and _REPORT.search(cause.diag.context or "") is not None


@cache
def _read_scripts() -> str:
    scripts = shipped_path("sql", "pgflow.sql").parent.rglob("*.sql")
    return "\n".join(script.read_text(encoding="utf-8") for script in scripts)


@cache
def _list_our_functions() -> frozenset[tuple[str, str, bool]]:
    """Return schema and name of the functions that our scripts create, and whether they take no argument."""
    found = re.findall(r"FUNCTION (pgflow\w*)\.(\w+)\((\)?)", _read_scripts())
    return frozenset((schema, name, bool(closed)) for schema, name, closed in found)


@cache
def _list_functions_with_a_path() -> frozenset[tuple[str, bool]]:
    """Return the names of our functions that set their own search_path, and whether they take no argument."""
    pattern = re.compile(r"CREATE OR REPLACE FUNCTION pgflow\w*\.(\w+)\((\)?)(.*?)\nAS \$", re.DOTALL)
    created = pattern.findall(_read_scripts())
    return frozenset((name, bool(closed)) for name, closed, head in created if "SET search_path" in head)


def _is_of_encoding(error: psycopg.Error) -> bool:
    """Tell whether another encoding would have the character; none has NUL."""
    is_one = isinstance(error, errors.UntranslatableCharacter | errors.CharacterNotInRepertoire)
    return is_one and "\\u0000" not in (error.diag.message_detail or "")


def _describe_character(error: psycopg.Error, message: str) -> str:
    detail = error.diag.message_detail
    advice = "a database that was created with ENCODING 'UTF8' stores every character"
    if found := _BYTES.search(message):
        character = bytes.fromhex(found[0].replace("0x", "")).decode("utf-8", "replace")
        return f"the database's encoding does not have the character {character!r}: {advice}"
    return f"the database's encoding does not have a character of this text ({detail or message}): {advice}"
