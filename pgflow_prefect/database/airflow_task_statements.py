"""Tasks of Airflow that ask here who does them, and those of them that do not."""

from collections.abc import Collection, Iterable
from uuid import UUID

from pydantic import BaseModel, ConfigDict

from pgflow_prefect.database.statements import Statements


class RemovedDag(BaseModel):
    """A DAG of Airflow whose tasks ask no more.

    Attributes:
        workflow_slug: the workflow, and the id of its DAG.
        moved: its steps that are bound here.
        going_on: how many of its runs go on, whose tasks still ask; None if this role may not read runs.
    """

    model_config = ConfigDict(frozen=True)

    workflow_slug: str
    moved: list[str]
    going_on: int | None


class AskingRun(BaseModel):
    """A pending run of Airflow whose tasks ask here.

    Attributes:
        run_id: the run.
        workflow_slug: its workflow.
        source_run_id: Airflow's `dag_run.run_id`, as the run's payload has it.
        steps: the steps that Airflow does and that have not ended here; true for one that has asked.
    """

    model_config = ConfigDict(frozen=True)

    run_id: UUID
    workflow_slug: str
    source_run_id: str
    steps: dict[str, bool] | None


class AirflowTaskStatements(Statements):
    """The part of the store for DAGs of Airflow whose tasks ask."""

    async def name_airflow_dags(self, workflow_slugs: Iterable[str]) -> list[str]:
        """Let the tasks of these DAGs of Airflow ask who does them; return those that could not before."""
        rows = await self._fetch("name_airflow_dags", workflow_slugs=list(workflow_slugs))
        return [str(row["slug"]) for row in rows]

    async def remove_airflow_dags(self, workflow_slugs: Iterable[str]) -> list[RemovedDag]:
        """Let the tasks of these DAGs ask no more, but for those of runs that go on; return those that could ask."""
        rows = await self._fetch("remove_airflow_dags", workflow_slugs=list(workflow_slugs))
        return [RemovedDag.model_validate(row) for row in rows]

    async def list_asking_dags(self, workflow_slugs: Collection[str]) -> frozenset[str]:
        """Return those of these DAGs whose tasks ask."""
        rows = await self._fetch("list_asking_dags", workflow_slugs=[*workflow_slugs])
        return frozenset(str(row["slug"]) for row in rows)

    async def list_asking_runs(
        self, workflow_slugs: Collection[str], *, after: UUID | None, limit: int
    ) -> list[AskingRun]:
        """Return pending runs of these DAGs behind an id, whose tasks ask.

        Args:
            workflow_slugs: the DAGs.
            after: the id; None for the first ones.
            limit: the greatest number of runs.
        """
        rows = await self._fetch("list_asking_runs", workflow_slugs=[*workflow_slugs], after=after, limit=limit)
        return [AskingRun.model_validate(row) for row in rows]

    async def end_unseen_airflow_task(
        self, run_id: UUID, step_slug: str, try_number: int, outcome: str, *, result: str | None, message: str | None
    ) -> bool:
        """Report how a task has ended that has not reported itself; False where that changes nothing.

        Args:
            run_id: the run.
            step_slug: the step.
            try_number: Airflow's.
            outcome: completed, skipped or failed.
            result: JSON text.
            message: for people.

        Raises:
            PgflowPrefectError: the database refuses it.
        """
        [row] = await self._fetch(
            "end_unseen_airflow_task",
            run_id=run_id,
            step_slug=step_slug,
            try_number=try_number,
            outcome=outcome,
            result=result,
            message=message,
        )
        return bool(row["ended"])
