"""What users write against: a workflow's handlers, and the Prefect flow that they make."""

import sys
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from datetime import timedelta
from functools import cached_property, partial
from hashlib import sha256
from inspect import cleandoc
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, TypeVar, get_args, overload
from uuid import UUID

from prefect import Flow, Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from pydantic import JsonValue

from pgflow_prefect.bindings import AnyBinding, WorkPool
from pgflow_prefect.definitions.from_handlers import derive_definition, find_missing_deps
from pgflow_prefect.definitions.graph import find_problems
from pgflow_prefect.definitions.maps import find_map_problems, find_sources, resolve_rules
from pgflow_prefect.definitions.model import (
    AnyWhenEmpty,
    AnyWhenItemFails,
    FailedBy,
    StepRules,
    WhenFailed,
    WorkflowDefinition,
    to_identifier,
)
from pgflow_prefect.definitions.rules import find_missing_defaults, find_rule_problems
from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.flow import Execution
from pgflow_prefect.execution.flow_options import (
    AnyFlow,
    EventLoopTaskRunner,
    find_option_problems,
    find_unshown_problems,
    take_options,
)
from pgflow_prefect.execution.load_result import load_result
from pgflow_prefect.execution.process.host import Host
from pgflow_prefect.execution.process.prewarmed_host import open_ahead
from pgflow_prefect.execution.result_options import ResultSerializer, ResultStorage, make_result_options
from pgflow_prefect.execution.task_runner import AnyTaskRunner
from pgflow_prefect.execution.workflow_flow import AsyncFlow, WorkflowFlow
from pgflow_prefect.handlers.base import RetryPolicy
from pgflow_prefect.handlers.caching import make_cache_options
from pgflow_prefect.handlers.choice import StepHandlers
from pgflow_prefect.handlers.python import AT_ONCE, PythonHandler
from pgflow_prefect.handlers.run_names import Naming
from pgflow_prefect.handlers.step_options import (
    AnyRule,
    AnyWhen,
    check_at_once,
    choose,
    make_map,
    make_rules,
    refuse_text,
)
from pgflow_prefect.handlers.task_options import (
    TaskOptions,
    check_task_run_name,
    find_naming_problems,
    make_task_options,
)
from pgflow_prefect.prefect_api.ids import parse_run_id, parse_schedule_id
from pgflow_prefect.recording import RecordLater
from pgflow_prefect.settings import Settings
from pgflow_prefect.state_names import Observer
from pgflow_prefect.wording import write_code

F = TypeVar("F", bound=Callable[..., Any])

CacheKey: TypeAlias = Callable[[TaskRunContext, dict[str, Any]], str | Awaitable[str | None] | None]
"""Prefect's `cache_key_fn`; it may be async, too."""

RetryCondition: TypeAlias = Callable[[Task[..., Any], TaskRun, State[Any]], bool | Awaitable[bool]]
"""Prefect's `retry_condition_fn`."""

_MADE_FOR_ROWS = "pgflow_prefect.deployment."
"""The beginning of the names of modules that make workflows without a file. Their docstrings do not describe these."""

_FORBIDDEN_IN_FLOW_NAMES = frozenset("/%&<>")


def to_flow_name(slug: str) -> str:
    """Return the name of a workflow's flow in Prefect: its slug, if Prefect accepts that.

    Otherwise, forbidden characters become `_`, and the name ends with a hash of the slug: `a/b` differs from `a_b`.
    """
    name = "".join(each if each.isprintable() and each not in _FORBIDDEN_IN_FLOW_NAMES else "_" for each in slug)
    return name if name == slug else f"{name}-{sha256(slug.encode()).hexdigest()[:8]}"


