"""Following Airflow in a worker: no error of it ends the worker."""

from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from pydantic import SecretStr

from pgflow_prefect.errors import ForeignInstallationError
from pgflow_prefect.services import airflow
from pgflow_prefect.settings import Settings

pytestmark = pytest.mark.anyio


@pytest.fixture
def settings() -> Settings:
    return Settings(dsn=SecretStr("postgresql://here"), airflow_dsn=SecretStr("postgresql://there"))


@pytest.fixture
def store() -> Any:
    return cast("Any", SimpleNamespace(implementation=SimpleNamespace(executes=True), release_mirrors=AsyncMock()))


async def fail(error: Exception) -> None:
    raise error


async def test_an_error_of_the_observer_is_raised_as_it_is(settings: Settings, store: Any) -> None:
    service = airflow.AirflowObserver(store, cast("Any", None), settings, "postgresql://there")
    service._observer = cast("Any", SimpleNamespace(run=lambda: fail(ForeignInstallationError("copy")), stop=int))
    service._mirror._follow = AsyncMock()  # type: ignore[method-assign]
    with pytest.raises(ForeignInstallationError, match="copy"):
        await service.run()
    store.release_mirrors.assert_awaited_once()


async def test_a_worker_follows_again_after_an_error(
    settings: Settings, store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    outcomes: list[Exception | None] = [ValueError("a row"), ExceptionGroup("rows", [ValueError("a row")])]
    outcomes.append(ForeignInstallationError("copy"))
    service = SimpleNamespace(register=AsyncMock(), run=AsyncMock(side_effect=outcomes))
    monkeypatch.setattr(airflow, "AirflowObserver", lambda *_: service)
    monkeypatch.setattr("anyio.sleep", AsyncMock())
    await airflow.keep_following(store, cast("Any", None), settings)
    assert service.run.await_count == 3
