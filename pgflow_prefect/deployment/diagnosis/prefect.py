"""Checks of Prefect's server, and of the link to it."""

import re
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import anyio
import prefect
from prefect.exceptions import PrefectHTTPStatusError
from prefect.settings import get_current_settings

from pgflow_prefect.deployment.diagnosis.findings import Check, Outcome, Patient, Verdict
from pgflow_prefect.deployment.prefect_server import POOL_SETTING, POOL_SIZE, RECORDER_SETTINGS
from pgflow_prefect.errors import PrefectUnavailableError
from pgflow_prefect.prefect_api.client import ask_prefect, connect_to_prefect
from pgflow_prefect.prefect_api.errors import advise
from pgflow_prefect.prefect_api.internals import get_events_client
from pgflow_prefect.prefect_api.redaction import describe_error, name_server

_OLDEST = (3, 8)
_RECORDER = "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_"
_PATIENCE = 8.0  # seconds for the first answer: less than a check has, whose message would say less
_RECENTLY = 600.0  # seconds
_ON_POSTGRES = "set PREFECT_API_DATABASE_CONNECTION_URL to postgresql+asyncpg://… on its server"

RECORDER_ADVICE = "set " + ", ".join(f"{name}={value}" for name, value in RECORDER_SETTINGS.items()) + " on its server"
"""Settings that make Prefect show task runs sooner."""


async def _check_url(patient: Patient) -> Verdict:
    if get_current_settings().api.url:
        return Verdict(Outcome.OK, f"PREFECT_API_URL is {name_server()}")
    return Verdict(
        Outcome.WARNING,
        "PREFECT_API_URL is not set: each command starts a temporary server, which forgets what it was told",
        "start one with `prefect server start`, and set PREFECT_API_URL=http://127.0.0.1:4200/api",
    )


async def _reach(patient: Patient) -> Verdict:
    if not get_current_settings().api.url:
        return Verdict(Outcome.SKIPPED, "there is no server to look at")
    began = time.monotonic()
    reason, advice = f"no answer in {_PATIENCE:g} s", advise(None)
    with anyio.move_on_after(_PATIENCE):
        try:
            patient.client = await patient.resources.enter_async_context(connect_to_prefect())
        except PrefectUnavailableError as error:  # its message has the whole URL
            reason, advice = describe_error(error.__cause__ or error), advise(error.__cause__)
    if patient.client is None:
        return Verdict(Outcome.FAULT, f"Prefect's API at {name_server()} can't be used: {reason}", advice)
    took = time.monotonic() - began
    patient.api_settings = await _read_settings(patient)
    return Verdict(Outcome.OK, f"{name_server()} answers, in {took:.2f} s")


async def _read_settings(patient: Patient) -> dict[str, object]:
    try:
        response = await patient.prefect.request("GET", "/admin/settings")
    except PrefectHTTPStatusError:
        return {}  # Prefect Cloud, or a server that does not tell
    return dict(response.json())


def read_minor(version: str) -> tuple[int, int]:
    """Return the first two numbers of a version: (3, 8) for `3.8.8`, (0, 0) for a text without numbers."""
    found = re.match(r"(\d+)\.(\d+)", version)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def judge_versions(server: str, client: str) -> Verdict:
    """Compare the version of Prefect's server with that of the package here."""
    both = f"server {server}, package {client}"
    if read_minor(server) < _OLDEST:
        return Verdict(Outcome.FAULT, f"Prefect's server is too old: {both}", "upgrade it to Prefect 3.8 or later")
    if read_minor(server) != read_minor(client):
        newer = max(server, client, key=read_minor)
        return Verdict(
            Outcome.WARNING,
            f"Prefect's server and the package here are of different versions: {both}",
            f"pip install --upgrade 'prefect=={newer}' on the older side",
        )
    return Verdict(Outcome.OK, both)


async def _check_version(patient: Patient) -> Verdict:
    try:
        with ask_prefect("a look at its version"):
            server = await patient.prefect.api_version()
    except Exception as error:  # noqa: BLE001  not every API has one
        return Verdict(Outcome.SKIPPED, f"it does not tell its version: {describe_error(error)}")
    return judge_versions(str(server), prefect.__version__)


