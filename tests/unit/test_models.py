"""Names: of a step in Python, and of exactly one definition."""

import keyword
import unicodedata
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgflow_prefect.definitions.model import RESERVED_NAMES, Dep, WorkflowDefinition, to_identifier
from tests.unit.definitions import dags, define


@pytest.mark.parametrize(
    ("slug", "name"),
    [
        ("prepare_list", "prepare_list"),
        ("send-emails", "send_emails"),
        ("a.b/c d", "a_b_c_d"),
        ("2nd", "_2nd"),
        ("-x", "_x"),
        ("class", "class_"),
        ("None", "None_"),
        ("__debug__", "__debug___"),
        ("payload", "payload_"),
        ("context", "context_"),
        ("upstream", "upstream_"),
        ("match", "match"),
        ("Straße", "Straße"),
        ("ﬁnal", "final"),
        ("\uff43\uff4c\uff41\uff53\uff53", "class_"),  # full-width letters
        ("größe", "größe"),
        ("日本語", "日本語"),
        ("ship 🚀", "ship__"),
        ("", "_"),
        ("\u0301accent", "_\u0301accent"),
    ],
)
def test_a_slug_has_one_python_name(slug: str, name: str) -> None:
    assert to_identifier(slug) == name


@given(st.text() | st.sampled_from([*keyword.kwlist, *RESERVED_NAMES]))
def test_every_slug_becomes_a_name_that_a_handler_can_take(slug: str) -> None:
    name = to_identifier(slug)
    assert name.isidentifier()
    assert not keyword.iskeyword(name)
    assert name not in RESERVED_NAMES
    assert unicodedata.normalize("NFKC", name) == name, "Python would know it by another name"
    compile(f"def {name}({name}): pass", "handlers.py", "exec")


@given(st.text())
def test_a_name_stands_for_itself(slug: str) -> None:
    name = to_identifier(slug)
    assert to_identifier(name) == name


def test_the_order_of_rows_is_no_part_of_a_definition() -> None:
    one = WorkflowDefinition(slug="w", steps=("a", "b", "c"), deps=(Dep("a", "b"), Dep("a", "c")))
    other = WorkflowDefinition(slug="w", steps=("c", "a", "b"), deps=(Dep("a", "c"), Dep("a", "b")))
    assert one.definition_hash == other.definition_hash
    assert len(one.definition_hash) == 16
    int(one.definition_hash, 16)


@pytest.mark.parametrize(
    "other",
    [
        define({"a": [], "b": ["a"]}, slug="v"),
        define({"a": [], "b": []}),
        define({"b": [], "a": ["b"]}),
        define({"a": [], "b": ["a"], "c": []}),
        define({"a": [], "b\0": ["a"]}),
        define({"a": [], "\ud800": ["a"]}),
    ],
)
def test_another_definition_has_another_hash(other: WorkflowDefinition) -> None:
    assert define({"a": [], "b": ["a"]}).definition_hash != other.definition_hash


def test_a_hash_tells_slugs_apart_that_look_alike_when_joined() -> None:
    assert define({"a": [], "b,c": []}).definition_hash != define({"a,b": [], "c": []}).definition_hash


@given(dags(), st.randoms())
def test_a_hash_survives_any_shuffle(definition: WorkflowDefinition, random: Random) -> None:
    steps, deps = [*definition.steps], [*definition.deps]
    random.shuffle(steps)
    random.shuffle(deps)
    shuffled = WorkflowDefinition(slug=definition.slug, steps=tuple(steps), deps=tuple(deps))
    assert shuffled.definition_hash == definition.definition_hash


def test_a_definition_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        define({"a": []}).slug = "other"  # type: ignore[misc]
