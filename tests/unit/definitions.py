"""Workflow definitions for tests: written short, and drawn at random."""

from collections.abc import Iterable, Mapping

from hypothesis import strategies as st

from pgflow_prefect.definitions.model import Dep, WorkflowDefinition


def define(steps: Mapping[str, Iterable[str]], slug: str = "workflow") -> WorkflowDefinition:
    """Return a definition; `steps` gives each step with the steps that it waits for."""
    deps = tuple(Dep(upstream, step) for step, upstreams in steps.items() for upstream in upstreams)
    return WorkflowDefinition(slug=slug, steps=tuple(steps), deps=deps)


def make_layered(steps: int, deps_per_step: int = 5, slug: str = "wide") -> WorkflowDefinition:
    """Return a definition of so many steps, each with deps on the five before it that are 100 apart."""
    slugs = [f"step_{number:06}" for number in range(steps)]
    waits = {
        each: [slugs[number - 100 * back] for back in range(1, deps_per_step + 1) if number >= 100 * back]
        for number, each in enumerate(slugs)
    }
    return define(waits, slug)


@st.composite
def dags(draw: st.DrawFn, least: int = 1) -> WorkflowDefinition:
    """Draw a definition with no cycle: its steps in a random order, each waiting for some of those before it."""
    steps = draw(st.permutations([f"s{number}" for number in range(draw(st.integers(least, 12)))]))
    pairs = [(upstream, step) for place, step in enumerate(steps) for upstream in steps[:place]]
    deps = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    return WorkflowDefinition(
        slug="random", steps=tuple(draw(st.permutations(steps))), deps=tuple(Dep(*pair) for pair in deps)
    )
