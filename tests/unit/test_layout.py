"""Where a picture's boxes and lines go: nothing on top of anything else, and big graphs in seconds."""

from collections.abc import Callable
from itertools import combinations, pairwise, product

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pgflow_prefect.definitions.graph import build_graph, find_layers
from pgflow_prefect.definitions.model import WorkflowDefinition
from pgflow_prefect.render.lattice import MOST_BENDS, count_crossings, make_lattice
from pgflow_prefect.render.layout import BETWEEN_BOXES, Box, Layout, Point, fit_ascending, lay_out
from tests.growth import is_linear
from tests.unit.definitions import dags, define, make_layered

HEIGHT = 40.0


def lay(definition: WorkflowDefinition, width: float = 90.0) -> Layout:
    return lay_out(build_graph(definition), lambda slug: width + len(slug), HEIGHT)


def touch(one: Box, other: Box) -> bool:
    return (
        one.x < other.x + other.width
        and other.x < one.x + one.width
        and one.y < other.y + other.height
        and other.y < one.y + one.height
    )


def crosses(point: Point, box: Box) -> bool:
    slack = 1e-6
    return box.x + slack < point.x < box.x + box.width - slack and box.y + slack < point.y < box.y + box.height - slack


@given(dags(), st.sampled_from([90.0, 700.0]))
def test_no_box_touches_another_one_and_all_are_in_the_picture(definition: WorkflowDefinition, width: float) -> None:
    layout = lay(definition, width)
    assert set(layout.boxes) == set(definition.steps)
    assert not any(touch(one, other) for one, other in combinations(layout.boxes.values(), 2))
    for box in layout.boxes.values():
        assert min(box.x, box.y) >= -1e-6
        assert box.x + box.width <= layout.width + 1e-6
        assert box.y + box.height <= layout.height + 1e-6


@given(dags(), st.sampled_from(["a", "z"]), st.sampled_from([90.0, 700.0]))
@example(define({"s0": [], "s1": ["s0"], "s2": ["s1"], "s3": [], "s4": ["s0", "s3"], "s5": ["s4"], "s6": ["s1"],
                 "s7": ["s0", "s3", "s6"], "s8": ["s1"]}), "z", 90.0)  # fmt: skip
def test_a_step_without_dependencies_lies_beside_another_one(
    definition: WorkflowDefinition, lone: str, width: float
) -> None:
    steps = (*definition.steps, f"{lone}-lone")
    layout = lay(definition.model_copy(update={"steps": steps}), width)
    alone = layout.boxes[steps[-1]]
    if layout.downwards:
        gaps = [abs(box.x - alone.x) - max(box.width, alone.width) for box in layout.boxes.values() if box.y == alone.y]
    else:
        gaps = [abs(box.y - alone.y) - box.height for box in layout.boxes.values() if box.x == alone.x]
    beside = [gap for gap in gaps if gap > 0]
    # A bend of a long line may lie between the two.
    assert not beside or min(beside) < 3 * BETWEEN_BOXES


@given(dags(), st.sampled_from([90.0, 700.0]))
def test_a_line_leads_from_box_to_box_onwards_and_its_bends_go_round_other_boxes(
    definition: WorkflowDefinition, width: float
) -> None:
    layout = lay(definition, width)
    assert set(layout.lines) == set(definition.deps)
    for (upstream, downstream), points in layout.lines.items():
        begin, end = layout.boxes[upstream], layout.boxes[downstream]
        if layout.downwards:
            assert points[0] == pytest.approx((begin.x + begin.width / 2, begin.y + begin.height))
            assert points[-1] == pytest.approx((end.x + end.width / 2, end.y))
        else:
            assert points[0] == pytest.approx((begin.x + begin.width, begin.y + begin.height / 2))
            assert points[-1] == pytest.approx((end.x, end.y + end.height / 2))
        along = [point.y if layout.downwards else point.x for point in points]
        assert along == sorted(along)
        assert not any(crosses(point, box) for point in points[1:-1] for box in layout.boxes.values())


