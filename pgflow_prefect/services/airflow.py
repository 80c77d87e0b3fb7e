"""Follows Airflow, and shows in Prefect what was found: a mirror, and an observer of what it writes."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from uuid import UUID

import anyio
from prefect.client.orchestration import PrefectClient

from pgflow_prefect.database.airflow.reader import open_airflow
from pgflow_prefect.database.store import Store
from pgflow_prefect.errors import ForeignInstallationError, PgflowPrefectError
from pgflow_prefect.services.mirror import Mirror
from pgflow_prefect.services.observer import Observer
from pgflow_prefect.settings import Settings
from pgflow_prefect.waiting import Pauses

_logger = logging.getLogger(__name__)


@dataclass
class AirflowObserver:
    """Follows the observed DAGs until `stop`. Prefect and the databases may be away meanwhile.

    Attributes:
        store: the database.
        client: Prefect's API.
        settings: its intervals.
        airflow_dsn: Airflow's metadata database.
    """

    store: Store
    client: PrefectClient
    settings: Settings
    airflow_dsn: str
    _mirror: Mirror = field(init=False)
    _observer: Observer = field(init=False)

    def __post_init__(self) -> None:
        self._observer = Observer(self.store, self.client, self.settings, (), adopt=True)
        self._mirror = Mirror(self.store, self.airflow_dsn, self.settings, self._notice)

    @property
    def passed_at(self) -> float:
        """The time of the last look, by the monotonic clock."""
        return min(self._mirror.passed_at, self._observer.passed_at)

    async def register(self) -> None:
        """Register this database in Prefect, and check that Airflow's can be read.

        Raises:
            UsageError: Airflow's address can't be right, or there are no tables of Airflow.
            DatabaseUnavailableError: Airflow's database does not answer.
            ForeignInstallationError: the database is a copy of another one that has been used with Prefect.
            PrefectUnavailableError: Prefect does not answer.
        """
        async with open_airflow(self.airflow_dsn, timeout=self.settings.connect_timeout) as airflow, airflow.snapshot():
            await airflow.read_newest_run()
        await self._observer.register()

    async def run(self) -> None:
        """Follow and show until `stop`.

        Raises:
            ForeignInstallationError: another database has begun to use this one's id in Prefect.
        """
        failure: Exception | None = None  # raised below: the group would wrap it

        async def observe() -> None:
            nonlocal failure
            try:
                await self._observer.run()
            except Exception as error:  # noqa: BLE001
                failure = error
                self._mirror.stop()

        async with anyio.create_task_group() as group:
            group.start_soon(observe)
            try:
                await self._mirror.run()
            except Exception as error:  # noqa: BLE001
                failure = error
            self._observer.stop()
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """End after the present look."""
        self._mirror.stop()

    def _notice(self, run_ids: Collection[UUID], workflow_slugs: Collection[str]) -> None:
        self._observer.notice(run_ids, workflow_slugs)


async def keep_following(store: Store, client: PrefectClient, settings: Settings) -> None:
    """Follow Airflow in a worker or a bridge, for as long as that works. Without an Airflow, return at once."""
    if settings.airflow_dsn is None or not (source := settings.airflow_dsn.get_secret_value()):
        return
    if not store.implementation.executes:
        return  # the released pgflow has no mirrors
    pauses = Pauses(longest=60.0)
    while True:
        service = AirflowObserver(store, client, settings, source)
        try:
            await service.register()
            pauses.reset()
            await service.run()
        except ForeignInstallationError as error:  # the worker or the bridge itself finds that out, too
            _logger.error("Airflow's runs are followed no more: %s", error)  # noqa: TRY400  no traceback
            return
        except PgflowPrefectError as error:
            _logger.warning("Airflow's runs are followed later: %s", error)
        except Exception:  # nothing that Airflow has may end a worker
            _logger.exception("Airflow's runs are followed later")
        else:
            return
        await anyio.sleep(pauses.draw())
