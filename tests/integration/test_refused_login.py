"""A Prefect server that asks for a login: the error names the variable that has it."""

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from pgflow_prefect.errors import PrefectUnavailableError
from pgflow_prefect.prefect_api.client import connect_to_prefect
from tests.http_server import http_server

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("status", [401, 403])
async def test_a_refused_login_names_the_variable_that_has_it(status: int) -> None:
    async with http_server() as server:
        server.respond(status)
        with (
            temporary_settings({PREFECT_API_URL: f"{server.url.rstrip('/')}/api"}),
            pytest.raises(PrefectUnavailableError, match=f"it answers {status}, .*; set PREFECT_API_AUTH_STRING to"),
        ):
            async with connect_to_prefect():
                pass


async def test_another_refusal_does_not_ask_for_a_login() -> None:
    async with http_server() as server:
        server.respond(404)
        with (
            temporary_settings({PREFECT_API_URL: f"{server.url.rstrip('/')}/api"}),
            pytest.raises(PrefectUnavailableError, match=r"it answers 404, .*; start it with"),
        ):
            async with connect_to_prefect():
                pass
