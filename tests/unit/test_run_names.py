"""What people type for a run: its id, the beginning of it, or `latest`."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgflow_prefect.database.run_names import parse_run_name
from pgflow_prefect.errors import UsageError


@given(st.uuids(), st.integers(1, 36))
def test_every_beginning_of_an_id_means_the_id(run_id: UUID, length: int) -> None:
    for text in (str(run_id)[:length], str(run_id).upper()[:length], run_id.hex[:length]):
        name = parse_run_name(text)
        assert name.first is not None
        assert name.last is not None
        assert name.first <= run_id <= name.last


@given(st.uuids(), st.uuids(), st.integers(1, 36))
def test_no_other_id_is_meant(run_id: UUID, other: UUID, length: int) -> None:
    name = parse_run_name(str(run_id)[:length])
    assert name.first is not None
    assert name.last is not None
    assert (name.first <= other <= name.last) is str(other).startswith(str(run_id)[:length])


@given(st.uuids())
def test_a_whole_id_is_known_without_a_look(run_id: UUID) -> None:
    for text in (str(run_id), run_id.hex, f"{{{run_id}}}", run_id.urn):
        assert parse_run_name(text).run_id == run_id
    assert parse_run_name(str(run_id)[:-1]).run_id is None


def test_latest_is_no_id() -> None:
    assert parse_run_name("latest").run_id is None
    assert parse_run_name("latest").first is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "last",
        "LATEST",
        "0815x",
        "08-15",
        "0b0e3a4e--6a5c",
        "-0b0e3a4e",
        "0" * 33,
        "\u0661\u0662",
        "ab cd",
        "%",
    ],
)
def test_what_can_be_no_id_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"RUN_ID .* is no run's id: give the id, the beginning of it, or 'latest'"):
        parse_run_name(text)
