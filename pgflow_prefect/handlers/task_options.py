"""How Prefect shows a step's task run, and which of its limits count: `tags` and `task_run_name`."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import JsonValue
from pydantic_core import to_jsonable_python

from pgflow_prefect.definitions.model import WorkflowDefinition, to_identifier
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.redaction import find_secrets
from pgflow_prefect.handlers.run_names import Naming, NamingError, check_naming, find_fields, make_name
from pgflow_prefect.handlers.step_options import refuse_text

_OF_ALL = ("payload", "upstream")


@dataclass(frozen=True)
class TaskOptions:
    """What the code says of a step's task run in Prefect.

    Attributes:
        tags: the task run has them beside those of its flow run. Prefect limits how many task runs with a tag run at
            the same time.
        run_name: a template or a function; None for the step's slug.
    """

    tags: tuple[str, ...] = ()
    run_name: Naming | None = None

    @property
    def is_said(self) -> bool:
        """Whether the code says anything."""
        return bool(self.tags) or self.run_name is not None

    @property
    def needs_values(self) -> bool:
        """Whether the name is made of the step's input."""
        return self.run_name is not None and bool(find_fields(self.run_name))


def make_task_options(step_slug: object, tags: Collection[str], task_run_name: Naming | None) -> TaskOptions:
    """Return the options of a step's task run.

    Args:
        step_slug: the step, for messages.
        tags: of a decorator or of `bind`.
        task_run_name: likewise.

    Raises:
        UsageError: one of them is not of its type.
    """
    refuse_text("tags", tags, "a list")
    for tag in tags:
        if not isinstance(tag, str) or not tag.strip() or not tag.isprintable():
            raise UsageError(f"tags={[*tags]!r} of step {step_slug!r}: {tag!r} is no tag. A tag is a text of one line")
    if task_run_name is not None:
        try:
            find_fields(task_run_name)
        except NamingError as error:
            raise UsageError(f"task_run_name of step {step_slug!r} {error}") from None
    return TaskOptions(tuple(dict.fromkeys(tags)), task_run_name)


def check_task_run_name(step_slug: str, options: TaskOptions, known: Collection[str]) -> None:
    """Check that the name of a step's task runs needs only values that there are.

    Raises:
        UsageError: it needs another value.
    """
    if options.run_name is None:
        return
    try:
        check_naming(options.run_name, known)
    except NamingError as error:
        raise UsageError(f"task_run_name of step {step_slug!r} {error}") from None


def find_naming_problems(
    definition: WorkflowDefinition, options: Mapping[str, TaskOptions], checked: Collection[str]
) -> Iterator[str]:
    """Yield a sentence for each step whose task run can't get its name from the step's input.

    Args:
        definition: the workflow.
        options: of its steps, by slug.
        checked: the steps that are functions. Their names were checked against the function's arguments.
    """
    upstream: dict[str, list[str]] = {slug: [] for slug in options if slug not in checked}
    for dep in definition.deps:
        if dep.downstream in upstream:
            upstream[dep.downstream].append(dep.upstream)
    for slug in [slug for slug in definition.steps if slug in upstream]:
        try:
            check_task_run_name(slug, options[slug], list_values(upstream[slug]))
        except UsageError as error:
            yield str(error)


def list_values(upstream: Collection[str]) -> list[str]:
    """Return the names of the values of a step that is no Python function: its payload and its upstream steps."""
    return [*_OF_ALL, *map(to_identifier, upstream)]


def name_task_run(naming: Naming, arguments: Mapping[str, Any], raw: Mapping[str, JsonValue]) -> str:
    """Return the name of a task run.

    Args:
        naming: a template or a function.
        arguments: the handler's arguments, which a function gets as its `parameters`.
        raw: the same as they were before their annotations, as far as they are JSON.

    Raises:
        NamingFailedError: the template does not fit the values, or the function has raised an error.
    """
    secrets = frozenset(find_secrets({**raw, **arguments}))
    values = {name: merge(raw.get(name), value) for name, value in {**raw, **arguments}.items()}
    return make_name(naming, values, secrets, arguments)


def merge(raw: JsonValue, typed: object) -> JsonValue:
    """Return a value as JSON: as it was, with the defaults that its annotation adds."""
    dumped: JsonValue = to_jsonable_python(typed, fallback=str, serialize_unknown=True)
    return dumped if raw is None else _add(raw, dumped)


def _add(raw: JsonValue, dumped: JsonValue) -> JsonValue:
    if isinstance(raw, dict) and isinstance(dumped, dict):
        return {**dumped, **{name: _add(value, dumped.get(name)) for name, value in raw.items()}}
    return raw
