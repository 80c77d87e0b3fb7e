"""The part of the store that is about who does a step, and about steps that others do."""

from collections.abc import Iterable, Mapping
from uuid import UUID

from pydantic import JsonValue
from pydantic_core import to_json

from pgflow_prefect.database.statements import Statements
from pgflow_prefect.models import AwaitedStep, BindingChange, ShadowSummary, StepBinding, StepEnd, TaskKey
from pgflow_prefect.raw_json import RawJson


class BindingStatements(Statements):
    """Bindings, their history, waiting for what others do, and shadows."""

    async def list_bindings(self, workflow_slug: str) -> dict[str, StepBinding]:
        """Return what a workflow's steps are bound to, by slug; only of those that have a row."""
        rows = await self._fetch("list_bindings", workflow_slug=workflow_slug)
        found = [StepBinding.model_validate(row) for row in rows]
        return {each.step_slug: each for each in found}

    async def list_network_bindings(self) -> list[tuple[str, StepBinding]]:
        """Return the rows that name an endpoint or a queue, each with its workflow's slug."""
        rows = await self._fetch("list_network_bindings")
        return [(str(row["workflow_slug"]), StepBinding.model_validate(row)) for row in rows]

    async def list_bound_workflows(self) -> list[str]:
        """Return the slugs of the workflows that need no Python: rows say who does each of their steps."""
        return [str(row["slug"]) for row in await self._fetch("list_bound_workflows")]

    async def bind_step(
        self,
        workflow_slug: str,
        step_slug: str,
        kind: str | None,
        target: str | None = None,
        options: Mapping[str, JsonValue] | None = None,
    ) -> bool:
        """Say who does a step from its next claim on, or without a kind that no row does; False where it was so.

        Raises:
            UsageError: there is no such step, or there is a secret in it.
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
        """Take back the last change of a step's binding that was not taken back yet; False where there is none."""
        [row] = await self._fetch("undo_binding", workflow_slug=workflow_slug, step_slug=step_slug)
        return bool(row["changed"])

    async def observe_workflow(self, workflow_slug: str) -> int:
        """Bind all steps of a workflow to others, and return how many were bound otherwise."""
        [row] = await self._fetch("observe_workflow", workflow_slug=workflow_slug)
        return int(str(row["changed"]))

    async def list_binding_changes(
        self, workflow_slug: str, step_slug: str | None = None, *, limit: int = 50
    ) -> list[BindingChange]:
        """Return who changed which binding of a workflow, or of a step of it, the latest first."""
        rows = await self._fetch("list_binding_changes", workflow_slug=workflow_slug, step_slug=step_slug, limit=limit)
        return [BindingChange.model_validate(row) for row in rows]

    async def find_functions(self, names: Mapping[str, tuple[str, str]]) -> dict[str, str]:
        """Return what functions that take one jsonb return, such as `jsonb`; of one that does not exist, nothing.

        Args:
            names: schema and name of each, by whatever it is called in the answer.
        """
        schemas = [schema for schema, _ in names.values()]
        functions = [function for _, function in names.values()]
        rows = await self._fetch("find_functions", names=list(names), schemas=schemas, functions=functions)
        return {str(row["name"]): str(row["returns"]) for row in rows}

    async def list_shadows(self, workflow_slug: str) -> list[ShadowSummary]:
        """Return what came of the shadows of a workflow's steps, by slug."""
        rows = await self._fetch("list_shadows", workflow_slug=workflow_slug)
        return [ShadowSummary.model_validate(row) for row in rows]

    async def watch_steps(self, awaited: Iterable[AwaitedStep]) -> list[StepEnd]:
        """Return those of the steps that others do which need not be waited for any more."""
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
        """Return the run's payload and the results of a step's upstream steps, of these or of all, without claiming.

        The results are an object, by slug.
        """
        [row] = await self._fetch("read_input", run_id=run_id, upstream=upstream, **task.as_parameters())
        return RawJson(str(row["payload"])), RawJson(str(row["upstream_results"]))

    async def report_shadow(
        self, run_id: UUID, task: TaskKey, *, outcome: str, details: list[str], seconds: float
    ) -> None:
        """Note what came of a handler that ran beside an external worker: same, different or failed."""
        await self._fetch_telling(
            "report_shadow",
            {"details": details},
            run_id=run_id,
            outcome=outcome,
            seconds=seconds,
            **task.as_parameters(),
        )
