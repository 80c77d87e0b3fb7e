"""A row reaches public addresses only, and those that the worker's settings name. The party: `define`."""

import socket
import ssl
from collections.abc import Sequence
from typing import Any

import anyio
import anyio.abc
import anyio.streams.tls
import httpcore
import httpx
import pytest
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL, temporary_settings

from pgflow_prefect import HttpEndpoint, Workflow
from pgflow_prefect.errors import NotRetriableError
from pgflow_prefect.execution.process.resources import make_row_policy
from pgflow_prefect.handlers.guarded_transport import GuardedBackend, GuardedTransport
from pgflow_prefect.handlers.row_policy import InternalAddressError, RowPolicy, describe_internal
from pgflow_prefect.origins import find_origin
from pgflow_prefect.settings import Settings
from tests.conftest import Connection
from tests.http_server import HttpServer
from tests.integration.conftest import insert_workflow, make_slug, read_run, read_steps
from tests.security.conftest import Party

pytestmark = pytest.mark.anyio

PUBLIC, ANY = "93.184.216.34", "0.0.0.0"  # noqa: S104  nothing is bound to it

INTERNAL = [
    ANY, "127.0.0.1", "127.8.9.1", "::1", "::", "10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1",
    "169.254.169.254", "168.63.129.16", "fe80::1%eth0", "fd00:ec2::254", "fec0::1", "224.0.0.1", "ff02::1",
    "255.255.255.255", "240.0.0.1", "192.0.2.1", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::127.0.0.1",
    "64:ff9b::7f00:1", "64:ff9b:1::a00:1", "2002:7f00:1::", "2001:0:7f00:1::",
]  # fmt: skip

LOOPBACK_HOSTS = [
    "127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0177.0.0.1", "0x7f.1", "[::1]",
    "[::ffff:127.0.0.1]", "[::ffff:7f00:1]", ANY, "0", "[::]",
]  # fmt: skip


@pytest.mark.parametrize("address", INTERNAL)
def test_an_internal_address_is_known_in_each_of_its_forms(address: str) -> None:
    assert describe_internal(address)


