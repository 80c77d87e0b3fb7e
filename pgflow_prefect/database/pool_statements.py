"""The part of the store for steps on work pools."""

from collections.abc import Sequence
from uuid import UUID

from pgflow_prefect.database.statements import Statements
from pgflow_prefect.models import PoolAttempt, PoolInput, PoolProgress


class PoolStatements(Statements):
    """Attempts that processes of work pools do, each with a lease of its own."""

    async def begin_pool_step(self, attempt: PoolAttempt, holder: UUID, lease: float) -> PoolInput | None:
        """Claim an attempt that was handed over to a work pool, and return its input.

        Args:
            attempt: of a step.
            holder: this process.
            lease: seconds for which it may be silent.

        Returns:
            None if no run waits for this attempt any more, or if another process has it.

        Raises:
            UnknownRunError: there is no such run.
        """
        rows = await self._fetch(
            "begin_pool_step", run_id=attempt.run_id, holder=holder, lease=lease, **attempt.as_parameters()
        )
        return PoolInput.model_validate(rows[0]) if rows else None

    async def extend_pool_step(self, attempt: PoolAttempt, holder: UUID, lease: float) -> bool:
        """Extend the lease of this process; return False if it must stop."""
        [row] = await self._fetch(
            "extend_pool_step", run_id=attempt.run_id, holder=holder, lease=lease, **attempt.as_parameters()
        )
        return bool(row["extended"])

    async def end_pool_step(
        self, attempt: PoolAttempt, holder: UUID | None, failure: str | None = None, *, is_final: bool = False
    ) -> bool:
        """End the lease of an attempt.

        Args:
            attempt: of a step.
            holder: this process; None if the owner of the run takes the attempt back.
            failure: why the attempt has failed; the owner of the run decides about another one.
            is_final: another attempt would only repeat the failure.

        Returns:
            Whether the process had the attempt.
        """
        texts: dict[str, str | list[str]] = {} if failure is None else {"failure": failure}
        nothing: dict[str, object] = {"failure": None} if failure is None else {}
        [row] = await self._fetch_telling(
            "end_pool_step",
            texts,
            run_id=attempt.run_id,
            holder=holder,
            is_final=is_final,
            **attempt.as_parameters(),
            **nothing,
        )
        return bool(row["ended"])

    async def read_pool_steps(self, attempts: Sequence[PoolAttempt]) -> list[PoolProgress]:
        """Return what is known of each of these attempts, in their order."""
        rows = await self._fetch(
            "read_pool_steps",
            run_ids=[each.run_id for each in attempts],
            step_slugs=[each.task.step_slug for each in attempts],
            task_indexes=[each.task.index for each in attempts],
            attempts=[each.attempt for each in attempts],
        )
        return [PoolProgress.model_validate(row) for row in rows]
