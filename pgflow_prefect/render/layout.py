"""Finds the coordinates of steps' boxes and of the lines between them, by Sugiyama's method."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

from pgflow_prefect.definitions.graph import Graph, find_layers
from pgflow_prefect.render.lattice import Lattice, make_lattice

BETWEEN_BOXES, BETWEEN_LINES = 16.0, 9.0
_BETWEEN_LAYERS = 44.0
_LONGEST_ROW = 1600.0
"""A picture up to this length goes to the right, as people read; a longer one takes the shorter direction."""

_ROUNDS = 6
_PULLS = {(False, False): 1.0, (False, True): 0.4, (True, False): 2.0, (True, True): 8.0}
"""How strongly a neighbour attracts a cell, by which of the two are bends; long lines become straight."""


class Point(NamedTuple):
    """A place in the picture, in pixels from its upper left corner."""

    x: float
    y: float


class Box(NamedTuple):
    """A step's place: its upper left corner, and its size."""

    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True)
class Layout:
    """A graph's picture.

    Attributes:
        width: in pixels.
        height: in pixels.
        downwards: whether the layers go down instead of to the right.
        boxes: of the steps, by slug.
        lines: of the deps. A line has a point where it leaves its step, two points for each bend (entering and leaving
            its layer), and a point where it reaches the other step. Between two layers it may curve.
    """

    width: float
    height: float
    downwards: bool
    boxes: dict[str, Box]
    lines: dict[tuple[str, str], list[Point]]


def lay_out(graph: Graph, measure: Callable[[str], float], height: float) -> Layout:
    """Return the place of each step and each dep; no box touches another one, and bends go around boxes.

    Args:
        graph: without cycles.
        measure: the width of a step's box in pixels.
        height: of each box.
    """
    lattice = make_lattice(graph)
    widths = [measure(slug) for slug in lattice.slugs]
    downwards = _go_down([_of_steps(layer, widths) for layer in lattice.layers], height)
    layer_widths = [max(_of_steps(layer, widths), default=0.0) for layer in lattice.layers]
    if downwards:
        lengths = [height] * len(lattice.layers)
        breadths = [*widths, *([0.0] * (len(lattice.above) - len(widths)))]
    else:
        lengths = layer_widths
        breadths = [height if cell < len(widths) else 0.0 for cell in range(len(lattice.above))]
    centres = _place_across(lattice, breadths)
    starts = _place_along(lattice, lengths)
    return _Drawing(lattice, downwards, lengths, breadths, starts, centres).finish(graph)


def _of_steps(layer: Sequence[int], sizes: Sequence[float]) -> list[float]:
    return [sizes[cell] for cell in layer if cell < len(sizes)]


def goes_down(graph: Graph, measure: Callable[[str], float], height: float) -> bool:
    """Tell whether the picture's layers go down, as `lay_out` with the same arguments decides."""
    return _go_down([[measure(slug) for slug in layer] for layer in find_layers(graph)], height)


def _go_down(layers: Sequence[Sequence[float]], height: float) -> bool:
    row = sum(max(layer, default=0.0) + _BETWEEN_LAYERS for layer in layers)
    column = max((len(layer) for layer in layers), default=0) * (height + BETWEEN_BOXES)
    down = len(layers) * (height + _BETWEEN_LAYERS)
    across = max((sum(layer) + len(layer) * BETWEEN_BOXES for layer in layers), default=0.0)
    return row > _LONGEST_ROW and max(row, column) > max(down, across)


def _place_along(lattice: Lattice, lengths: Sequence[float]) -> list[float]:
    """Return where each layer begins; more edges between two layers get more room."""
    starts, here = [], 0.0
    for layer, length in zip(lattice.layers, lengths, strict=True):
        starts.append(here)
        edges = sum(len(lattice.below[cell]) for cell in layer)
        here += length + _BETWEEN_LAYERS + min(edges, 60)
    return starts


def _place_across(lattice: Lattice, breadths: Sequence[float]) -> list[float]:
    """Return the cells' centres across the layers, each as near to its neighbours as the others allow."""
    centres = [0.0] * len(breadths)
    offsets = []
    for layer in lattice.layers:
        offsets.append(_find_offsets(layer, breadths, len(lattice.slugs)))
        for cell, offset in zip(layer, offsets[-1], strict=True):
            centres[cell] = offset - offsets[-1][-1] / 2
    both = [above + below for above, below in zip(lattice.above, lattice.below, strict=True)]
    numbered = list(zip(lattice.layers, offsets, strict=True))
    for neighbours, layers in [
        *([(lattice.above, numbered), (lattice.below, numbered[::-1])] * _ROUNDS),
        (both, numbered),
        (both, numbered[::-1]),
    ]:
        for layer, layer_offsets in layers:
            _settle(layer, layer_offsets, neighbours, centres, lattice)
    return centres


