"""Names of flow runs and task runs: made of values whose author is not the author of the template."""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, JsonValue, SecretStr

from pgflow_prefect.handlers.redaction import MASK, find_secrets, is_secret_name, redact, redact_text
from pgflow_prefect.handlers.run_names import (
    LONGEST,
    NamingError,
    NamingFailedError,
    check_naming,
    find_fields,
    make_name,
)
from pgflow_prefect.handlers.task_options import make_task_options, merge, name_task_run

ORDER: JsonValue = {
    "id": 7,
    "price": 1.5,
    "customer": {"name": "Ann", "tags": ["new", "vip"]},
    "nothing": None,
    "class": "A",
    "api_key": "s3cr3t-key",
    "source": "https://ann:pw@example.org/orders",
}


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("nightly", "nightly"),
        ("order {payload[id]}", "order 7"),
        ("order {payload.id:>05d}", "order 00007"),
        ("{payload.price:.2f} of {payload[customer][name]}", "1.50 of Ann"),
        ("{payload.customer.tags[1]}, {payload[customer][tags][0]!s:>5}", "vip,   new"),
        ("{payload[nothing]} {payload[class]}", "None A"),
        ("{payload.customer}", '{"name": "Ann", "tags": ["new", "vip"]}'),
        ("{{}} {run_id}", "{} r-1"),
    ],
)
def test_a_template_finds_members_by_key_or_by_attribute(template: str, name: str) -> None:
    assert make_name(template, {"payload": ORDER, "run_id": "r-1"}) == name


@pytest.mark.parametrize("template", ["{payload[api_key]}", "{payload}", "{payload.source}", "{payload[customer]}"])
def test_no_secret_of_a_payload_gets_into_a_name(template: str) -> None:
    name = make_name(template, {"payload": ORDER})
    assert "s3cr3t" not in name
    assert "pw@" not in name
    assert (MASK in name) is (template != "{payload[customer]}")


def test_a_name_is_one_clean_line_of_a_limited_length() -> None:
    name = make_name("{payload}", {"payload": "a\nb\x1b[31m\u202e" + "x" * 10_000_000})
    assert name.isprintable()
    assert name.startswith("a\N{SYMBOL FOR LINE FEED}b\N{SYMBOL FOR ESCAPE}[31m")
    assert len(name) == LONGEST
    assert name.endswith("\N{HORIZONTAL ELLIPSIS}")


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{payload[day]}", "LookupError: there is no payload[day]"),
        ("{payload[customer][tags][9]}", "LookupError: there is no payload[customer][tags][9]"),
        ("{payload.id.day}", "LookupError: there is no payload[id][day]"),
        ("{payload[customer][name]:d}", "ValueError: Unknown format code 'd'"),
        ("{payload[id]}  {order}", "KeyError: 'order'"),
        ("  ", "ValueError: it made an empty name"),
    ],
)
def test_a_name_that_can_not_be_made_says_why(template: str, reason: str) -> None:
    with pytest.raises(NamingFailedError) as raised:
        make_name(template, {"payload": ORDER})
    assert str(raised.value).startswith(reason)


def test_a_function_gets_the_values_that_it_names_without_secrets() -> None:
    def by_name(payload: dict[str, Any], run_id: str, width: int = 3) -> str:
        return f"{payload['id']:0{width}} {run_id} {payload['api_key']}"

    def of_all(parameters: dict[str, Any]) -> str:
        return ", ".join(parameters)

    values: dict[str, JsonValue] = {"payload": ORDER, "run_id": "r-1"}
    assert make_name(by_name, values) == f"007 r-1 {MASK}"
    assert make_name(of_all, values) == "payload, run_id"
    assert make_name(lambda: "nightly", values) == "nightly"


