"""Has the processes of flow runs write the log lines of their handlers to standard error, and no more."""

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
"""Our commands set it so, for Prefect not to say again what they say: flow runs would inherit that."""


@contextmanager
def handlers_logging() -> Iterator[Mapping[str, str | None]]:
    """Yield what the environment of a flow run's process needs, to show its handlers' log lines.

    A user's own logging configuration, `PREFECT_LOGGING_SETTINGS_PATH`, stays in force.
    """
    if PREFECT_LOGGING_SETTINGS_PATH.value().exists():
        yield {_LEVEL: None}
        return
    text = json.dumps(_make_config())  # which is YAML, too
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
    """Write a configuration into Prefect's home, under a name of its content: a process that is killed adds no other.

    Raises:
        OSError: it can't be written.
    """
    directory: Path = PREFECT_HOME.value() / "pgflow"
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"logging-{sha256(text.encode()).hexdigest()[:16]}.yml"
    draft = path.with_suffix(f".{os.getpid()}")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
    return path


def _make_config() -> dict[str, Any]:
    """Return Prefect's own configuration, whose console has our filter and our formatter."""
    config = load_logging_config(DEFAULT_LOGGING_SETTINGS_PATH)
    config.setdefault("filters", {})["handlers"] = {"()": f"{HandlersFilter.__module__}.{HandlersFilter.__name__}"}
    config["formatters"]["handlers"] = {"()": f"{HandlersFormatter.__module__}.{HandlersFormatter.__name__}"}
    console = config["handlers"]["console"]
    console |= {"filters": ["handlers"], "formatter": "handlers"}
    if console["level"] == _SILENT:
        console["level"] = "NOTSET"
    return config
