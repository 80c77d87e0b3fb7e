"""A workflow's definition, and the Python names of its steps."""

import hashlib
import json
import keyword
import unicodedata
from enum import StrEnum
from functools import cached_property
from typing import Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
)

RESERVED_NAMES = frozenset({"payload", "context", "upstream"})
"""Argument names of a handler that do not mean an upstream step."""


def to_identifier(slug: str) -> str:
    """Return the Python name of a step in a handler's arguments.

    Characters that no name may have become `_`. A leading digit gets `_` before it, and a keyword or a reserved name
    gets `_` after it: `send-emails` -> `send_emails`, `2nd` -> `_2nd`, `class` -> `class_`, `payload` -> `payload_`.
    """
    name = slug
    if not (slug.isascii() and slug.isidentifier()):
        # Python itself compares names in this form.
        normal = unicodedata.normalize("NFKC", slug)
        name = "".join(character if f"_{character}".isidentifier() else "_" for character in normal)
        if not name[:1].isidentifier():
            name = f"_{name}"
    if keyword.iskeyword(name) or name in RESERVED_NAMES or name == "__debug__":  # no assignment to it is possible
        name = f"{name}_"
    return name


class Dep(NamedTuple):
    """A dependency: `upstream` must complete before `downstream` starts. Both are step slugs."""

    upstream: str
    downstream: str


class Rule(StrEnum):
    """When a step runs, by how the steps that it waits for have ended: the trigger rules of Airflow, by their names."""

    ALL_SUCCESS = "all_success"
    ALL_FAILED = "all_failed"
    ALL_DONE = "all_done"
    ALL_DONE_MIN_ONE_SUCCESS = "all_done_min_one_success"
    ALL_DONE_SETUP_SUCCESS = "all_done_setup_success"
    ALL_SKIPPED = "all_skipped"
    ALWAYS = "always"
    NONE_FAILED = "none_failed"
    NONE_FAILED_MIN_ONE_SUCCESS = "none_failed_min_one_success"
    NONE_SKIPPED = "none_skipped"
    ONE_DONE = "one_done"
    ONE_FAILED = "one_failed"
    ONE_SUCCESS = "one_success"


BEFORE_FAILURES = frozenset(
    {None, Rule.ALL_SUCCESS, Rule.NONE_FAILED, Rule.NONE_FAILED_MIN_ONE_SUCCESS, Rule.ALL_SKIPPED}
)
"""Rules of steps that never run after a failure."""


class WhenUnmet(StrEnum):
    """What becomes of a step where its condition is not met, or where its last attempt fails."""

    FAIL = "fail"
    SKIP = "skip"
    """What waits for it goes on without it."""

    SKIP_CASCADE = "skip-cascade"
    """What waits for it is skipped, too, unless its rule says otherwise."""


AnyWhenEmpty = Literal["complete", "skip", "skip-cascade"]
AnyWhenItemFails = Literal["stop", "continue", "skip"]

PAYLOAD = "payload"
"""What a map maps over that takes its array from the run's payload."""


class MapRules(BaseModel):
    """What is said of a map: a step that is executed once for each item of an array.

    Attributes:
        over: the upstream step whose result has the array, or `payload`; None where the definition does not say it.
        path: where the array is in that; empty: it is the array.
        max_items: more items fail the map; None for the engine's limit.
        when_empty: what becomes of a map without items: `complete` gives it the result `[]`.
        when_item_fails: what becomes of it where the last attempt of an item fails. `stop`: it fails at once;
            `continue`: it fails after the others have ended; `skip`: the item is left out of its result.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    over: str | None = None
    path: tuple[str, ...] = ()
    max_items: int | None = Field(default=None, ge=1)
    when_empty: AnyWhenEmpty = "complete"
    when_item_fails: AnyWhenItemFails = "stop"


class ChildRules(BaseModel):
    """What is said of a step that is a run of another workflow.

    Attributes:
        workflow: its slug.
        payload: where the payload of the run is in the step's input; None: it is all of that.
        retries: how many further runs are begun after one that has failed.
        max_children: of a map, how many of its runs are under way at the same time; None for the engine's limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    workflow: str
    payload: tuple[str, ...] | None = None
    retries: int = Field(default=0, ge=0)
    max_children: int | None = Field(default=None, ge=1)


