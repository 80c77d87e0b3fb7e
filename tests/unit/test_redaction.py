"""What other programs have written comes without its secrets."""

import pytest
from pydantic import JsonValue

from pgflow_prefect.definitions.redaction import HIDDEN, is_secret_name, redact, redact_text

SECRET = "hunter2-S3cret"  # noqa: S105  of no system


@pytest.mark.parametrize(
    "text",
    [
        f"postgresql://app:{SECRET}@db/app",
        f"psql postgres://app:{SECRET}@db/app -c 'SELECT 1'",
        f"host=db user=app password={SECRET} dbname=app",
        f"host=db password='{SECRET} with blanks' dbname=app",
        f"jdbc:sqlserver://db;user=sa;password={SECRET};",
        f"DefaultEndpointsProtocol=https;AccountName=a;AccountKey={SECRET}==;EndpointSuffix=x",
        f"PGPASSWORD={SECRET} pg_dump app",
        f"export API_TOKEN='{SECRET}'; run",
        f"run --password {SECRET} --fast",
        f"run --api-key={SECRET}",
        f"curl -u app:{SECRET} https://example.org",
        f"curl -H 'Authorization: Bearer {SECRET}' https://example.org",
        f'{{"api_key": "{SECRET}", "limit": 10}}',
        f"CREATE USER app PASSWORD '{SECRET}'",
        f"CREATE USER app IDENTIFIED BY '{SECRET}'",
        f"aws_secret_access_key => {SECRET}",
        f"postgresql://app:{SECRET}/with/slashes@db/app",
        f"redis://:{SECRET}@cache:6379/0",
        f"https://example.org/blob?sv=1&sig={SECRET}&x=2",
        f"https://hooks.slack.com/services/T0/B0/{SECRET}",
        f'{{\\"password\\": \\"{SECRET}\\"}}',
        f"<password>{SECRET}</password>",
        f"mysqldump -h db -p{SECRET} app",
        f"sshpass -p {SECRET} ssh db",
        f"a: 1\nclient_secret: {SECRET}\nb: 2",
    ],
)
def test_a_secret_in_a_text_is_hidden(text: str) -> None:
    shown = redact_text(text)
    assert HIDDEN in shown
    assert SECRET not in shown
    assert "S3cret" not in shown


@pytest.mark.parametrize(
    "token",
    [
        "AKIAIOSFODNN7EXAMPLE",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abcdefghijkl",
        "ghp_" + "a" * 36,
        "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----",
    ],
)
def test_a_key_of_a_known_form_is_hidden_wherever_it_stands(token: str) -> None:
    assert redact_text(f"use {token} here") == f"use {HIDDEN} here"


@pytest.mark.parametrize(
    "text",
    [
        "SELECT * FROM tokens WHERE day = '{{ ds }}'",
        "echo token refresh",
        "run --max-tokens=100",
        "token={{ var.value.token }}",
        "password=$PASSWORD run",
        "export PASSWORD=${PASSWORD}",
        "https://example.org/a:b@c",
        "echo {{ ds }} | sort -u",
        "http://airflow:8080/dags/etl@main",
        "mysql -h db -p$PASSWORD app",
        "https://example.org/list?page=2&keys=3",
        "<p>the password is kept elsewhere</p>",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redact_text(text) == text


@pytest.mark.parametrize("name", ["password", "db_pass", "API_TOKEN", "dsn", "conn_uri", "connection_string", "pwd"])
def test_a_name_tells_a_secret(name: str) -> None:
    assert is_secret_name(name)


@pytest.mark.parametrize("name", ["postgres_conn_id", "max_tokens", "secret_name", "bypass", "pass_rate", "tokenizer"])
def test_a_name_that_only_looks_like_one_tells_none(name: str) -> None:
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ({"password": SECRET, "user": "app"}, {"password": HIDDEN, "user": "app"}),
        ({"env": {"DB_PASSWORD": SECRET}}, {"env": {"DB_PASSWORD": HIDDEN}}),
        (["--password", SECRET, "--fast"], ["--password", HIDDEN, "--fast"]),
        ([{"name": "API_TOKEN", "value": SECRET}], [{"name": "API_TOKEN", "value": HIDDEN}]),
        ({"secret": {"__type": "dict", "__var": {"a": SECRET}}}, {"secret": HIDDEN}),
        (
            {"password": None, "token": "{{ conn.lake.password }}"},
            {"password": None, "token": "{{ conn.lake.password }}"},
        ),
        ({"tokens": [f"postgres://a:{SECRET}@b"]}, {"tokens": [f"postgres://a:{HIDDEN}@b"]}),
    ],
)
def test_secrets_in_a_value_are_hidden(value: JsonValue, shown: JsonValue) -> None:
    assert redact("arguments", value) == shown


def test_a_value_that_is_too_deep_is_hidden() -> None:
    value: JsonValue = SECRET
    for _ in range(500):
        value = [value]
    assert SECRET not in str(redact("", value))
