"""A connection string that can't be right: the part that is wrong is named, and nothing of the password."""

import pytest

from pgflow_prefect.database.dsn import check_dsn
from pgflow_prefect.errors import UsageError

SECRET = "hunter2"  # noqa: S105  not a real one
HERE = f"me:{SECRET}@db:5432/app"


@pytest.mark.parametrize(
    ("dsn", "named"),
    [
        (f"postgresql://{HERE}?pgbouncer=true", "the DSN's parameter 'pgbouncer' is Prisma's"),
        (f"postgresql://{HERE}?sslmode=require&schema=public", "the DSN's parameter 'schema' is Prisma's"),
        (f"postgres://{HERE}?connection_limit=1", "the DSN's parameter 'connection_limit' is Prisma's"),
        (f"postgresql://{HERE}?statement_cache_size=0", "the DSN's parameter 'statement_cache_size' is asyncpg's"),
        (f"postgresql://{HERE}?supa=base", "the DSN's parameter 'supa' is not one that PostgreSQL's library knows"),
        (f"host=db schema=public password={SECRET}", "the DSN's parameter 'schema' is Prisma's"),
        (f"host=db pasword={SECRET}", "the DSN's parameter 'pasword' is not one"),
        (f"postgresql+asyncpg://{HERE}", "the DSN begins with postgresql+asyncpg://, which is SQLAlchemy's"),
        (f"postgresql+psycopg://{HERE}", "write postgresql://"),
        (f"jdbc:postgresql://{HERE}", "the DSN begins with jdbc:postgresql://, which is not PostgreSQL's"),
        (f"mysql://{HERE}", "the DSN begins with mysql://, which is not PostgreSQL's"),
        (f" postgresql://{HERE}", "begins or ends with a blank"),
        (f"postgresql://{HERE}\n", "begins or ends with a blank or a line break"),
        (f"postgresql://{HERE} ?sslmode=require", "has a blank or a line break in it"),
        (f"postgresql://me:{SECRET}%@db/app", "has a % that begins no code"),
        (f"postgresql://me:a/{SECRET}?x{SECRET}=1@db/app", "the DSN's password can't be right"),
        (f"postgresql://me:pass/{SECRET}@db/app", "the DSN's host or port can't be right"),
        (f"postgresql://me:{SECRET}@[half/app", "the DSN is not a connection string"),
        (f"me:{SECRET}@db/app", "the DSN is not a connection string"),
        (f"host=db password=a {SECRET}=b", "a parameter that PostgreSQL's library does not know"),
    ],
)
def test_the_wrong_part_is_named_and_the_password_is_not(dsn: str, named: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_dsn(dsn)
    assert named in str(refused.value)
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql:///app",
        f"postgresql://{HERE}?sslmode=require&connect_timeout=3&options=-c%20geqo%3Doff",
        f"postgres://{HERE}?ssl=true",
        "postgresql://me@/app?host=/var/run/postgresql",
        "postgresql://one:1,two:2/app?target_session_attrs=read-write",
        f"host=db dbname=app user=me password='{SECRET} with blanks = and more'",
        "service=mine",
        f"postgresql://me:{SECRET}?x:1@db/app",
    ],
)
def test_a_valid_dsn_is_taken(dsn: str) -> None:
    check_dsn(dsn)
