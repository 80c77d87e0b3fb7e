"""Writes a workflow as one plain file, and names what it loses. Slugs and texts of rows only become literals."""

import keyword
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import Literal

from pgflow_prefect.bindings import Kind
from pgflow_prefect.definitions.graph import build_graph, find_descendants, sort_steps
from pgflow_prefect.definitions.maps import find_source
from pgflow_prefect.definitions.model import PAYLOAD, Rule, StepRules, WhenUnmet, WorkflowDefinition, to_identifier
from pgflow_prefect.deployment.plain.source import (
    KEPT,
    HandlerSource,
    find_branches,
    find_whole,
    list_attributes,
    list_names,
    list_top,
)
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.base import RetryPolicy
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.python import AT_ONCE, PythonHandler
from pgflow_prefect.workflow import to_flow_name

Target = Literal["airflow", "prefect"]

_BEGIN = "# The exported file begins here.\n"
_LONGEST_ID = 250
_OURS = re.compile("from (__future__|pgflow_prefect)")
_ODD = re.compile(r"[^A-Za-z0-9_.-]")


@dataclass(frozen=True)
class PlainSchedule:
    """When runs begin.

    Attributes:
        cron: an expression.
        timezone: an IANA name.
    """

    cron: str
    timezone: str


@dataclass(frozen=True)
class Exported:
    """A file.

    Attributes:
        text: Python source.
        lost: sentences on what it lacks.
    """

    text: str
    lost: tuple[str, ...]


