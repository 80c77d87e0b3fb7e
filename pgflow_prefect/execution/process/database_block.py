"""Reads and saves the database's address in a Prefect block."""

from typing import TYPE_CHECKING, Any

from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from pydantic import SecretStr

from pgflow_prefect.database.connection import find_dsn
from pgflow_prefect.errors import UsageError
from pgflow_prefect.prefect_api.client import ask_prefect
from pgflow_prefect.settings import BLOCK_TYPE, Settings

if TYPE_CHECKING:  # making a class of blocks takes 50 ms, and most runs need none
    from pgflow_prefect.blocks import PgflowDatabase


async def find_settings(settings: Settings) -> Settings:
    """Return settings that have the database's address, from a block if the settings themselves have none.

    A connection string in the settings (`--dsn`, `PGFLOW_DSN`) comes first, then the block that `PGFLOW_BLOCK` names,
    then the result of `find_dsn`. This never reads a block that no setting names: each Prefect user may write a block,
    and so could choose the database of this machine.

    Raises:
        UsageError: there is no block of the name that the settings have, or it has no usable values.
        PrefectUnavailableError: Prefect's API does not answer.
    """
    if settings.dsn is not None or settings.block is None:
        return settings
    block = await _load(settings.block)
    if block is None:
        raise UsageError(
            f"there is no Prefect block {BLOCK_TYPE}/{settings.block}: make it with `pgflow-prefect block "
            f"{settings.block}`, or name another one (PGFLOW_BLOCK)"
        )
    return _apply(settings, block)


def is_settled(settings: Settings) -> bool:
    """Tell whether the database's address is known without a block."""
    return settings.dsn is not None or settings.block is None


async def save_block(name: str, settings: Settings) -> bool:
    """Save a database's address in a Prefect block, a new or an existing one.

    Args:
        name: of the block: lower-case letters, digits and dashes.
        settings: their connection string and pool size are saved.

    Returns:
        Whether the block is new.

    Raises:
        UsageError: the settings have no connection string, or Prefect refuses the name.
        PrefectUnavailableError: Prefect's API does not answer.
    """
    if settings.dsn is None:
        raise UsageError("which database? give --dsn, or set PGFLOW_DSN: a block has a whole connection string")
    from pgflow_prefect.blocks import PgflowDatabase  # noqa: PLC0415

    find_dsn(settings)  # refuse now what could not be used later
    with ask_prefect(f"the block {name!r}"):
        former = await _read(name)
        kept = former.get("pool_size") if former and "pool_size" not in settings.model_fields_set else None
        size = kept if isinstance(kept, int) else settings.pool_size
        try:
            # Saving the first block also registers this kind of block in Prefect.
            await PgflowDatabase(dsn=settings.dsn, pool_size=size).asave(name, overwrite=True)
        except ValueError as error:
            raise UsageError(f"{name!r} can't be the name of a block: lower-case letters, digits and -") from error
    return former is None


async def _load(name: str) -> "PgflowDatabase | None":
    with ask_prefect(f"the block {name!r}"):
        values = await _read(name)
    if values is None:
        return None
    # Not `PgflowDatabase.load`: pydantic's message would quote a wrong value.
    dsn, pool_size = values.get("dsn"), values.get("pool_size", 5)
    if not isinstance(dsn, str) or not dsn or not isinstance(pool_size, int) or pool_size < 1:
        raise UsageError(f"the Prefect block {BLOCK_TYPE}/{name} has no usable values: save it again")
    from pgflow_prefect.blocks import PgflowDatabase  # noqa: PLC0415

    return PgflowDatabase(dsn=SecretStr(dsn), pool_size=pool_size)


async def _read(name: str) -> dict[str, Any] | None:
    """Return a block's values; None if there is no block of this name."""
    try:
        async with get_client() as client:
            return dict((await client.read_block_document_by_name(name, BLOCK_TYPE)).data)
    except ObjectNotFound:
        return None


def _apply(settings: Settings, block: "PgflowDatabase") -> Settings:
    size = settings.pool_size if "pool_size" in settings.model_fields_set else block.pool_size
    return settings.model_copy(update={"dsn": block.dsn, "pool_size": size})
