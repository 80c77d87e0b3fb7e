"""Work for many processors: a pool of processes, as Python has it."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor

from numbers_of_ours import is_prime

from pgflow_prefect import Workflow

workflow = Workflow("pool")


def count_primes(limits: tuple[int, int]) -> int:
    return sum(map(is_prime, range(*limits)))


@workflow.step(timeout_seconds=120)
def count(payload: dict[str, int]) -> int:
    parts = [(start, start + 100) for start in range(0, payload["limit"], 100)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as executor:
        return sum(executor.map(count_primes, parts))


@workflow.step
def find(payload: dict[str, int], count: int) -> list[int]:
    with multiprocessing.get_context("forkserver").Pool(1) as pool:
        flags = pool.map(is_prime, range(20))
    assert count
    return [number for number, flag in enumerate(flags) if flag]


flow = workflow.flow
