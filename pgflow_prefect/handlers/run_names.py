"""Makes the names of flow runs and task runs from a user's template or function, and from values of a payload.

A payload has an author who is not the author of the template. So a name is one line of a limited length, it has no
characters that a terminal would obey, and no secret is in it.
"""

import inspect
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from string import Formatter
from typing import Any, TypeAlias

from pydantic import JsonValue

from pgflow_prefect.handlers.redaction import redact, redact_text
from pgflow_prefect.wording import clean

Naming: TypeAlias = str | Callable[..., str]
"""A template in the form of `str.format`, or a function, as Prefect has them."""

LONGEST = 200
"""The most characters of a name. A longer one ends with an ellipsis."""

_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class NamingError(ValueError):
    """A template or a function can't be used. The message says why, without the subject."""


class NamingFailedError(Exception):
    """A template or a function has made no name of these values. The message has no secret of them."""


def find_fields(naming: Naming) -> frozenset[str]:
    """Return the names of the values that a template or a function needs; `parameters` stands for all of them.

    Raises:
        NamingError: it is neither, or the template is none.
    """
    if isinstance(naming, str):
        return _find_template_fields(naming)
    if not callable(naming):
        raise NamingError(f"is {naming!r}: give a text such as 'order {{payload[id]}}', or a function")
    try:
        parameters = inspect.signature(naming).parameters.values()
    except (TypeError, ValueError):  # one that is written in C
        return frozenset()
    needed = [each for each in parameters if each.default is each.empty or each.name == "parameters"]
    for each in needed:
        if each.kind not in _BY_NAME:
            raise NamingError(f"is a function that takes {each}: name what it takes, or take `parameters`")
    return frozenset(each.name for each in needed)


def check_naming(naming: Naming, known: Collection[str]) -> None:
    """Check that a template or a function can be used.

    Args:
        naming: of a user.
        known: the names of the values that there are.

    Raises:
        NamingError: it can't, or it needs another value.
    """
    if unknown := sorted(find_fields(naming) - {*known, "parameters"}):
        there = f"there is {', '.join(sorted(known))}" if known else "there are no values"
        raise NamingError(f"needs {' and '.join(unknown)}: {there}")


def make_name(
    naming: Naming,
    values: Mapping[str, JsonValue],
    secrets: Iterable[str] = (),
    parameters: Mapping[str, Any] | None = None,
) -> str:
    """Return the name that a template or a function makes of some values.

    Args:
        naming: of a user.
        values: JSON by name, for templates. Secrets are masked here.
        secrets: texts that are secret wherever they stand.
        parameters: what a function gets in place of `values`.

    Raises:
        NamingFailedError: the template does not fit the values, or the function has raised an error.
    """
    hidden = frozenset(secrets)
    try:
        return _make_name(naming, values, hidden, parameters)
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever a user's function raises
        raise NamingFailedError(f"{type(error).__name__}: {redact_text(str(error), hidden)}") from None


def _make_name(
    naming: Naming, values: Mapping[str, JsonValue], hidden: frozenset[str], parameters: Mapping[str, Any] | None
) -> str:
    if isinstance(naming, str):
        name = naming.format(**{key: _Field(key, redact(value, hidden)) for key, value in values.items()})
    else:
        given = {key: redact(value, hidden) for key, value in values.items()} if parameters is None else parameters
        needed = find_fields(naming)
        own = {key: value for key, value in given.items() if key in needed}
        name = naming(**own, **({"parameters": given} if "parameters" in needed else {}))
        if not isinstance(name, str):
            if inspect.iscoroutine(name):
                name.close()
            raise TypeError(f"it returned {type(name).__name__}, not a text")
    return _bound(clean(redact_text(name[: LONGEST * LONGEST], hidden)).strip())


def _bound(name: str) -> str:
    if not name:
        raise ValueError("it made an empty name")
    return name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}\N{HORIZONTAL ELLIPSIS}"


def _find_template_fields(template: str) -> frozenset[str]:
    fields = set()
    try:
        for _, name, form, _ in Formatter().parse(template):
            if name is None:
                continue
            first = name.partition(".")[0].partition("[")[0]
            if not first or first.isdigit():
                raise NamingError(f"is {template!r}, which has a field without a name: write {{payload[id]}}, say")
            if "{" in (form or ""):
                raise NamingError(f"is {template!r}: a value can't say how wide another one is")
            fields.add(first)
    except ValueError as error:
        if isinstance(error, NamingError):
            raise
        raise NamingError(f"is {template!r}, which is no template: {error}") from None
    return frozenset(fields)


class _Field:
    """A JSON value in a template: `{payload[id]}` and `{payload.id}` mean the same."""

    __slots__ = ("_path", "_value")

    def __init__(self, path: str, value: JsonValue) -> None:
        self._path = path
        self._value = value

    def __getattr__(self, name: str) -> "_Field":
        return self[name]

    def __getitem__(self, key: str | int) -> "_Field":
        value, path = self._value, f"{self._path}[{key}]"
        if isinstance(value, dict) and str(key) in value:
            return _Field(path, value[str(key)])
        if isinstance(value, list) and isinstance(key, int) and -len(value) <= key < len(value):
            return _Field(path, value[key])
        raise LookupError(f"there is no {path}")

    def __format__(self, form: str) -> str:
        if isinstance(self._value, int | float) and not isinstance(self._value, bool) and form:
            return format(self._value, form)
        return format(str(self), form)

    def __str__(self) -> str:
        value = self._value
        if isinstance(value, dict | list):
            return json.dumps(value, ensure_ascii=False)
        return str(value)[: LONGEST + 1]

    __repr__ = __str__
