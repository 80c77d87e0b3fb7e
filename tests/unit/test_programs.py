"""The setting that gives programs their names."""

import json

import pytest
from pydantic import ValidationError

from pgflow_prefect.programs import Pool, Program, parse_pools, parse_programs
from pgflow_prefect.settings import Settings


def test_a_list_or_an_object_says_what_is_started() -> None:
    assert parse_programs('{"stamp": ["/opt/stamp", "--fast"], "a.b-c_1": {"argv": ["x"], "cwd": "/srv"}}') == {
        "stamp": Program(["/opt/stamp", "--fast"]),
        "a.b-c_1": Program(["x"], cwd="/srv"),
    }
    assert parse_programs("") == parse_programs(" \n") == parse_programs("{}") == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("stamp=/opt/stamp", "it is no JSON: Expecting value at character 1"),
        ('["hunter2"]', "it is no JSON object"),
        ('{"stamp": "hunter2 -x"}', "'stamp': it: "),
        ('{"stamp": []}', "'stamp': argv: it names no program"),
        ('{"stamp": [""]}', "'stamp': argv: it names no program"),
        ('{"stamp": [1]}', r"'stamp': argv.0: Input should be a valid string"),
        ('{"stamp": ["hunter2\\u0000"]}', r"'stamp': argv.0: it has a NUL"),
        ('{"stamp": {"argv": "hunter2"}}', "'stamp': argv: it is a text, and no shell reads it"),
        ('{"stamp": {"argv": ["x"], "shell": true}}', "'stamp': shell: Unexpected keyword argument"),
        ('{"stamp": {"argv": ["x"], "env": {"A=B": "hunter2"}}}', "it is no name of an environment variable"),
        ('{"stamp": {"argv": ["x"], "pass_env": "PATH"}}', "'stamp': pass_env: it is a text"),
        ('{"stamp": {"argv": ["x"], "skip_exit_code": 0}}', "'stamp': skip_exit_code: "),
        ('{"": ["x"]}', "'': it is no name"),
        ('{"../sh": ["x"]}', "'../sh': it is no name"),
        ('{"a b": ["x"]}', "'a b': it is no name"),
        ('{"a": ["x"], "a": ["y"]}', "has one name twice"),
        ("[" * 100_000, "nested too deeply|is no JSON"),
    ],
)
def test_another_form_is_refused_and_no_value_is_shown(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_programs(text)
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("PGFLOW_COMMANDS", text)
    with pytest.raises(ValidationError):
        Settings()


def test_the_settings_do_not_show_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGFLOW_COMMANDS", '{"stamp": {"argv": ["x", "hunter2"], "env": {"A": "hunter2"}}}')
    assert "hunter2" not in repr(Settings())
    assert "hunter2" not in repr(Settings().programs)


def test_a_name_or_an_object_says_which_work_pool() -> None:
    said = {"pool": "k8s", "image": "app:3", "job_variables": {"memory": "4Gi", "image": "other"}, "directory": "/app"}
    pools = parse_pools(json.dumps({"small": "my pool", "gpu": said}))
    assert pools["small"] == Pool("my pool")
    assert pools["gpu"].variables == {"memory": "4Gi", "image": "app:3"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("k8s", "it is no JSON"),
        ('{"gpu": ""}', "'gpu': pool: "),
        ('{"gpu": ["k8s"]}', "'gpu': "),
        ('{"gpu": {"image": "hunter2"}}', "'gpu': pool: Field required"),
        ('{"gpu": {"pool": "k8s", "token": "hunter2"}}', "'gpu': token: Unexpected keyword argument"),
        ('{"a/b": "k8s"}', "'a/b': it is no name"),
    ],
)
def test_another_form_of_work_pools_is_refused(text: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=reason) as caught:
        parse_pools(text)
    assert "hunter2" not in str(caught.value)
    monkeypatch.setenv("PGFLOW_WORK_POOLS", text)
    with pytest.raises(ValidationError):
        Settings()
