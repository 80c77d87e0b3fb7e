"""The options of `deploy`: what they mean, and what is wrong with those that mean nothing."""

import re
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from pgflow_prefect.cli.deploy import deploy
from pgflow_prefect.cli.deploy_options import DeployFlags
from pgflow_prefect.deployment.deployments.location import describe_steps, is_said, make_default_steps, parse_location
from pgflow_prefect.deployment.deployments.schedules import parse_schedule
from pgflow_prefect.errors import UsageError

HERE = Path("/srv/app")
CLONE = "prefect.deployments.steps.git_clone"
SET = "prefect.deployments.steps.set_working_directory"


@pytest.mark.parametrize(
    ("interval", "length"),
    [
        ("30s", timedelta(seconds=30)),
        ("15m", timedelta(minutes=15)),
        ("2h", timedelta(hours=2)),
        ("1d", timedelta(days=1)),
        ("1h30m", timedelta(minutes=90)),
    ],
)
def test_an_interval_is_written_as_people_say_it(interval: str, length: timedelta) -> None:
    wish = parse_schedule(None, interval, "Europe/Berlin", remove=False)

    assert wish is not None
    assert isinstance(wish.schedule, IntervalSchedule)
    assert (wish.schedule.interval, wish.schedule.timezone) == (length, "Europe/Berlin")


def test_a_cron_expression_counts_in_its_time_zone_or_in_utc() -> None:
    for timezone in (None, "Europe/Berlin"):
        wish = parse_schedule("0 9 * * 1-5", None, timezone, remove=False)

        assert wish is not None
        assert wish.schedule == CronSchedule(cron="0 9 * * 1-5", timezone=timezone or "UTC")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (DeployFlags(work_pool="local", no_work_pool=True), "--work-pool and --no-work-pool exclude each other"),
        (DeployFlags(work_pool=""), "--work-pool '' names no work pool. To remove it, use --no-work-pool"),
        (DeployFlags(cron="every morning"), "--cron 'every morning' is no cron expression"),
        (DeployFlags(cron="61 * * * *"), "is no cron expression"),
        (DeployFlags(interval="soon"), "--interval 'soon' is no length of time"),
        (DeployFlags(interval="0s"), "--interval '0s' is no length of time"),
        (DeployFlags(interval="5"), "write it as 30s, 15m"),
        (DeployFlags(interval=f"{'9' * 30}d"), "is no length of time"),
        (DeployFlags(cron="* * * * *", timezone="Mars/Olympus"), "--timezone 'Mars/Olympus' is no time zone"),
        (DeployFlags(timezone="UTC"), "--timezone goes with --cron or --interval"),
        (DeployFlags(payload="{}"), "--payload goes with --cron or --interval"),
        (DeployFlags(cron="* * * * *", payload="{"), "the payload is not JSON"),
        (DeployFlags(cron="* * * * *", payload="@nowhere.json"), "the payload can't be read"),
        (DeployFlags(schedule_name="nightly"), "--schedule-name goes with --cron, --interval or --no-schedule"),
        (DeployFlags(no_schedule=True, timezone="UTC"), "--timezone goes with --cron or --interval"),
        (DeployFlags(cron="* * * * *", interval="1h"), "exclude each other"),
        (DeployFlags(cron="* * * * *", no_schedule=True), "exclude each other"),
        (DeployFlags(concurrency_limit="many"), "--concurrency-limit 'many' is not a number of flow runs"),
        (DeployFlags(concurrency_limit="-1"), "is not a number of flow runs"),
        (DeployFlags(source_credentials="secret/token"), "--source-credentials goes with --source"),
        (DeployFlags(source="https://host/a/b", source_credentials="mine"), "as TYPE/NAME"),
        (DeployFlags(source="nowhere"), "--source is no URL of a git repository"),
        (DeployFlags(source="https://[broken"), "--source is no URL of a git repository"),
        (DeployFlags(source="git+https://host/a/b@"), "names no ref after its @"),
        (DeployFlags(source="git+https://host/a/b@main#subdirectory=c"), "with --directory"),
        (DeployFlags(source="git@host:a/b.git#subdirectory=c"), "with --directory"),
    ],
)
def test_an_option_that_means_nothing_is_refused(flags: DeployFlags, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        flags.parse()

    assert message in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "https://me:hunter2@host/a/b",
        "git+https://hunter2@host/a/b@main",
        "https://host/a/b?access_token=hunter2",
        "ssh://me:hunter2@host/a/b",
    ],
)
def test_a_secret_in_the_url_of_the_code_is_refused_and_not_shown(source: str) -> None:
    with pytest.raises(UsageError, match="--source has credentials") as caught:
        parse_location(source, None, None)

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("repository", "shown"),
    [
        ("https://hunter2@host:8443/a/b", "https://host:8443/a/b"),
        ("https://me:hunter2@host/a/b?token=hunter2#hunter2", "https://host/a/b"),
        ("oauth2:hunter2@host:a/b", "host:a/b"),
        ("https://hunter2@[broken", "a repository"),
        ("git@host:a/b.git", "git@host:a/b.git"),
    ],
)
def test_a_secret_that_a_deployment_has_already_is_not_shown(repository: str, shown: str) -> None:
    assert describe_steps([{CLONE: {"repository": repository, "branch": "main"}}]) == f"{shown}@main"


