"""A row sends no credential that the worker's settings do not tie to where it would go. The party: `define`."""

import pytest
from prefect.blocks.system import Secret

from pgflow_prefect import HttpEndpoint, Workflow
from tests.conftest import Connection
from tests.http_server import HttpServer
from tests.integration.conftest import read_run, read_steps
from tests.security.conftest import Party

pytestmark = pytest.mark.anyio

BIND = "SELECT pgflow_prefect.bind_step(%s, 'ask', %s, %s, jsonb_build_object(%s::text, %s::text, 'retries', 0))"


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, endpoint: HttpServer) -> None:
    """A worker with secrets, whose settings let rows reach the endpoint; so the credential alone decides."""
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2-aws")
    monkeypatch.setenv("PREFECT_API_KEY", "hunter2-prefect")
    monkeypatch.setenv("PGFLOW_TOKEN_MAIL", "hunter2-mail")
    monkeypatch.setenv("PGFLOW_HTTP_ALLOW", f"{endpoint.url},redis://127.0.0.1:1")
    monkeypatch.setenv("PGFLOW_CREDENTIAL_ORIGINS", "PGFLOW_TOKEN_MAIL=https://mail.example.org")


async def execute(workflow: Workflow) -> None:
    await workflow.flow(return_state=True)


@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
@pytest.mark.parametrize(
    ("option", "name", "reason"),
    [
        ("token_env", "AWS_SECRET_ACCESS_KEY", "begin with PGFLOW_TOKEN_"),
        ("token_env", "PREFECT_API_KEY", "begin with PGFLOW_TOKEN_"),
        ("token_env", "pgflow_token_mail", "begin with PGFLOW_TOKEN_"),
        ("token_env", "PGFLOW_DSN", "begin with PGFLOW_TOKEN_"),
        ("token_env", "PGFLOW_TOKEN_MAIL", "add PGFLOW_TOKEN_MAIL=http://127.0.0.1:"),
        ("token_block", "production", "begin with pgflow-"),
        ("token_block", "pgflow-production", "add pgflow-production=http://127.0.0.1:"),
    ],
)
async def test_a_row_sends_no_credential_to_an_origin_of_its_choice(
    party: Party, workflow: Workflow, endpoint: HttpServer, db: Connection, option: str, name: str, reason: str
) -> None:
    if option == "token_block":
        await Secret(value="hunter2-block").save(name, overwrite=True)
    party("define").execute(BIND, [workflow.slug, "http", endpoint.url, option, name])
    await execute(workflow)
    assert endpoint.requests == []
    status, message, _ = read_run(db)
    assert status == "failed"
    assert reason in message
    assert "hunter2" not in message


@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
@pytest.mark.parametrize(
    ("option", "name"),
    [("login_env", "AWS_SECRET_ACCESS_KEY"), ("login_env", "PGFLOW_TOKEN_MAIL"), ("login_block", "production")],
)
async def test_a_row_logs_in_to_no_broker_with_a_credential_of_its_choice(
    party: Party, workflow: Workflow, db: Connection, option: str, name: str
) -> None:
    party("define").execute(BIND, [workflow.slug, "queue", "redis://127.0.0.1:1/0?queue=q", option, name])
    await execute(workflow)
    assert "a row " in read_run(db)[1], "it is refused before the broker is asked"


@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
async def test_a_credential_that_the_settings_tie_to_the_origin_is_sent(
    party: Party, workflow: Workflow, endpoint: HttpServer, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_CREDENTIAL_ORIGINS", f"pgflow-x=https://a.example, PGFLOW_TOKEN_MAIL={endpoint.url}")
    party("define").execute(BIND, [workflow.slug, "http", endpoint.url, "token_env", "PGFLOW_TOKEN_MAIL"])
    await execute(workflow)
    assert read_steps(db)["ask"][0] == "completed"
    assert [request.headers["authorization"] for request in endpoint.requests] == ["Bearer hunter2-mail"]


@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
async def test_a_binding_in_python_names_what_it_likes(workflow: Workflow, endpoint: HttpServer) -> None:
    workflow.bind("ask", HttpEndpoint(endpoint.url, token_env="AWS_SECRET_ACCESS_KEY"))  # noqa: S106  a name
    await execute(workflow)
    assert [request.headers["authorization"] for request in endpoint.requests] == ["Bearer hunter2-aws"]
