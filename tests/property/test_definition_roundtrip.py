"""A definition is the same one wherever it has been: in the tables, in a script, in Python."""

from collections.abc import Iterator
from inspect import Parameter, Signature
from typing import Any

import psycopg
import pytest
from anyio.from_thread import BlockingPortal, start_blocking_portal
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pgflow_prefect import Workflow
from pgflow_prefect.database.connection import run_script
from pgflow_prefect.database.definition_script import write_script
from pgflow_prefect.database.store import Store, open_store
from pgflow_prefect.definitions.graph import build_graph
from pgflow_prefect.definitions.model import (
    PAYLOAD,
    Dep,
    MapRules,
    Rule,
    StepRules,
    WhenUnmet,
    WorkflowDefinition,
    to_identifier,
)
from pgflow_prefect.errors import UnknownWorkflowError
from pgflow_prefect.settings import Settings
from tests.unit.definitions import define

NASTY = [
    "",
    "'",
    "\\",
    "\\'",
    "';--",
    "$$",
    "\u2028",
    "\u202e",
    "é",
    "e\u0301",
    "🦆",
    ":name",
    "%s",
    "{}",
]
CHARACTERS = st.characters(exclude_characters="\0", exclude_categories=["Cs", "Cc"])
SLUGS = st.sampled_from(NASTY) | st.text(CHARACTERS, max_size=8) | st.from_regex("[a-z]{1,3}", fullmatch=True)

PATTERNS = st.none() | st.dictionaries(SLUGS, st.sampled_from([1, "'", None, True, [1.5, {}], "\\"]), max_size=2)
RULES = st.builds(
    StepRules,
    rule=st.none() | st.sampled_from(Rule),
    only_if=PATTERNS,
    unless=PATTERNS,
    when_unmet=st.sampled_from(WhenUnmet),
    when_exhausted=st.sampled_from(WhenUnmet),
    fails_run=st.booleans(),
    is_setup=st.booleans(),
)

MAPS = st.builds(
    MapRules,
    path=st.lists(st.from_regex("[a-z]{1,3}", fullmatch=True), max_size=2).map(tuple),
    max_items=st.none() | st.integers(1, 9),
    when_empty=st.sampled_from(["complete", "skip", "skip-cascade"]),
    when_item_fails=st.sampled_from(["stop", "continue", "skip"]),
)

few = settings(max_examples=40, deadline=None, database=None, suppress_health_check=[*HealthCheck])


@st.composite
def wild_dags(draw: st.DrawFn, slugs: list[str]) -> WorkflowDefinition:
    """Draw a definition of some of these steps, each waiting for some of those before it in a random order."""
    steps = draw(st.permutations(slugs))[: draw(st.integers(1, len(slugs)))]
    pairs = [Dep(upstream, step) for place, step in enumerate(steps) for upstream in steps[:place]]
    deps = draw(st.lists(st.sampled_from(pairs), unique=True)) if pairs else []
    rules = draw(st.dictionaries(st.sampled_from(steps), RULES, max_size=3))
    for slug in draw(st.sets(st.sampled_from(steps), max_size=2)):
        sources = [dep.upstream for dep in deps if dep.downstream == slug and dep.upstream]
        said = draw(MAPS).model_copy(update={"over": draw(st.sampled_from([PAYLOAD, *sources]))})
        rules[slug] = rules.get(slug, StepRules()).model_copy(update={"map": said})
    return WorkflowDefinition(
        slug=draw(SLUGS),
        steps=tuple(draw(st.permutations(steps))),
        deps=tuple(deps),
        rules=rules,
        when_failed=draw(st.sampled_from([None, "continue"])),
        failed_by=draw(st.sampled_from(["steps", "leaves"])),
    )


POOLS = st.lists(SLUGS, min_size=1, max_size=8, unique_by=to_identifier)
DEFINITIONS = POOLS.flatmap(wild_dags)
PAIRS = POOLS.flatmap(lambda slugs: st.tuples(wild_dags(slugs), wild_dags(slugs)))