def _find_offsets(layer: Sequence[int], breadths: Sequence[float], steps: int) -> list[float]:
    """Return the smallest distance of each cell from the first cell's centre."""
    offsets = [0.0]
    for before, after in pairwise(layer):
        gap = BETWEEN_BOXES if before < steps and after < steps else BETWEEN_LINES
        offsets.append(offsets[-1] + (breadths[before] + breadths[after]) / 2 + gap)
    return offsets


def _settle(
    layer: Sequence[int],
    offsets: Sequence[float],
    neighbours: Sequence[Sequence[int]],
    centres: list[float],
    lattice: Lattice,
) -> None:
    """Move a layer's cells to the mean of their neighbours by least squares, keeping order and distances.

    A step without edges stays as near as possible to the cell before it, or to the one after it.
    """
    steps = len(lattice.slugs)
    drawn = [place for place, cell in enumerate(layer) if lattice.above[cell] or lattice.below[cell]]
    wishes, weights = [], []
    for place in drawn or range(len(layer)):
        cell = layer[place]
        weight = wish = 0.0
        for other in neighbours[cell]:
            pull = _PULLS[cell >= steps, other >= steps]
            weight += pull
            wish += pull * centres[other]
        wishes.append((wish / weight if weight else centres[cell]) - offsets[place])
        weights.append(weight or 0.1)
    fitted = dict(zip(drawn or range(len(layer)), fit_ascending(wishes, weights), strict=True))
    here = next(iter(fitted.values()), 0.0)
    for place, (cell, offset) in enumerate(zip(layer, offsets, strict=True)):
        here = fitted.get(place, here)
        centres[cell] = here + offset


def fit_ascending(wishes: Sequence[float], weights: Sequence[float]) -> list[float]:
    """Return the non-descending numbers that are nearest to these by weighted least squares, in linear time.

    Source: the pool adjacent violators algorithm, https://en.wikipedia.org/wiki/Isotonic_regression
    """
    pools: list[tuple[float, float, int]] = []  # mean, weight, length
    for wish, weight in zip(wishes, weights, strict=True):
        mean, total, length = wish, weight, 1
        while pools and pools[-1][0] >= mean:
            other, more, longer = pools.pop()
            mean = (mean * total + other * more) / (total + more)
            total += more
            length += longer
        pools.append((mean, total, length))
    return [mean for mean, _, length in pools for _ in range(length)]


@dataclass(frozen=True)
class _Drawing:
    """Places along and across the layers, to be turned into coordinates."""

    lattice: Lattice
    downwards: bool
    lengths: list[float]
    breadths: list[float]
    starts: list[float]
    centres: list[float]

    def finish(self, graph: Graph) -> Layout:
        depths = {cell: depth for depth, layer in enumerate(self.lattice.layers) for cell in layer}
        least = min((c - b / 2 for c, b in zip(self.centres, self.breadths, strict=True)), default=0.0)
        most = max((c + b / 2 for c, b in zip(self.centres, self.breadths, strict=True)), default=0.0)
        length = self.starts[-1] + self.lengths[-1] if self.starts else 0.0
        boxes, numbers = {}, {}
        for cell, slug in enumerate(self.lattice.slugs):
            numbers[slug] = cell
            corner = self._turn(self.starts[depths[cell]], self.centres[cell] - self.breadths[cell] / 2 - least)
            boxes[slug] = Box(*corner, *self._turn(self.lengths[depths[cell]], self.breadths[cell]))
        lines = {}
        for upstream, downstream in graph.edges:
            bends = self.lattice.bends.get((upstream, downstream), [])
            chain = [numbers[upstream], *bends, numbers[downstream]]
            # A line enters every cell but the first, and leaves every cell but the last.
            ends = [point for cell in chain for point in self._find_ends(cell, depths[cell], least)]
            lines[upstream, downstream] = ends[1:-1]
        return Layout(*self._turn(length, most - least), self.downwards, boxes, lines)

    def _find_ends(self, cell: int, depth: int, least: float) -> tuple[Point, Point]:
        across = self.centres[cell] - least
        start = self.starts[depth]
        return self._turn(start, across), self._turn(start + self.lengths[depth], across)

    def _turn(self, along: float, across: float) -> Point:
        return Point(across, along) if self.downwards else Point(along, across)
