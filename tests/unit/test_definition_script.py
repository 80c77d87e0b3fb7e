"""A definition as SQL: the same text each time, and no slug that gets out of its quotes."""

import re
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from pgflow_prefect.database.definition_script import write_script
from pgflow_prefect.definitions.model import WorkflowDefinition
from tests.growth import is_linear
from tests.unit.definitions import dags, define, make_layered

GREETING = """\
-- The pgflow workflow 'greeting'. Adds what is missing; again: changes nothing.
BEGIN;
INSERT INTO pgflow.workflows (slug) VALUES
    ('greeting')
ON CONFLICT DO NOTHING;
INSERT INTO pgflow.steps (workflow_slug, slug) VALUES
    ('greeting', 'name'),
    ('greeting', 'weather'),
    ('greeting', 'greet')
ON CONFLICT DO NOTHING;
INSERT INTO pgflow.deps (workflow_slug, from_step_slug, to_step_slug) VALUES
    ('greeting', 'name', 'greet'),
    ('greeting', 'weather', 'greet')
ON CONFLICT DO NOTHING;
COMMIT;
"""


def test_a_script_reads_as_a_person_would_write_it() -> None:
    assert write_script(define({"greet": ["weather", "name"], "weather": [], "name": []}, "greeting")) == GREETING


def test_what_a_workflow_has_none_of_is_left_out() -> None:
    assert "pgflow.deps" not in write_script(define({"only": []}))
    assert "pgflow.steps" not in write_script(define({}))


@given(dags(), st.randoms(use_true_random=False))
def test_the_order_of_the_rows_does_not_show(definition: WorkflowDefinition, random: Random) -> None:
    shuffled = WorkflowDefinition(
        slug=definition.slug,
        steps=tuple(random.sample(definition.steps, len(definition.steps))),
        deps=tuple(random.sample(definition.deps, len(definition.deps))),
    )
    assert write_script(shuffled) == write_script(definition)


def test_quotes_and_backslashes_are_right_whatever_the_server_takes_a_backslash_for() -> None:
    script = write_script(define({"it's": [], "a\\b'": []}, "w"))
    assert "    ('w', 'it''s')" in script
    assert "    ('w', E'a\\\\b''')" in script


def test_a_character_that_is_not_seen_is_written_as_its_number() -> None:
    script = write_script(define({"a\r\n-- b\u2028": []}, "x\n; DROP TABLE y"))
    assert "E'a\\U0000000d\\U0000000a-- b\\U00002028'" in script
    assert "E'x\\U0000000a; DROP TABLE y'" in script
    assert all(re.match(r"--|[A-Z]|    \(", line) for line in script.splitlines())


def test_ten_times_the_steps_take_about_ten_times_as_long() -> None:
    definitions = {steps: make_layered(steps) for steps in (1_000, 10_000)}

    def write(steps: int) -> None:
        assert write_script(definitions[steps]).count("INSERT") == 3

    assert is_linear(write, 1_000, 10)
