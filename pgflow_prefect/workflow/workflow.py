"""A workflow as its file declares it: its definition, its problems, and the Prefect flow that executes its runs."""

import sys
from collections.abc import Collection, Iterator, Mapping
from functools import cached_property, partial
from hashlib import sha256
from types import ModuleType
from typing import Any, get_args
from uuid import UUID

from pgflow_prefect.definitions.from_handlers import derive_definition, find_missing_deps
from pgflow_prefect.definitions.graph import find_problems
from pgflow_prefect.definitions.maps import find_map_problems, find_sources, resolve_rules
from pgflow_prefect.definitions.model import FailedBy, WhenFailed, WorkflowDefinition, to_identifier
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
from pgflow_prefect.handlers.step_options import choose, refuse_text
from pgflow_prefect.handlers.task_options import find_naming_problems
from pgflow_prefect.prefect_api.ids import parse_run_id, parse_schedule_id
from pgflow_prefect.recording import RecordLater
from pgflow_prefect.settings import Settings
from pgflow_prefect.state_names import Observer
from pgflow_prefect.wording import write_code
from pgflow_prefect.workflow.decorators import StepDecorators
from pgflow_prefect.workflow.module import UserModule

_FORBIDDEN_IN_FLOW_NAMES = frozenset("/%&<>")


def to_flow_name(slug: str) -> str:
    """Return the name of a workflow's flow in Prefect: its slug, if Prefect accepts that.

    Otherwise, forbidden characters become `_`, and the name ends with a hash of the slug: `a/b` differs from `a_b`.
    """
    name = "".join(each if each.isprintable() and each not in _FORBIDDEN_IN_FLOW_NAMES else "_" for each in slug)
    return name if name == slug else f"{name}-{sha256(slug.encode()).hexdigest()[:8]}"


class Workflow(StepDecorators):
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
        results = make_result_options(result_storage, result_serializer)
        super().__init__(slug, UserModule(sys._getframe(1).f_globals), results)
        self.description = description
        self.tags = tuple(tags)
        self.record = record
        self._task_runner: AnyTaskRunner = task_runner or EventLoopTaskRunner()

    def __getstate__(self) -> dict[str, object]:
        """Leave out what no other process could use. A handler may refer to its workflow when it is pickled."""
        return {name: value for name, value in vars(self).items() if name != "flow"}

    def __repr__(self) -> str:
        return f"Workflow({self.slug!r}, steps={list(self.step_handlers)})"

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
        # Every flow that was made of ours has the same function.
        return self._module.choose_flow(self.flow.fn) or self.flow

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
        flow.__module__ = self._module.name
        flow.__qualname__ = f"{name}.flow" if (name := self._module.find_name(self)) else "flow"
        flow.__name__ = to_identifier(self.slug)
        default = f"The workflow {write_code(self.slug)} of pgflow."
        flow.__doc__ = self.description or self._module.find_docstring() or default
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
        made._entrypoint = f"{self._module.file}:{flow.__qualname__}"
        return made

    def belong_to(self, module: ModuleType) -> None:
        """Look for the names of this object and of its flows in a module, if a factory elsewhere made the object."""
        if self._module.find_name(self) is None:
            self._module = UserModule(vars(module))


def _ignore(step_slug: str, state_name: str) -> None:
    """Ignore a state."""
