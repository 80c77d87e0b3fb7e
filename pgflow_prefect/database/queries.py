"""The named statements of `queries.sql`."""

import re
from importlib.resources import files
from typing import LiteralString, cast

_HEADER = re.compile(r"^-- (\w+) --\n(?:-- .*\n)*", re.MULTILINE)


def _read_queries() -> dict[str, LiteralString]:
    text = files("pgflow_prefect.database").joinpath("queries.sql").read_text(encoding="utf-8")
    _, *parts = _HEADER.split(text)
    # psycopg takes no text that could have come from outside; this file is part of the package, as code is.
    return {name: cast("LiteralString", body.strip()) for name, body in zip(parts[::2], parts[1::2], strict=True)}


QUERIES = _read_queries()
