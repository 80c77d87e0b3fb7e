"""JSON documents of the package as values of Python, for tests that compare them."""

from pydantic import JsonValue

from pgflow_prefect.raw_json import RawJson


def decode(raw: RawJson | None) -> JsonValue:
    """Return what a document means; None where there is none."""
    return None if raw is None else raw.decode()
