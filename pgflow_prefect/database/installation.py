"""Identifies a database among those that share a Prefect server, and finds out whether it is a copy."""

from uuid import UUID

from pgflow_prefect.database.connection import Connection, Row
from pgflow_prefect.database.queries import QUERIES
from pgflow_prefect.database.statements import Statements
from pgflow_prefect.database.translation import translate_errors
from pgflow_prefect.errors import ForeignInstallationError, SchemaMissingError, TransientError
from pgflow_prefect.models import Installation
from pgflow_prefect.shipped import shipped_path

COPIED = (
    "Say what it is: `pgflow-prefect init --new-installation` if it works beside the original, "
    "`pgflow-prefect init --moved` if it replaces the original (after a restore or pg_upgrade)"
)
"""What to do in a database that is a copy."""


class InstallationStatements(Statements):
    """The part of the store for the database as a whole."""

    async def read_installation(self) -> UUID:
        """Return the id of this database among those that share a Prefect server.

        Raises:
            ForeignInstallationError: it is a copy of a database that has been used with Prefect.
            SchemaMissingError: its row was deleted.
        """
        found = await self._read_installation()
        if found.is_used:
            self._check_copy(found)
        return found.id

    async def use_installation(self) -> Installation:
        """Return this installation before it writes to Prefect.

        A copy of a database that was never used gets an id of its own, because Prefect has no objects of the original.

        Raises:
            ForeignInstallationError: it is a copy of a database that has been used with Prefect.
            SchemaMissingError: its row was deleted.
            ReadOnlyError: the database can't be written.
        """
        try:
            found = await self._read_installation("use_installation")
        except TransientError:
            await self.check_writable()  # it names the reason
            raise
        if found.is_used:
            self._check_copy(found)
        return found

    async def beat(self, beat: UUID, every: float) -> list[UUID]:
        """Give a sign of life in the database, and return the latest ones, the newest first.

        Args:
            beat: the sign; not written if another service gave one within `every` seconds.
            every: seconds.
        """
        return _read_beats(await self._fetch("beat", beat=beat, every=every))

    async def list_beats(self) -> list[UUID]:
        """Return the latest signs of life, the newest first."""
        return _read_beats(await self._fetch("list_beats"))

    async def read_database_name(self) -> str:
        """Return the database's name for people: its own name, and its server's address."""
        async with self._pool.connection() as connection:
            info = connection.info
            return f"{info.dbname!r} at {info.host or 'local'}:{info.port}"

    async def _read_installation(self, query: str = "read_installation") -> Installation:
        rows = await self._fetch(query)
        if not rows:
            raise SchemaMissingError("pgflow_prefect.installation has no row: run `pgflow-prefect init`")
        return Installation.model_validate(rows[0])

    def _check_copy(self, found: Installation) -> None:
        if not found.fits:
            raise ForeignInstallationError(
                f"this database is a copy: its stamp is {found.stamp}, and it is in {found.current_stamp}. "
                f"What the original shows in Prefect must stay as it is. {COPIED}"
            )


def _read_beats(rows: list[Row]) -> list[UUID]:
    beats = rows[0]["beats"]
    assert isinstance(beats, list)
    return [UUID(str(each)) for each in beats]


async def find_copy(connection: Connection) -> Installation | None:
    """Return the installation if the database is a copy of one that has been used; else None."""
    with translate_errors():
        row = await (await connection.execute(QUERIES["read_installation"])).fetchone()
    found = Installation.model_validate(row)
    return None if found.fits else found


async def start_installation(connection: Connection) -> UUID:
    """Make the database an installation of its own, and return its new id."""
    return UUID(str(await _run("new_installation", connection)))


async def move_installation(connection: Connection) -> bool:
    """Make the database the replacement of its original; return False if it is no copy."""
    return bool(await _run("moved_installation", connection))


async def _run(script: str, connection: Connection) -> object:
    """Run a script of the owner's, and return the only value of its only row."""
    with translate_errors():
        row = await (await connection.execute(shipped_path("sql", f"{script}.sql").read_bytes())).fetchone()
    assert row is not None
    return next(iter(row.values()))
