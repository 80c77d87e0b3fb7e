"""Finds dead processes of this machine that hold runs, and ends their leases."""

import json
import logging
from uuid import UUID

from pgflow_prefect.database.connection import Row
from pgflow_prefect.database.process_identity import find_identity, is_dead
from pgflow_prefect.database.statements import Statements

_logger = logging.getLogger(__name__)


class HolderStatements(Statements):
    """Statements about owners of runs that are processes of this machine."""

    async def expire_dead_holders(self, only_run: UUID | None = None) -> list[UUID]:
        """End the leases of dead processes of this machine, and return the runs that they held.

        A process that the kernel no longer knows can't come back, so its runs need not wait for their leases.
        Processes of other machines and of other containers are left alone.

        Args:
            only_run: looks at the holder of this run only.
        """
        expired: list[UUID] = []
        for row in await self._list_dead_holders(only_run):
            run_id = UUID(str(row["run_id"]))
            holder = json.dumps(row["holder"])
            [answer] = await self._fetch("expire_lease", run_id=run_id, epoch=row["epoch"], holder=holder)
            if answer["expired"]:
                _logger.info("run %s: its owner %s is dead", run_id, row["held_by"])
                expired.append(run_id)
        return expired

    async def has_dead_holder(self, run_id: UUID) -> bool:
        """Tell whether the process that holds a run is a dead one of this machine."""
        return bool(await self._list_dead_holders(run_id))

    async def _list_dead_holders(self, only_run: UUID | None) -> list[Row]:
        here = find_identity()
        if here is None:
            return []
        rows = await self._fetch("list_holders", machine=json.dumps(here.machine), only_run=only_run)
        return [row for row in rows if is_dead(row["holder"], here)]
