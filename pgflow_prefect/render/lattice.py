"""The graph in layers, where every edge leads to the next layer; a long edge goes through bends.

The first steps of K. Sugiyama's method: layers, bends, and an order in each layer with few crossings.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from pgflow_prefect.definitions.graph import Graph, find_layers

MOST_BENDS = 20_000
"""The most bends, whose number can be quadratic; beyond it, the longest edges go straight."""

_MOST_ROUNDS = 12
_LOOKS = 400_000
"""Rounds end after about this number of edges, which takes a second."""


@dataclass
class Lattice:
    """Cells in layers.

    Attributes:
        slugs: of the cells that are steps, which come first; all other cells are bends.
        layers: of cells, each layer in its order.
        above: for each cell, its neighbours in the layer before.
        below: in the next one.
        bends: of each edge that spans several layers, unless it goes straight.
    """

    slugs: list[str]
    layers: list[list[int]]
    above: list[list[int]]
    below: list[list[int]]
    bends: dict[tuple[str, str], list[int]]


def make_lattice(graph: Graph) -> Lattice:
    """Return a graph's lattice, in an order with few crossings; about linear in steps and edges."""
    slug_layers = [sorted(layer, key=_pad_numbers) for layer in find_layers(graph)]
    slugs = [slug for layer in slug_layers for slug in layer]
    numbers = {slug: number for number, slug in enumerate(slugs)}
    depths = {slug: depth for depth, layer in enumerate(slug_layers) for slug in layer}
    layers = [[numbers[slug] for slug in layer] for layer in slug_layers]
    lattice = Lattice(slugs, layers, [[] for _ in slugs], [[] for _ in slugs], {})
    budget = MOST_BENDS
    for upstream, downstream in sorted(
        graph.edges, key=lambda edge: (depths[edge[1]] - depths[edge[0]], numbers[edge[0]], numbers[edge[1]])
    ):
        inner = range(depths[upstream] + 1, depths[downstream])
        budget -= len(inner)
        if budget < 0 and inner:
            continue
        bends = [_add_bend(lattice, depth) for depth in inner]
        if bends:
            lattice.bends[upstream, downstream] = bends
        chain = [numbers[upstream], *bends, numbers[downstream]]
        for before, after in pairwise(chain):
            lattice.below[before].append(after)
            lattice.above[after].append(before)
    _order(lattice)
    return lattice


def _pad_numbers(slug: str) -> str:
    """Return a sort key that puts `part_10` after `part_9`."""
    return re.sub("[0-9]+", lambda match: match[0].zfill(9), slug)


def _add_bend(lattice: Lattice, depth: int) -> int:
    cell = len(lattice.above)
    lattice.layers[depth].append(cell)
    lattice.above.append([])
    lattice.below.append([])
    return cell


def _order(lattice: Lattice) -> None:
    """Put each layer into an order with few crossings, the best one of several sweeps down and up."""
    places = _walk(lattice)
    layers = [sorted(layer, key=places.__getitem__) for layer in lattice.layers]
    _number(layers, places)
    edges = sum(map(len, lattice.below))
    best, fewest = layers, count_crossings(layers, lattice.below, places)
    for _ in range(min(_MOST_ROUNDS, max(2, _LOOKS // (edges + 1)))):
        if not fewest:
            break
        layers = _sweep(_sweep(layers, lattice.above, places)[::-1], lattice.below, places)[::-1]
        crossings = count_crossings(layers, lattice.below, places)
        if crossings < fewest:
            best, fewest = layers, crossings
    lattice.layers = best


def _walk(lattice: Lattice) -> list[int]:
    """Number the cells in the order of a depth-first walk, so that trees have no crossings and parts stay together."""
    places = [-1] * len(lattice.above)
    stack = [cell for layer in lattice.layers for cell in layer if not lattice.above[cell]][::-1]
    met = 0
    while stack:
        cell = stack.pop()
        if places[cell] < 0:
            places[cell] = met
            met += 1
            stack += reversed(lattice.below[cell])
    return places


def _sweep(layers: list[list[int]], neighbours: Sequence[Sequence[int]], places: list[int]) -> list[list[int]]:
    """Order each layer by the mean places of its neighbours in the layer before; a cell without neighbours stays."""

    def find_mean(cell: int) -> float:
        found = neighbours[cell]
        return sum(map(places.__getitem__, found)) / len(found) if found else places[cell]

    swept = []
    for layer in layers:
        swept.append(sorted(layer, key=find_mean))
        _number(swept[-1:], places)
    return swept


def _number(layers: list[list[int]], places: list[int]) -> None:
    for layer in layers:
        for place, cell in enumerate(layer):
            places[cell] = place


def count_crossings(layers: Sequence[Sequence[int]], below: Sequence[Sequence[int]], places: Sequence[int]) -> int:
    """Return how many pairs of edges cross, for these places of the cells in their layers.

    Source: Barth, Jünger, Mutzel, "Simple and Efficient Bilayer Cross Counting", with a Fenwick tree.
    """
    return sum(
        _count_inversions([place for cell in layer for place in sorted(map(places.__getitem__, below[cell]))], size)
        for layer, size in _pair_sizes(layers)
    )


def _pair_sizes(layers: Sequence[Sequence[int]]) -> Iterator[tuple[Sequence[int], int]]:
    return zip(layers, map(len, layers[1:]), strict=False)


def _count_inversions(numbers: Sequence[int], size: int) -> int:
    tree = [0] * (size + 1)
    inversions = 0
    for seen, number in enumerate(numbers):
        inversions += seen
        index = number + 1
        while index:  # less those before it that are not greater
            inversions -= tree[index]
            index &= index - 1
        index = number + 1
        while index <= size:
            tree[index] += 1
            index += index & -index
    return inversions
