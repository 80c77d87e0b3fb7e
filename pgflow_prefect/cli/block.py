"""`block`."""

from pgflow_prefect.cli.console import out, print_json
from pgflow_prefect.cli.deploy import check_server
from pgflow_prefect.cli.options import AsJson, Dsn, make_settings


def block(name: str = "default", /, *, json: AsJson = False, dsn: Dsn = None) -> None:
    """Save the database's address in Prefect, as a block. Flow runs that read it need no PGFLOW_DSN.

    The block has the connection string of --dsn or PGFLOW_DSN, as a secret, and PGFLOW_POOL_SIZE. A flow run reads the
    block only if its deployment (`pgflow-prefect deploy --block NAME`) or the variable PGFLOW_BLOCK names it.
    PGFLOW_DSN overrides both.

    Example: `pgflow-prefect block production`

    Parameters
    ----------
    name
        The block's name: lower-case letters, digits and dashes. An existing block gets the new address.
    """
    from pgflow_prefect.execution.process.database_block import save_block
    from pgflow_prefect.execution.process.signals import run_event_loop
    from pgflow_prefect.settings import BLOCK_TYPE

    check_server()
    is_new = run_event_loop(save_block, name, make_settings(dsn))
    full_name = f"{BLOCK_TYPE}/{name}"
    if json:
        print_json({"block": full_name, "outcome": "created" if is_new else "updated"})
        return
    out.print(f"{'created' if is_new else 'updated'} Prefect block {full_name}", markup=False)