def test_a_step_without_inputs_is_named() -> None:
    assert describe_steps([{"shop.steps.fetch": None}]) == "fetch"
    assert is_said([{"shop.steps.fetch": None}])


@pytest.mark.parametrize(
    ("slugs", "options", "message"),
    [
        ([], {"plan": True}, "which workflow? name it, or say --all"),
        (["chain"], {"prune": True}, "--prune goes with --all"),
        (["chain"], {"all_": True}, "--all means all workflows: name none beside it"),
    ],
)
def test_a_contradictory_choice_of_workflows_is_refused(
    slugs: list[str], options: dict[str, bool], message: str
) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        deploy(*slugs, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("source", "step"),
    [
        ("git+https://host/a/b", {"repository": "https://host/a/b"}),
        ("git+https://host/a/b.git@v1", {"repository": "https://host/a/b.git", "branch": "v1"}),
        ("https://host/a/b@feature/x", {"repository": "https://host/a/b", "branch": "feature/x"}),
        ("git@host:a/b.git", {"repository": "git@host:a/b.git"}),
        ("git@host:a/b.git@main", {"repository": "git@host:a/b.git", "branch": "main"}),
        ("git+ssh://git@host/a/b@main", {"repository": "ssh://git@host/a/b", "branch": "main"}),
        (f"https://host/a/b@{'ab' * 20}", {"repository": "https://host/a/b", "commit_sha": "ab" * 20}),
    ],
)
def test_code_in_a_repository_is_cloned_at_its_ref(source: str, step: dict[str, str]) -> None:
    location = parse_location(source, None, None)

    assert location is not None
    [made] = location.make_steps(HERE)
    assert made == {CLONE: {"id": "pgflow-clone", **step}}
    assert is_said([made])


@pytest.mark.parametrize(
    ("block", "inputs"),
    [
        ("github-credentials/mine", {"credentials": "{{ prefect.blocks.github-credentials.mine }}"}),
        ("secret/my-token", {"access_token": "{{ prefect.blocks.secret.my-token }}"}),
    ],
)
def test_credentials_are_those_of_a_block(block: str, inputs: dict[str, str]) -> None:
    location = parse_location("https://host/a/b", block, None)

    assert location is not None
    [made] = location.make_steps(HERE)
    assert made[CLONE] == {"id": "pgflow-clone", "repository": "https://host/a/b", **inputs}


def test_a_directory_is_the_repository_s_or_the_other_machine_s() -> None:
    within = parse_location("https://host/a/b", None, "backend")
    elsewhere, back = parse_location(None, None, "/app"), parse_location(None, None, ".")

    assert within is not None
    assert elsewhere is not None
    assert back is not None
    assert within.make_steps(HERE)[1][SET]["directory"] == "{{ pgflow-clone.directory }}/backend"
    assert describe_steps(within.make_steps(HERE)) == "https://host/a/b, then {{ pgflow-clone.directory }}/backend"
    assert elsewhere.make_steps(HERE)[0][SET]["directory"] == "/app"
    assert back.make_steps(HERE)[0][SET]["directory"] == "/srv/app"
    assert is_said(elsewhere.make_steps(HERE))
    assert not is_said(make_default_steps(HERE))
    with pytest.raises(UsageError, match="must be a directory of the repository of --source"):
        parse_location("https://host/a/b", None, "/app")