class Workflow:
    """The handlers of one workflow. The database defines its steps and their dependencies.

    `definition` is the workflow as the handlers define it. `pgflow-prefect push` writes it into the database.

    Example:
        ```python
        workflow = Workflow("email_campaign")

        @workflow.step(retries=3, retry_delay_seconds=[1, 10, 60], timeout_seconds=300)
        async def send_emails(prepare_list: list[Recipient], payload: Campaign) -> SendReport: ...

        flow = workflow.flow
        ```
    """

    def __init__(
        self,
        slug: str,
        *,
        description: str | None = None,
        tags: Collection[str] = (),
        task_runner: AnyTaskRunner | None = None,
        record: RecordLater | None = None,
        when_failed: WhenFailed | None = None,
        failed_by: FailedBy = "steps",
        result_storage: ResultStorage | None = None,
        result_serializer: ResultSerializer | None = None,
    ) -> None:
        """Begin with no handlers.

        Args:
            slug: the workflow.
            description: a text for Prefect's UI; by default, the docstring of the module.
            tags: the tags of its deployment.
            task_runner: a task runner of Prefect that executes the handlers in Python, such as
                `DaskTaskRunner(address=…)`. By default, the flow run's event loop and its threads execute them, which
                is fastest.
            record: how a worker shows runs in Prefect that it executes without telling Prefect. Without it, each run
                is shown while it is executed. See `pgflow-prefect guide recording`.
            when_failed: `stop`: a failure ends a run at once. `continue`: what does not depend on it goes on. None:
                stop, unless the rule of a step needs the run to go on.
            failed_by: whose failure fails a run that goes on: `steps`, that of any step, or `leaves`, that of a step
                that none waits for.
            result_storage: the storage of all its steps' results that name none; see `step`.
            result_serializer: the serializer of all its steps' results that name none; see `step`.

        Raises:
            UsageError: the tags are one text, `record` is no `RecordLater`, or there is no such choice, storage or
                serializer.
        """
        refuse_text("tags", tags, "a list")
        if record is not None and not isinstance(record, RecordLater):
            raise UsageError(f"record={record!r} is no RecordLater: write record=RecordLater(one_in=100), say")
        self.when_failed = choose("when_failed", when_failed, (None, *get_args(WhenFailed)))
        self.failed_by = choose("failed_by", failed_by, get_args(FailedBy))
        self.slug = slug
        self.description = description
        self.tags = tuple(tags)
        self.record = record
        self._results = make_result_options(result_storage, result_serializer)
        self._task_runner: AnyTaskRunner = task_runner or EventLoopTaskRunner()
        self._handlers: dict[str, PythonHandler] = {}
        self._bindings: dict[str, AnyBinding] = {}
        self._after: dict[str, tuple[str, ...]] = {}
        self._rules: dict[str, StepRules] = {}
        self._task_options: dict[str, TaskOptions] = {}
        self._at_once: dict[str, int] = {}  # of maps that are bound
        caller = sys._getframe(1)
        self._globals = caller.f_globals

    def __getstate__(self) -> dict[str, object]:
        """Leave out what no other process could use. A handler may refer to its workflow when it is pickled."""
        return {name: value for name, value in vars(self).items() if name not in {"flow", "_globals"}} | {
            "_globals": {}
        }

    def __repr__(self) -> str:
        return f"Workflow({self.slug!r}, steps={list(self.step_handlers)})"

    @overload
    def step(self, function: F, /) -> F: ...

    @overload
    def step(
        self,
        slug: str | None = None,
        /,
        *,
        after: Collection[str] = (),
        retries: int = 0,
        retry_delay_seconds: float | list[float] = 0,
        retry_jitter_factor: float | None = None,
        timeout_seconds: float | None = None,
        retry_condition_fn: RetryCondition | None = None,
        tags: Collection[str] = (),
        task_run_name: Naming | None = None,
        result_storage: ResultStorage | None = None,
        result_serializer: ResultSerializer | None = None,
        cache_key_fn: CacheKey | None = None,
        cache_expiration: timedelta | None = None,
        unimplemented: bool = False,
        shadow: bool = False,
        rule: AnyRule | None = None,
        only_if: JsonValue = None,
        unless: JsonValue = None,
        when_unmet: AnyWhen = "skip",
        when_exhausted: AnyWhen = "fail",
        fails_run: bool = True,
        is_setup: bool = False,
    ) -> Callable[[F], F]: ...

    def step(
        self,
        slug: str | F | None = None,
        /,
        *,
        after: Collection[str] = (),
        retries: int = 0,
        retry_delay_seconds: float | list[float] = 0,
        retry_jitter_factor: float | None = None,
        timeout_seconds: float | None = None,
        retry_condition_fn: RetryCondition | None = None,
        tags: Collection[str] = (),
        task_run_name: Naming | None = None,
        result_storage: ResultStorage | None = None,
        result_serializer: ResultSerializer | None = None,
        cache_key_fn: CacheKey | None = None,
        cache_expiration: timedelta | None = None,
        unimplemented: bool = False,
        shadow: bool = False,
        rule: AnyRule | None = None,
        only_if: JsonValue = None,
        unless: JsonValue = None,
        when_unmet: AnyWhen = "skip",
        when_exhausted: AnyWhen = "fail",
        fails_run: bool = True,
        is_setup: bool = False,
    ) -> F | Callable[[F], F]:
        """Make a function the handler of a step.

        The function's arguments are bound by name: an upstream step's slug, as an identifier, gets that step's result;
        `payload` the run's payload; `upstream` the results of all upstream steps by slug; `context` a `StepContext`, or
        an `AsyncStepContext` where the function is async.
        An argument with a default may name no upstream step: it keeps its default then. Annotations are checked by
        pydantic, on the way in and on the way out. A sync function runs in a thread.

        Args:
            slug: the step; the function's name where it is not given.
            after: the slugs of the steps that it waits for and whose results no argument takes by name.
            retries: attempts after the first one, if the function raises.
            retry_delay_seconds: before each of them, or one for each (the last one repeats).
            retry_jitter_factor: spreads a delay at random, by up to this factor.
            timeout_seconds: for each attempt. A sync function that takes longer is left alone, not stopped.
            tags: the task run has them beside the tags of its flow run. Prefect's limits of these tags count.
            task_run_name: the name of the task run in Prefect: a template such as `"order {payload[id]}"`, or a
                function, as for Prefect's tasks. By default, the step's slug.
            retry_condition_fn: called with the task, the task run and the failed state, as in Prefect, while attempts
                are left. The step is tried again only if it returns true. It may be async.
            result_storage: where its results are kept: a storage block of Prefect, the name of one such as
                `s3-bucket/results`, a URL of fsspec or a path. Its row then has a small reference, and the next Python
                steps get the value. By default, that of the workflow. See `pgflow-prefect guide results`.
            result_serializer: the form in which they are kept: a serializer of Prefect or the name of one, such as
                `pickle` or `compressed/json`. By default, that of the workflow, else `json`, the JSON of a row.
            cache_key_fn: called with the context and a dict of the arguments, as in Prefect. If a run of the same
                definition has completed the step with the key that it returns, the step takes over that result, and
                Prefect shows it as Cached. None means no cache this time. See `pgflow-prefect guide results`.
            cache_expiration: how long after its end a result may be taken over; by default, for ever.
            unimplemented: the function is a stub. It counts as no handler, and the step as external. `pgflow-prefect
                import` writes this into its stubs: take it out when the function does the work.
            shadow: the function may run beside an external worker, to compare their results: see
                `pgflow-prefect shadow`. What it writes through `context.connection` is rolled back then; whatever else
                it does, it has to leave out where `context.shadow` is set.
            rule: when the step runs, by how the steps that it waits for have ended: `all_done`, say. Without one it
                runs when they are completed, or skipped without a cascade. See `pgflow-prefect guide rules`.
            only_if: its input has to contain this, or it does not run: `{"look": {"rows": 0}}`. The input is the
                payload where it waits for no step, else `{"payload": …, "<upstream step>": its result, …}`.
            unless: its input must not contain this.
            when_unmet: what becomes of it then: `skip`, `skip-cascade` (what waits for it is skipped, too) or `fail`.
            when_exhausted: what becomes of it where its last attempt fails: `fail`, `skip` or `skip-cascade`.
            fails_run: false: its failure never fails the run.
            is_setup: whether it counts for the rule `all_done_setup_success`.

        Raises:
            UsageError: the step has a handler already, the function's arguments can't be bound by name, or there is
                no such storage or serializer.
        """
        if callable(slug):
            return self.step()(slug)
        refuse_text("after", after, "a list of slugs")
        if retry_condition_fn is not None and not callable(retry_condition_fn):
            raise UsageError(
                f"retry_condition_fn={retry_condition_fn!r} is no function: give one as for Prefect's tasks"
            )
        rules = make_rules(
            rule=rule,
            only_if=only_if,
            unless=unless,
            when_unmet=when_unmet,
            when_exhausted=when_exhausted,
            fails_run=fails_run,
            is_setup=is_setup,
        )
        policy = RetryPolicy(retries, retry_delay_seconds, retry_jitter_factor, timeout_seconds, retry_condition_fn)
        task_options = make_task_options(slug or "", tags, task_run_name)
        results = make_result_options(result_storage, result_serializer).or_else(self._results)

        def make_handler(step_slug: str, function: F) -> PythonHandler:
            cache = make_cache_options(function, cache_key_fn, cache_expiration)
            return PythonHandler(
                step_slug,
                function,
                policy=policy,
                unimplemented=unimplemented,
                shadow=shadow,
                results=results,
                cache=cache,
            )

        return lambda function: self._register(slug, function, make_handler, after=after, said=(rules, task_options))

    def _register(
        self,
        slug: str | None,
        function: F,
        make_handler: Callable[[str, F], PythonHandler],
        *,
        after: Collection[str],
        said: tuple[StepRules, TaskOptions],
    ) -> F:
        """Make a function the handler of a step, and return it."""
        step_slug = slug if slug is not None else getattr(function, "__name__", None)
        if step_slug is None:
            raise UsageError(f"{function!r} has no name of its own: name its step, @workflow.step('some-slug')")
        if step_slug in self._handlers and not self._is_run_again(self._handlers[step_slug].function, function):
            raise UsageError(f"step {step_slug!r} of workflow {self.slug!r} has two handlers: remove one")
        if self._handlers.pop(step_slug, None) is not None:
            self._after.pop(step_slug, None)
            self._rules.pop(step_slug, None)
            self._task_options.pop(step_slug, None)
        handler = make_handler(step_slug, function)
        rules, task_options = said
        check_task_run_name(step_slug, task_options, [name for name in handler.arguments if name != "context"])
        self._say(step_slug, rules, task_options)
        self._handlers[step_slug] = handler
        if after:
            self._after[step_slug] = (*self._after.get(step_slug, ()), *after)
        return function

    def map(
        self,
        slug: str | None = None,
        /,
        *,
        over: str,
        max_items: int | None = None,
        when_empty: AnyWhenEmpty = "complete",
        when_item_fails: AnyWhenItemFails = "stop",
        at_once: int = AT_ONCE,
        after: Collection[str] = (),
        retries: int = 0,
        retry_delay_seconds: float | list[float] = 0,
        retry_jitter_factor: float | None = None,
        timeout_seconds: float | None = None,
        retry_condition_fn: RetryCondition | None = None,
        tags: Collection[str] = (),
        unimplemented: bool = False,
        rule: AnyRule | None = None,
        only_if: JsonValue = None,
        unless: JsonValue = None,
        when_unmet: AnyWhen = "skip",
        when_exhausted: AnyWhen = "fail",
        fails_run: bool = True,
        is_setup: bool = False,
    ) -> Callable[[F], F]:
        """Make a function the handler of a map: a step that is executed once for each item of an array.

        The argument `item` gets one item, which pydantic checks. `context` gets an `ItemContext`, or an
        `AsyncItemContext` where the function is async. The other arguments are bound as in `step`; all items share
        them, so do not change them. The step's result is the array of the items' results, in the order of the items. An
        item that raises `Skip` is left out of it.

        Example:
            ```python
            @workflow.map(over="orders", retries=3, at_once=50)
            async def price(item: Order, rates: Rates, context: AsyncItemContext) -> Price: ...
            ```

        Args:
            slug: the step; the function's name where it is not given.
            over: where the array is: the slug of an upstream step, `payload`, or a path in either: `payload.rows`.
            max_items: an array with more items fails the step; without it, one with more than a million does.
            when_empty: what becomes of the step where there are no items: `complete` with the result `[]`, `skip` or
                `skip-cascade`.
            when_item_fails: what becomes of it where the last attempt of an item fails. `stop`: it fails at once.
                `continue`: it fails after the other items have ended. `skip`: the item is left out of the result.
            at_once: the most items that a process executes at the same time.
            after: as of `step`.
            retries: attempts of each item after its first one.
            retry_delay_seconds: as of `step`, for each item.
            retry_jitter_factor: as of `step`.
            timeout_seconds: for each attempt of an item.
            retry_condition_fn: as of `step`, for each item.
            tags: as of `step`, of the map's task run.
            unimplemented: as of `step`.
            rule: as of `step`.
            only_if: as of `step`.
            unless: as of `step`.
            when_unmet: as of `step`.
            when_exhausted: as of `step`: what becomes of the map where it fails.
            fails_run: as of `step`.
            is_setup: as of `step`.

        Raises:
            UsageError: the step has a handler already, an option is no choice, or the function's arguments can't be
                bound by name.
        """
        refuse_text("after", after, "a list of slugs")
        rules = make_rules(
            rule=rule,
            only_if=only_if,
            unless=unless,
            when_unmet=when_unmet,
            when_exhausted=when_exhausted,
            fails_run=fails_run,
            is_setup=is_setup,
            map=make_map(over, max_items, when_empty, when_item_fails),
        )
        policy = RetryPolicy(retries, retry_delay_seconds, retry_jitter_factor, timeout_seconds, retry_condition_fn)
        handler = partial(
            PythonHandler,
            policy=policy,
            unimplemented=unimplemented,
            is_map=True,
            at_once=check_at_once(at_once),
        )
        task_options = make_task_options(slug or "", tags, None)
        return lambda function: self._register(slug, function, handler, after=after, said=(rules, task_options))

    def _say(self, slug: str, rules: StepRules, task_options: TaskOptions) -> None:
        """Note what is said of a step, by its decorator or by `bind`: one of them."""
        if rules.said:
            self._rules[slug] = rules
        if task_options.is_said:
            self._task_options[slug] = task_options

    def bind(
        self,
        slug: str,
        binding: AnyBinding,
        *,
        after: Collection[str] = (),
        tags: Collection[str] = (),
        task_run_name: Naming | None = None,
        rule: AnyRule | None = None,
        only_if: JsonValue = None,
        unless: JsonValue = None,
        when_unmet: AnyWhen = "skip",
        when_exhausted: AnyWhen = "fail",
        fails_run: bool = True,
        is_setup: bool = False,
    ) -> None:
        """Have a step done by something else than a function here; a row of `pgflow_prefect.bindings` wins over this.

        Example: `workflow.bind("send", HttpEndpoint("https://example.org/send", token_env="SEND_TOKEN"))`

        Args:
            slug: the step.
            binding: `SqlFunction`, `HttpEndpoint`, `Queue`, `Command`, `WorkPool` or `External`.
            after: the slugs of the steps that it waits for, where this file defines the workflow.
            tags: as of `step`.
            task_run_name: as of `step`. Its values are `payload`, `upstream` and the upstream steps.
            rule: as of `step`.
            only_if: as of `step`.
            unless: as of `step`.
            when_unmet: as of `step`.
            when_exhausted: as of `step`.
            fails_run: as of `step`.
            is_setup: as of `step`.

        Raises:
            UsageError: the step is bound already.
        """
        refuse_text("after", after, "a list of slugs")
        if slug in self._bindings and not self._is_interactive:
            raise UsageError(f"step {slug!r} of workflow {self.slug!r} is bound twice: remove one")
        rules = make_rules(
            rule=rule,
            only_if=only_if,
            unless=unless,
            when_unmet=when_unmet,
            when_exhausted=when_exhausted,
            fails_run=fails_run,
            is_setup=is_setup,
        )
        if getattr(binding, "batch", None) is not None:
            raise UsageError(f"step {slug!r} is bound with batch, which only maps have: use bind_map(…, over=…)")
        self._bind(slug, binding, rules, after, make_task_options(slug, tags, task_run_name))

    def _bind(
        self,
        slug: str,
        binding: AnyBinding,
        rules: StepRules,
        after: Collection[str],
        task_options: TaskOptions,
    ) -> None:
        refuse_text("after", after, "a list of slugs")
        if slug in self._bindings and not self._is_interactive:
            raise UsageError(f"step {slug!r} of workflow {self.slug!r} is bound twice: remove one")
        self._bindings[slug] = binding
        self._say(slug, rules, task_options)
        if after:
            self._after[slug] = (*self._after.get(slug, ()), *after)

    def bind_map(
        self,
        slug: str,
        binding: AnyBinding,
        *,
        over: str,
        max_items: int | None = None,
        when_empty: AnyWhenEmpty = "complete",
        when_item_fails: AnyWhenItemFails = "stop",
        at_once: int = AT_ONCE,
        after: Collection[str] = (),
        tags: Collection[str] = (),
        rule: AnyRule | None = None,
        only_if: JsonValue = None,
        unless: JsonValue = None,
        when_unmet: AnyWhen = "skip",
        when_exhausted: AnyWhen = "fail",
        fails_run: bool = True,
        is_setup: bool = False,
    ) -> None:
        """Have the items of a map done by something else than a function here.

        A function or an endpoint gets `{"payload": …, "item": …, "<other upstream step>": …}` for each item. With
        `batch=n` in its binding it gets `items`, an array of up to `n`, and returns an array of their results. What the
        map maps over is not part of the rest.

        Example: `workflow.bind_map("label", SqlFunction("shop.label", batch=500), over="price")`

        Args:
            slug: the step.
            binding: `SqlFunction`, `HttpEndpoint`, `Queue` or `External`, with the retries and the time-out of an item.
            over: as of `map`.
            max_items: as of `map`.
            when_empty: as of `map`.
            when_item_fails: as of `map`.
            at_once: the most calls at the same time in a process.
            after: the slugs of further steps that it waits for.
            tags: as of `step`, of the map's task run.
            rule: as of `step`.
            only_if: as of `step`.
            unless: as of `step`.
            when_unmet: as of `step`.
            when_exhausted: as of `step`.
            fails_run: as of `step`.
            is_setup: as of `step`.

        Raises:
            UsageError: the step is bound already, or an option is no choice.
        """
        rules = make_rules(
            rule=rule,
            only_if=only_if,
            unless=unless,
            when_unmet=when_unmet,
            when_exhausted=when_exhausted,
            fails_run=fails_run,
            is_setup=is_setup,
            map=make_map(over, max_items, when_empty, when_item_fails),
        )
        if isinstance(binding, WorkPool):
            raise UsageError(f"step {slug!r} is a map, and its items can't be done on a work pool: bind it otherwise")
        self._at_once[slug] = check_at_once(at_once)
        self._bind(slug, binding, rules, after, make_task_options(slug, tags, None))

    @property
    def _is_interactive(self) -> bool:
        """Whether a cell of a notebook has made this object, or a line at a prompt: users run these again."""
        return "__file__" not in self._globals

    def _is_run_again(self, former: Callable[..., Any], function: Callable[..., Any]) -> bool:
        """Tell whether a cell that defines a handler was run again: it defines a function of the same name."""
        names = [getattr(each, "__qualname__", None) for each in (former, function)]
        return self._is_interactive and names[0] is not None and names[0] == names[1]

    @property
    def source(self) -> Path | None:
        """The file whose code made this object; None if no file did, for example in a notebook."""
        file = self._globals.get("__file__")
        return Path(file).resolve() if isinstance(file, str) else None

    @property
    def _relative_source(self) -> str | None:
        """The file, as a process elsewhere finds it from its own directory; absolute where it is not beneath this."""
        source = self.source
        if source is None:
            return None
        here = Path.cwd()
        return str(source.relative_to(here) if source.is_relative_to(here) else source)

    @property
    def bindings(self) -> Mapping[str, AnyBinding]:
        """The bindings that `bind` set, by step slug."""
        return dict(self._bindings)

    @property
    def after(self) -> Mapping[str, tuple[str, ...]]:
        """The steps that `after` names, by step slug: the step waits for them, too."""
        return dict(self._after)

    @property
    def step_handlers(self) -> dict[str, StepHandlers]:
        """The handlers and bindings of each step that this file knows, by step slug."""
        handlers, bindings, options = self.handlers, self._bindings, self._task_options
        return {
            slug: StepHandlers(
                slug,
                handlers.get(slug),
                bindings.get(slug),
                options.get(slug, TaskOptions()),
                self._at_once.get(slug),
                self._relative_source,
            )
            for slug in {**handlers, **bindings}
        }

    @property
    def handlers(self) -> Mapping[str, PythonHandler]:
        """The handlers by step slug, without stubs."""
        return {slug: handler for slug, handler in self._handlers.items() if not handler.unimplemented}

    def find_function(self, slug: str) -> PythonHandler | None:
        """Return the function of a step, which may be a stub; None if this file has none."""
        return self._handlers.get(slug)

    @property
    def stubs(self) -> list[str]:
        """The slugs of the steps whose handler is still a stub."""
        return [slug for slug, handler in self._handlers.items() if handler.unimplemented]

    @property
    def known_steps(self) -> list[str]:
        """The slugs of the steps that this file knows: those with a function or a stub, and those that `bind` binds."""
        return list(dict.fromkeys([*self._handlers, *self._bindings]))

    @property
    def definition(self) -> WorkflowDefinition:
        """The workflow as its handlers define it. A step waits for the steps that its arguments and `after` name.

        Raises:
            InvalidDefinitionError: with a sentence for each problem.
        """
        arguments = {slug: handler.arguments for slug, handler in self._handlers.items()}
        optional = {slug: handler.optional for slug, handler in self._handlers.items()}
        rules = resolve_rules(self._rules, self.known_steps)
        derived = derive_definition(
            self.slug, self.known_steps, arguments, self._after, optional, sources=find_sources(rules)
        )
        return derived.model_copy(update={"rules": rules, "when_failed": self.when_failed, "failed_by": self.failed_by})

    def find_problems(self, definition: WorkflowDefinition) -> list[str]:
        """Return a sentence for each reason why these handlers can't execute this definition.

        A step without a handler is external, and so is a stub: neither is a problem.
        """
        problems = []
        objects = self._find_objects(definition)
        for slug, handler in self.handlers.items():
            try:
                handler.check_annotations(objects.get(slug, ()))
            except UsageError as error:
                problems.append(str(error))
        problems += self._find_flow_problems() if self._flow_is_made else []
        problems += self.find_recording_problems() if self.record is not None else []
        # A stub's arguments count, because it will become a handler.
        arguments = {slug: handler.required for slug, handler in self._handlers.items()}
        arguments |= {slug: () for slug in self._bindings if slug not in arguments}
        return [
            *find_problems(definition, arguments),
            *find_missing_deps(definition, self._after),
            *find_rule_problems(definition, resolve_rules(self._rules, definition.steps)),
            *find_map_problems(definition, {slug: each.is_map for slug, each in self.handlers.items()}),
            *find_naming_problems(definition, self._task_options, self._handlers),
            *find_missing_defaults(definition, {slug: each.required for slug, each in self.handlers.items()}),
            *problems,
        ]

    def _find_objects(self, definition: WorkflowDefinition) -> Mapping[str, set[str]]:
        """Return, by step slug, the arguments whose values are no JSON, but those of a serializer such as pickle."""
        passing = {slug for slug, each in self.handlers.items() if each.results.passes_objects}
        objects: dict[str, set[str]] = {}
        for dep in definition.deps:
            if dep.upstream in passing:
                objects.setdefault(dep.downstream, {"upstream"}).add(to_identifier(dep.upstream))
        return objects

    def _find_flow_problems(self) -> Iterator[str]:
        try:
            yield from find_option_problems(self.given_flow, self.flow.name)
        except UsageError as error:
            yield str(error)

    def find_recording_problems(self) -> list[str]:
        """Return a sentence for each reason why runs can't be executed without telling Prefect."""
        try:
            return [*find_unshown_problems(self.given_flow)]
        except UsageError as error:
            return [str(error)]

    @cached_property
    def flow(self) -> AsyncFlow:
        """The Prefect flow that executes runs of this workflow. You can call it, serve it and deploy it.

        With `payload`, any JSON value, it creates a run. With `run_id`, it executes a run that exists. It returns the
        results of the leaf steps, by slug. It finds the database as the command line does: by `PGFLOW_DSN`, libpq's
        `PG*` variables, or the embedded server.
        """
        return self.make_flow()

    async def load_result(self, run_id: UUID, step_slug: str, settings: Settings | None = None) -> Any:  # noqa: ANN401
        """Return the result of a completed step, also if it is in a storage. A flow returns references to these.

        Example: `frame = await workflow.load_result(run_id, "load")`

        Args:
            run_id: a run of this workflow.
            step_slug: the step.
            settings: by default, those of the environment.

        Raises:
            UnknownRunError: there is no such run.
            UsageError: it is a run of another workflow, or the step is not completed.
            StoredResultError: the object is missing, or has changed.
            StorageError: the storage does not answer, or refuses.
        """
        return await load_result(settings or Settings(), self.slug, self.step_handlers, run_id, step_slug)

    @property
    def given_flow(self) -> AnyFlow:
        """The flow of the user's file: `flow`, or the one that the file made of it with `with_options`.

        Raises:
            UsageError: the file has several flows, and none is called `flow`.
        """
        function = self.flow.fn  # every flow that was made of ours has the same function
        made = {
            name: value for name, value in self._globals.items() if isinstance(value, Flow) and value.fn is function
        }
        if "flow" in made:
            return made["flow"]
        if len({id(each) for each in made.values()}) > 1:
            raise UsageError(
                f"its file has several flows, {' and '.join(made)}: give the name `flow` to the one whose options and "
                "hooks its runs are to have"
            )
        return next(iter(made.values()), self.flow)

    @property
    def _flow_is_made(self) -> bool:
        return "flow" in vars(self)

    def make_flow(
        self, settings: Settings | None = None, observe: Observer | None = None, host: Host | None = None
    ) -> AsyncFlow:
        """Return a flow with its own settings and an observer, and with the options and hooks of `given_flow`.

        Args:
            settings: by default, each run reads them from the environment when it begins.
            observe: called with a step's slug and the name of its new state.
            host: the process, if it executes several runs at once.
        """

        async def flow(
            payload: Any = None,  # noqa: ANN401  any JSON value
            run_id: UUID | None = None,
            schedule_id: UUID | None = None,
        ) -> Any:  # noqa: ANN401
            execution = Execution(self.slug, self.step_handlers, settings or Settings(), observe or _ignore, host)
            return await execution.execute(
                {} if payload is None else payload, parse_run_id(run_id), parse_schedule_id(schedule_id)
            )

        # Prefect records where to load a flow from by its function's module and name: the user's, not ours.
        module = str(self._globals.get("__name__", "__main__"))
        flow.__module__ = module
        flow.__qualname__ = f"{name}.flow" if (name := self._find_own_name()) else "flow"
        flow.__name__ = to_identifier(self.slug)
        default = f"The workflow {write_code(self.slug)} of pgflow."
        flow.__doc__ = self.description or self._find_docstring() or default
        made = WorkflowFlow(
            flow,
            name=to_flow_name(self.slug),
            task_runner=self._task_runner,
            persist_result=False,
            log_prints=True,
            # A payload is any JSON. Prefect would take an object with "$ref" for a block, and look for the block.
            validate_parameters=False,
        )
        if self._flow_is_made:
            take_options(made, self.given_flow)
        if host is None:
            made.before = partial(open_ahead, settings)
        made._entrypoint = f"{self._globals.get('__file__', module)}:{flow.__qualname__}"
        return made

    def _find_docstring(self) -> str | None:
        """Return the docstring of the user's module, which says what its workflow does."""
        if str(self._globals.get("__name__")).startswith(_MADE_FOR_ROWS):
            return None
        text = self._globals.get("__doc__")
        return cleandoc(text) if isinstance(text, str) else None

    def belong_to(self, module: ModuleType) -> None:
        """Look for the names of this object and of its flows in a module, if a factory elsewhere made the object."""
        if self._find_own_name() is None:
            self._globals = vars(module)

    def _find_own_name(self) -> str | None:
        """Return the name of this workflow in the user's module, usually `workflow`."""
        return next((name for name, value in self._globals.items() if value is self), None)


def _ignore(step_slug: str, state_name: str) -> None:
    """Ignore a state."""