def test_a_tree_is_drawn_without_crossings() -> None:
    tree = {f"s{number}": [f"s{(number - 1) // 3}"] if number else [] for number in range(121)}
    lattice = make_lattice(build_graph(define(tree)))
    places = [0] * len(lattice.above)
    for layer in lattice.layers:
        for place, cell in enumerate(layer):
            places[cell] = place
    assert count_crossings(lattice.layers, lattice.below, places) == 0


@given(dags())
def test_crossings_are_those_that_one_counts_by_hand(definition: WorkflowDefinition) -> None:
    lattice = make_lattice(build_graph(definition))
    places = {cell: place for layer in lattice.layers for place, cell in enumerate(layer)}
    by_hand = 0
    for layer in lattice.layers:
        edges = [(places[cell], places[other]) for cell in layer for other in lattice.below[cell]]
        by_hand += sum((a - c) * (b - d) < 0 for (a, b), (c, d) in combinations(edges, 2))
    counted = count_crossings(lattice.layers, lattice.below, [places[cell] for cell in range(len(lattice.above))])
    assert counted == by_hand


def test_a_diamond_goes_to_the_right_with_its_middle_steps_side_by_side() -> None:
    layout = lay(define({"a": [], "b": ["a"], "c": ["a"], "d": ["b", "c"]}))
    a, b, c, d = (layout.boxes[slug] for slug in "abcd")
    assert not layout.downwards
    assert a.x < b.x == c.x < d.x
    assert a.y == pytest.approx(d.y)
    assert a.y == pytest.approx((b.y + c.y) / 2)


def test_numbered_steps_stand_in_the_order_of_their_numbers() -> None:
    layout = lay(define({"start": [], **{f"part_{number}": ["start"] for number in range(12)}}))
    parts = [layout.boxes[f"part_{number}"].y for number in range(12)]
    assert parts == sorted(parts)


def test_a_long_chain_goes_down() -> None:
    chain = define({f"s{place}": [f"s{place - 1}"] if place else [] for place in range(50)})
    layout = lay(chain)
    assert layout.downwards
    assert len({round(box.x + box.width / 2) for box in layout.boxes.values()}) == 1


def test_layers_are_those_of_the_graph() -> None:
    graph = build_graph(make_layered(500))
    lattice = make_lattice(graph)
    steps = [sorted(lattice.slugs[cell] for cell in layer if cell < len(lattice.slugs)) for layer in lattice.layers]
    assert steps == find_layers(graph)


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 4)), min_size=1, max_size=4))
def test_the_nearest_ascending_numbers(drawn: list[tuple[int, int]]) -> None:
    wishes, weights = [float(wish) for wish, _ in drawn], [float(weight) for _, weight in drawn]
    fitted = fit_ascending(wishes, weights)

    def miss(numbers: tuple[float, ...]) -> float:
        return sum(w * (n - wish) ** 2 for n, wish, w in zip(numbers, wishes, weights, strict=True))

    assert all(one <= other + 1e-9 for one, other in pairwise(fitted))
    others = (each for each in product(range(-9, 10, 3), repeat=len(drawn)) if list(each) == sorted(each))
    assert all(miss(tuple(fitted)) <= miss(other) + 1e-6 for other in others)


def make_all_to_last(steps: int) -> WorkflowDefinition:
    chain = {f"s{place}": [f"s{place - 1}"] if place else [] for place in range(steps)}
    return define({**chain, "last": [*chain]})


@pytest.mark.thorough
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make_layered, id="five edges a step, over up to five layers"),
        pytest.param(make_all_to_last, id="edges over all layers"),
    ],
)
def test_the_time_for_a_picture_of_ten_thousand_steps_is_bounded(make: Callable[[int], WorkflowDefinition]) -> None:
    definitions = {steps: make(steps) for steps in (2_000, 10_000)}

    def draw(steps: int) -> None:
        layout = lay(definitions[steps])
        assert len(layout.boxes) == len(definitions[steps].steps)
        assert sum(len(points) - 2 for points in layout.lines.values()) <= 2 * MOST_BENDS

    # Up to 2,000 steps, edges are sorted with care: that takes more than in proportion, and then no more of it is done.
    assert is_linear(draw, 2_000, 5)
