"""Creates and ends the flow runs of several runs with one request of Prefect's API."""

import logging
from asyncio import Event, Future, Semaphore, ensure_future, gather
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from time import monotonic
from typing import Any, TypeAlias, cast
from uuid import UUID

import anyio
import httpx
from prefect.client.orchestration import PrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import OrchestrationResult, SetStateStatus
from prefect.exceptions import Pause, PrefectHTTPStatusError, PrefectSignal
from prefect.states import Completed

from pgflow_prefect.errors import PrefectUnavailableError
from pgflow_prefect.prefect_api.errors import unavailable
from pgflow_prefect.prefect_api.internals import propose_state, to_state_create
from pgflow_prefect.prefect_api.redaction import describe_error
from pgflow_prefect.waiting import Answer, Asked, Collected, Item, give, refuse

MOST_CREATED = 25
"""The most new flow runs in one request. Prefect's server takes 100. But its answer comes when it has created the last
one, and none of their runs begins before."""

MOST_ENDED = 50
"""The most flow runs that one request ends, as in Prefect's server."""

_PATIENCE, _PATIENCE_EACH = 10.0, 0.2
"""Seconds to wait for new flow runs, and more for each of several. After that, their runs are handed back."""

_PATIENCE_OF_END = 60.0
"""Seconds to wait for a flow run's state. Prefect's client itself tries again for as long."""

_LATE = 0.5
"""Seconds after which later flow runs no longer wait for the answer to a request."""

_MOST_AT_ONCE = 4
"""The most requests for several flow runs at the same time. All but the last one are late."""

_LANES = 8
"""The most requests for single flow runs at the same time. More would not be faster."""

_WITHOUT_ROUTES = 600.0
"""Seconds after which a server without the routes for several is tried again: its proxy may have been the cause."""

_NO_ROUTE = frozenset({httpx.codes.NOT_FOUND, httpx.codes.METHOD_NOT_ALLOWED})
_OF_ALL = frozenset({401, 408, 425, 429, 502, 503, 504})
"""Status codes that no single flow run has caused. 403 is not among them: only one flow run may be forbidden."""

Json: TypeAlias = dict[str, Any]

_logger = logging.getLogger(__name__)


