"""New queues of real brokers."""

from uuid import uuid4

import pytest


@pytest.fixture(params=["redis_url", "rabbitmq_url"])
def queue_url(request: pytest.FixtureRequest) -> str:
    """A new queue, of each broker."""
    return f"{request.getfixturevalue(request.param)}?queue=q-{uuid4().hex[:8]}"


@pytest.fixture
def redis_queue(redis_url: str) -> str:
    return f"{redis_url}?queue=q-{uuid4().hex[:8]}"


@pytest.fixture
def rabbitmq_queue(rabbitmq_url: str) -> str:
    return f"{rabbitmq_url}?queue=q-{uuid4().hex[:8]}"
