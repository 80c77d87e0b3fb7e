"""The names of states: those that SQL writes and compares are those that Python knows."""

import re
from pathlib import Path

import pytest
from prefect.client.schemas.objects import State, StateType
from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Failed, Pending, Retrying, Running

from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.execution.outcomes import StepOutcome, find_outcome, find_outcome_of_stop
from pgflow_prefect.execution.process.host import Stop
from pgflow_prefect.models import Ending, Status
from pgflow_prefect.prefect_api.states import handed_back, is_cancelled, superseded
from pgflow_prefect.shipped import shipped_path
from pgflow_prefect.state_names import DONE, IDLE, WORKING, StateName

HOLDERS = {"Airflow"}
"""Who holds a run, in `pgflow_prefect.owners`: no state."""

SCRIPTS = sorted(shipped_path("sql").rglob("*.sql"))


def find_state_names(script: str) -> set[str]:
    """Return the names of states in a script: every text in quotes that begins as only they do."""
    code = re.sub(r"--[^\n]*", "", script)
    return set(re.findall(r"'([A-Z][a-z]+(?:[A-Z][a-z]+)*)'", code))


@pytest.mark.parametrize("path", SCRIPTS, ids=[each.name for each in SCRIPTS])
def test_every_state_that_a_script_names_is_one_that_python_knows(path: Path) -> None:
    assert find_state_names(path.read_text(encoding="utf-8")) - HOLDERS <= {*StateName}


def test_every_state_that_a_query_names_is_one_that_python_knows() -> None:
    assert find_state_names("\n".join(QUERIES.values())) <= {*StateName}


def test_the_scripts_name_the_states_that_decide_who_does_a_step() -> None:
    named = set[str]().union(*(find_state_names(each.read_text(encoding="utf-8")) for each in SCRIPTS))
    assert named >= {StateName.WAITING, StateName.DEFERRED, StateName.CACHED, StateName.RUNNING, StateName.CANCELLED}


def test_what_a_step_ended_as_is_a_state_of_prefect_in_lower_case() -> None:
    assert {each.capitalize() for each in Ending} <= {*StateName}
    assert {*Status} - {Status.PENDING} < {*Ending}


@pytest.mark.parametrize("state", [Pending(), Running(), Retrying(), AwaitingRetry(), Completed(), Failed(), Crashed()])
def test_names_that_prefect_gives_are_prefects(state: State[object]) -> None:
    assert state.name in {*StateName}
    assert (state.name in WORKING) is not state.is_final()


def test_what_only_waits_is_not_done() -> None:
    assert IDLE < WORKING
    assert not DONE & WORKING


@pytest.mark.parametrize(
    ("state", "outcome"),
    [
        (Completed(), StepOutcome.COMPLETED),
        (Completed(name="Cached"), StepOutcome.COMPLETED),
        (Completed(name="Skipped"), StepOutcome.SKIPPED),
        (Failed(), StepOutcome.FAILED),
        (Failed(name="TimedOut"), StepOutcome.FAILED),
        (Failed(name="Skipped"), StepOutcome.FAILED),
        (Cancelled(), StepOutcome.CANCELLED),
        (superseded("taken"), StepOutcome.SUPERSEDED),
        (handed_back("stopped"), StepOutcome.HANDED_BACK),
        (Crashed(), StepOutcome.HANDED_BACK),
    ],
)
def test_a_task_run_s_state_says_what_became_of_its_step(state: State[object], outcome: StepOutcome) -> None:
    assert find_outcome(state) is outcome


@pytest.mark.parametrize(
    ("reason", "outcome"),
    [
        (Stop.ENDED, StepOutcome.CANCELLED),
        (Stop.LOST, StepOutcome.SUPERSEDED),
        (Stop.SHUTDOWN, StepOutcome.HANDED_BACK),
        (None, StepOutcome.HANDED_BACK),
    ],
)
def test_a_step_that_did_not_begin_has_the_outcome_of_its_run_s_stop(reason: Stop | None, outcome: StepOutcome) -> None:
    assert find_outcome_of_stop(reason) is outcome


def test_only_completed_and_skipped_steps_let_the_next_steps_start() -> None:
    assert {each for each in StepOutcome if each.is_done} == {StepOutcome.COMPLETED, StepOutcome.SKIPPED}


@pytest.mark.parametrize(
    ("state", "cancelled"),
    [(Cancelled(), True), (State(type=StateType.CANCELLING), True), (superseded(""), False), (handed_back(""), False)],
)
def test_a_superseded_or_handed_back_state_is_not_cancelled(state: State[object], cancelled: bool) -> None:
    assert is_cancelled(state) is cancelled
