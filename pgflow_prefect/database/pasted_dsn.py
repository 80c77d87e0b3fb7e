"""Recognises connection strings in the notation of another program, as people paste them."""

import re
import unicodedata
from collections.abc import Mapping

_ADDRESS = r"(?:jdbc:)?postgres(?:ql)?(?:\+\w+)?://"
_NAMES = (
    "host|hostname|server|data source|port|database|dbname|initial catalog|user|username|user id|uid|user name|"
    "password|pwd|ssl mode|sslmode|pooling|timeout|driver"
)
SYNONYMS = {
    "hostname": "host",
    "server": "host",
    "database": "dbname",
    "db": "dbname",
    "username": "user",
    "uid": "user",
    "pwd": "password",
}
"""Other programs' names of the parts that libpq has."""

_QUOTES = "\"'`\u2018\u2019\u201c\u201d\u00ab\u00bb"

_NOTATIONS = (
    (rf"[{_QUOTES}]", "begins with a quote, which belongs to a shell or a file: remove the quotes"),
    (r"(?:\S*/)?(?:psql|pgcli|pg_\w+|createdb|vacuumdb)\s", "begins with a command: give only its address"),
    (r"-", "begins with an option of a command: give only the address"),
    (r"[$%<]|\{\{", "begins with a placeholder that nothing has replaced by its value: put the address itself there"),
    (r"[{\[]", "is JSON or a list: give only the address in it"),
    (
        r"(?!(?:password|pwd)\s*=(?:[^;]*;$|.*\s(?:host|hostaddr|port|dbname|user|service)\s*=))"
        rf"(?:pgsql:)?(?:{_NAMES})\s*=(?:\{{[^}}]*\}}|[^;\s']*);\s*(?:(?:{_NAMES}|[a-z]+)\s*=|$)",
        "separates its parts by ;, as .NET, ODBC and PHP do: write blanks, and the names host, port, dbname, user and "
        "password",
    ),
    (rf"(?:{_NAMES})\s*:\s", "has : between a name and its value, as in YAML: write NAME=VALUE"),
    (
        rf"(?!jdbc:|password\b)(?:[a-z]+\s+)?[\w.-]+[{_QUOTES}]?\s*[\s:=]\s*[{_QUOTES}]?{_ADDRESS}",
        "begins with a name, and its address comes after that: remove everything before postgresql://",
    ),
    (
        r"(?:export\s+|set\s+|env\s+)?(?-i:[A-Z][A-Z0-9_]*)\s*=",
        "begins with a variable, as in a shell or a file: give only the address",
    ),
    (
        r"(?![\w+.:-]*://)(?:jdbc:)?postgres(?:ql)?(?:[:;]|//)",
        "has no postgresql:// at its beginning: write the colon and two slashes",
    ),
)
"""Beginnings, whatever their case, and what is wrong with a connection string that begins so. The first one counts."""

_COMPILED = tuple((re.compile(pattern, re.IGNORECASE | re.DOTALL), problem) for pattern, problem in _NOTATIONS)

_PLACEHOLDERS = {
    "${NAME}": re.compile(r"\$\{\w+\}|\$\(\w+\)"),
    "{{NAME}}": re.compile(r"\{\{.*\}\}"),
    "%(NAME)s": re.compile(r"%\(\w+\)s"),
    "<NAME>": re.compile(r"<[\w -]+>"),
    "[YOUR-NAME]": re.compile(r"\[your[\w -]*\]", re.IGNORECASE),
}


def has_invisible(text: str) -> bool:
    """Tell whether a text has a character that no one sees: documents and chats put some in."""
    return any(unicodedata.category(each) in {"Cc", "Cf"} and not each.isspace() for each in text)


def find_notation(dsn: str) -> str | None:
    """Return what is wrong with a connection string in another program's notation; None if it may be libpq's.

    The text is the rest of a sentence that begins with "the DSN". It quotes nothing, because any part may be a secret.
    """
    return next((problem for pattern, problem in _COMPILED if pattern.match(dsn)), None)


_MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

_VARIABLE = re.compile(r"\$[A-Za-z_]\w*")


def find_placeholder(text: str) -> str | None:
    """Return the form of a placeholder that a tool should have replaced by its value; None if there is none."""
    return next((form for form, pattern in _PLACEHOLDERS.items() if pattern.search(text)), None)


def find_odd_part(parts: Mapping[str, str]) -> str | None:
    """Return what is wrong with the value of a part, by the names of libpq; None if nothing is.

    A password may have any text, except for the words that a documentation has in its place.
    """
    if _PLACEHOLDERS["[YOUR-NAME]"].fullmatch(parts.get("password", "")):
        return "has the placeholder of a document in place of its password: put the password there"
    named = ((name, value) for name, value in parts.items() if "password" not in name)
    problem = next(filter(None, (_find_odd_value(*each) for each in named)), None)
    return problem or _find_odd_database(parts.get("dbname", "")) or _find_odd_ssl(parts.get("sslmode"))


def _find_odd_value(name: str, value: str) -> str | None:
    if name not in {"host", "port", "dbname", "user"}:
        return None
    if _VARIABLE.fullmatch(value):
        return f"has the name of a variable in place of its {name}: put the value there"
    if form := find_placeholder(value):
        return f"has a placeholder {form} in its {name}: put the value in its place"
    if value[-1:] and value[-1:] in f",;{_QUOTES}":
        return f"has {value[-1:]} at the end of its {name}: remove it"
    return None


def _find_odd_database(name: str) -> str | None:
    if re.match(_ADDRESS, name):
        return "has a whole address as its dbname: give only the address"
    return "has & after its database: parameters begin with ?, not &" if re.search(r"&[\w.]+=", name) else None


def _find_odd_ssl(mode: str | None) -> str | None:
    if mode is None or mode in _MODES:
        return None
    return f"has an sslmode that PostgreSQL's library does not know: write one of {', '.join(_MODES)}"
