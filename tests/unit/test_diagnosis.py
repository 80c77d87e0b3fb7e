"""What `doctor` makes of what it sees, and of checks that go wrong."""

from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any

import anyio
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from pgflow_prefect.deployment.diagnosis.findings import Check, Finding, Outcome, Patient, Verdict, carry_out
from pgflow_prefect.deployment.diagnosis.lag import judge_lag
from pgflow_prefect.deployment.diagnosis.prefect import PREFECT_CHECKS, judge_pool, judge_recorder, judge_versions
from pgflow_prefect.errors import DatabaseUnavailableError
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.settings import Settings

FAST = {"enabled": True, "read_batch_size": 100, "batch_size": 100, "flush_interval": 1.0}


async def well(patient: Patient) -> Verdict:
    return Verdict(Outcome.OK, "well")


async def broken(patient: Patient) -> Verdict:
    raise DatabaseUnavailableError("can't connect\ncheck that it runs")


async def unforeseen(patient: Patient) -> Verdict:
    raise ZeroDivisionError


async def endless(patient: Patient) -> Verdict:
    await anyio.sleep_forever()
    raise AssertionError


def carry_out_all(*checks: Check) -> tuple[list[Finding], list[str]]:
    async def collect() -> tuple[list[Finding], list[str]]:
        begun: list[str] = []
        patient = Patient(Settings(), "a test", AsyncExitStack())
        return [each async for each in carry_out(checks, patient, begun.append)], begun

    return anyio.run(collect)


def test_a_check_that_raises_is_a_fault_and_the_others_go_on() -> None:
    found, begun = carry_out_all(Check("first", broken), Check("second", unforeseen), Check("third", well))
    assert begun == ["first", "second", "third"]
    assert [each.outcome for each in found] == [Outcome.FAULT, Outcome.FAULT, Outcome.OK]
    assert (found[0].message, found[0].advice) == ("can't connect", "check that it runs")
    assert found[1].message == "ZeroDivisionError"


@pytest.mark.parametrize("user", ["hunter2", "me:hunter2"])
def test_a_secret_in_the_url_of_prefect_is_never_said(user: str) -> None:
    [websockets] = [replace(each, needs=()) for each in PREFECT_CHECKS if each.name == "websockets"]

    with temporary_settings({PREFECT_API_URL: f"http://{user}@127.0.0.1:1/api"}):
        [found], _ = carry_out_all(websockets)
        said = describe_error(ValueError(f"'404 Not Found' for url 'http://{user}@127.0.0.1:1/api/x'"))

    assert found.outcome is Outcome.FAULT
    assert "no websocket to http://127.0.0.1:1/api/events/in" in found.message
    assert "hunter2" not in found.message + said


def test_a_check_that_takes_too_long_is_a_fault() -> None:
    [found], _ = carry_out_all(Check("slow", endless, patience=0.01))
    assert (found.outcome, found.message) == (Outcome.FAULT, "no answer in 0.01 s")


def test_checks_that_need_a_failed_or_skipped_check_are_skipped() -> None:
    found, _ = carry_out_all(
        Check("database", broken), Check("schema", well, needs=("database",)), Check("runs", well, needs=("schema",))
    )
    assert [each.outcome for each in found] == [Outcome.FAULT, Outcome.SKIPPED, Outcome.SKIPPED]
    assert found[2].message == "needs what 'schema' looks at"


@pytest.mark.parametrize(
    ("server", "outcome"),
    [
        ("3.8.8", Outcome.OK),
        ("3.8.1", Outcome.OK),
        ("3.9.0rc1", Outcome.WARNING),
        ("3.10.0", Outcome.WARNING),
        ("3.7.9", Outcome.FAULT),
        ("2.20.1", Outcome.FAULT),
        ("unknown", Outcome.FAULT),
    ],
)
def test_a_server_of_another_minor_version_is_warned_of_and_one_before_3_8_is_a_fault(
    server: str, outcome: Outcome
) -> None:
    verdict = judge_versions(server, "3.8.8")
    assert verdict.outcome is outcome
    assert server in verdict.message
    assert "3.10.0" in (verdict.advice or "") or server != "3.10.0", "the older side is to be upgraded"


@pytest.mark.parametrize(("seconds", "outcome"), [(0.4, Outcome.OK), (5.1, Outcome.WARNING), (None, Outcome.FAULT)])
def test_a_server_that_lags_is_advised_by_the_names_of_its_settings(seconds: float | None, outcome: Outcome) -> None:
    verdict = judge_lag(seconds)
    assert verdict.outcome is outcome
    assert (outcome is Outcome.WARNING) == ("PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_" in (verdict.advice or ""))


@pytest.mark.parametrize(
    ("values", "outcome", "advice"),
    [
        (FAST, Outcome.OK, None),
        (FAST | {"batch_size": 500, "flush_interval": 0.5}, Outcome.OK, None),
        (FAST | {"batch_size": 1}, Outcome.WARNING, "PREFECT_SERVER_SERVICES_TASK_RUN_RECORDER_BATCH_SIZE=100 (is 1)"),
        (FAST | {"flush_interval": 5.0}, Outcome.WARNING, "FLUSH_INTERVAL=1 (is 5)"),
        (FAST | {"enabled": False}, Outcome.WARNING, "prefect server services start"),
        (None, Outcome.SKIPPED, None),
    ],
)
def test_the_recorder_settings_of_a_server_are_compared_with_the_fast_ones(
    values: Any, outcome: Outcome, advice: str | None
) -> None:
    verdict = judge_recorder(values)
    assert verdict.outcome is outcome
    assert (verdict.advice is None) if advice is None else (advice in (verdict.advice or ""))


@pytest.mark.parametrize(
    ("size", "outcome"),
    [(5, Outcome.WARNING), (20, Outcome.OK), (0, Outcome.OK), (None, Outcome.SKIPPED)],
)
def test_a_server_that_keeps_few_connections_is_advised_by_the_name_of_its_setting(
    size: int | None, outcome: Outcome
) -> None:
    verdict = judge_pool(size)
    assert verdict.outcome is outcome
    assert (outcome is Outcome.WARNING) == ("PREFECT_SERVER_DATABASE_SQLALCHEMY_POOL_SIZE=20" in (verdict.advice or ""))
