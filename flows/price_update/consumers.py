"""The workers of the three queues that steps of this workflow are bound to.

    python consumers.py labels URL       queues of Redis and RabbitMQ, each in a process of its own
    python consumers.py shops URL
    python consumers.py search           pgqueuer's own worker; `pgq install`, once, makes its tables

`PGFLOW_DSN` names the database that they report to.
"""

import asyncio
import os
import sys
from typing import Any

import psycopg
from pgqueuer import PgQueuer
from pgqueuer.db import PsycopgDriver
from pgqueuer.models import Job

from pgflow_prefect.consumer import consume, perform

Input = dict[str, Any]


def print_labels(step: Input) -> int:
    """Print a label for each product, as it were, and return how many."""
    return int(step["payload"]["products"])


def tell_shops(step: Input) -> int:
    """Tell each shop that there are new prices, and return how many shops there are."""
    return len(step["payload"]["shops"])


def update_search(step: Input) -> int:
    """Have the search show new prices, and return of how many products."""
    return int(step["payload"]["products"])


async def work_in_postgres() -> None:
    """Run pgqueuer's worker."""
    connection = await psycopg.AsyncConnection.connect(os.environ["PGFLOW_DSN"], autocommit=True)
    pgq = PgQueuer(PsycopgDriver(connection))

    @pgq.entrypoint("search")
    async def search(job: Job) -> None:
        await perform(job.payload, update_search, queue="pgqueuer:search")

    await pgq.run()


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["labels", url]:
            consume(url, print_labels)
        case ["shops", url]:
            consume(url, tell_shops, login_env="SHOPS_LOGIN")
        case ["search"]:
            asyncio.run(work_in_postgres())
        case _:
            sys.exit(__doc__)