class FlowRunWriter:
    """Creates flow runs of deployments, and writes their states, for all runs of this process.

    Flow runs that come during a request go with the next one, which does not wait for a late answer. If a request for
    several fails, each is sent alone, so that only the flow run with the error gets it. A server without the routes for
    several gets single requests. Once in a while, it is asked again whether it has the routes.
    """

    def __init__(self, client: PrefectClient) -> None:
        """Begin without flow runs.

        Args:
            client: Prefect's API.
        """
        self._client = client
        self._creations: dict[UUID, Collected[Json, FlowRun]] = {}
        self._completions: Collected[_Entry, State[Any]] = _collect(self._complete, MOST_ENDED)
        self._creates_alone_until = self._ends_alone_until = 0.0
        self._lanes = Semaphore(_LANES)

    async def create(self, deployment_id: UUID, body: Json) -> FlowRun:
        """Create a flow run of a deployment, or return the one that has its idempotency key.

        Args:
            deployment_id: the deployment.
            body: the body of Prefect's request for one flow run.

        Raises:
            PrefectUnavailableError: there was no answer in time.
            PrefectHTTPStatusError: Prefect refuses it.
        """
        if deployment_id not in self._creations:
            send = _bind(self._create, deployment_id)
            self._creations[deployment_id] = _collect(send, MOST_CREATED)
        return await self._creations[deployment_id].ask(body)

    async def enter(self, flow_run_id: UUID, state: State[Any], *, force: bool = False) -> State[Any]:
        """Propose a state for a flow run, and return the state that it is in then: see Prefect's `propose_state`.

        Raises:
            Abort: Prefect's server says that the process must leave the flow run alone.
            Pause: it says that the flow run is paused.
            PrefectUnavailableError: there was no answer in time.
            PrefectHTTPStatusError: Prefect refuses it.
        """
        if not force and _is_plain_completion(state):
            return await self._completions.ask((flow_run_id, state))
        return await self._propose(flow_run_id, state, force=force)

    async def enter_in_turn(
        self, flow_run_id: UUID, state: State[Any], given_up: Event | None = None
    ) -> State[Any] | None:
        """Propose a state until the server accepts it, and return the state that the flow run is in then.

        Args:
            flow_run_id: the flow run.
            state: the server may let it wait, for example until a retry is due.
            given_up: if this is set first, the flow run keeps its state, and the answer is None. A request that has
                begun is awaited.

        Raises:
            Abort: see `enter`, here and below.
            Pause: it says that the flow run is paused.
            PrefectUnavailableError: there was no answer in time.
            PrefectHTTPStatusError: Prefect refuses it.
        """
        if given_up is None:
            return await self._propose(flow_run_id, state)
        entered: State[Any] | None = None
        with anyio.CancelScope() as scope:
            waiting = ensure_future(given_up.wait())
            waiting.add_done_callback(lambda done: None if done.cancelled() else scope.cancel())
            client = cast("PrefectClient", _PatientClient(self._client, to_the_end=True))
            try:
                entered = await propose_state(client, state, flow_run_id=flow_run_id)
            finally:
                waiting.cancel()
        return entered

    async def _propose(self, flow_run_id: UUID, state: State[Any], *, force: bool = False) -> State[Any]:
        client = cast("PrefectClient", _PatientClient(self._client))
        return await propose_state(client, state, flow_run_id=flow_run_id, force=force)

    # Creation

    async def _create(self, deployment_id: UUID, asked: Sequence["Asked[Json, FlowRun]"]) -> None:
        made: list[FlowRun | None] = [None] * len(asked)
        if len(asked) > 1 and monotonic() >= self._creates_alone_until:
            made = await self._create_together(deployment_id, [body for body, _ in asked])
        for (_, answer), flow_run in zip(asked, made, strict=True):
            if flow_run is not None:
                give(answer, flow_run)
        left = [each for each, flow_run in zip(asked, made, strict=True) if flow_run is None]
        await _send_each(left, lambda body: self._create_one(deployment_id, body), self._lanes)

    async def _create_together(self, deployment_id: UUID, bodies: Sequence[Json]) -> list[FlowRun | None]:
        """Return the created flow runs, and None for each that must be created alone."""
        with _bounded(_PATIENCE, len(bodies)), _understood():
            try:
                answer = await self._post(f"/deployments/{deployment_id}/create_flow_run/bulk", [*bodies])
            except PrefectHTTPStatusError as error:
                if _lacks_route(error):
                    self._creates_alone_until = monotonic() + _WITHOUT_ROUTES
                _judge(error, "flow runs")
                return [None] * len(bodies)
            ids = [UUID(each["flow_run_id"]) if each.get("flow_run_id") else None for each in answer["results"]]
        if len(ids) != len(bodies):
            return [None] * len(bodies)
        found = await self._read([each for each in ids if each is not None])
        return [None if each is None else found.get(each) for each in ids]

    async def _read(self, ids: Sequence[UUID]) -> dict[UUID, FlowRun]:
        """Return the flow runs that exist, by id. A request that broke at its end may have created none of them."""
        if not ids:
            return {}
        with _bounded(_PATIENCE, len(ids)), _understood():
            chosen = FlowRunFilter(id=FlowRunFilterId(any_=[*ids]))
            return {each.id: each for each in await self._client.read_flow_runs(flow_run_filter=chosen, limit=len(ids))}

    async def _create_one(self, deployment_id: UUID, body: Json) -> FlowRun:
        with _bounded(_PATIENCE), _understood():
            return FlowRun.model_validate(await self._post(f"/deployments/{deployment_id}/create_flow_run", body))

    async def _post(self, path: str, body: Json | list[Json]) -> Any:  # noqa: ANN401  JSON
        # The types of Prefect's client do not know all of these routes.
        response = await cast("Any", self._client).request("POST", path, json=body)
        return response.json()

    # Ends

    async def _complete(self, asked: Sequence["Asked[_Entry, State[Any]]"]) -> None:
        results: Mapping[UUID, OrchestrationResult[Any]] = {}
        if len(asked) > 1 and monotonic() >= self._ends_alone_until:
            results = await self._complete_together([flow_run_id for (flow_run_id, _), _ in asked])
        left: list[Asked[_Entry, State[Any]]] = []
        for (flow_run_id, state), answer in asked:
            result = results.get(flow_run_id)
            if result is None or result.status not in (SetStateStatus.ACCEPT, SetStateStatus.REJECT):
                left.append(((flow_run_id, state), answer))  # the single request tells the reason
            else:
                _conclude(answer, state, result)
        await _send_each(left, self._complete_one, self._lanes)

    async def _complete_together(self, ids: Sequence[UUID]) -> dict[UUID, OrchestrationResult[Any]]:
        body = {
            "flow_runs": {"id": {"any_": [str(each) for each in ids]}},
            "state": {"type": StateType.COMPLETED.value, "name": "Completed"},
            "force": False,
            "limit": len(ids),
        }
        with _bounded(_PATIENCE_OF_END), _understood():
            try:
                answer = await self._post("/flow_runs/bulk_set_state", body)
            except PrefectHTTPStatusError as error:
                if _lacks_route(error):
                    self._ends_alone_until = monotonic() + _WITHOUT_ROUTES
                _judge(error, "ends of flow runs")
                return {}
            return {UUID(each["flow_run_id"]): OrchestrationResult.model_validate(each) for each in answer["results"]}

    async def _complete_one(self, entry: "_Entry") -> State[Any]:
        flow_run_id, state = entry
        plain: State[Any] = Completed()  # in no flow run's context, a result that is not persisted would go along
        entered = await self._propose(flow_run_id, plain)
        return _note_entered(state, plain) if entered is plain else entered