@dataclass(frozen=True)
class Exporter:
    """Writes one workflow.

    Attributes:
        definition: the workflow.
        handlers: what the file says of each step.
        kinds: how a row binds a step, by slug.
        source: the handlers' source.
        tags: of the workflow.
        schedule: when runs begin; None for no schedule.
        lost: sentences on what is lost of the deployment.
    """

    definition: WorkflowDefinition
    handlers: Mapping[str, StepHandlers]
    kinds: Mapping[str, str]
    source: HandlerSource
    tags: Sequence[str] = ()
    schedule: PlainSchedule | None = None
    lost: Sequence[str] = ()

    def write(self, target: Target) -> Exported:
        """Return the file for a program."""
        body, lost = (self._write_airflow() if target == "airflow" else self._write_prefect()), self._list_lost(target)
        program = "Airflow 3" if target == "airflow" else "Prefect"
        top = [
            f"# The workflow {_show(self.definition.slug)}, exported from pgflow-prefect for {program}.",
            "# It runs without pgflow-prefect, and so without PostgreSQL as the place of its state.",
            "#",
            "# What is lost:" if lost else "# Nothing is known to be lost.",
            *(f"# - {_show_sentence(each)}" for each in lost),
        ]
        text = "\n".join([*top, "", body]).rstrip("\n") + "\n"
        compile(text, "exported", "exec", dont_inherit=True)
        return Exported(text, tuple(map(_show_sentence, lost)))

    # Both

    def _list_own_names(self) -> list[str]:
        """Return the names that the handlers' source has at its top.

        Raises:
            UsageError: it has one that the exported file needs.
        """
        own = {*list_names(self.source)}
        ours = {name for part in ("common_part", "prefect_part", "airflow_part") for name in list_top(_read_part(part))}
        ours |= {*list_top(_PREFECT_IMPORTS), *list_top(_AIRFLOW_IMPORTS), *_OWN}
        if clashing := sorted(each for each in own & ours if each.startswith("_") or each in KEPT):
            raise UsageError(
                f"the handlers' file has the name {clashing[0]!r}, which the exported file needs: rename it"
            )
        return sorted(own)

    @property
    def _order(self) -> list[str]:
        return sort_steps(build_graph(self.definition))

    @cached_property
    def _branches(self) -> frozenset[str]:
        return find_branches(self.source)

    @cached_property
    def _upstream(self) -> Mapping[str, list[str]]:
        found: dict[str, list[str]] = {}
        for dep in self.definition.deps:
            found.setdefault(dep.downstream, []).append(dep.upstream)
        return found

    def _list_upstream(self, slug: str) -> list[str]:
        return self._upstream.get(slug, [])

    def _find_function(self, slug: str) -> tuple[str | None, str]:
        """Return the name of a step's function, or why it has none."""
        kind, handlers = self.kinds.get(slug), self.handlers.get(slug)
        bound = kind or (str(handlers.bound.kind) if handlers is not None else Kind.EXTERNAL.value)
        rules = self.definition.find_rules(slug)
        if rules.child is not None or bound == Kind.CHILD:
            return None, "it is a run of another workflow"
        if bound != Kind.PYTHON:
            return None, f"it is bound to {bound}, and not to a function in Python"
        if rules.only_if is not None or rules.unless is not None:
            return None, "its condition (only_if, unless) is not in this file"
        if slug not in self.source.functions:
            return None, "its function is not in the handlers' file under its own name, once"
        return self.source.functions[slug], ""

    def _get_policy(self, slug: str) -> RetryPolicy:
        handlers = self.handlers.get(slug)
        return handlers.policy if handlers is not None else RetryPolicy()

    def _get_tags(self, slug: str) -> tuple[str, ...]:
        handlers = self.handlers.get(slug)
        return handlers.task_options.tags if handlers is not None else ()

    def _get_at_once(self, slug: str) -> int:
        handlers = self.handlers.get(slug)
        return handlers.items_at_once if handlers is not None else AT_ONCE

    @property
    def _stops(self) -> bool:
        if self.definition.when_failed is not None:
            return self.definition.when_failed == "stop"
        return not any(each.needs_to_go_on for each in self.definition.rules.values())

    def _list_lost(self, target: Target) -> list[str]:
        lost = [
            "the state of runs in PostgreSQL: exactly once, going on after a crash, and completions by other programs"
        ]
        lost += self.source.lost
        other = "airflow" if target == "prefect" else "prefect"
        if other in self.source.imports:
            lost.append(f"the handlers import {other}, which this program's environment may lack")
        lost += self.lost
        if self.schedule is None and not self.lost:
            lost.append("a schedule: none was found, or none was given by --cron")
        lost += self._list_lost_of_contexts(target)
        for slug in self._order:
            lost += [f"step {slug!r}: {each}" for each in self._list_lost_of(slug, target)]
        if target == "airflow":
            lost += self._list_lost_in_airflow()
        return lost

    def _list_lost_of_contexts(self, target: Target) -> Iterator[str]:
        """Return what handlers read of their context, and do not find any more."""
        read = list_attributes(self.source)
        if "connection" in read:
            yield "context.connection: a handler that uses it fails"
        if "failed_steps" in read and target == "airflow":
            yield "context.failed_steps: a handler that reads it fails"
        dates = sorted(read & {"logical_date", "data_interval_start", "data_interval_end"})
        if dates and target == "prefect":
            yield f"{', '.join(f'context.{each}' for each in dates)}: always None"
        elif "data_interval_start" in dates:
            yield "context.data_interval_start: None, as a DAG with a cron expression has no intervals"

    def _list_lost_of(self, slug: str, target: Target) -> Iterator[str]:
        rules = self.definition.find_rules(slug)
        function, why = self._find_function(slug)
        if function is None:
            yield f"{why}. It fails until you write it"
        if rules.map is not None and rules.map.max_items is not None:
            yield f"at most {rules.map.max_items} items"
        policy, handlers = self._get_policy(slug), self.handlers.get(slug)
        if policy.retry_condition is not None:
            yield "retry_condition_fn: every error is tried again"
        if handlers is not None and handlers.function is not None:
            yield from _list_lost_options(handlers.function)
        if handlers is not None and handlers.task_options.run_name is not None:
            yield "the name of its task run"
        if rules.rule is not None and rules.rule.startswith("one_") and target == "prefect":
            yield f"its rule {rules.rule} waits here until all steps above have ended"

    def _list_lost_in_airflow(self) -> Iterator[str]:
        if self.definition.failed_by == "steps" and not self._stops:
            yield "a failure of any step fails the run: in Airflow, those that no other waits for decide"
        if self._branches and find_whole(self.source):
            yield "Branch(whole=True): it fails where a step below the branches has a rule of its own"
        if any(self._list_upstream(slug) for slug in self.definition.steps):
            yield "a result that is null: a task below takes it for missing, and a map's list is without it"
        if self._stops and not self._fails_fast:
            yield "a failure ends the run at once: fail_fast needs all_success everywhere"
        for slug, task_id in self._make_ids().items():
            if task_id != slug:
                yield f"step {slug!r}: its slug becomes {task_id!r}"
            yield from self._list_lost_of_task(slug)
        if self._make_dag_id() != self.definition.slug:
            yield f"the workflow's slug becomes {self._make_dag_id()!r}"

    def _list_lost_of_task(self, slug: str) -> Iterator[str]:
        rules, policy = self.definition.find_rules(slug), self._get_policy(slug)
        delays = policy.retry_delay_seconds
        if (isinstance(delays, list) and len(set(delays)) > 1) or policy.retry_jitter_factor:
            yield f"step {slug!r}: delays that grow, or are spread at random: the first counts"
        if rules.when_exhausted is not WhenUnmet.FAIL:
            yield f"step {slug!r}: it is skipped where its last attempt fails"
        if rules.map is not None and not self._can_expand(slug):
            yield f"step {slug!r}: {_NO_EXPANSION}. It fails until you write it"
        elif rules.map is not None:
            yield f"step {slug!r}: a map without items is skipped, and the other items go on where one fails"
        if not rules.fails_run:
            yield f"step {slug!r}: fails_run=False"
        if rules.rule is None and self._list_upstream(slug):
            yield f"step {slug!r}: it also goes on beside a step that was skipped without a cascade"

    # Prefect

    def _write_prefect(self) -> str:
        parts = [
            _FUTURE,
            _PREFECT_IMPORTS,
            _read_part("common_part"),
            _read_part("prefect_part"),
            self.source.code,
            "",
        ]
        names = _Names(self._list_own_names())
        tasks = {slug: names.make(f"do_{to_identifier(slug)}") for slug in self._order}
        for slug, name in tasks.items():
            parts.append(self._write_prefect_task(slug, name))
        steps = "".join(self._write_prefect_step(slug, tasks[slug]) for slug in self._order)
        flow = names.make("exported_flow")
        parts.append(
            f"_STEPS = [\n{steps}]\n\n\n@_flow(name={to_flow_name(self.definition.slug)!r})\n"
            f"def {flow}(payload: Any = None) -> dict[str, Any]:\n"
            f'    """Execute the workflow, and return the results of its last steps."""\n'
            f"    run = _Run({{each.slug: each for each in _STEPS}}, {{}} if payload is None else payload, "
            f"{self._stops!r}, {self.definition.failed_by!r})\n"
            "    return run.execute()\n"
        )
        parts.append(self._write_prefect_main(flow))
        return "\n".join(parts)

    def _write_prefect_task(self, slug: str, name: str) -> str:
        policy = self._get_policy(slug)
        options = [f"name={slug!r}"]
        if policy.retries:
            options += [f"retries={policy.retries!r}", f"retry_delay_seconds={policy.retry_delay_seconds!r}"]
        if policy.retry_jitter_factor:
            options.append(f"retry_jitter_factor={policy.retry_jitter_factor!r}")
        if policy.timeout_seconds is not None:
            options.append(f"timeout_seconds={policy.timeout_seconds!r}")
        if tags := self._get_tags(slug):
            options.append(f"tags={[*tags]!r}")
        function, why = self._find_function(slug)
        work = (
            f"return _perform({slug!r}, {self.definition.slug!r}, {function}, _given)"
            if function is not None
            else f"return _refuse({slug!r}, {why!r})"
        )
        return f"\n@_task({', '.join(options)})\ndef {name}(_given: dict[str, Any]) -> Any:\n    {work}\n"

    def _write_prefect_step(self, slug: str, task: str) -> str:
        rules, upstream = self.definition.find_rules(slug), self._list_upstream(slug)
        said = [repr(slug), task, str(self._find_function(slug)[0]), repr(self._name_arguments(slug))]
        if rules.rule is not None:
            said.append(f"rule={rules.rule.value!r}")
        if not rules.fails_run:
            said.append("fails_run=False")
        if rules.is_setup:
            said.append("is_setup=True")
        if rules.when_exhausted is not WhenUnmet.FAIL:
            said.append(f"when_exhausted={rules.when_exhausted.value!r}")
        if rules.map is not None:
            said += [
                "is_map=True",
                f"over={find_source(rules.map, upstream)!r}",
                f"path={rules.map.path!r}",
                f"when_empty={rules.map.when_empty!r}",
                f"when_item_fails={rules.map.when_item_fails!r}",
                f"at_once={self._get_at_once(slug)!r}",
            ]
        return f"    _Step({', '.join(said)}),\n"

    def _name_arguments(self, slug: str) -> dict[str, str]:
        """Return the steps above a step, by the arguments of its handler."""
        is_map = self.definition.find_rules(slug).map is not None
        named = {}
        for each in self._list_upstream(slug):
            name = to_identifier(each)
            name = f"{name}_" if is_map and name == "item" else name
            named[name if name not in named else f"{name} of {each}"] = each  # an edge, though no argument
        return named

    def _write_prefect_main(self, flow: str) -> str:
        if self.schedule is None:
            work = f"print({flow}())"
        else:
            work = (
                f"{flow}.serve(name={to_flow_name(self.definition.slug)!r}, "
                f"schedule=_Cron({self.schedule.cron!r}, timezone={self.schedule.timezone!r}))"
            )
        return f'\nif __name__ == "__main__":\n    {work}\n'

    # Airflow

    @property
    def _fails_fast(self) -> bool:
        rules = [self.definition.find_rules(slug).rule for slug in self.definition.steps]
        return self._stops and all(each in {None, Rule.ALL_SUCCESS} for each in rules)

    def _make_dag_id(self) -> str:
        return _ODD.sub("_", self.definition.slug)[:_LONGEST_ID] or "workflow"

    def _make_ids(self) -> dict[str, str]:
        names = _Names()
        return {slug: names.make(_ODD.sub("_", slug)[: _LONGEST_ID - 4] or "step") for slug in self._order}

    def _can_expand(self, slug: str) -> bool:
        said = self.definition.find_rules(slug).map
        if said is None or said.path:
            return False
        source = find_source(said, self._list_upstream(slug))
        # A task that chooses branches returns their ids to Airflow.
        return source != PAYLOAD and source in self._list_upstream(slug) and source not in self._branches

    def _list_ruled(self, slug: str) -> dict[str, list[str]]:
        """Return, for each step right below a step, those further below that have rules of their own."""
        graph = build_graph(self.definition)
        near = {*graph.successors(slug)}
        ruled = {each for each in graph if self.definition.find_rules(each).rule not in {None, Rule.ALL_SUCCESS}} - near
        return {each: sorted(find_descendants(graph, each) & ruled) for each in sorted(near)}

    def _write_airflow(self) -> str:
        ids, names = self._make_ids(), _Names(["_tasks", *self._list_own_names()])
        branches = self._branches
        functions = {slug: names.make(f"do_{to_identifier(slug)}") for slug in self._order}
        schedule = "None"
        if self.schedule is not None:
            schedule = f"_CronTriggerTimetable({self.schedule.cron!r}, timezone={self.schedule.timezone!r})"
        options = [
            f"dag_id={self._make_dag_id()!r}",
            f"schedule={schedule}",
            "start_date=_datetime(2020, 1, 1, tzinfo=_timezone.utc)",
            "catchup=False",
        ]
        options += [f"tags={[*self.tags]!r}"] if self.tags else []
        options += ["fail_fast=True"] if self._fails_fast else []
        dag = names.make("exported_dag")
        body = [f"@_dag({', '.join(options)})\ndef {dag}() -> None:\n    _tasks: dict[str, Any] = {{}}\n"]
        body += [
            self._write_airflow_task(slug, functions[slug], ids, is_branch=slug in branches) for slug in self._order
        ]
        body += [
            f"    _tasks[{dep.upstream!r}] >> _tasks[{dep.downstream!r}]\n" for dep in sorted(self.definition.deps)
        ]
        setups = [slug for slug in self._order if self.definition.find_rules(slug).is_setup]
        body += [f"    _tasks[{slug!r}].as_setup()\n" for slug in setups]
        parts = [
            _FUTURE,
            _AIRFLOW_IMPORTS,
            _read_part("common_part"),
            _read_part("airflow_part"),
            self.source.code,
            "",
            "",
        ]
        return "\n".join([*parts, *body, "", f"{dag}()"])

    def _write_airflow_task(self, slug: str, function: str, ids: Mapping[str, str], *, is_branch: bool) -> str:
        rules, policy = self.definition.find_rules(slug), self._get_policy(slug)
        options = [f"task_id={ids[slug]!r}", f"trigger_rule={_find_trigger_rule(rules)!r}"]
        options.append(f"retries={policy.retries!r}")
        if policy.retries:
            delays = policy.retry_delay_seconds
            first = (delays[0] if delays else 0) if isinstance(delays, list) else delays
            options.append(f"retry_delay=_timedelta(seconds={float(first)!r})")
        if policy.timeout_seconds is not None:
            options.append(f"execution_timeout=_timedelta(seconds={float(policy.timeout_seconds)!r})")
        is_map = rules.map is not None
        if is_map:
            options.append(f"max_active_tis_per_dagrun={self._get_at_once(slug)!r}")
        handler, why = self._find_function(slug)
        if is_map and not self._can_expand(slug):
            handler, why = None, _NO_EXPANSION
        upstream = {
            name: (each, ids[each], self.definition.find_rules(each).map is not None)
            for name, each in self._name_arguments(slug).items()
        }
        call = f"_perform({slug!r}, {self.definition.slug!r}, {handler}, {upstream!r}, _context"
        expands = is_map and self._can_expand(slug)
        if handler is None:
            work = f"return _refuse({slug!r}, {why!r})"
        elif is_branch and not is_map:
            below = {dep.downstream: ids[dep.downstream] for dep in self.definition.deps if dep.upstream == slug}
            work = f'return _choose(_context["ti"], {call}), {below!r}, {self._list_ruled(slug)!r})'
        else:
            work = f"return _keep({slug!r}, {call}{', item=_item' if expands else ''}))"
        decorator = "_task.branch" if is_branch and not is_map and handler is not None else "_task"
        arguments = "_item: Any, **_context: Any" if expands else "**_context: Any"
        made = f"{function}()"
        if expands:
            assert rules.map is not None
            made = f"{function}.expand(_item=_tasks[{find_source(rules.map, self._list_upstream(slug))!r}])"
        return (
            f"\n    @{decorator}({', '.join(options)})\n    def {function}({arguments}) -> Any:\n        {work}\n\n"
            f"    _tasks[{slug!r}] = {made}\n"
        )


