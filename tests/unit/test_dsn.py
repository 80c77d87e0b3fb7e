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
        (f"jdbc:postgresql://{HERE}", "the DSN begins with jdbc:postgresql://, which is JDBC's: write postgresql://"),
        (f"mysql://{HERE}", "the DSN begins with mysql://, which is not PostgreSQL's"),
        (f" postgresql://{HERE}", "begins or ends with a blank"),
        (f"postgresql://{HERE}\n", "begins or ends with a blank or a line break"),
        (f"postgresql://{HERE} ?sslmode=require", "has a blank or a line break in it"),
        (f"postgresql://me:{SECRET}%@db/app", "has a % that begins no code"),
        (f"postgresql://me:a/{SECRET}?x{SECRET}=1@db/app", "the DSN's password can't be right"),
        (f"postgresql://me:pass/{SECRET}@db/app", "the DSN's host or port can't be right"),
        (f"postgresql://me:{SECRET}@[half/app", "the DSN is not a connection string"),
        (f"me:{SECRET}@db/app", "the DSN has no postgresql:// before its user and host"),
        (f"me:{SECRET}@db/app?sslmode=require", "the DSN has no postgresql:// before its user and host"),
        ("localhost:5432/app", "the DSN has no postgresql:// before its user and host"),
        ("app", "the DSN is not a connection string"),
        (f"host=db password=a {SECRET}=b", "a parameter that PostgreSQL's library does not know"),
        (f"host=db password={SECRET} and more", "the DSN has a part without ="),
        (f"host=db password='{SECRET}", "a quote without its end"),
        (f"postgresql://{HERE}?ssl=require", "the DSN's parameter 'ssl' is asyncpg's: write sslmode=require"),
        (f"postgresql://{HERE}?sslmode", "the DSN's parameter 'sslmode' has no value: write sslmode=VALUE"),
        (f"postgresql://{HERE}?connect_timeout=3&sslmode", "the DSN's parameter 'sslmode' has no value"),
        (f"postgresql://{HERE}?sslmode=no-verify", "an sslmode that PostgreSQL's library does not know: write one of"),
        (f"host=db sslmode=on password={SECRET}", "an sslmode that PostgreSQL's library does not know: write one of"),
        (f"postgresql://{HERE}?options=-csearch_path=x", "'options' has a second = in its value: write it as %3D"),
        (f"postgresql://{HERE}?sslmode=require&amp;connect_timeout=3", "&amp; in its parameters, which is HTML"),
        (f"postgresql://{HERE}&sslmode=require", "has & after its database: parameters begin with ?"),
        (f"username=me host=db password={SECRET}", "'username' has another name in PostgreSQL's library: write 'user'"),
        (f"postgresql://db/app?user=me&password=ab&{SECRET}", "a parameter that PostgreSQL's library does not know"),
        (f"postgresql://db/app?password=ab&{SECRET}=1", "a parameter that PostgreSQL's library does not know"),
        (f"Host=db Password={SECRET}", "'Host' has another name in PostgreSQL's library: write 'host'"),
    ],
)
def test_the_wrong_part_is_named_and_the_password_is_not(dsn: str, named: str) -> None:
    with pytest.raises(UsageError) as refused:
        check_dsn(dsn)
    assert named in str(refused.value)
    assert SECRET not in str(refused.value)
    assert refused.value.__cause__ is None


