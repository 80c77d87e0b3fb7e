"""The PostgreSQL server of all subjects: empty, and counting the statements that it gets."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import psycopg

from pgflow_prefect.database.embedded import start_embedded, stop_embedded


@contextmanager
def statistics_server() -> Iterator[str]:
    """Start an embedded server with pg_stat_statements, for as long as the block takes; yield how to connect."""
    with TemporaryDirectory(prefix="pgflow-") as directory:
        data = Path(directory) / "data"
        server = start_embedded(data)
        with psycopg.connect(server.get_uri(), autocommit=True) as db:
            db.execute("ALTER SYSTEM SET shared_preload_libraries = 'pg_stat_statements'")
        stop_embedded(server)  # a library is loaded at the start only
        server = start_embedded(data)
        try:
            with psycopg.connect(server.get_uri(), autocommit=True) as db:
                db.execute("CREATE EXTENSION pg_stat_statements")
            yield server.get_uri()
        finally:
            stop_embedded(server)
