"""What `cache_key_fn=` and `cache_expiration=` may be, and which hash a key has."""

from datetime import timedelta
from typing import Any

import pytest
from prefect.tasks import task_input_hash

from pgflow_prefect import Workflow
from pgflow_prefect.errors import UsageError
from pgflow_prefect.handlers.caching import CacheOptions, make_cache_options


def load() -> int:
    return 1


def find_key(context: object, arguments: dict[str, Any]) -> str:
    return "key"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_key_fn": "key"}, "cache_key_fn='key' is no function"),
        ({"cache_key_fn": lambda: "key"}, "has to take two arguments, as for Prefect's tasks"),
        ({"cache_key_fn": find_key, "cache_expiration": 60}, "cache_expiration=60 is no time after a step's end"),
        ({"cache_key_fn": find_key, "cache_expiration": timedelta()}, "give a positive timedelta"),
        ({"cache_expiration": timedelta(1)}, "cache_expiration needs cache_key_fn"),
    ],
)
def test_bad_options_are_refused_with_what_to_give(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        Workflow("w").step(**options)(load)
    assert message in str(refused.value)


@pytest.mark.parametrize("key_fn", [find_key, task_input_hash, lambda *given: "key"])
def test_a_key_function_takes_the_context_and_the_arguments(key_fn: Any) -> None:
    options = make_cache_options(load, key_fn, timedelta(minutes=1))
    assert options is not None
    assert options.expires_in == 60


def test_a_result_that_would_expire_in_centuries_does_not_expire() -> None:
    options = make_cache_options(load, find_key, timedelta.max)
    assert options is not None
    assert options.expires_in is None


def test_a_key_is_one_of_its_workflow_step_and_source() -> None:
    options = CacheOptions(find_key, None, "source")
    others = [
        options.hash_key("other", "step", "key"),
        options.hash_key("w", "other", "key"),
        options.hash_key("w", "step", "other"),
        CacheOptions(find_key, None, "other").hash_key("w", "step", "key"),
    ]
    hashed = options.hash_key("w", "step", "key")
    assert hashed not in others
    assert hashed == CacheOptions(load, 3, "source").hash_key("w", "step", "key")
    assert len({*others}) == len(others)
