"""Compares two definitions of a workflow."""

from dataclasses import dataclass

from pgflow_prefect.definitions.model import Dep, WorkflowDefinition


@dataclass(frozen=True)
class Difference:
    """The changes from one definition to another; all sorted, all empty if nothing changes."""

    steps_added: tuple[str, ...]
    steps_removed: tuple[str, ...]
    deps_added: tuple[Dep, ...]
    deps_removed: tuple[Dep, ...]


def compare_definitions(old: WorkflowDefinition | None, new: WorkflowDefinition) -> Difference:
    """Return the changes of `old`, which is None if the database has no such workflow."""
    old_steps, new_steps = set(old.steps if old else ()), set(new.steps)
    old_deps, new_deps = set(old.deps if old else ()), set(new.deps)
    return Difference(
        steps_added=tuple(sorted(new_steps - old_steps)),
        steps_removed=tuple(sorted(old_steps - new_steps)),
        deps_added=tuple(sorted(new_deps - old_deps)),
        deps_removed=tuple(sorted(old_deps - new_deps)),
    )
