"""Compares two definitions of a workflow."""

from dataclasses import dataclass

from pgflow_prefect.definitions.model import NO_RULES, Dep, WorkflowDefinition


@dataclass(frozen=True)
class Difference:
    """The changes from one definition to another; all sorted, all empty if nothing changes.

    Attributes:
        steps_added: slugs.
        steps_removed: slugs.
        deps_added: pairs of slugs.
        deps_removed: pairs of slugs.
        rules_changed: the slugs of the steps of which something else is said.
        workflow_changed: what is said differently of the workflow: `when_failed`, `failed_by`.
    """

    steps_added: tuple[str, ...]
    steps_removed: tuple[str, ...]
    deps_added: tuple[Dep, ...]
    deps_removed: tuple[Dep, ...]
    rules_changed: tuple[str, ...] = ()
    workflow_changed: tuple[str, ...] = ()


def compare_definitions(old: WorkflowDefinition | None, new: WorkflowDefinition) -> Difference:
    """Return the changes of `old`, which is None if the database has no such workflow."""
    old_steps, new_steps = set(old.steps if old else ()), set(new.steps)
    old_deps, new_deps = set(old.deps if old else ()), set(new.deps)
    return Difference(
        steps_added=tuple(sorted(new_steps - old_steps)),
        steps_removed=tuple(sorted(old_steps - new_steps)),
        deps_added=tuple(sorted(new_deps - old_deps)),
        deps_removed=tuple(sorted(old_deps - new_deps)),
        rules_changed=tuple(
            slug
            for slug in sorted(new_steps)
            if (old.find_rules(slug) if old else NO_RULES).said != new.find_rules(slug).said
        ),
        workflow_changed=tuple(
            name
            for name, former in (("failed_by", "steps"), ("when_failed", None))
            if getattr(old, name, former) != getattr(new, name)
        ),
    )
