"""What this package adds to Prefect's kinds of blocks; Prefect finds it by its entry point."""

from typing import ClassVar

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from pgflow_prefect.settings import BLOCK_TYPE


class PgflowDatabase(Block):
    """A PostgreSQL database that has pgflow's schema. Deployed flows that find one need no environment variable.

    Example:
        ```python
        from pgflow_prefect import PgflowDatabase

        PgflowDatabase(dsn="postgresql://app:secret@db.example.org/app").save("production")
        ```

    Attributes:
        dsn: the database, as a URI or as `key=value` pairs.
        pool_size: the most connections that one process opens for its runs.
    """

    _block_type_name: ClassVar[str] = "Pgflow Database"
    _block_type_slug: ClassVar[str] = BLOCK_TYPE
    _description: ClassVar[str] = "The PostgreSQL database in which pgflow workflows and their runs are kept."

    dsn: SecretStr = Field(
        title="Connection string", description="postgresql://USER:PASSWORD@HOST:PORT/DATABASE, or key=value pairs."
    )
    pool_size: int = Field(
        default=5, ge=1, title="Pool size", description="Connections that one process opens at most for its runs."
    )
