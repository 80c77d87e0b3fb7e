"""Logins that may do what the guide says, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from uuid import uuid4

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

READER = "GRANT SELECT ON serialized_dag, dag_run, task_instance, xcom TO {role}"
"""What the guide grants to the role that reads Airflow's database."""

ASKER = """
    GRANT USAGE ON SCHEMA pgflow_prefect TO {role};
    GRANT EXECUTE ON FUNCTION pgflow_prefect.claim_airflow_task, pgflow_prefect.watch_airflow_tasks,
        pgflow_prefect.end_airflow_task TO {role}
"""
"""What the guide grants to the role by which tasks of Airflow ask."""


@contextmanager
def make_login(dsn: str, rights: str) -> Iterator[str]:
    """Create a role with these rights in a database, and yield its address."""
    name = f"pgflow_live_{uuid4().hex[:12]}"
    role = sql.Identifier(name)
    with psycopg.connect(dsn, autocommit=True) as owner:
        owner.execute(sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(role, sql.Literal(name)))
        try:
            for right in filter(str.strip, rights.split(";")):
                owner.execute(right.replace("{role}", role.as_string(owner)).encode())
            yield make_conninfo(dsn, user=name, password=name)
        finally:
            owner.execute(sql.SQL("DROP OWNED BY {}").format(role))
            owner.execute(sql.SQL("DROP ROLE {}").format(role))
