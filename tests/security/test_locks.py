"""What a weaker role can keep the owner from doing by holding a lock."""

import pytest

from pgflow_prefect.shipped import shipped_path
from tests.conftest import Connection
from tests.engine import value
from tests.integration.supabase import run_script
from tests.security.conftest import Party

SCRIPTS_LOCK_OF_VERSION_1 = 7031902210563


@pytest.mark.parametrize("role", ["define", "run", "work", "observe"])
def test_no_advisory_lock_of_a_role_keeps_an_installation_waiting(kit: Connection, party: Party, role: str) -> None:
    party(role).execute("SELECT pg_advisory_lock(%s)", [SCRIPTS_LOCK_OF_VERSION_1])
    for script in ("pgflow.sql", "pgflow_prefect.sql"):
        kit.execute(shipped_path("sql", script).read_bytes().replace(b"lock_timeout = '10s'", b"lock_timeout = '1ms'"))
    run_script(kit, "api")
    run_script(kit, "roles")
    assert value(kit, "SELECT pgflow.engine_version()") == 2
