"""Explains what is wrong with a connection string by its part, never by its text, which has a password."""

import re
from urllib.parse import parse_qsl

import psycopg
from psycopg import pq
from psycopg.conninfo import conninfo_to_dict

from pgflow_prefect.database.pasted_dsn import SYNONYMS, find_notation, find_odd_part, find_placeholder, has_invisible
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
    "ssl": "asyncpg's: write sslmode=require, or another sslmode",
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
    if has_invisible(dsn.replace(find_password(dsn) or "\0", "")):  # a password may have any character
        raise UsageError(f"the DSN has an invisible character in it, perhaps from a document: type it anew ({source})")
    if problem := find_notation(dsn):
        raise UsageError(f"the DSN {problem} ({source})")
    scheme = _SCHEME.match(dsn)
    if scheme is not None:
        _check_uri(dsn, scheme["scheme"], source)
    try:
        parts = {name: str(value) for name, value in conninfo_to_dict(dsn).items()}
    except psycopg.ProgrammingError:
        raise UsageError(_find_problem(dsn, source)) from None
    if problem := find_odd_part(parts):
        raise UsageError(f"the DSN {problem} ({source})")
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
        raise UsageError(f"the DSN begins with {scheme}://, which {_describe_scheme(scheme)}: write postgresql://")
    if re.search(r"\s", dsn):
        raise UsageError("the DSN has a blank or a line break in it: remove it, or write a blank as %20")
    # As in libpq, user and password end at the first @ before any slash.
    _, _, query = re.sub(r"^[^@/]*@", "", dsn.partition("://")[2]).partition("?")
    if any("@" in part and not _is_plain(part.partition("=")[0]) for part in query.split("&")):  # of a password
        raise UsageError(f"the DSN's password can't be right: {_PASSWORD}")
    if form := find_placeholder(dsn):
        raise UsageError(
            f"the DSN has a placeholder {form} in it: put the value in its place, or write its first character as "
            f"%{ord(form[0]):X} if it belongs to the value ({source})"
        )
    if "&amp;" in query:
        raise UsageError(f"the DSN has &amp; in its parameters, which is HTML: write & ({source})")
    _check_parameters(query, source)


def _is_plain(name: str) -> bool:
    """Tell whether it is the name of a parameter that is no secret."""
    return "password" not in name and name in {each.keyword.decode() for each in pq.Conninfo.get_defaults()}


def _check_parameters(query: str, source: str) -> None:
    known = {each.keyword.decode() for each in pq.Conninfo.get_defaults()} | {"ssl"}
    before = ""
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name not in known:  # behind a password, it may be the rest of it
            raise UsageError(_describe_parameter(name, source, is_safe="password" not in before))
        before += name
        if name == "ssl" and value != "true":
            raise UsageError(f"the DSN's parameter 'ssl' is {FOREIGN['ssl']} ({source})")
    for part in query.split("&"):
        name, *values = part.split("=")
        if name in known and not values:  # any other text may be a part of a password
            raise UsageError(f"the DSN's parameter {name!r} has no value: write {name}=VALUE, or remove it ({source})")
        if name in known and len(values) > 1:
            raise UsageError(f"the DSN's parameter {name!r} has a second = in its value: write it as %3D ({source})")


def _describe_scheme(scheme: str) -> str:
    if scheme.lower() in {"postgresql", "postgres"}:
        return "is not in small letters"
    if scheme.startswith("jdbc:"):
        return "is JDBC's"
    return "is SQLAlchemy's" if re.match(r"postgres(ql)?\+", scheme) else "is not PostgreSQL's"


def _find_problem(dsn: str, source: str) -> str:
    """Describe what libpq could not read."""
    if re.search(r"%(?![0-9A-Fa-f]{2})", dsn) and "://" in dsn:
        return "the DSN has a % that begins no code of two hexadecimal digits: write % itself as %25"
    if re.match(r"[^\s=]*[@/]", dsn) and "://" not in dsn:
        return f"the DSN has no postgresql:// before its user and host: {_FORMS} ({source})"
    known = {each.keyword.decode() for each in pq.Conninfo.get_defaults()}
    before, names = "", re.finditer(r"(?:^|\s)([^\s=]+)\s*=", dsn)
    for name in [] if "://" in dsn else names:
        if name[1] not in known:
            return _describe_parameter(name[1], source, is_safe="password" not in before)
        before += name[1]
    if "=" in dsn and "://" not in dsn:
        return f"the DSN has a part without =, or a quote without its end: put a value with blanks in '…' ({source})"
    return f"the DSN is not a connection string: {_FORMS} ({source})"


def _describe_parameter(name: str, source: str, *, is_safe: bool) -> str:
    """Describe a parameter that libpq does not know, without its name if it may be part of a password."""
    if name in FOREIGN:
        return f"the DSN's parameter {name!r} is {FOREIGN[name]}; remove it"
    known = {each.keyword.decode() for each in pq.Conninfo.get_defaults()}
    if (right := SYNONYMS.get(name.lower(), name.lower())) in known:
        return f"the DSN's parameter {name!r} has another name in PostgreSQL's library: write {right!r}"
    if is_safe and _NAME.fullmatch(name):
        return f"the DSN's parameter {name!r} is not one that PostgreSQL's library knows: remove it"
    return f"the DSN has a parameter that PostgreSQL's library does not know: {_FORMS} ({source})"
