"""A real browser, and what Prefect's UI shows a person in it.

The UI draws the graph of a flow run on a canvas, with PixiJS. PixiJS tells developers' tools of its scene by calling
`__PIXI_APP_INIT__`: that is where what is drawn can be read, each box with its text and its place, each arrow with its
ends.
"""

import base64
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

PATIENCE = 120_000
"""Milliseconds after which what a page is to show will not come any more."""

_PAUSE = 200  # milliseconds between two looks

_GREENER = 40  # of 255: what is completed is #219d4b, and paler at a thin box's edges; the background is at most 10

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# WebGL without a graphics card, and nothing that calls home.
_ARGUMENTS = ("--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--disable-gpu-sandbox")

_KEEP_THE_SCENE = "globalThis.__PIXI_APP_INIT__ = (app) => { globalThis.pixiApp = app }"

_READ_THE_SCENE = """() => {
    const everything = (item) => [item, ...(item.children ?? []).flatMap(everything)]
    const find = (item, label) => everything(item).filter((each) => each.label === label)
    const [scene] = globalThis.pixiApp ? find(globalThis.pixiApp.stage, "nodes-container") : []
    if (!scene) return { boxes: [], arrows: [] }
    const boxes = find(scene, "node-container").map((node) => {
        const bar = node.children.find((each) => each.height > 0 && each.text === undefined)
        const place = bar.getBounds()
        return {
            text: everything(node).find((each) => each.text !== undefined)?.text ?? "",
            left: node.x, right: node.x + bar.width, middle: node.y + bar.height / 2,
            spot: [place.x + place.width / 2, place.y + place.height * (place.height < 8 ? 0.5 : 0.15)], // not its text
        }
    })
    const arrows = find(scene, "edge-container").map((edge) => ({
        // The first child is the arrow's head, whose middle is 8 from its tip.
        begin: [edge.x, edge.y], end: [edge.x + edge.children[0].x + 8, edge.y + edge.children[0].y],
    }))
    return { boxes, arrows }
}"""

_READ_PIXELS = """async ([png, spots]) => {
    const bytes = Uint8Array.from(atob(png), (each) => each.charCodeAt(0))
    const image = await createImageBitmap(new Blob([bytes], { type: "image/png" }))
    const context = new OffscreenCanvas(image.width, image.height).getContext("2d")
    context.drawImage(image, 0, 0)
    return spots.map(([x, y]) => [...context.getImageData(x, y, 1, 1).data])
}"""


@dataclass(frozen=True)
class Drawing:
    """A flow run's graph as it is drawn.

    Attributes:
        steps: the texts of the boxes, in alphabetical order.
        deps: what the arrows join, from box to box, in alphabetical order; `?` where an end touches no box.
        spots: a place on the canvas for each box.
    """

    steps: list[str]
    deps: list[tuple[str, str]]
    spots: list[tuple[float, float]]


