"""What a step may be bound to, as Python and a row have it."""

import pytest

from pgflow_prefect.bindings import (
    AnyBinding,
    External,
    HttpEndpoint,
    Kind,
    NamedCommand,
    NamedWorkPool,
    Python,
    Queue,
    SqlFunction,
    parse_binding,
    parse_function,
)
from pgflow_prefect.errors import UsageError


@pytest.mark.parametrize(
    "binding",
    [
        Python(),
        External(),
        External(shadow=True, timeout_seconds=2.5),
        SqlFunction("app.send", retries=2, retry_delay_seconds=(1, 5)),
        HttpEndpoint("https://example.org/send", token_env="SEND_TOKEN", request_timeout_seconds=5),  # noqa: S106
        HttpEndpoint("https://example.org/send", retries=0),
        Queue("redis://localhost/0?queue=mails", login_block="mails"),
        NamedCommand("stamp", retries=2, timeout_seconds=5),
        NamedWorkPool("gpu", retries=2),
    ],
)
def test_a_row_says_the_same_as_python(binding: AnyBinding) -> None:
    assert parse_binding(binding.kind, binding.target, binding.options) == binding


def test_a_row_has_only_what_differs_from_the_defaults() -> None:
    assert SqlFunction("app.send", retry_delay_seconds=(1, 5)).options == {"retry_delay_seconds": [1, 5]}
    assert HttpEndpoint("https://example.org", retries=3).options == {}
    assert (External().target, External().options) == (None, {})


def test_words_have_the_kind_and_the_target() -> None:
    assert [str(External()), str(SqlFunction("app.send"))] == ["external", "sql app.send"]


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("app.send", ("app", "send")),
        ("App.Send_2", ("app", "send_2")),
        ('"App"."Send Mail"', ("App", "Send Mail")),
        ('"a""b".c', ('a"b', "c")),
        ("größe.f$1", ("größe", "f$1")),
    ],
)
def test_the_name_of_a_function_is_read_as_sql_reads_it(written: str, read: tuple[str, str]) -> None:
    assert parse_function(written) == read


@pytest.mark.parametrize(
    "name", ["send", "a.b.c", "app.", ".send", "app.send()", "app.send; DROP", '"app".', "1app.send", "app. send", ""]
)
def test_a_name_that_is_no_function_with_its_schema_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match=r"bound to sql so: function: it is not the name of a function"):
        parse_binding("sql", name, {})


SECRETS = [
    "https://user:hunter2@example.org/send",
    "https://hunter2@example.org",
    "amqp://user:hunter2@localhost/?queue=mails",
    "https://example.org/send?api_key=hunter2",
    "https://example.org/send?a=b&X-Amz-Signature=hunter2",
    "https://example.org/?ACCESS_TOKEN=hunter2",
    "example.org/hunter2",
]


@pytest.mark.parametrize("url", SECRETS)
@pytest.mark.parametrize("kind", [Kind.HTTP, Kind.QUEUE])
def test_a_url_that_is_refused_is_not_shown(kind: Kind, url: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_binding(kind, url, {})
    assert str(caught.value).startswith(f"a step can't be bound to {kind} so: url: it")
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("kind", "options", "problem"),
    [
        ("http", {"token": "hunter2"}, "token: Unexpected keyword argument"),
        ("http", {"token_env": ["hunter2"]}, "token_env: Input should be a valid string"),
        ("http", {"request_timeout_seconds": "hunter2"}, "request_timeout_seconds: "),
        ("queue", {"login_env": {"hunter2": 1}}, "login_env: "),
    ],
)
def test_an_option_that_is_refused_is_named_and_its_value_is_not_shown(
    kind: str, options: dict[str, object], problem: str
) -> None:
    with pytest.raises(UsageError) as caught:
        parse_binding(kind, "https://example.org", options)
    assert problem in str(caught.value)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("external", {"retries": -1}),
        ("external", {"timeout_seconds": 0}),
        ("external", {"retry_delay_seconds": [-1]}),
        ("python", {"shadow": True}),
        ("sql", {"token_env": "TOKEN"}),
    ],
)
def test_options_that_make_no_sense_are_refused(kind: str, options: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="can't be bound to"):
        parse_binding(kind, "app.send" if kind == "sql" else None, options)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(UsageError, match=r"retries: .*; timeout_seconds: "):
        parse_binding("external", None, {"retries": -1, "timeout_seconds": -1})


def test_an_unknown_kind_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(UsageError, match="the kinds are python, external, sql, http, queue, command, work-pool"):
        parse_binding("fax", None, {})


def test_a_missing_or_unexpected_target_is_refused() -> None:
    with pytest.raises(UsageError, match="function: "):
        parse_binding("sql", None, {})
    with pytest.raises(UsageError, match="has no target"):
        parse_binding("external", "somewhere", {})
