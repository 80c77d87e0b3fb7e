"""Another installation on the same Prefect server, and rows that name its flow runs: nothing of it is changed."""

from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Running

from pgflow_prefect.database.store import Store
from pgflow_prefect.deployment.reconciliation.reconcile import reconcile
from pgflow_prefect.prefect_api.ids import find_run_id
from pgflow_prefect.prefect_api.ownership import make_ownership_tag
from pgflow_prefect.services.cancellation import show_cancelled
from tests.conftest import Connection
from tests.engine import define, refused, value
from tests.integration.conftest import make_slug
from tests.integration.supabase import DENIED
from tests.security.conftest import Party

STRANGERS = [
    *("no tag", "no tag, the run's id is its own", "no tag, our run's id", "a deployment of its own, our run's id"),
    *("its own tag", "both tags", "our tag, another run"),
]


async def create_stranger(client: PrefectClient, installation: UUID, slug: str, run_id: UUID, kind: str) -> FlowRun:
    """Create a flow run of a tenant that runs a flow of the same name."""
    ours, theirs = make_ownership_tag(installation), make_ownership_tag(uuid4())
    tags = {"its own tag": [theirs], "both tags": [ours, theirs], "our tag, another run": [ours]}.get(kind, [])
    parameters = {
        "our tag, another run": {"run_id": str(uuid4())},
        "no tag, our run's id": {"run_id": str(run_id)},
        "its own tag": {"run_id": str(run_id)},
        "both tags": {"run_id": str(run_id)},
    }

    @flow(name=slug)
    def theirs_(run_id: str | None = None) -> None: ...

    if kind.startswith("a deployment"):
        deployment = await client.create_deployment(await client.create_flow(theirs_), "theirs")
        return await client.create_flow_run_from_deployment(
            deployment, parameters={"run_id": str(run_id)}, state=Running()
        )
    return await client.create_flow_run(theirs_, tags=tags, parameters=parameters.get(kind, {}), state=Running())


@pytest.mark.anyio
@pytest.mark.parametrize("kind", STRANGERS)
async def test_rows_that_name_a_stranger_s_flow_run_change_nothing_of_it(
    store: Store, client: PrefectClient, db: Connection, kind: str
) -> None:
    slug, run_id = make_slug(), uuid4()
    define(db, slug, {"a": []})
    installation = await store.read_installation()
    stranger = await create_stranger(client, installation, slug, run_id, kind)
    if kind == "no tag, the run's id is its own":
        run_id = find_run_id(stranger.id)
    db.execute("SELECT pgflow.run_workflow(%s, '{}', %s)", [slug, run_id])
    db.execute("SELECT pgflow_prefect.take_run(%s, %s, 'me', 60, 3)", [run_id, stranger.id])
    db.execute("SELECT pgflow.cancel_run(%s)", [run_id])
    db.execute("UPDATE pgflow_prefect.owners SET lease_until = '-infinity', taken_at = '2000-01-01'")
    db.execute("UPDATE pgflow.runs SET finished_at = '2000-01-01'")

    assert await reconcile(store, client, apply=True, grace=0, lag=0) == []
    await show_cancelled(client, await store.read_run(run_id), installation)
    assert (await client.read_flow_run(stranger.id)).state_name == "Running"
    assert value(db, "SELECT count(*) FROM pgflow_prefect.owners WHERE settled") == 1, "and not looked at for ever"


@pytest.mark.anyio
async def test_a_flow_run_without_a_tag_is_changed_where_its_deployment_is_our_own(
    store: Store, client: PrefectClient, db: Connection
) -> None:
    """As an older version left it: neither its flow run nor, at that time, its deployment had a tag."""
    slug, run_id = make_slug(), uuid4()
    define(db, slug, {"a": []})
    installation = await store.read_installation()
    old = await create_stranger(client, installation, slug, run_id, "a deployment of its own, our run's id")
    assert old.deployment_id is not None
    own = DeploymentUpdate(tags=[make_ownership_tag(installation)])
    await client.update_deployment(old.deployment_id, own)
    db.execute("SELECT pgflow.run_workflow(%s, '{}', %s)", [slug, run_id])
    db.execute("SELECT pgflow_prefect.take_run(%s, %s, 'me', 60, 3)", [run_id, old.id])
    db.execute("SELECT pgflow.cancel_run(%s)", [run_id])
    db.execute("UPDATE pgflow_prefect.owners SET lease_until = '-infinity', taken_at = '2000-01-01'")
    db.execute("UPDATE pgflow.runs SET finished_at = '2000-01-01'")

    await reconcile(store, client, apply=True, grace=0, lag=0)
    assert (await client.read_flow_run(old.id)).state_name == "Cancelled"


@pytest.mark.anyio
@pytest.mark.parametrize("apply", [True, False])
@pytest.mark.parametrize("kind", ["no tag", "no tag, our run's id", "its own tag"])
async def test_flow_runs_of_another_installation_are_no_orphans(
    store: Store, client: PrefectClient, db: Connection, apply: bool, kind: str
) -> None:
    slug = make_slug()
    define(db, slug, {"a": []})
    theirs = await create_stranger(client, await store.read_installation(), slug, uuid4(), kind)
    assert await reconcile(store, client, apply=apply, strangers=True, grace=0, lag=0) == []
    assert (await client.read_flow_run(theirs.id)).state_name == "Running"


@pytest.mark.parametrize("role", ["define", "run", "work", "observe"])
def test_no_role_says_which_installation_this_is(kit: Connection, party: Party, role: str) -> None:
    connection = party(role)
    for statement in (
        "UPDATE pgflow_prefect.installation SET id = gen_random_uuid()",
        "DELETE FROM pgflow_prefect.installation",
        "TRUNCATE pgflow_prefect.installation",
        "SELECT pgflow_prefect.new_installation()",
        "SELECT pgflow_prefect.move_installation()",
    ):
        with refused(DENIED):
            connection.execute(statement.encode())


def test_what_an_older_script_has_granted_is_taken_back(kit: Connection, party: Party) -> None:
    from tests.integration.supabase import run_script  # noqa: PLC0415

    kit.execute("GRANT UPDATE, DELETE ON pgflow_prefect.installation TO pgflow_work")
    run_script(kit, "roles")
    with refused(DENIED):
        party("work").execute("UPDATE pgflow_prefect.installation SET id = gen_random_uuid()")