@dataclass(frozen=True)
class Screen:
    """A page of Prefect's UI, and where its pictures are kept."""

    page: Page
    pictures: Path

    def open(self, url: str) -> None:
        """Open a page, and return when its document is there."""
        self.page.goto(url, wait_until="domcontentloaded", timeout=PATIENCE)

    def open_graph(self, url: str) -> dict[str, Any]:
        """Open the page of a flow run, and return what Prefect answered when the page asked for the graph."""
        with self.page.expect_response(lambda answer: answer.url.endswith("/graph-v2"), timeout=PATIENCE) as asked:
            self.open(url)
        return dict(json.loads(asked.value.body()))

    def await_drawing(self, steps: list[str], deps: list[tuple[str, str]]) -> Drawing:
        """Return the graph as it is drawn once it has these steps and deps, or after a while as far as it came."""
        for _ in self._look_again():
            drawing = self._read_drawing()
            if (drawing.steps, drawing.deps) == (steps, deps):
                break
        return drawing

    def await_green_boxes(self, count: int) -> None:
        """Return once so many of the graph's boxes are seen in the colour of what is completed."""
        # Where they are is read each time: the graph is moved into the middle after it was drawn.
        self._await_green(lambda: self._read_drawing().spots, count)

    def await_something_green(self) -> None:
        """Return once something that is completed is seen on the canvas, whatever draws it."""
        size = self.page.locator("canvas").first.bounding_box(timeout=PATIENCE)
        assert size is not None
        # Not at the bottom, where a bar has the state of the flow run.
        spots = [(x, y) for x in range(0, int(size["width"]), 4) for y in range(0, int(size["height"]) - 40, 4)]
        self._await_green(lambda: spots, 10)

    def _await_green(self, find_spots: Callable[[], Sequence[tuple[float, float]]], count: int) -> None:
        for _ in self._look_again():
            if (found := self._count_green(find_spots())) >= count:
                return
        pytest.fail(f"{found} places of the canvas are green, and not {count}")

    def _look_again(self) -> Iterator[None]:
        deadline = monotonic() + PATIENCE / 1000
        while monotonic() < deadline:
            yield
            self.page.wait_for_timeout(_PAUSE)  # not a sleep: the page goes on meanwhile

    def _read_drawing(self) -> Drawing:
        scene = self.page.evaluate(_READ_THE_SCENE)
        boxes = scene["boxes"]
        deps = [
            (_find(boxes, "right", arrow["begin"]), _find(boxes, "left", arrow["end"])) for arrow in scene["arrows"]
        ]
        return Drawing(sorted(box["text"] for box in boxes), sorted(deps), [box["spot"] for box in boxes])

    def _count_green(self, spots: Sequence[tuple[float, float]]) -> int:
        png = base64.b64encode(self.page.locator("canvas").first.screenshot(timeout=PATIENCE)).decode()
        pixels = self.page.evaluate(_READ_PIXELS, [png, [*spots]])
        return sum(green - max(red, blue) > _GREENER for red, green, blue, _ in pixels)

    def keep_picture(self, name: str) -> Path:
        """Keep what the window shows as a picture, and say where."""
        path = self.pictures / f"{name}.png"
        self.page.screenshot(path=path)
        print(f"picture: {path}")
        return path


def find_browser() -> str:
    """Return a browser's path; skip the test where there is none and there does not have to be one."""
    for program in _PROGRAMS:
        if found := shutil.which(program):
            return found
    reason = f"no browser is installed: install {', '.join(_PROGRAMS[:2])} or {_PROGRAMS[2]}"
    if os.environ.get("PGFLOW_TEST_BROWSER") == "required":
        pytest.fail(reason)
    pytest.skip(reason)


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Start a browser without a window."""
    as_root = ["--no-sandbox"] if os.getuid() == 0 else []
    program = find_browser()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=[*_ARGUMENTS, *as_root])
        yield browser
        browser.close()


@contextmanager
def open_screen(browser: Browser, directory: Path, *, here: str) -> Iterator[Screen]:
    """Open a window that reaches this machine only.

    Args:
        browser: whose window.
        directory: where pictures are kept, unless PGFLOW_TEST_PICTURES names another one.
        here: what the URLs of this machine's Prefect server begin with.
    """
    pictures = Path(os.environ.get("PGFLOW_TEST_PICTURES", directory))
    pictures.mkdir(parents=True, exist_ok=True)
    context = browser.new_context(viewport={"width": 1600, "height": 1000}, locale="en-GB", timezone_id="UTC")
    context.add_init_script(_KEEP_THE_SCENE)
    context.route(lambda url: not url.startswith(here), lambda route: route.abort())
    yield Screen(context.new_page(), pictures)
    context.close()


def _find(boxes: list[dict[str, Any]], side: str, place: tuple[float, float]) -> str:
    """Return the text of the box that has an arrow's end in the middle of this side."""
    x, y = place
    found = [box["text"] for box in boxes if abs(box[side] - x) < 0.01 and abs(box["middle"] - y) < 0.01]
    return str(found[0]) if len(found) == 1 else "?"
