"""Registers this installation in Prefect, so that services can tell a database from a copy of it.

The registration is a Prefect variable, `pgflow_installation_…`. It names the database and its latest sign of life. The
database stores each sign of life too. A copy only has those from before it was copied.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from uuid import UUID, uuid4

import anyio
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import VariableCreate, VariableUpdate
from prefect.exceptions import ObjectAlreadyExists
from pydantic import BaseModel, ConfigDict, ValidationError

from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import ForeignInstallationError, PgflowPrefectError
from pgflow_prefect.models import Installation
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.prefect_api.ownership import make_ownership_tag

INTERVAL = 15.0
"""Seconds between two signs of life of an installation, from any of its services."""

_PATIENCE = 3  # after this many intervals without a sign of life, the other database counts as gone

_logger = logging.getLogger(__name__)


class Registration(BaseModel):
    """The registration of an installation in Prefect.

    Attributes:
        stamp: the stamp of its database.
        database: the database's name.
        beat: the latest sign of life.
    """

    model_config = ConfigDict(frozen=True)

    stamp: str
    database: str
    beat: UUID


@dataclass
class Heartbeat:
    """Keeps this installation registered, and finds another database that uses its id.

    Attributes:
        store: the database.
        client: Prefect's API.
        interval: seconds between two signs of life.
    """

    store: Store
    client: PrefectClient
    interval: float = INTERVAL

    async def register(self) -> Installation:
        """Register this installation, before it writes anything else to Prefect.

        If another database with the same stamp was registered last, this takes up to three intervals, to see whether
        that database is alive.

        Raises:
            ForeignInstallationError: this database is a copy, or another database uses its id.
            PrefectUnavailableError: Prefect does not answer.
        """
        installation = await self.store.use_installation()
        if installation.fits:  # otherwise it needs an id first, and there is no original
            await self._beat(installation)
        return installation

    async def keep(self, give_up: Callable[[ForeignInstallationError], None]) -> None:
        """Give signs of life for ever. Return if another database uses this one's id.

        Args:
            give_up: called with that error.
        """
        while True:
            await anyio.sleep(self.interval)
            try:
                await self.register()
            except ForeignInstallationError as error:
                _logger.error("stopping: %s", error)  # noqa: TRY400  no traceback
                give_up(error)
                return
            except PgflowPrefectError as error:
                _logger.warning("no sign of life in Prefect: %s", error)

    async def _beat(self, installation: Installation) -> None:
        name = f"pgflow_installation_{installation.id.hex}"
        found = await self._read(name)
        if found is not None:
            await self._check(installation, name, found)
        beats = await self.store.beat(uuid4(), self.interval / 2)
        registration = Registration(
            stamp=str(installation.stamp), database=await self.store.read_database_name(), beat=beats[0]
        )
        if registration != found:
            await self._write(name, registration, is_new=found is None)

    async def _check(self, installation: Installation, name: str, found: Registration) -> None:
        """Return if Prefect's registration belongs to this database, or to one that is gone. Raise otherwise."""
        if found.stamp not in {installation.stamp, *installation.former_stamps}:
            raise self._refuse(installation, found)
        waited = 0.0
        last = found
        while last.beat not in await self.store.list_beats():
            if last.beat != found.beat:  # the other database is alive
                raise self._refuse(installation, last)
            if waited == 0:
                _logger.warning(
                    "database %s, unknown to this one, is registered under this installation's id: "
                    "waiting up to %g s for a sign of life",
                    found.database,
                    _PATIENCE * self.interval,
                )
            elif waited >= _PATIENCE * self.interval:
                _logger.warning("database %s gives no sign of life: this one takes its place", found.database)
                return
            await anyio.sleep(self.interval / 5)
            waited += self.interval / 5
            last = await self._read(name) or found

    def _refuse(self, installation: Installation, found: Registration) -> ForeignInstallationError:
        return ForeignInstallationError(
            f"installation {make_ownership_tag(installation.id)} is registered in Prefect for database "
            f"{found.database} (stamp {found.stamp}), and this database (stamp {installation.stamp}) is a copy of "
            "it. Run `pgflow-prefect init --new-installation` on the one that works beside the other. If the "
            f"other one is gone for good, delete Prefect's variable pgflow_installation_{installation.id.hex}"
        )

    async def _read(self, name: str) -> Registration | None:
        with ask_prefect("the registration of this installation"):
            variable = await self.client.read_variable_by_name(name)
        try:
            return None if variable is None else Registration.model_validate(variable.value)
        except ValidationError:
            return None  # a user has edited it

    async def _write(self, name: str, registration: Registration, *, is_new: bool) -> None:
        value = registration.model_dump(mode="json")
        with ask_prefect("the registration of this installation"):
            if is_new:
                with suppress(ObjectAlreadyExists):  # another service of this database was faster
                    await self.client.create_variable(VariableCreate(name=name, value=value, tags=["pgflow"]))
            else:
                await self.client.update_variable(VariableUpdate(name=name, value=value, tags=["pgflow"]))
