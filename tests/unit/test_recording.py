"""Which runs Prefect hears of later, and what stands for the flow run of a run that it is not told of."""

from typing import Any
from uuid import UUID, uuid4, uuid5

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgflow_prefect import Workflow
from pgflow_prefect.errors import UsageError
from pgflow_prefect.prefect_api.ids import is_placeholder, make_placeholder
from pgflow_prefect.recording import LONGER_THAN, RecordLater, parse_recordings

RUN_ID = UUID("5fa69405-dba3-4ed1-9ddb-16fc51a54aaa")


def test_the_setting_names_workflows_and_what_is_shown_of_them() -> None:
    assert parse_recordings("orders, uploads:100,reports:10:2.5,pings::60,") == {
        "orders": RecordLater(None, LONGER_THAN),
        "uploads": RecordLater(100, LONGER_THAN),
        "reports": RecordLater(10, 2.5),
        "pings": RecordLater(None, 60),
    }
    assert parse_recordings("") == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("orders:often", "invalid literal for int"),
        ("orders:0", "one_in is 0: give 1 to show each run"),
        ("orders:10:0", "longer_than is 0: give a number of seconds above 0"),
        ("orders:10:nan", "longer_than is nan"),
        ("orders:10:5:1", "too many values"),
    ],
)
def test_a_setting_of_another_form_is_refused_with_its_part(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is not SLUG, SLUG:ONE_IN or SLUG:ONE_IN:SECONDS: .*{reason}"):
        parse_recordings(f"uploads,{text}")


def test_long_runs_are_wanted_and_others_by_their_ids() -> None:
    assert RecordLater(longer_than=10).wants(RUN_ID, 10.1)
    assert not RecordLater(longer_than=10).wants(RUN_ID, 10.0)
    assert not RecordLater().wants(RUN_ID, None)
    assert RecordLater(one_in=1).wants(RUN_ID, None)
    record = RecordLater(one_in=10)
    wanted = [record.wants(UUID(int=number), 0.0) for number in range(10_000)]
    assert 800 < sum(wanted) < 1_200, "about one in ten, also of ids that are counted up"
    assert wanted == [record.wants(UUID(int=number), 0.0) for number in range(10_000)]


def test_what_a_workflow_is_told_to_record_has_to_be_of_its_type() -> None:
    given: Any = "later"
    with pytest.raises(UsageError, match="record='later' is no RecordLater: write record="):
        Workflow("orders", record=given)


@given(st.uuids(), st.integers(1, 10_000))
def test_a_placeholder_is_known_by_its_version_and_follows_from_run_and_epoch(run_id: UUID, epoch: int) -> None:
    made = make_placeholder(run_id, epoch)
    assert is_placeholder(made)
    assert made == make_placeholder(run_id, epoch)
    assert made != make_placeholder(run_id, epoch + 1)
    assert made.variant == uuid4().variant


@pytest.mark.parametrize("flow_run_id", [uuid4(), uuid5(RUN_ID, "1"), UUID("0199c0de-0000-7000-8000-000000000000")])
def test_an_id_that_prefect_gives_out_is_no_placeholder(flow_run_id: UUID) -> None:
    assert not is_placeholder(flow_run_id)
