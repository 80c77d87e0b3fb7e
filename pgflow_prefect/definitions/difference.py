"""What differs between two definitions of a workflow."""

from dataclasses import dataclass

from pgflow_prefect.definitions.model import Dep, WorkflowDefinition


@dataclass(frozen=True)
class Difference:
    """What makes one definition another one; all sorted, all empty where there is nothing to change."""

    steps_added: tuple[str, ...]
    steps_removed: tuple[str, ...]
    deps_added: tuple[Dep, ...]
    deps_removed: tuple[Dep, ...]


def compare_definitions(old: WorkflowDefinition | None, new: WorkflowDefinition) -> Difference:
    """Return what has to change in `old`, which is None where the database has no such workflow."""
    old_steps, new_steps = set(old.steps if old else ()), set(new.steps)
    old_deps, new_deps = set(old.deps if old else ()), set(new.deps)
    return Difference(
        steps_added=tuple(sorted(new_steps - old_steps)),
        steps_removed=tuple(sorted(old_steps - new_steps)),
        deps_added=tuple(sorted(new_deps - old_deps)),
        deps_removed=tuple(sorted(old_deps - new_deps)),
    )
