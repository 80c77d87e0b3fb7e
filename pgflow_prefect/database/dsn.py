"""Explains what is wrong with a connection string by its part, never by its text, which has a password."""

import re
from urllib.parse import parse_qsl

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from pgflow_prefect.errors import UsageError

_SCHEME = re.compile(r"^(?P<scheme>[A-Za-z][\w+.:-]*)://")
_NAME = re.compile(r"[A-Za-z_]\w*")
_PASSWORD = "write the characters /, @, :, ? and # of a password as %2F, %40, %3A, %3F and %23"  # noqa: S105
_FORMS = "give postgresql://USER@HOST:PORT/DATABASE or 'host=… dbname=… user=…'"

HERE = "--dsn or PGFLOW_DSN"
"""Where the address of pgflow's database is given."""

FOREIGN = {
    "pgbouncer": "Prisma's: a pooler in transaction mode needs no parameter here",
    "schema": "Prisma's: pgflow's tables are always in the schema pgflow",
    "currentSchema": "JDBC's: pgflow's tables are always in the schema pgflow",
    "connection_limit": "Prisma's: PGFLOW_POOL_SIZE says how many connections there are",
    "pool_timeout": "Prisma's: PGFLOW_CONNECT_TIMEOUT says how long to wait",
    "statement_cache_size": "asyncpg's: pgflow-prefect prepares no statement",
    "prepared_statement_cache_size": "SQLAlchemy's: pgflow-prefect prepares no statement",
    "server_settings": "asyncpg's: write options=-c%20NAME%3DVALUE",
}
"""Parameters of other programs that people copy, and what to do without them."""


def check_dsn(dsn: str, source: str = HERE) -> None:
    """Refuse a connection string that libpq can't read, and say which part of it is wrong.

    Args:
        dsn: the connection string.
        source: where it was given.

    Raises:
        UsageError: it can't be right. libpq's own message would quote the password.
    """
    if dsn != dsn.strip():
        raise UsageError(f"the DSN begins or ends with a blank or a line break: remove that ({source})")
    scheme = _SCHEME.match(dsn)
    if scheme is not None:
        _check_uri(dsn, scheme["scheme"], source)
    try:
        parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    except psycopg.ProgrammingError:
        raise UsageError(_find_problem(dsn, source)) from None
    if "@" in parts.get("host", "") or not parts.get("port", "0").replace(",", "0").isdecimal():
        raise UsageError(f"the DSN's host or port can't be right: {_PASSWORD}")


def find_password(dsn: str) -> str | None:
    """Return the password in a connection string; None if it has none, or can't be read."""
    try:
        return conninfo_to_dict(dsn).get("password") or None  # type: ignore[return-value]
    except psycopg.ProgrammingError:
        return None


def _check_uri(dsn: str, scheme: str, source: str) -> None:
    if scheme not in {"postgresql", "postgres"}:
        whose = " is SQLAlchemy's: " if re.match(r"postgres(ql)?\+", scheme) else " is not PostgreSQL's: "
        raise UsageError(f"the DSN begins with {scheme}://, which{whose}write postgresql://")
    if re.search(r"\s", dsn):
        raise UsageError("the DSN has a blank or a line break in it: remove it, or write a blank as %20")
    # As in libpq, user and password end at the first @ before any slash.
    _, _, query = re.sub(r"^[^@/]*@", "", dsn.partition("://")[2]).partition("?")
    if "@" in query:  # part of a password: never shown
        raise UsageError(f"the DSN's password can't be right: {_PASSWORD}")
    known = {each.keyword.decode() for each in pq.Conninfo.get_defaults()} | {"ssl"}
    for name, _ in parse_qsl(query, keep_blank_values=True):
        if name not in known:
            raise UsageError(_describe_parameter(name, source, is_safe=True))


def _find_problem(dsn: str, source: str) -> str:
    """Describe what libpq could not read."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", dsn) and "://" in dsn:
        return "the DSN has a % that begins no code of two hexadecimal digits: write % itself as %25"
    known = {each.keyword.decode() for each in pq.Conninfo.get_defaults()}
    before, names = "", re.finditer(r"(?:^|\s)([^\s=]+)\s*=", dsn)
    for name in [] if "://" in dsn else names:
        if name[1] not in known:
            return _describe_parameter(name[1], source, is_safe="password" not in before)
        before += name[1]
    return f"the DSN is not a connection string: {_FORMS} ({source})"


def _describe_parameter(name: str, source: str, *, is_safe: bool) -> str:
    """Describe a parameter that libpq does not know, without its name if it may be part of a password."""
    if name in FOREIGN:
        return f"the DSN's parameter {name!r} is {FOREIGN[name]}; remove it"
    if is_safe and _NAME.fullmatch(name):
        return f"the DSN's parameter {name!r} is not one that PostgreSQL's library knows: remove it"
    return f"the DSN has a parameter that PostgreSQL's library does not know: {_FORMS} ({source})"
