"""Adds what one definition has to another one: nothing is taken away, and nothing is changed."""

from dataclasses import dataclass

from pgflow_prefect.definitions.model import Dep, StepRules, WorkflowDefinition


@dataclass(frozen=True)
class Addition:
    """What another import of a workflow adds, and what it leaves as it is.

    Attributes:
        definition: the old one, with what is new.
        steps: slugs of new steps.
        deps: new ones.
        kept: a sentence for each difference that stays: a step that is gone, another rule.
    """

    definition: WorkflowDefinition
    steps: tuple[str, ...]
    deps: tuple[Dep, ...]
    kept: tuple[str, ...]


def add_definition(old: WorkflowDefinition | None, new: WorkflowDefinition, source: str) -> Addition:
    """Return the old definition with the steps and deps that only the new one has.

    Args:
        old: as the database has it; None if it has no such workflow.
        new: as it is elsewhere.
        source: what to call that: `Airflow`.
    """
    if old is None:
        return Addition(new, new.steps, new.deps, ())
    known, deps = set(old.steps), set(old.deps)
    steps = tuple(slug for slug in new.steps if slug not in known)
    added = tuple(dep for dep in new.deps if dep not in deps)
    rules = {slug: new.find_rules(slug) for slug in steps}
    merged = old.model_copy(
        update={"steps": (*old.steps, *steps), "deps": (*old.deps, *added), "rules": {**old.rules, **rules}}
    )
    definition = WorkflowDefinition.model_validate(merged.model_dump())  # the copy keeps the hash of the old one
    return Addition(definition, steps, added, tuple(_name_differences(old, new, source)))


def _name_differences(old: WorkflowDefinition, new: WorkflowDefinition, source: str) -> list[str]:
    there, here = set(new.steps), set(old.steps)
    found = [f"step {slug!r} is no longer in {source}" for slug in old.steps if slug not in there]
    deps = {*new.deps}
    found += [
        f"step {dep.downstream!r} no longer waits for {dep.upstream!r} in {source}"
        for dep in old.deps
        if dep not in deps and {*dep} <= there
    ]
    for slug in new.steps:
        if slug in here and (said := _compare(old.find_rules(slug), new.find_rules(slug))):
            found.append(f"step {slug!r} has other rules in {source}: {said}")
    for name in ("when_failed", "failed_by"):
        if getattr(old, name) != getattr(new, name):
            found.append(f"{name} is {getattr(old, name)!r} here and {getattr(new, name)!r} in {source}")
    return found


def _compare(old: StepRules, new: StepRules) -> str:
    here, there = old.model_dump(mode="json"), new.model_dump(mode="json")
    return ", ".join(
        f"{name} is {here[name]!r} here and {there[name]!r} there" for name in here if here[name] != there[name]
    )
