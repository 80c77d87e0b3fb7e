"""The former version of this project: its commit, and its files where the clone has them."""

import subprocess
import tarfile
from pathlib import Path

import psycopg
import pytest

import pgflow_prefect

COMMIT = "56a9b74f840100c9bb8de3705efe60e861c7285b"
"""Of the former version: engine 2, adapter 6."""

SCRIPTS = ("sql/pgflow.sql", "sql/pgflow_prefect.sql")


def read_former(path: str) -> bytes:
    """Return a file of the former version; skip the test in a clone that does not have its commit."""
    return _ask_git("show", f"{COMMIT}:{path}")


def install_former(dsn: str) -> None:
    """Install the schemas of the former version in an empty database."""
    with psycopg.connect(dsn, autocommit=True) as db:
        for script in SCRIPTS:
            db.execute(read_former(script))


def extract_former(folder: Path) -> None:
    """Put all files of the former version into a folder."""
    archive = folder / "former.tar"
    _ask_git("archive", "--output", str(archive), COMMIT)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()


def _ask_git(*arguments: str) -> bytes:
    repository = Path(pgflow_prefect.__file__).parents[1]
    asked = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, check=False)
    if asked.returncode:
        pytest.skip(f"this clone has no commit {COMMIT[:7]}, the former version: `git fetch --unshallow` brings it")
    return asked.stdout
