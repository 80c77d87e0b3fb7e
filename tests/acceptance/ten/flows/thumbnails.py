"""Make small images of large ones, with a program that is started for each."""

import subprocess
import sys
from pathlib import Path

from pgflow_prefect import ItemContext, Workflow

workflow = Workflow("thumbnails")

SHRINK = """
import sys
head, size, depth, *pixels = sys.stdin.read().split()
width, height = int(size), int(depth)
rows = [pixels[1:][number * width:(number + 1) * width] for number in range(height)]
print("P2", width // 2, height // 2, pixels[0], *(pixel for row in rows[::2] for pixel in row[::2]))
"""


@workflow.step
def draw(payload: dict[str, str]) -> list[Path]:
    folder = Path(payload["folder"])
    paths = [folder / f"{number}.pgm" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_text(f"P2 4 4 255 {' '.join(str(number) for _ in range(16))}")
    return paths


@workflow.map(over="draw", retries=1, timeout_seconds=60)
def shrink(item: Path, context: ItemContext) -> Path:
    done = subprocess.run(
        [sys.executable, "-c", SHRINK], input=item.read_text(), capture_output=True, text=True, check=True
    )
    made = item.with_suffix(".small.pgm")
    made.write_text(done.stdout)
    context.logger.info("made %s, number %d", made.name, context.item_index)
    return made


@workflow.step
def measure(shrink: list[Path]) -> dict[str, str]:
    return {path.name: " ".join(path.read_text().split()[1:3]) for path in shrink}


flow = workflow.flow
