"""`--older-than`: what is an age, and what is not."""

from datetime import timedelta

import pytest

from pgflow_prefect.cli.prune import read_age
from pgflow_prefect.errors import UsageError


@pytest.mark.parametrize(
    ("text", "age"),
    [
        ("30d", timedelta(days=30)),
        ("12h", timedelta(hours=12)),
        ("2w", timedelta(weeks=2)),
        ("90m", timedelta(minutes=90)),
        ("45s", timedelta(seconds=45)),
        (" 1d ", timedelta(days=1)),
    ],
)
def test_a_number_and_a_unit_are_an_age(text: str, age: timedelta) -> None:
    assert read_age(text) == age


@pytest.mark.parametrize(
    "text", ["", "30", "d", "0d", "-1d", "1.5d", "1 month", "30x", "1d12h", "٣d", "99999w", "999999999999w", "1" * 99]
)
def test_anything_else_is_refused_with_the_forms_that_there_are(text: str) -> None:
    with pytest.raises(UsageError, match=r"--older-than .* is not a time like 90m, 12h, 30d or 2w"):
        read_age(text)
