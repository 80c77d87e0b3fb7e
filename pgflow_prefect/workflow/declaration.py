"""What the code says of a step, beside the work that it does."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from pgflow_prefect.definitions.model import StepRules
from pgflow_prefect.handlers.run_names import Naming
from pgflow_prefect.handlers.step_options import make_rules, refuse_text
from pgflow_prefect.handlers.task_options import TaskOptions, make_task_options


@dataclass(frozen=True)
class Declaration:
    """What a decorator, or `bind`, says of a step beside its work.

    Attributes:
        after: the slugs of the steps that it waits for and whose results no argument takes by name.
        rules: when it runs, and what becomes of it.
        task_options: of its task run.
    """

    after: tuple[str, ...]
    rules: StepRules
    task_options: TaskOptions


def declare(
    slug: str | None,
    *,
    after: Collection[str],
    tags: Collection[str],
    task_run_name: Naming | None = None,
    **rules: Any,  # noqa: ANN401  what a user has written
) -> Declaration:
    """Return what the code says of a step.

    Args:
        slug: the step, for messages; None where the function's name will be the slug.
        after: as of `Workflow.step`, as all that follow.
        tags: likewise.
        task_run_name: likewise.
        **rules: likewise: the options that are fields of `StepRules`.

    Raises:
        UsageError: a list is a text, there is no such choice, or a condition is no JSON.
    """
    refuse_text("after", after, "a list of slugs")
    task_options = make_task_options(slug or "", tags, task_run_name)
    return Declaration(tuple(after), make_rules(**rules), task_options)
