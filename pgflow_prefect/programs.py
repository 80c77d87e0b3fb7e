"""Programs and work pools that do steps: what is started. The settings of a worker give them names for rows."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import field
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

T = TypeVar("T")

SKIPPED = 99
"""The exit code by which a program says that its step is not needed this time, as in Airflow."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}", re.ASCII)
"""A name that a row may give: a key of the worker's settings, never a path."""


def check_name(name: str) -> str:
    """Return a name that a row may give.

    Raises:
        ValueError: it has other characters.
    """
    if not NAME.fullmatch(name):
        raise ValueError("it is no name: up to 63 letters, digits, dots, dashes and underscores of ASCII")
    return name


def _refuse_text(argv: object) -> object:
    if isinstance(argv, str | bytes):
        raise ValueError("it is a text, and no shell reads it: give a list, ['prog', 'argument']")  # noqa: TRY004
    return argv


def _check_text(text: str) -> str:
    if "\0" in text:
        raise ValueError("it has a NUL, which no program can get")
    return text


def _check_program(argv: Sequence[str]) -> Sequence[str]:
    if not argv or not argv[0]:
        raise ValueError("it names no program: give a list, ['prog', 'argument']")
    return tuple(argv)


def _check_variable(name: str) -> str:
    if not name or "=" in name or "\0" in name:
        raise ValueError("it is no name of an environment variable")
    return name


_Text = Annotated[str, AfterValidator(_check_text)]
Arguments = Annotated[Sequence[_Text], BeforeValidator(_refuse_text), AfterValidator(_check_program)]
Variable = Annotated[str, AfterValidator(_check_variable)]
Variables = Annotated[Sequence[Variable], BeforeValidator(_refuse_text), AfterValidator(tuple)]
Environment = Mapping[Variable, _Text]
ExitCode = Annotated[int, Field(ge=1, le=255)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", hide_input_in_errors=True))
class Program:
    """A program of the worker's machine, and what it gets.

    Attributes:
        argv: the program and its arguments. No shell reads them.
        env: variables of its environment, with their values.
        pass_env: names of variables that it gets from the worker's environment. It gets no others.
        cwd: its working directory; None for the worker's.
        skip_exit_code: the exit code that skips the step; None for no such code.
    """

    argv: Arguments = field(repr=False)
    env: Environment = field(default_factory=dict, repr=False)
    pass_env: Variables = ()
    cwd: _Text | None = None
    skip_exit_code: ExitCode | None = SKIPPED

    @property
    def label(self) -> str:
        """The program in a message: without its arguments, which may have secrets."""
        return self.argv[0].rpartition("/")[2] or self.argv[0]


@dataclass(frozen=True, config=ConfigDict(extra="forbid", hide_input_in_errors=True))
class Pool:
    """A work pool of Prefect, and how it starts flow runs for steps.

    Attributes:
        pool: its name in Prefect.
        image: the image in which the flow run is started, for pools that have images.
        job_variables: further job variables of the flow run. Prefect shows them: they must have no secrets.
        directory: the directory there that has the folder of handlers. By default, this process's working directory;
            with an image, the image's.
    """

    pool: Annotated[str, Field(min_length=1)]
    image: str | None = None
    job_variables: Mapping[str, Any] = field(default_factory=dict)
    directory: str | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """All job variables."""
        return {**self.job_variables, **({} if self.image is None else {"image": self.image})}


_PROGRAM: TypeAdapter[Program] = TypeAdapter(Program)
_POOL: TypeAdapter[Pool] = TypeAdapter(Pool)


def parse_pools(text: str) -> dict[str, Pool]:
    """Return the work pools of a setting by name, from JSON.

    A value is the name of a work pool, or an object with the fields of `Pool`.

    Raises:
        ValueError: the text has another form. The message has no values of it.
    """
    found = read_named(text, "the name of a work pool")
    return {name: _read(_POOL, name, {"pool": each} if isinstance(each, str) else each) for name, each in found.items()}


def parse_programs(text: str) -> dict[str, Program]:
    """Return the programs of a setting by name, from JSON.

    A value is a list, `["prog", "argument"]`, or an object with the fields of `Program`.

    Raises:
        ValueError: the text has another form. The message has no values of it.
    """
    found = read_named(text, "a list of program and arguments")
    return {
        name: _read(_PROGRAM, name, {"argv": each} if isinstance(each, list) else each) for name, each in found.items()
    }


def read_named(text: str, what: str) -> dict[str, Any]:
    """Return the members of a JSON object whose keys are names that a row may give.

    Args:
        text: of a setting; empty for none.
        what: what a member is, for the message.

    Raises:
        ValueError: it is no such object. The message has no values of it.
    """
    if not text.strip():
        return {}
    try:
        found = json.loads(text, object_pairs_hook=_refuse_twice)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is no JSON: {error.msg} at character {error.pos + 1}") from None
    if not isinstance(found, dict):
        raise ValueError(f"it is no JSON object: write a name for each, and {what}")  # noqa: TRY004
    for name in found:
        try:
            check_name(name)
        except ValueError as error:
            raise ValueError(f"{name[:100]!r}: {error}") from None
    return found


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object in it has one name twice")
    return found


def _read(adapter: TypeAdapter[T], name: str, value: object) -> T:
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{name!r}: {describe_problems(error)}") from None


def describe_problems(error: ValidationError) -> str:
    """Return the problems of a value, each with its place, without the value itself."""
    problems = error.errors(include_input=False, include_url=False)
    return "; ".join(f"{'.'.join(map(str, each['loc'])) or 'it'}: {_shorten(each['msg'])}" for each in problems)


def _shorten(message: str) -> str:
    return message.removeprefix("Value error, ")