class StepRules(BaseModel):
    """What is said of a step beside its name, of what it waits for, and of who does it.

    Attributes:
        rule: when it runs; None: when what it waits for is completed, or skipped so that the rest goes on.
        only_if: its input has to contain this, as the operator `@>` of jsonb tells; None for no condition.
        unless: its input must not contain this.
        when_unmet: what becomes of it where its input is not so.
        when_exhausted: what becomes of it where its last attempt fails.
        fails_run: whether its failure fails the run.
        is_setup: whether it counts for the rule `all_done_setup_success`.
        map: of a map, what it maps over; None for a step that is executed once.
        child: of a step that is a run of another workflow, which one; None for any other step.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rule: Rule | None = None
    only_if: JsonValue = None
    unless: JsonValue = None
    when_unmet: WhenUnmet = WhenUnmet.SKIP
    when_exhausted: WhenUnmet = WhenUnmet.FAIL
    fails_run: bool = True
    is_setup: bool = False
    map: MapRules | None = None
    child: ChildRules | None = None

    @property
    def said(self) -> dict[str, JsonValue]:
        """What does not go without saying."""
        return self.model_dump(mode="json", exclude_defaults=True)

    @property
    def needs_to_go_on(self) -> bool:
        """Whether its run has to go on after a failure."""
        return self.rule not in BEFORE_FAILURES or not self.fails_run

    @property
    def may_lack_input(self) -> bool:
        """Whether it may run although a step that it waits for has no result."""
        return self.rule not in {None, Rule.ALL_SUCCESS}


NO_RULES = StepRules()

WhenFailed = Literal["stop", "continue"]
FailedBy = Literal["steps", "leaves"]


class WorkflowDefinition(BaseModel):
    """A workflow as the database defines it: its steps and dependencies, in no particular order.

    Attributes:
        slug: its name.
        steps: their slugs.
        deps: what waits for what.
        rules: what is said of steps beside that, by slug; a step that is not there has no rules.
        when_failed: whether a failure ends a run at once; None: unless the rules need it to go on.
        failed_by: whose failure fails a run that goes on: that of any step, or of one that none waits for.
        uses_rules: of the definition of a run: PostgreSQL decides its steps by rules.
        continues: of the definition of a run: it goes on after a failure.
    """

    model_config = ConfigDict(frozen=True)

    slug: str
    steps: tuple[str, ...]
    deps: tuple[Dep, ...]
    rules: dict[str, StepRules] = Field(default_factory=dict)
    when_failed: WhenFailed | None = None
    failed_by: FailedBy = "steps"
    uses_rules: bool = False
    continues: bool = False

    @property
    def maps(self) -> dict[str, MapRules]:
        """What is said of its maps, by slug."""
        return {slug: each.map for slug, each in self.rules.items() if each.map is not None}

    @property
    def children(self) -> dict[str, ChildRules]:
        """What is said of its steps that are runs of other workflows, by slug."""
        return {slug: each.child for slug, each in self.rules.items() if each.child is not None}

    def find_rules(self, slug: str) -> StepRules:
        """Return what is said of a step."""
        return self.rules.get(slug, NO_RULES)

    @property
    def said(self) -> dict[str, JsonValue]:
        """What is said of the workflow and its steps beside steps and deps; empty for a plain workflow."""
        rules: dict[str, JsonValue] = {slug: each.said for slug, each in sorted(self.rules.items()) if each.said}
        said: dict[str, JsonValue] = {"rules": rules} if rules else {}
        if self.when_failed is not None:
            said["when_failed"] = self.when_failed
        if self.failed_by != "steps":
            said["failed_by"] = self.failed_by
        return said

    @cached_property
    def definition_hash(self) -> str:
        """A hash of the definition that does not depend on the order of its rows: 16 hexadecimal digits."""
        rows: list[object] = [self.slug, sorted(self.steps), sorted(self.deps), *([self.said] if self.said else [])]
        canonical = json.dumps(rows, ensure_ascii=False, sort_keys=True)
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()[:16]
