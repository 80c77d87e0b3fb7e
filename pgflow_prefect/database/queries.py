"""The named statements of the folders of `.sql` files beside this module."""

import re
from importlib.resources import files
from typing import LiteralString, cast

_HEADER = re.compile(r"^-- (\w+) --\n(?:-- .*\n)*", re.MULTILINE)


def read_statements(folder: str) -> dict[str, LiteralString]:
    """Return the named statements of the files in a folder beside this module."""
    queries: dict[str, LiteralString] = {}
    for file in files("pgflow_prefect.database").joinpath(*folder.split("/")).iterdir():
        _, *parts = _HEADER.split(file.read_text(encoding="utf-8"))
        for name, body in zip(parts[::2], parts[1::2], strict=True):
            assert name not in queries, f"two statements are called {name}"
            # psycopg refuses text that may come from outside. These files are part of the package, like code.
            queries[name] = cast("LiteralString", body.strip())
    return queries


QUERIES = read_statements("queries")
