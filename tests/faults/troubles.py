"""What can go wrong in a storm, by the names on the cards; each is in order again when its function returns."""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from random import Random
from typing import LiteralString

import psycopg
from psycopg import sql

from tests.faults.copies import Copies
from tests.faults.database import Database
from tests.faults.fleet import Fleet
from tests.faults.servers import PATIENCE, Postgres, Prefect
from tests.silent_proxy import SilentProxy

Say = Callable[[str], None]
Row = tuple[object, ...]

_LEFT = 1  # workers
_MOST_CONNECTIONS = 300  # that a full server may have


@dataclass
class Scene:
    """Where it happens.

    Attributes:
        random: decides how long it lasts.
        fleet: the workers.
        postgres: the server.
        prefect: the other one.
        database: the storm's.
        role: of the workers in PostgreSQL.
        proxy: between the workers and PostgreSQL.
        copies: of the database.
        wait: returns after so many seconds, or when the storm is over: whether it is.
        say: writes a line.
    """

    random: Random
    fleet: Fleet
    postgres: Postgres
    prefect: Prefect
    database: Database
    role: str
    proxy: SilentProxy
    copies: Copies
    wait: Callable[[float], bool]
    say: Say

    def last(self, least: float, most: float) -> float:
        """Return for how many seconds a trouble lasts."""
        return self.random.uniform(least, most)

    def execute(self, statement: LiteralString, **names: str) -> None:
        """Execute a statement as a superuser, whatever else is wrong."""
        with self.connect() as connection:
            connection.execute(
                sql.SQL(statement).format(**{each: sql.Identifier(name) for each, name in names.items()})
            )

    @contextmanager
    def connect(self) -> Iterator[psycopg.Connection[Row]]:
        """Connect to the storm's database as a superuser, for whom a full server keeps a few connections."""
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                connection = psycopg.connect(self.database.dsn, autocommit=True)
                break
            except psycopg.OperationalError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        with connection:
            yield connection

    def cut(self, like: str = "%") -> None:
        """End the workers' connections whose last statement was such a one."""
        with self.connect() as connection:
            connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = %s AND query LIKE %s",
                [self.role, like],
            )


def kill(scene: Scene) -> None:
    # On a slow machine, too, a worker has to be left that gets some work done until the next one dies.
    while scene.fleet.count_ready() < _LEFT + 1:
        if scene.wait(0.1):
            return
    scene.say(f"killed {scene.fleet.kill_one(scene.random)}")


def restart_postgres(scene: Scene) -> None:
    seconds = scene.last(0, 2)
    scene.say(f"PostgreSQL is down for {seconds:.1f} s")
    scene.postgres.crash(seconds)


def interrupt_prefect(scene: Scene) -> None:
    seconds = scene.last(1, 6)
    scene.say(f"Prefect is down for {seconds:.1f} s")
    scene.prefect.stop()
    try:
        scene.wait(seconds)
    finally:
        scene.prefect.start()
    scene.say("Prefect is back")


def limit_role(scene: Scene) -> None:
    seconds = scene.last(3, 6)
    scene.say(f"the role gets no further connection for {seconds:.1f} s")
    scene.execute("ALTER ROLE {role} CONNECTION LIMIT 0", role=scene.role)
    try:
        scene.cut("%extend_leases%")  # the pool has to do it now
        scene.wait(seconds)
    finally:
        scene.execute("ALTER ROLE {role} CONNECTION LIMIT -1", role=scene.role)


def limit_database(scene: Scene) -> None:
    seconds = scene.last(3, 6)
    scene.say(f"the database gets no further connection for {seconds:.1f} s")
    scene.execute("ALTER DATABASE {name} CONNECTION LIMIT 0", name=scene.database.name)
    try:
        scene.wait(seconds)
    finally:
        scene.execute("ALTER DATABASE {name} CONNECTION LIMIT -1", name=scene.database.name)


def fill_server(scene: Scene) -> None:
    seconds = scene.last(1, 4)
    with ExitStack() as connections:
        with suppress(psycopg.OperationalError):  # there is no room left
            for _ in range(_MOST_CONNECTIONS):
                connections.enter_context(psycopg.connect(scene.postgres.make_dsn("postgres", user="faults_hog")))
        scene.say(f"the server is full for {seconds:.1f} s")
        scene.wait(seconds)


def lock_runs(scene: Scene) -> None:
    _hold_locks(scene, "runs", "SELECT FROM pgflow.runs WHERE status = 'pending' ORDER BY random() LIMIT 4 FOR UPDATE")


def lock_leases(scene: Scene) -> None:
    _hold_locks(scene, "leases", "SELECT FROM pgflow_prefect.owners ORDER BY taken_at DESC LIMIT 8 FOR UPDATE")


def _hold_locks(scene: Scene, what: str, statement: LiteralString) -> None:
    seconds = scene.last(1.5, 3)
    scene.say(f"locks on {what} for {seconds:.1f} s")
    # Where a worker and this deadlock, either of them may be the victim.
    with suppress(psycopg.errors.DeadlockDetected), scene.connect() as connection, connection.transaction():
        connection.execute(statement)
        scene.wait(seconds)


def silence_links(scene: Scene) -> None:
    scene.say("all links fall silent, and new ones work")
    scene.proxy.fall_silent()


def silence_database(scene: Scene) -> None:
    seconds = scene.last(1, 4)
    scene.say(f"all links fall silent, and new ones, too, for {seconds:.1f} s")
    scene.proxy.fall_silent(for_new_ones=True)
    try:
        scene.wait(seconds)
    finally:
        scene.proxy.speak()


def restrict_role(scene: Scene) -> None:
    seconds = scene.last(2, 5)
    scene.say(f"the role may only read for {seconds:.1f} s")
    scene.execute("ALTER ROLE {role} SET default_transaction_read_only = on", role=scene.role)
    try:
        scene.cut()  # as a failover does
        scene.wait(seconds)
    finally:
        scene.execute("ALTER ROLE {role} RESET default_transaction_read_only", role=scene.role)
        scene.cut()


def stand_by(scene: Scene) -> None:
    seconds = scene.last(1, 4)
    scene.say(f"PostgreSQL is a standby for {seconds:.1f} s")
    scene.postgres.begin_standby()
    try:
        scene.wait(seconds)
    finally:
        scene.postgres.promote()
    scene.say("PostgreSQL is a primary again")


def copy(scene: Scene) -> None:
    scene.copies.live_through_one()


TROUBLES: dict[str, Callable[[Scene], None]] = {
    "kill": kill,
    "postgres": restart_postgres,
    "prefect": interrupt_prefect,
    "limited role": limit_role,
    "limited database": limit_database,
    "full server": fill_server,
    "locked runs": lock_runs,
    "locked leases": lock_leases,
    "silent links": silence_links,
    "silent database": silence_database,
    "read-only role": restrict_role,
    "standby": stand_by,
    "copy": copy,
}