@pytest.mark.parametrize(
    ("dsn", "named"),
    [
        (f'"postgresql://{HERE}"', "begins with a quote"),
        (f"'postgresql://{HERE}'", "begins with a quote"),
        (f"\u201cpostgresql://{HERE}\u201d", "begins with a quote"),
        (f'postgresql://{HERE}"', 'has " at the end of its dbname'),
        (f"postgresql://{HERE};", "has ; at the end of its dbname"),
        (f"host=db, dbname=app password={SECRET}", "has , at the end of its host"),
        (f"psql postgresql://{HERE}", "begins with a command"),
        (f"psql 'host=db password={SECRET}'", "begins with a command"),
        ("psql -h db -U me app", "begins with a command"),
        (f"pg_dump postgresql://{HERE}", "begins with a command"),
        (f"--dsn postgresql://{HERE}", "begins with an option of a command"),
        (f"PGPASSWORD={SECRET} psql -h db -U me app", "begins with a variable"),
        (f"DATABASE_URL={HERE}", "begins with a variable"),
        (f"DATABASE_URL=postgres://{HERE}", "begins with a name, and its address comes after that"),
        (f"export DATABASE_URL='postgres://{HERE}'", "begins with a name, and its address comes after that"),
        (f"DATABASE_URL: postgres://{HERE}", "begins with a name, and its address comes after that"),
        (f'url = "postgresql://{HERE}"', "begins with a name, and its address comes after that"),
        (f"dbname=postgresql://{HERE}", "begins with a name, and its address comes after that"),
        (f'{{"host": "db", "password": "{SECRET}"}}', "is JSON or a list"),
        (f"host: db\nport: 5432\npassword: {SECRET}", "has : between a name and its value, as in YAML"),
        (f"Host=db;Port=5432;Username=me;Password={SECRET};Database=app", "separates its parts by ;"),
        (f"Server=db;User Id=me;Password={SECRET};", "separates its parts by ;"),
        (f"Driver={{PostgreSQL Unicode}};Server=db;Pwd={SECRET}", "separates its parts by ;"),
        (f"pgsql:host=db;dbname=app;password={SECRET}", "separates its parts by ;"),
        ("host=db; dbname=app", "separates its parts by ;"),
        ("${DATABASE_URL}", "begins with a placeholder"),
        ("$DATABASE_URL", "begins with a placeholder"),
        ("%DATABASE_URL%", "begins with a placeholder"),
        ("{{ database_url }}", "begins with a placeholder"),
        ("<address of the database>", "begins with a placeholder"),
        ("postgresql://me:${PASSWORD}@db/app", "has a placeholder ${NAME} in it"),
        ("postgresql://me:<password>@db/app", "has a placeholder <NAME> in it"),
        ("postgresql://postgres:[YOUR-PASSWORD]@db/app", "has a placeholder [YOUR-NAME] in it"),
        ("host=db password=[YOUR-PASSWORD]", "in place of its password"),
        (f"host={{{{ host }}}} password={SECRET}", "the DSN"),
        (f"postgresql://me:{SECRET}@db:$PORT/app", "has the name of a variable in place of its port"),
        (f"POSTGRESQL://{HERE}", "which is not in small letters: write postgresql://"),
        (f"postgresql:/{HERE}", "has no postgresql:// at its beginning"),
        (f"postgresql//{HERE}", "has no postgresql:// at its beginning"),
        ("jdbc:postgresql:app", "has no postgresql:// at its beginning"),
        (f"jdbc:postgresql://db/app?user=me&password={SECRET}", "is JDBC's: write postgresql://"),
        (f"\ufeffpostgresql://{HERE}", "has an invisible character in it"),
    ],
)
def test_the_notation_of_another_program_is_named(dsn: str, named: str) -> None:
    test_the_wrong_part_is_named_and_the_password_is_not(dsn, named)


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
        "postgresql://me@db/app?options=-c%20search_path%3Dapp",
        "host=db options='-c search_path=\\'x\\'' sslpassword='${x}\"'",
        "postgresql://me:%24%7Bx%7D@[::1]:5432/app",
        "host=db password=${x};",
        "password=a;b host=db",
        "host = db dbname = app",
        "host=db\npassword=postgresql://x\nuser='a: b; c=1'",
        "host=one,two port=1,2 user=a:b@c",
        "postgresql://db/app?user=me@server&password=x",
        "password=a;b=c host=db",
        "password=x;",
        "postgresql://db/app?application_name=%3Cworker%201%3E",
        "postgresql://me:a%E2%80%8Db@db/app",
        "host=db password='a\u200db'",
    ],
)
def test_a_valid_dsn_is_taken(dsn: str) -> None:
    check_dsn(dsn)
