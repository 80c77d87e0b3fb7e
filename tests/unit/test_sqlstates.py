"""What follows from an error: by SQLSTATE, and by whose statement met it."""

import psycopg
import pytest
from psycopg.errors import lookup
from psycopg_pool import PoolTimeout

from pgflow_prefect.database.sqlstates import Verdict, Whose, judge

OURS = [each for each in Whose if each.is_ours]
WORK = [each for each in Whose if not each.is_ours]

OF_THE_MOMENT = [
    *("57014", "25006", "25P02", "40001", "40P01", "55P03", "XX000"),
    *("08000", "08003", "08006", "08P01", "53100", "53200", "53300", "53400"),
    *("25P03", "25P04", "57P01", "57P02", "57P03", "57P05", "58000", "58030", "58P01", "58P02"),
]
LOST = ["25006", "40001", "40P01", "55P03", "53100", "53200", "53300", "53400", "58000", "58030"]
LOST_WITH_THE_LINK = ["25P03", "25P04", "08000", "08003", "08006", "08P01", "57P01", "57P02", "57P03", "57P05"]
OF_THE_WORK = ["57014", "25P02", "XX000", "58P01", "58P02"]
LASTING = ["23505", "23503", "42P01", "42501", "P0001", "22012", "XX001"]


def make(sqlstate: str) -> psycopg.Error:
    try:
        return lookup(sqlstate)("raised")
    except KeyError:
        error = psycopg.DatabaseError("raised")
        error.sqlstate = sqlstate
        return error


@pytest.mark.parametrize("whose", OURS)
@pytest.mark.parametrize("sqlstate", OF_THE_MOMENT)
def test_a_statement_of_ours_is_tried_again_for_an_error_of_the_moment(sqlstate: str, whose: Whose) -> None:
    assert judge(make(sqlstate), whose) is Verdict.AGAIN


@pytest.mark.parametrize("whose", WORK)
@pytest.mark.parametrize("sqlstate", LOST)
def test_a_transaction_of_the_work_is_lost_to_an_error_of_the_moment(sqlstate: str, whose: Whose) -> None:
    assert judge(make(sqlstate), whose, is_cut=False) is Verdict.LOST


@pytest.mark.parametrize("whose", WORK)
@pytest.mark.parametrize("sqlstate", LOST_WITH_THE_LINK)
def test_a_broken_link_counts_where_it_is_the_steps_own(sqlstate: str, whose: Whose) -> None:
    assert judge(make(sqlstate), whose, is_cut=True) is Verdict.LOST
    assert judge(make(sqlstate), whose, is_cut=False) is Verdict.FAILURE


@pytest.mark.parametrize("whose", WORK)
@pytest.mark.parametrize("sqlstate", OF_THE_WORK)
def test_what_the_work_has_caused_is_its_failure(sqlstate: str, whose: Whose) -> None:
    assert judge(make(sqlstate), whose) is Verdict.FAILURE


@pytest.mark.parametrize("whose", [*Whose])
@pytest.mark.parametrize("sqlstate", LASTING)
def test_a_lasting_error_is_a_failure_whose_statement_it_ever_was(sqlstate: str, whose: Whose) -> None:
    assert judge(make(sqlstate), whose) is Verdict.FAILURE


def test_without_a_code_a_broken_connection_is_told_from_a_mistake() -> None:
    assert judge(psycopg.OperationalError("the connection is lost"), Whose.REPORT) is Verdict.AGAIN
    assert judge(PoolTimeout("no connection"), Whose.SWEEP) is Verdict.AGAIN
    assert judge(psycopg.ProgrammingError("can't adapt type"), Whose.REPORT) is Verdict.FAILURE
    assert judge(psycopg.OperationalError("lost"), Whose.HANDLER, is_cut=False) is Verdict.FAILURE
