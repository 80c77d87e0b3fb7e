"""The SQL that is shipped."""

import re
from pathlib import Path

import pytest

from pgflow_prefect.database.implementations.released import describe_released
from pgflow_prefect.shipped import shipped_path

SCRIPTS = sorted(shipped_path("sql", "pgflow.sql").parent.rglob("*.sql"))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_ascii(path: Path) -> None:
    """A database that is not UTF-8, or a client that sends something else, takes it as well."""
    assert path.read_bytes().isascii()


def test_the_first_script_for_the_released_pgflow_reads_no_table_of_a_later_one() -> None:
    """Each commits by itself, and an observer of a former version goes on: it calls what this one replaces."""
    first, *later = [shipped_path("sql", name).read_text() for name in describe_released(skips=True).scripts]
    tables = {
        table for script in later for table in re.findall(r"CREATE TABLE IF NOT EXISTS (pgflow_prefect\.\w+)", script)
    }
    assert len(tables) > 10
    read = tables & set(re.findall(r"pgflow_prefect\.\w+", first))
    assert read <= {"pgflow_prefect.enabled_workflows"}, "the very first version had that one already"
