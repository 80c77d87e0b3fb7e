"""How a jsonb value of a row becomes a value in Python."""

from typing import Any

import psycopg

from pgflow_prefect import raw_json


def load_json(document: str | bytes) -> Any:  # noqa: ANN401  a JSON value
    """Return what a JSON document means.

    Raises:
        psycopg.DataError: Python can't read it; the message says why, and has nothing of it.
    """
    try:
        return raw_json.load_json(document)
    except raw_json.UnreadableJsonError as error:
        raise psycopg.DataError(str(error)) from None
