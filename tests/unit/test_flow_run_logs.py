"""Where the logging of flow runs' processes is configured: a process that is killed leaves nothing that adds up."""

from pathlib import Path

from prefect.settings import PREFECT_HOME, PREFECT_LOGGING_SETTINGS_PATH, temporary_settings

from pgflow_prefect.services.flow_run_logs import handlers_logging


def test_it_is_the_same_file_each_time(tmp_path: Path) -> None:
    with temporary_settings({PREFECT_HOME: tmp_path, PREFECT_LOGGING_SETTINGS_PATH: tmp_path / "none"}):
        paths = set()
        for _ in range(2):
            with handlers_logging() as environment:
                paths.add(environment["PREFECT_LOGGING_SETTINGS_PATH"])
    [path] = paths
    assert [str(each) for each in (tmp_path / "pgflow").iterdir()] == [path]


def test_a_home_that_can_not_be_written_is_none_to_need(tmp_path: Path) -> None:
    home = tmp_path / "file"
    home.touch()
    with temporary_settings({PREFECT_HOME: home, PREFECT_LOGGING_SETTINGS_PATH: tmp_path / "none"}):
        with handlers_logging() as environment:
            path = Path(str(environment["PREFECT_LOGGING_SETTINGS_PATH"]))
            assert path.is_file()
        assert not path.exists()


def test_a_users_own_configuration_stays(tmp_path: Path) -> None:
    own = tmp_path / "own.yml"
    own.write_text("{}")
    with temporary_settings({PREFECT_LOGGING_SETTINGS_PATH: own}), handlers_logging() as environment:
        assert "PREFECT_LOGGING_SETTINGS_PATH" not in environment
