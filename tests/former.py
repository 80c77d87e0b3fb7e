"""Former versions of this project: their commits, and their files where the clone has them."""

import re
import subprocess
import tarfile
from pathlib import Path

import psycopg
import pytest

import pgflow_prefect

COMMIT = "56a9b74f840100c9bb8de3705efe60e861c7285b"
"""Of the oldest version that tests upgrade from: engine 2, adapter 6."""

COMMITS = {
    (2, 6): COMMIT,
    (4, 8): "1884e796d12c951c9a827216ba4447574d759315",
    (5, 9): "07ee4f8f58148e364840400854502f6a1605ddf2",
}
"""Of each former version, by the versions of engine and adapter."""

SCRIPTS = ("sql/pgflow.sql", "sql/pgflow_prefect.sql")
"""Of the oldest version."""

ROLES = "sql/supabase/roles.sql"
"""In each version, the script that makes the roles of least privilege. It needs the one before it."""


def read_former(path: str, commit: str = COMMIT) -> bytes:
    """Return a file of a former version; skip the test in a clone that does not have its commit."""
    return _ask_git("show", f"{commit}:{path}", commit=commit)


def install_former(dsn: str, commit: str = COMMIT) -> None:
    """Install the schemas of a former version in an empty database."""
    with psycopg.connect(dsn, autocommit=True) as db:
        for script in SCRIPTS if commit == COMMIT else _list_scripts(commit):
            db.execute(read_former(script, commit))


def grant_former_roles(dsn: str, commit: str) -> None:
    """Make the roles of least privilege of a former version."""
    with psycopg.connect(dsn, autocommit=True) as db:
        for script in ("sql/supabase/api.sql", ROLES):
            db.execute(read_former(script, commit))


def _list_scripts(commit: str) -> list[str]:
    known = read_former("pgflow_prefect/database/implementations/classic.py", commit).decode()
    return [f"sql/{name}" for name in re.findall(r'"([\w/]+\.sql)"', known)]


def extract_former(folder: Path) -> None:
    """Put all files of the oldest version into a folder."""
    archive = folder / "former.tar"
    _ask_git("archive", "--output", str(archive), COMMIT, commit=COMMIT)
    with tarfile.open(archive) as files:
        files.extractall(folder, filter="data")
    archive.unlink()


def _ask_git(*arguments: str, commit: str) -> bytes:
    repository = Path(pgflow_prefect.__file__).parents[1]
    asked = subprocess.run(["git", *arguments], cwd=repository, capture_output=True, check=False)
    if asked.returncode:
        pytest.skip(f"this clone has no commit {commit[:7]}, a former version: `git fetch --unshallow` brings it")
    return asked.stdout
