"""`python -m tests.faults`: the storm by command, as long as one likes.

It has servers of its own in a temporary directory. The exit code is 1 where something was violated.
"""

import argparse
import secrets
import signal
import sys
import tempfile
import time
from itertools import groupby, islice
from pathlib import Path

from tests.faults.breaking import LEVELS
from tests.faults.released_flows import CHAIN
from tests.faults.released_storm import ReleasedStorm, run_released_storm
from tests.faults.storm import Storm, run_storms
from tests.faults.weathers import MIXED, WEATHERS

_SHOWN = 20  # violations of each storm


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=200, help="of each storm")
    parser.add_argument(
        "--storm",
        action="append",
        choices=[*WEATHERS],
        dest="kinds",
        help="what goes wrong: everything, where not given; several storms blow on the same servers",
    )
    parser.add_argument("--seed", type=int, help="of a storm that is to be repeated; random where not given")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--later", action="store_true", help="Prefect hears of the runs later: see `guide recording`")
    parser.add_argument(
        "--rules", action="store_true", help="workflows with steps that fail, skip and branch, and maps"
    )
    parser.add_argument(
        "--released",
        action="store_true",
        help="on the released pgflow, beside players of its Edge worker, while the flows move every 100 ms",
    )
    parser.add_argument("--items", type=int, default=20, help="with --released: tasks of each map")
    parser.add_argument(
        "--slow-moves", action="store_true", help="with --released: a move waits until some tasks were completed"
    )
    parser.add_argument("--keep", type=Path, help="an empty or new directory to work in, which stays with all logs")
    parser.add_argument(
        "--break-fence",
        type=int,
        nargs="?",
        const=LEVELS,
        default=0,
        choices=range(1, LEVELS + 1),
        metavar="LEVEL",
        help="break the fences of each storm, to see that it is found; of those in PostgreSQL, the first so many "
        "(with --released: both that there are)",
    )
    return parser.parse_args()


def _make_released(options: argparse.Namespace, seed: int) -> ReleasedStorm:
    if options.break_fence:
        # No worker is killed: one takes a run while the other one is stopped, and then both report.
        return ReleasedStorm(
            options.runs, seed, options.workers, options.items, kills=None, broken=True, flows=(CHAIN,)
        )
    return ReleasedStorm(
        options.runs,
        seed,
        options.workers,
        options.items,
        flip=None if options.slow_moves else 0.1,
        crashes=max(1, options.runs // 50),
    )


def main() -> int:
    options = _parse()
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    level = options.break_fence
    storms = [
        Storm(kind, options.runs, seed, options.workers, bool(level), level, options.later, options.rules)
        for kind in options.kinds or [MIXED]
    ]
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)

    print(f"seed {seed}, {options.runs} runs", flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left running
    with tempfile.TemporaryDirectory(prefix="pgflow-faults-") as scratch:
        directory = options.keep or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        violations = (
            run_released_storm(_make_released(options, seed), directory.resolve(), say)
            if options.released
            else run_storms(storms, directory.resolve(), say)
        )
    for _, found in groupby(violations, lambda each: each.partition(": ")[0]):
        for violation in islice(found, _SHOWN):
            print(f"VIOLATION: {violation}")
    say(f"{len(violations)} violations; seed {seed}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
