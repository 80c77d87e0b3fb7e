"""From a run that was taken to the one flow run that is created for it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError

from pgflow_prefect.errors import DeploymentGoneError, PrefectUnavailableError, SubmissionRefusedError
from pgflow_prefect.models import TakenRun

_TOO_MANY_REQUESTS, _SERVER_ERROR = 429, 500


@contextmanager
def translate_prefect_errors() -> Iterator[None]:
    """Raise what Prefect's API answers as an error of this package.

    Raises:
        PrefectUnavailableError: it does not answer, or not at this moment.
        SubmissionRefusedError: it refuses, and would so again.
    """
    try:
        yield
    except httpx.TransportError as error:
        raise PrefectUnavailableError(f"Prefect's API does not answer: {error or type(error).__name__}") from error
    except PrefectHTTPStatusError as error:
        code = error.response.status_code
        if code == _TOO_MANY_REQUESTS or code >= _SERVER_ERROR:
            raise PrefectUnavailableError(f"Prefect's API answers {code}") from error
        raise SubmissionRefusedError(f"Prefect refuses: {_find_reason(error.response)}") from error


async def create_submission(
    client: PrefectClient, deployment_id: UUID, run: TakenRun, state: State[Any] | None = None
) -> FlowRun:
    """Create the flow run of a run, or find the one that was created in the same epoch.

    It gets the run's id only: the payload stays in PostgreSQL.

    Args:
        client: Prefect's API.
        deployment_id: what to run.
        run: the run, in the epoch in which it was taken.
        state: the flow run's first state; scheduled for now where not given.

    Raises:
        PrefectUnavailableError: Prefect does not answer.
        DeploymentGoneError: there is no such deployment any more.
        SubmissionRefusedError: Prefect refuses it for good.
    """
    parameters = {"run_id": str(run.run_id)}
    with translate_prefect_errors():
        try:
            created = await client.create_flow_run_from_deployment(
                deployment_id, parameters=parameters, state=state, idempotency_key=run.idempotency_key
            )
        except (ObjectNotFound, PrefectHTTPStatusError) as error:
            if isinstance(error, ObjectNotFound) or error.response.status_code == httpx.codes.NOT_FOUND:
                raise DeploymentGoneError(f"deployment {deployment_id} is not there any more") from error
            raise
    # Of a key that it knows, Prefect returns the flow run that is there, whatever it was asked to do.
    if created.parameters.get("run_id") != parameters["run_id"] or created.deployment_id != deployment_id:
        raise SubmissionRefusedError(
            f"flow run {created.id} has the idempotency key {run.idempotency_key!r} and is another one: "
            f"deployment {created.deployment_id}, run {created.parameters.get('run_id')}"
        )
    return created


def _find_reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