async def _check_websockets(patient: Patient) -> Verdict:
    try:
        # Like tasks, with proxies, certificates and credentials. It includes a ping and the server's answer.
        async with get_events_client(reconnection_attempts=0):
            return Verdict(Outcome.OK, "a websocket opens: task runs reach Prefect's server")
    except Exception as error:  # noqa: BLE001  the network's, the proxy's, the library's
        return Verdict(
            Outcome.FAULT,
            f"no websocket to {name_server()}/events/in, so task runs are never shown: {describe_error(error)}",
            "let the proxy in front of Prefect's server pass `Upgrade: websocket` on for /api/events/in (and look at "
            "HTTPS_PROXY, NO_PROXY here)",
        )


async def _check_recorder(patient: Patient) -> Verdict:
    return judge_recorder(_find(patient.api_settings, "server", "services", "task_run_recorder"))


def judge_recorder(values: object) -> Verdict:
    """Compare the settings of a server's task run recorder, from `/admin/settings`, with fast ones."""
    if not isinstance(values, dict):
        return Verdict(Outcome.SKIPPED, "the server does not tell its settings")
    if values.get("enabled") is False:
        # It may run on another machine, by `prefect server services start`. The check `lag` will tell.
        return Verdict(
            Outcome.WARNING,
            "this API server records no task runs itself",
            f"let `prefect server services start` run, or set {_RECORDER}ENABLED=true",
        )
    slow = []
    for name, wanted in RECORDER_SETTINGS.items():
        found = values.get(name.removeprefix(_RECORDER).lower())
        is_interval = name.endswith("INTERVAL")
        if found is not None and (float(found) > float(wanted) if is_interval else float(found) < float(wanted)):
            slow.append(f"{name}={wanted} (is {found:g})")
    if slow:
        advice = f"set on its server: {', '.join(slow)}"
        return Verdict(Outcome.WARNING, "task runs are recorded one by one: runs show later than they could", advice)
    return Verdict(Outcome.OK, "task runs are recorded many at a time")


async def _check_store(patient: Patient) -> Verdict:
    found = _find(patient.api_settings, "server", "database", "driver")
    if isinstance(found, str) and found.startswith("postgresql"):
        return Verdict(Outcome.OK, "Prefect's server keeps its data in PostgreSQL")
    if isinstance(found, str) or await anyio.to_thread.run_sync(_writes_here, patient):
        return Verdict(
            Outcome.WARNING,
            "Prefect's server keeps its data in SQLite, which answers 'database is locked' under load",
            _ON_POSTGRES,
        )
    return Verdict(
        Outcome.SKIPPED, "the server does not tell whether its data is in PostgreSQL or in SQLite", _ON_POSTGRES
    )


async def _check_pool(patient: Patient) -> Verdict:
    return judge_pool(_find(patient.api_settings, "server", "database", "sqlalchemy", "pool_size"))


def judge_pool(size: object) -> Verdict:
    """Compare the size of a server's pool, from `/admin/settings`, with the need of many flow runs."""
    if not isinstance(size, int):
        return Verdict(Outcome.SKIPPED, "the server does not tell how many connections it keeps")
    kept = f"Prefect's server keeps {size} connections to its database"
    if size >= POOL_SIZE or size == 0:  # no limit
        return Verdict(Outcome.OK, kept)
    return Verdict(
        Outcome.WARNING,
        f"{kept}, and opens and closes others all the time under load",
        f"set on its server: {POOL_SETTING}={POOL_SIZE}",
    )


def _writes_here(patient: Patient) -> bool:
    """Tell whether a server of this machine writes the file that is Prefect's default."""
    home = patient.api_settings.get("home")
    if not isinstance(home, str) or urlsplit(name_server()).hostname not in {"127.0.0.1", "localhost", "::1"}:
        return False
    files = [Path(home) / name for name in ("prefect.db", "prefect.db-wal")]
    return any(file.is_file() and time.time() - file.stat().st_mtime < _RECENTLY for file in files)


def _find(values: object, *names: str) -> Any:  # noqa: ANN401  JSON
    for name in names:
        values = values.get(name) if isinstance(values, dict) else None
    return values


PREFECT_CHECKS = (
    Check("prefect url", _check_url),
    Check("prefect api", _reach, needs=("prefect url",)),
    Check("prefect version", _check_version, needs=("prefect api",)),
    Check("websockets", _check_websockets, needs=("prefect api",)),
    Check("task run recorder", _check_recorder, needs=("prefect api",)),
    Check("prefect database", _check_store, needs=("prefect api",)),
    Check("prefect connections", _check_pool, needs=("prefect api",)),
)