class _PatientClient:
    """Prefect's client for proposing states, with a limited wait for each answer.

    Between two answers, the server may let a state wait for any time.
    """

    def __init__(self, client: PrefectClient, *, to_the_end: bool = False) -> None:
        self._client = client
        self._to_the_end = to_the_end  # a cancellation waits for the answer

    async def set_flow_run_state(
        self, flow_run_id: UUID, state: State[Any], force: bool = False
    ) -> OrchestrationResult[Any]:
        answer: OrchestrationResult[Any]
        with anyio.CancelScope(shield=self._to_the_end), _bounded(_PATIENCE_OF_END):
            answer = await self._client.set_flow_run_state(flow_run_id, state, force=force)
        return answer


_Entry: TypeAlias = tuple[UUID, State[Any]]


async def _send_each(
    asked: Sequence["Asked[Item, Answer]"], send: Callable[[Item], Awaitable[Answer]], lanes: Semaphore
) -> None:
    """Send each request alone. If the server can't be used, refuse the requests that have not begun."""
    reason: Exception | None = None

    async def send_one(item: Item, answer: "Future[Answer]") -> None:
        nonlocal reason
        async with lanes:
            if reason is not None:
                refuse(answer, reason)
            if answer.done():
                return
            try:
                give(answer, await send(item))
            except (Exception, PrefectSignal) as error:  # noqa: BLE001  it is raised where the answer is awaited
                if _is_of_all(error):
                    reason = cast("Exception", error)
                refuse(answer, error)

    await gather(*(send_one(*each) for each in asked))


def _conclude(answer: "Future[State[Any]]", state: State[Any], result: OrchestrationResult[Any]) -> None:
    """Give the answer that `propose_state` would return or raise."""
    found = result.state
    if result.status is SetStateStatus.ACCEPT and found is not None:
        give(answer, _note_entered(state, found))
    elif found is not None and found.is_paused():
        refuse(answer, Pause(getattr(result.details, "reason", None), state=found))
    else:
        give(answer, state if found is None else found)


def _note_entered(state: State[Any], entered: State[Any]) -> State[Any]:
    state.id, state.timestamp = entered.id, entered.timestamp
    state.state_details = entered.state_details or state.state_details
    return state


def _is_plain_completion(state: State[Any]) -> bool:
    """Tell whether it is the usual state at the end, which several flow runs can share."""
    if state.type is not StateType.COMPLETED or state.name != "Completed" or state.message is not None:
        return False
    return to_state_create(state).data is None  # the flow run's context says whether results are persisted


def _lacks_route(error: PrefectHTTPStatusError) -> bool:
    """Tell whether the server lacks the route. If it lacks the deployment instead, its answer names that."""
    if error.response.status_code not in _NO_ROUTE:
        return False
    try:
        detail = error.response.json().get("detail")
    except (ValueError, AttributeError):
        return True
    return detail in (None, "Not Found", "Method Not Allowed")


def _judge(error: PrefectHTTPStatusError, what: str) -> None:
    """Decide whether to send each request alone.

    Raises:
        PrefectHTTPStatusError: each would get the same answer.
    """
    if _is_of_all(error):
        raise error
    level = logging.DEBUG if _lacks_route(error) else logging.WARNING
    _logger.log(level, "%s are sent one by one, for Prefect refuses them together: %s", what, describe_error(error))


def _is_of_all(error: BaseException) -> bool:
    if isinstance(error, PrefectHTTPStatusError):
        return error.response.status_code in _OF_ALL
    return isinstance(error, httpx.TransportError | PrefectUnavailableError)


@contextmanager
def _bounded(patience: float, count: int = 1) -> Iterator[None]:
    """Limit the wait for an answer about so many flow runs.

    Raises:
        PrefectUnavailableError: there was no answer in time.
    """
    seconds = patience + _PATIENCE_EACH * (count - 1)
    with anyio.move_on_after(seconds) as scope:
        yield
    if scope.cancelled_caught:
        raise unavailable(f"no answer in {seconds:g} s")


@contextmanager
def _understood() -> Iterator[None]:
    """Read the server's answer.

    Raises:
        PrefectUnavailableError: it is not an answer of Prefect's API, but for example a page of a proxy.
    """
    try:
        yield
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise unavailable(f"its answer can't be read, {type(error).__name__}") from error


def _bind(
    send: Callable[[UUID, Sequence["Asked[Json, FlowRun]"]], Awaitable[None]], deployment_id: UUID
) -> Callable[[Sequence["Asked[Json, FlowRun]"]], Awaitable[None]]:
    return lambda asked: send(deployment_id, asked)


def _collect(
    send: Callable[[Sequence["Asked[Item, Answer]"]], Awaitable[None]], most: int
) -> "Collected[Item, Answer]":
    return Collected(send, most=most, late=_LATE, at_once=_MOST_AT_ONCE)
