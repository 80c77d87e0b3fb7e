"""The parties that the other tests act as are as weak as they are said to be."""

import pytest

from tests.engine import refused, value
from tests.integration.supabase import ALICE, BOB, DENIED, RUN
from tests.security.conftest import EndUser, Party


@pytest.mark.parametrize("role", ["define", "run", "work", "observe"])
def test_a_party_has_its_role_and_no_way_to_another(party: Party, role: str) -> None:
    connection = party(role)
    connection.execute("RESET ROLE")
    assert value(connection, "SELECT current_user::text") == f"pgflow_{role}"
    with refused(DENIED):
        connection.execute("SET ROLE pg_database_owner")
    with refused(DENIED):
        connection.execute("DELETE FROM pgflow.runs")


def test_an_end_user_sees_no_run_of_another_user(end_user: EndUser) -> None:
    count = "SELECT count(*) FROM pgflow.runs WHERE id = %s"
    assert value(end_user(ALICE), count, RUN) == 1
    assert value(end_user(BOB), count, RUN) == 0