def raise_with_secret(payload: dict[str, Any]) -> str:
    raise ValueError("no name for hidden-7")


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda: 7, "TypeError: it returned int, not a text"),
        (lambda: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda: sys.exit(3), "SystemExit: 3"),
        (raise_with_secret, f"ValueError: no name for {MASK}"),
    ],
)
def test_a_function_that_fails_says_why_without_a_secret(function: Callable[..., str], reason: str) -> None:
    with pytest.raises(NamingFailedError) as raised:
        make_name(function, {"payload": ORDER}, ["hidden-7"])
    assert str(raised.value) == reason


@pytest.mark.parametrize(
    ("naming", "problem"),
    [
        ("of {", "which is no template"),
        ("of {} and {}", "a field without a name"),
        ("of {0}", "a field without a name"),
        ("{payload[a]:>{payload[b]}}", "a value can't say how wide another one is"),
        ("{order}", "needs order: there is payload"),
        ("{order[id]} {day.month}", "needs day and order: there is payload"),
        (lambda order: "x", "needs order: there is payload"),
        (lambda *orders: "x", r"takes \*orders"),
        (7, "is 7: give a text"),
    ],
)
def test_a_template_or_a_function_that_can_not_be_used_is_refused_with_a_reason(naming: Any, problem: str) -> None:
    with pytest.raises(NamingError, match=problem):
        check_naming(naming, ["payload"])


def test_the_fields_are_the_values_that_are_needed() -> None:
    assert find_fields("a {payload[id]} {run_id!r:>4}") == {"payload", "run_id"}
    assert find_fields("nightly {{payload}}") == frozenset()
    assert find_fields(lambda payload, width=3: "") == {"payload"}
    assert find_fields(lambda parameters: "") == {"parameters"}


class Login(BaseModel):
    user: str
    key: SecretStr


@dataclass
class Job:
    login: Login
    max_tokens: int = 100
    region: str = "eu"


def test_what_a_model_calls_secret_is_masked_wherever_it_stands() -> None:
    raw: JsonValue = {"login": {"user": "ann", "key": "hush-1"}, "note": "hush-1"}
    job = Job(Login(user="ann", key=SecretStr("hush-1")))
    assert {*find_secrets(job)} == {"hush-1"}
    name = name_task_run("{job.login.key} {job.note} {job.login.user} {job.region}", {"job": job}, {"job": raw})
    assert name == f"{MASK} {MASK} ann eu"

    def name_by_model(job: Job) -> str:
        return f"{job.login.key.get_secret_value()} in {job.region}, {job.max_tokens}"

    assert name_task_run(name_by_model, {"job": job}, {"job": raw}) == f"{MASK} in eu, 100"


@pytest.mark.parametrize(
    "name", ["password", "dbPassword", "API-Key", "client_secret", "accessToken", "Authorization", "pgflow_dsn", "PIN"]
)
def test_members_with_the_name_of_a_secret_are_masked(name: str) -> None:
    assert is_secret_name(name)
    assert redact([{name: {"deep": ["x"]}, "id": 1}]) == [{name: MASK, "id": 1}]


@pytest.mark.parametrize("name", ["id", "customer", "shipping", "pinned", "keyboard", "author", "passenger"])
def test_other_members_are_shown(name: str) -> None:
    assert redact({name: "x"}) == {name: "x"}


def test_short_secrets_do_not_tear_other_words_apart() -> None:
    assert redact_text("order 12 of a", ["a", "12"]) == "order 12 of a"
    assert redact_text("a", ["a"]) == MASK
    assert redact({"id": 100, "max_tokens": 100}, find_secrets({"max_tokens": 100})) == {"id": 100, "max_tokens": MASK}


def test_a_merged_value_has_the_defaults_of_its_type_and_keeps_what_was_given() -> None:
    class Order(BaseModel):
        id: int
        region: str = "eu"

    assert merge({"id": "7", "more": 1}, Order(id=7)) == {"id": "7", "region": "eu", "more": 1}
    assert merge([1, 2], None) == [1, 2]


@pytest.mark.parametrize("tags", [[""], [7], ["a\nb"], [" "]])
def test_a_tag_that_is_none_is_refused(tags: list[Any]) -> None:
    with pytest.raises(Exception, match="is no tag"):
        make_task_options("send", tags, None)
