"""The part of the store for bindings, and for steps that other programs do."""

from collections.abc import Iterable, Mapping
from uuid import UUID

from pydantic import JsonValue
from pydantic_core import to_json

from pgflow_prefect.database.statements import Statements
from pgflow_prefect.models import AwaitedStep, BindingChange, ShadowSummary, StepBinding, StepEnd, TaskKey
from pgflow_prefect.raw_json import RawJson


class BindingStatements(Statements):
    """Bindings, their history, external steps, and shadows."""

    async def list_bindings(self, workflow_slug: str) -> dict[str, StepBinding]:
        """Return the bindings of a workflow's steps, by slug; only those that rows set."""
        rows = await self._fetch("list_bindings", workflow_slug=workflow_slug)
        found = [StepBinding.model_validate(row) for row in rows]
        return {each.step_slug: each for each in found}

    async def list_network_bindings(self) -> list[tuple[str, StepBinding]]:
        """Return the rows that name an endpoint or a queue, each with its workflow's slug."""
        rows = await self._fetch("list_network_bindings")
        return [(str(row["workflow_slug"]), StepBinding.model_validate(row)) for row in rows]

    async def list_bound_workflows(self) -> list[str]:
        """Return the slugs of the workflows that need no Python, because rows bind all their steps."""
        return [str(row["slug"]) for row in await self._fetch("list_bound_workflows")]

    async def bind_step(
        self,
        workflow_slug: str,
        step_slug: str,
        kind: str | None,
        target: str | None = None,
        options: Mapping[str, JsonValue] | None = None,
    ) -> bool:
        """Bind a step from its next claim on; without a kind, delete its row. Return False if nothing changed.

        Raises:
            UsageError: there is no such step, or the binding contains a secret.
        """
        [row] = await self._fetch(
            "bind_step",
            workflow_slug=workflow_slug,
            step_slug=step_slug,
            kind=kind,
            target=target,
            options=to_json(options or {}).decode(),
        )
        return bool(row["changed"])

    async def undo_binding(self, workflow_slug: str, step_slug: str) -> bool:
        """Undo the last change of a step's binding that was not undone yet; return False if there is none."""
        [row] = await self._fetch("undo_binding", workflow_slug=workflow_slug, step_slug=step_slug)
        return bool(row["changed"])

    async def observe_workflow(self, workflow_slug: str) -> int:
        """Make all steps of a workflow external, and return how many bindings changed."""
        [row] = await self._fetch("observe_workflow", workflow_slug=workflow_slug)
        return int(str(row["changed"]))

    async def list_binding_changes(
        self, workflow_slug: str, step_slug: str | None = None, *, limit: int = 50
    ) -> list[BindingChange]:
        """Return who changed which binding of a workflow, or of a step of it, the latest first."""
        rows = await self._fetch("list_binding_changes", workflow_slug=workflow_slug, step_slug=step_slug, limit=limit)
        return [BindingChange.model_validate(row) for row in rows]

    async def find_functions(self, names: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Return the result types of functions that take one jsonb, such as `jsonb`; leave out those that do not exist.

        Args:
            names: schema and name of each, by its key in the answer.
        """
        schemas = [schema for schema, _ in names.values()]
        functions = [function for _, function in names.values()]
        rows = await self._fetch("find_functions", names=list(names), schemas=schemas, functions=functions)
        return {str(row["name"]): str(row["returns"]) for row in rows}

    async def list_shadows(self, workflow_slug: str) -> list[ShadowSummary]:
        """Return the comparisons of a workflow's shadows, by step slug."""
        rows = await self._fetch("list_shadows", workflow_slug=workflow_slug)
        return [ShadowSummary.model_validate(row) for row in rows]

    async def watch_steps(self, awaited: Iterable[AwaitedStep]) -> list[StepEnd]:
        """Return those of the external steps for which the wait is over."""
        run_ids, tasks, epochs, task_run_ids, bound, have = (list(each) for each in zip(*awaited, strict=True))
        rows = await self._fetch(
            "watch_steps",
            run_ids=run_ids,
            step_slugs=[each.step_slug for each in tasks],
            task_indexes=[each.index for each in tasks],
            epochs=epochs,
            task_run_ids=task_run_ids,
            bound=bound,
            have_function=have,
        )
        return [StepEnd.model_validate(row) for row in rows]

    async def read_input(self, run_id: UUID, task: TaskKey, upstream: list[str] | None) -> tuple[RawJson, RawJson]:
        """Return the run's payload and the results of these upstream steps, or of all, without a claim.

        The results are an object, by slug.
        """
        [row] = await self._fetch("read_input", run_id=run_id, upstream=upstream, **task.as_parameters())
        return RawJson(str(row["payload"])), RawJson(str(row["upstream_results"]))

    async def report_shadow(
        self, run_id: UUID, task: TaskKey, *, outcome: str, details: list[str], seconds: float
    ) -> None:
        """Store the comparison of a shadow: same, different or failed."""
        await self._fetch_telling(
            "report_shadow",
            {"details": details},
            run_id=run_id,
            outcome=outcome,
            seconds=seconds,
            **task.as_parameters(),
        )
