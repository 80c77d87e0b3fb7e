"""How a file declares the steps of its workflow: `step`, `map`, `bind` and `bind_map`."""

from collections.abc import Awaitable, Callable, Collection
from datetime import timedelta
from functools import partial
from typing import Any, TypeAlias, overload

from prefect import Task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from pydantic import JsonValue

from pgflow_prefect.bindings import AnyBinding, WorkPool
from pgflow_prefect.definitions.model import AnyWhenEmpty, AnyWhenItemFails
from pgflow_prefect.errors import UsageError
from pgflow_prefect.execution.result_options import ResultSerializer, ResultStorage, make_result_options
from pgflow_prefect.handlers.base import RetryPolicy
from pgflow_prefect.handlers.caching import make_cache_options
from pgflow_prefect.handlers.python import AT_ONCE, PythonHandler
from pgflow_prefect.handlers.run_names import Naming
from pgflow_prefect.handlers.step_options import AnyRule, AnyWhen, check_at_once, make_child, make_map
from pgflow_prefect.handlers.stored import ResultOptions
from pgflow_prefect.workflow.declaration import declare
from pgflow_prefect.workflow.module import UserModule
from pgflow_prefect.workflow.steps import DeclaredSteps, F

CacheKey: TypeAlias = Callable[[TaskRunContext, dict[str, Any]], str | Awaitable[str | None] | None]
"""Prefect's `cache_key_fn`; it may be async, too."""

RetryCondition: TypeAlias = Callable[[Task[..., Any], TaskRun, State[Any]], bool | Awaitable[bool]]
"""Prefect's `retry_condition_fn`."""


class StepDecorators(DeclaredSteps):
    """The methods by which a file declares the steps of its workflow."""

    def __init__(self, slug: str, module: UserModule, results: ResultOptions) -> None:
        """Begin without steps.

        Args:
            slug: the workflow.
            module: the module that declares the steps.
            results: what the code says of the results of all steps.
        """
        super().__init__(slug, module)
        self._results = results

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
        if retry_condition_fn is not None and not callable(retry_condition_fn):
            raise UsageError(
                f"retry_condition_fn={retry_condition_fn!r} is no function: give one as for Prefect's tasks"
            )
        declared = declare(
            slug,
            after=after,
            tags=tags,
            task_run_name=task_run_name,
            rule=rule,
            only_if=only_if,
            unless=unless,
            when_unmet=when_unmet,
            when_exhausted=when_exhausted,
            fails_run=fails_run,
            is_setup=is_setup,
        )
        policy = RetryPolicy(retries, retry_delay_seconds, retry_jitter_factor, timeout_seconds, retry_condition_fn)
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

        return lambda function: self._register(slug, function, make_handler, declared)

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
        declared = declare(
            slug,
            after=after,
            tags=tags,
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
        return lambda function: self._register(slug, function, handler, declared)

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
            binding: `SqlFunction`, `HttpEndpoint`, `Queue`, `Command`, `WorkPool`, `Child` or `External`.
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
        declared = declare(
            slug,
            after=after,
            tags=tags,
            task_run_name=task_run_name,
            rule=rule,
            only_if=only_if,
            unless=unless,
            when_unmet=when_unmet,
            when_exhausted=when_exhausted,
            fails_run=fails_run,
            is_setup=is_setup,
            child=make_child(binding),
        )
        if getattr(binding, "batch", None) is not None:
            raise UsageError(f"step {slug!r} is bound with batch, which only maps have: use bind_map(…, over=…)")
        self._bind(slug, binding, declared)

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
            binding: `SqlFunction`, `HttpEndpoint`, `Queue`, `Child` or `External`, with the retries and the time-out of
                an item.
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
        declared = declare(
            slug,
            after=after,
            tags=tags,
            rule=rule,
            only_if=only_if,
            unless=unless,
            when_unmet=when_unmet,
            when_exhausted=when_exhausted,
            fails_run=fails_run,
            is_setup=is_setup,
            map=make_map(over, max_items, when_empty, when_item_fails),
            child=make_child(binding),
        )
        if isinstance(binding, WorkPool):
            raise UsageError(f"step {slug!r} is a map, and its items can't be done on a work pool: bind it otherwise")
        self._at_once[slug] = check_at_once(at_once)
        self._bind(slug, binding, declared)
