"""What queues need and is not installed is named, before a message is to be sent."""

from importlib.machinery import ModuleSpec

import pytest

from pgflow_prefect.handlers import queue
from pgflow_prefect.handlers.queue import find_missing_packages


@pytest.mark.parametrize(
    ("url", "needed"),
    [
        ("amqp://host/shop?queue=q", ["kombu"]),
        ("amqps://host/shop?queue=q", ["kombu"]),
        ("redis://host/0?queue=q", ["kombu", "redis"]),
        ("rediss://host/0?queue=q", ["kombu", "redis"]),
        ("pgqueuer:mails", ["pgqueuer"]),
        ("carrier-pigeon://loft", []),
    ],
)
def test_the_packages_of_each_kind_of_queue(monkeypatch: pytest.MonkeyPatch, url: str, needed: list[str]) -> None:
    assert find_missing_packages(url) == [], "the extra is installed for tests"
    found: list[str] = []

    def find_spec(name: str) -> ModuleSpec | None:
        found.append(name)
        return None

    monkeypatch.setattr(queue, "find_spec", find_spec)
    assert find_missing_packages(url) == needed == found