_OWN = ("_STEPS", "_tasks", "_given", "_context", "_item")
"""Names that are written here and in none of the parts."""

_NO_EXPANSION = "it maps over a part of a result, over the payload, or over the result of a step with branches"
_FUTURE = "from __future__ import annotations\n"
_PREFECT_IMPORTS = """\
from prefect import flow as _flow
from prefect import task as _task
from prefect.schedules import Cron as _Cron
"""
_AIRFLOW_IMPORTS = """\
from datetime import datetime as _datetime
from datetime import timedelta as _timedelta
from datetime import timezone as _timezone

from airflow.sdk import CronTriggerTimetable as _CronTriggerTimetable
from airflow.sdk import dag as _dag
from airflow.sdk import task as _task
"""


def _list_lost_options(function: PythonHandler) -> Iterator[str]:
    if function.cache is not None:
        yield "results of earlier runs (cache_key_fn)"
    if function.results.storage is not None:
        yield "the storage of its result"


def _find_trigger_rule(rules: StepRules) -> str:
    """Return Airflow's rule; it has none for a step that goes on beside what was skipped without a cascade."""
    if rules.rule is Rule.ALWAYS and rules.map is not None:  # Airflow refuses it, as a map waits for its array
        return Rule.ALL_DONE.value
    return rules.rule.value if rules.rule is not None else Rule.ALL_SUCCESS.value


def _read_part(name: str) -> str:
    """Return the part of one of the files beside this one that an exported file gets, with its imports."""
    text = files("pgflow_prefect.deployment.plain").joinpath(f"{name}.py").read_text(encoding="utf-8")
    above, _, part = text.partition(_BEGIN)
    imports = [line for line in above.splitlines() if line.startswith(("import ", "from ")) and not _OURS.match(line)]
    return "\n".join([*imports, "", part])


def _show(text: str) -> str:
    """Return a text for a comment: on one line, without anything that could end it."""
    return ascii(text)


def _show_sentence(text: str) -> str:
    return "".join(each if each.isprintable() and each.isascii() else ascii(each)[1:-1] for each in text)


class _Names:
    """Gives names out, each once."""

    def __init__(self, taken: Sequence[str] = ()) -> None:
        self._taken = {*taken, *keyword.kwlist}

    def make(self, wanted: str) -> str:
        name, number = wanted, 1
        while name in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name)
        return name