class Database:
    """This test's database, asked from outside an event loop."""

    def __init__(self, dsn: str, portal: BlockingPortal, store: Store) -> None:
        self.dsn = dsn
        self.portal = portal
        self.store = store

    def load(self, slug: str) -> WorkflowDefinition | None:
        try:
            return self.portal.call(self.store.load_definition, slug)
        except UnknownWorkflowError:
            return None

    def replace(self, new: WorkflowDefinition) -> None:
        """Make a definition another one, from whatever it is."""
        self.portal.call(self.store.replace_definition, self.load(new.slug), new)

    def clear(self) -> None:
        run_script(self.dsn, "DELETE FROM pgflow.deps; DELETE FROM pgflow.steps; DELETE FROM pgflow.workflows")

    def holds(self, definition: WorkflowDefinition) -> bool:
        found = self.load(definition.slug)
        return found is not None and found.definition_hash == definition.definition_hash


@pytest.fixture
def database(dsn: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Database]:
    monkeypatch.setenv("PGFLOW_DSN", dsn)
    with (
        start_blocking_portal() as portal,
        portal.wrap_async_context_manager(open_store(Settings(), size=1)) as store,
    ):
        yield Database(dsn, portal, store)


def make_workflow(definition: WorkflowDefinition, taken: frozenset[Dep]) -> Workflow:
    """Return a workflow in Python; of the deps, those in `taken` are arguments, the others in `after`."""
    graph = build_graph(definition)
    workflow = Workflow(definition.slug, when_failed=definition.when_failed, failed_by=definition.failed_by)
    for slug in definition.steps:
        upstream = list(graph.predecessors(slug))
        named = [each for each in upstream if Dep(each, slug) in taken]

        def work(**results: object) -> None: ...

        kind = Parameter.KEYWORD_ONLY
        parameters = [Parameter("payload", kind)]
        parameters += [Parameter(to_identifier(name), kind, default=None) for name in named]
        work.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        rules: dict[str, Any] = definition.find_rules(slug).said
        after = [each for each in upstream if each not in named]
        said: dict[str, Any] | None = rules.pop("map", None)
        if said is None:
            workflow.step(slug, after=after, **rules)(work)
        else:
            over = ".".join([said.pop("over"), *said.pop("path", [])])
            workflow.map(slug, over=over, after=after, **said, **rules)(work)
    return workflow


@pytest.mark.thorough
def test_sql_to_graph_to_sql_is_the_same_definition(database: Database) -> None:
    @few
    @given(DEFINITIONS, st.booleans())
    @example(define({slug: [] for slug in NASTY}, "it's\u2028-- \\a"), False)
    def check(definition: WorkflowDefinition, conforming: bool) -> None:
        database.clear()
        database.replace(definition)
        stored = database.load(definition.slug)
        assert stored is not None
        assert stored.definition_hash == definition.definition_hash

        script = write_script(stored)
        database.clear()
        with psycopg.connect(database.dsn, autocommit=True) as db:
            db.execute(f"SET standard_conforming_strings = {'on' if conforming else 'off'}")
            for _ in range(2):  # pasted twice
                db.execute(script.encode())
                assert database.load(definition.slug) == stored
        assert write_script(stored) == script

    check()


def test_python_to_sql_is_the_same_definition(database: Database) -> None:
    @few
    @given(DEFINITIONS, st.data())
    def check(definition: WorkflowDefinition, data: st.DataObject) -> None:
        taken = data.draw(st.sets(st.sampled_from(definition.deps))) if definition.deps else set()
        workflow = make_workflow(definition, frozenset(taken))
        assert workflow.definition.definition_hash == definition.definition_hash

        database.replace(workflow.definition)
        assert database.holds(definition)
        assert workflow.find_problems(definition) == []

    check()


def test_any_definition_can_become_any_other_one(database: Database) -> None:
    @few
    @given(PAIRS)
    def check(pair: tuple[WorkflowDefinition, WorkflowDefinition]) -> None:
        old, new = pair[0], pair[1].model_copy(update={"slug": pair[0].slug})
        database.replace(old)
        database.replace(new)
        assert database.holds(new)

    check()
