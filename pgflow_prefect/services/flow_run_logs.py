"""Makes the processes of flow runs write only the log lines of their handlers to standard error."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_HOME, PREFECT_LOGGING_SETTINGS_PATH

from pgflow_prefect.prefect_api.internals import DEFAULT_LOGGING_SETTINGS_PATH, load_logging_config
from pgflow_prefect.services.console_lines import HandlersFilter, HandlersFormatter

_LEVEL, _SILENT = "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL"
"""Commands silence Prefect's console with this. Flow runs must not inherit it."""


@contextmanager
def handlers_logging() -> Iterator[Mapping[str, str | None]]:
    """Yield the variables with which a flow run's process shows its handlers' log lines.

    A user's own logging configuration, `PREFECT_LOGGING_SETTINGS_PATH`, stays in force.
    """
    if PREFECT_LOGGING_SETTINGS_PATH.value().exists():
        yield {_LEVEL: None}
        return
    text = json.dumps(_make_config())  # JSON is valid YAML
    try:
        path = _keep(text)
    except OSError:  # Prefect's home can't be written
        with tempfile.TemporaryDirectory(prefix="pgflow-logging-") as directory:
            path = Path(directory) / "logging.yml"
            path.write_text(text, encoding="utf-8")
            yield {_LEVEL: None, PREFECT_LOGGING_SETTINGS_PATH.name: str(path)}
    else:
        yield {_LEVEL: None, PREFECT_LOGGING_SETTINGS_PATH.name: str(path)}


def _keep(text: str) -> Path:
    """Write a configuration into Prefect's home.

    Its name is a hash of its content, so killed processes leave no further files.

    Raises:
        OSError: the file can't be written.
    """
    directory: Path = PREFECT_HOME.value() / "pgflow"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"logging-{sha256(text.encode()).hexdigest()[:16]}.yml"
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


def _make_config() -> dict[str, Any]:
    """Return Prefect's configuration, with our filter and formatter for the console."""
    config = load_logging_config(DEFAULT_LOGGING_SETTINGS_PATH)
    config.setdefault("filters", {})["handlers"] = {"()": f"{HandlersFilter.__module__}.{HandlersFilter.__name__}"}
    config["formatters"]["handlers"] = {"()": f"{HandlersFormatter.__module__}.{HandlersFormatter.__name__}"}
    console = config["handlers"]["console"]
    console |= {"filters": ["handlers"], "formatter": "handlers"}
    if console["level"] == _SILENT:
        console["level"] = "NOTSET"
    return config
