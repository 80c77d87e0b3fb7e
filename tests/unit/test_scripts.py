"""The SQL that is shipped."""

from pathlib import Path

import pytest

from pgflow_prefect.shipped import shipped_path

SCRIPTS = sorted(shipped_path("sql", "pgflow.sql").parent.rglob("*.sql"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_ascii(path: Path) -> None:
    """A database that is not UTF-8, or a client that sends something else, takes it as well."""
    assert path.read_bytes().isascii()
