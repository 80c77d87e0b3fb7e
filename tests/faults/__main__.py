"""`python -m tests.faults`: the storm by command, as long as one likes.

It has servers of its own in a temporary directory. The exit code is 1 where something was violated.
"""

import argparse
import secrets
import signal
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.breaking import LEVELS
from tests.faults.storm import Storm, run_storm

_SHOWN = 40  # violations


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, help="of a storm that is to be repeated; random where not given")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--keep", type=Path, help="an empty or new directory to work in, which stays with all logs")
    parser.add_argument(
        "--break-fence",
        type=int,
        nargs="?",
        const=LEVELS,
        default=0,
        choices=range(1, LEVELS + 1),
        metavar="LEVEL",
        help="break the first so many fences (all of them, where no number is given), to see that it is found",
    )
    return parser.parse_args()


def main() -> int:
    options = _parse()
    seed = secrets.randbelow(2**32) if options.seed is None else options.seed
    storm = Storm(options.runs, seed, options.workers, options.break_fence)
    began = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:7.1f} s  {text}", flush=True)

    print(f"seed {seed}, {storm.runs} runs", flush=True)
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that nothing is left running
    with tempfile.TemporaryDirectory(prefix="pgflow-faults-") as scratch:
        directory = options.keep or Path(scratch)
        directory.mkdir(parents=True, exist_ok=True)
        violations = run_storm(storm, directory.resolve(), say)
    for violation in violations[:_SHOWN]:
        print(f"VIOLATION: {violation}")
    say(f"{len(violations)} violations; seed {seed}")
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