@pytest.mark.parametrize("address", [PUBLIC, "8.8.8.8", "2606:2800:220:1::1", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_a_public_address_is_none(address: str) -> None:
    assert describe_internal(address) is None


def bind(party: Party, workflow: Workflow, kind: str, url: str) -> None:
    statement = "SELECT pgflow_prefect.bind_step(%s, 'ask', %s, %s, '{\"retries\": 0}')"
    party("define").execute(statement, [workflow.slug, kind, url])


@pytest.mark.thorough
@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
async def test_a_row_reaches_no_address_of_the_workers_machine(
    party: Party, workflow: Workflow, endpoint: HttpServer, db: Connection
) -> None:
    port = endpoint.url.rpartition(":")[2]
    for host in LOOPBACK_HOSTS:
        bind(party, workflow, "http", f"http://{host}:{port}/")
        await workflow.flow(return_state=True)
        status, message, _ = read_run(db)
        is_told = "PGFLOW_HTTP_ALLOW" in message or "it is no URL" in message  # httpx takes no octal numbers
        assert (status, is_told) == ("failed", True), (host, message)
        db.execute("DELETE FROM pgflow.step_states; DELETE FROM pgflow.runs")
    assert endpoint.requests == []


@pytest.mark.usefixtures("pgflow_dsn")
@pytest.mark.parametrize("name", ["flow_runs", "deployments", "flows", "block_documents"])
async def test_a_row_reaches_no_member_of_prefects_api(
    party: Party, kit: Connection, prefect_api: str, db: Connection, name: str
) -> None:
    kit.execute("DELETE FROM pgflow.step_states; DELETE FROM pgflow.runs")
    workflow = Workflow(make_slug())
    insert_workflow(kit, workflow.slug, [name, "ask"], [(name, "ask")])
    kit.execute("SELECT pgflow_prefect.bind_step(%s, %s, 'python')", [workflow.slug, name])
    workflow.step(name)(lambda: {"include_secrets": True})
    bind(party, workflow, "http", f"{prefect_api}/{name}/filter")
    await workflow.flow(return_state=True)
    assert read_steps(db)["ask"][0] == "failed"
    assert read_steps(db)["ask"][2] is None


@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
@pytest.mark.parametrize("scheme", ["redis", "rediss", "amqp", "amqps"])
async def test_a_row_reaches_no_broker_of_the_workers_machine(
    party: Party, workflow: Workflow, endpoint: HttpServer, db: Connection, scheme: str
) -> None:
    port = endpoint.url.rpartition(":")[2]
    bind(party, workflow, "queue", f"{scheme}://localhost:{port}/0?queue=celery")
    await workflow.flow(return_state=True)
    assert f"add {scheme}://localhost:{port} to PGFLOW_HTTP_ALLOW" in read_run(db)[1]


@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
async def test_a_row_reaches_an_origin_that_the_settings_name_and_no_slug_is_a_key_of_the_body(
    party: Party, workflow: Workflow, endpoint: HttpServer, db: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_HTTP_ALLOW", f"https://example.org, {endpoint.url}/")
    bind(party, workflow, "http", f"{endpoint.url}/check")
    await workflow.flow(payload={"n": 1}, return_state=True)
    assert read_steps(db)["ask"][0] == "completed"
    assert [request.json for request in endpoint.requests] == [{"input": {"payload": {"n": 1}}}]


@pytest.mark.usefixtures("pgflow_dsn", "prefect_api")
async def test_the_body_of_earlier_versions_is_sent_where_a_setting_says_so(
    workflow: Workflow, endpoint: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGFLOW_HTTP_BODY", "flat")
    workflow.bind("ask", HttpEndpoint(endpoint.url))  # in Python, which is not restricted
    await workflow.flow(payload={"n": 1}, return_state=True)
    assert [request.json for request in endpoint.requests] == [{"payload": {"n": 1}}]


# Names: what is resolved is what is connected to


class Names:
    """A DNS server: the answers for a name, one after another."""

    def __init__(self, *answers: Sequence[str]) -> None:
        self._answers = list(answers)

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        if host == "unknown.example":
            raise socket.gaierror("no such name")
        return self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]


class Wire(httpcore.AsyncNetworkBackend):
    """The network: notes where connections go, and leads them all to one server of this test's own."""

    def __init__(self, port: int, dead: Sequence[str] = ()) -> None:
        self.port, self.dead = port, dead
        self.connected: list[str] = []

    async def connect_tcp(self, host: str, port: int, *arguments: Any, **options: Any) -> httpcore.AsyncNetworkStream:
        self.connected.append(host)
        if host in self.dead:
            raise httpcore.ConnectError("no server answers")
        return await httpcore.AnyIOBackend().connect_tcp("127.0.0.1", self.port)


async def post(names: Names, wire: Wire, url: str, tls: ssl.SSLContext | None = None, **options: Any) -> httpx.Response:
    rows = RowPolicy(resolve=names.resolve, **options)
    transport = GuardedTransport(GuardedBackend(rows.find_addresses, wire), tls)
    async with httpx.AsyncClient(transport=transport, trust_env=False) as client:
        return await client.post(url, json={})


@pytest.fixture
def wire(endpoint: HttpServer) -> Wire:
    return Wire(int(endpoint.url.rpartition(":")[2]))


async def test_the_connection_goes_to_the_address_that_was_checked(wire: Wire, endpoint: HttpServer) -> None:
    answer = await post(Names([PUBLIC], ["127.0.0.1"]), wire, "http://rebinding.example/x?y=1")
    assert (answer.json(), wire.connected) == (1, [PUBLIC])
    assert (endpoint.requests[0].line, endpoint.requests[0].headers["host"]) == (
        "POST /x?y=1 HTTP/1.1",
        "rebinding.example",
    )


@pytest.mark.parametrize("answer", [["127.0.0.1"], [PUBLIC, "10.0.0.1"], ["::ffff:169.254.169.254", PUBLIC]])
async def test_a_name_with_an_internal_address_among_its_addresses_is_not_connected_to(
    wire: Wire, answer: Sequence[str]
) -> None:
    with pytest.raises(InternalAddressError):
        await post(Names(answer), wire, "https://mixed.example/")
    assert wire.connected == []


async def test_prefects_server_is_not_connected_to_by_its_name_or_its_address(wire: Wire) -> None:
    for url in ("https://prefect.example/api", "https://alias.example/api"):
        with pytest.raises(InternalAddressError, match="Prefect's server"):
            await post(Names([PUBLIC]), wire, url, guarded=frozenset({"prefect.example"}))
    assert wire.connected == []


def test_prefects_api_and_its_pages_are_guarded() -> None:
    urls = {PREFECT_API_URL: "https://api.prefect.example/api", PREFECT_UI_URL: "https://ui.prefect.example"}
    with temporary_settings(urls):
        assert make_row_policy(Settings()).guarded == {"api.prefect.example", "ui.prefect.example"}


async def test_the_next_address_is_tried_where_one_does_not_answer(wire: Wire) -> None:
    wire.dead = ["1.1.1.1"]
    assert (await post(Names(["1.1.1.1", PUBLIC]), wire, "http://two.example/")).status_code == 200
    assert wire.connected == ["1.1.1.1", PUBLIC]


async def test_a_name_without_an_address_can_t_be_reached(wire: Wire) -> None:
    with pytest.raises(httpx.ConnectError, match="no such name"):
        await post(Names(), wire, "http://unknown.example/")


async def test_tls_is_asked_for_the_name_and_not_for_the_address() -> None:
    asked: list[str | None] = []
    tls = ssl.create_default_context()

    def note(protocol: ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> int:
        asked.append(name)
        return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_tls.sni_callback = note
    listener = await anyio.create_tcp_listener(local_host="127.0.0.1")

    async def greet(stream: anyio.abc.SocketStream) -> None:
        with pytest.raises(ssl.SSLError):
            await anyio.streams.tls.TLSStream.wrap(stream, server_side=True, ssl_context=server_tls)
        await stream.aclose()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, greet)
        port = listener.extra(anyio.abc.SocketAttribute.local_port)  # noqa: S610
        with pytest.raises(httpx.ConnectError):
            await post(Names([PUBLIC]), Wire(port), "https://named.example/", tls)
        tasks.cancel_scope.cancel()
    assert asked == ["named.example"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("http_allow", "example.org"),
        ("http_allow", "https://example.org/path"),
        ("http_allow", "https://user:pw@example.org"),
        ("http_allow", "ftp://example.org"),
        ("http_allow", "https://"),
        ("credential_origins", "PGFLOW_TOKEN_X"),
        ("credential_origins", "=https://example.org"),
        ("credential_origins", "PGFLOW_TOKEN_X=example.org"),
    ],
)
def test_a_setting_that_names_no_origin_is_refused(name: str, text: str) -> None:
    with pytest.raises(ValueError, match=r"is no (origin|pair)"):
        Settings.model_validate({name: text})


async def test_a_credential_is_tied_to_scheme_host_and_port() -> None:
    settings = Settings(credential_origins="PGFLOW_TOKEN_X=https://A.example:443/,pgflow-y=amqps://b.example")
    policy = make_row_policy(settings)
    policy.check_credential("PGFLOW_TOKEN_X", None, find_origin("https://a.example/send?x=1"))
    policy.check_credential(None, "pgflow-y", find_origin("amqps://b.example:5671/"))
    for url in ("http://a.example/", "https://a.example:8443/", "https://a.example.evil.org/", "https://evil.org/"):
        with pytest.raises(NotRetriableError, match="do not tie"):
            policy.check_credential("PGFLOW_TOKEN_X", None, find_origin(url))


@pytest.mark.parametrize(
    "url",
    [
        "http://a.example\\@evil.org/",
        "http://evil.org#@a.example/",
        "http://a.example@evil.org/",
        "http://evil.org?@a.example/",
    ],
)
def test_the_origin_of_a_url_is_where_the_client_connects(url: str) -> None:
    try:
        origin = find_origin(url)
    except ValueError:
        return  # no request is sent
    assert origin.host == httpx.Request("POST", url).url.raw_host.decode()
