"""What the benchmarks' tables say, and what they refuse to say."""

import pytest

from benchmarks.costs import Cost
from benchmarks.measure import Row, Sample, Target, ratio
from benchmarks.overload import Overload, report
from benchmarks.shapes import SHAPES, Trace, find_downstream, find_layers, layers
from benchmarks.small_runs import AT_ONCE, Shape, compare

STEADY = Sample((2.0, 2.1, 1.9, 2.0, 2.0), "s")
NOISY = Sample((1.0, 2.0, 9.0, 2.0, 8.0), "s")


def test_a_ratio_of_steady_rows_is_held_against_its_target() -> None:
    assert Row("", ratio(STEADY, STEADY), Target(at_most=1)).verdict == "met"
    slow = Sample(tuple(2 * value for value in STEADY.values), "s")
    assert Row("", ratio(slow, STEADY), Target(at_most=1)).verdict == "missed"


@pytest.mark.parametrize(("sample", "reference"), [(NOISY, STEADY), (STEADY, NOISY)])
def test_a_ratio_with_a_noisy_row_is_neither_met_nor_missed(sample: Sample, reference: Sample) -> None:
    row = Row("", ratio(sample, reference), Target(at_most=0.01))
    assert row.verdict == "too noisy"
    assert not row.is_missed


def test_whether_two_values_are_noisy_is_unknown() -> None:
    pair = Sample((2.0, 2.0), "s")
    assert Row("", ratio(pair, pair), Target(at_most=0.01)).verdict == "too few"


def cost(seconds: float, latency: float | None = None) -> Cost:
    return Cost(seconds, 0.01, 0.05, 0.02, 0.2, 1.0, latency)


def judge(costs: dict[str, list[Cost]]) -> dict[str, str]:
    return {row.name: row.verdict for row in compare(costs, Shape(5, max(AT_ONCE)))}


def test_small_runs_are_judged_by_several_measurements() -> None:
    former = [cost(0.3, 0.1)] * 3
    verdicts = judge({"ours": [cost(0.05, 0.02)] * 3, "former": former, "by_hand": [cost(0.1)] * 3})
    assert verdicts["rate: ours / former"] == verdicts["rate: ours / by hand"] == "met"
    assert verdicts["latency: ours / former"] == verdicts["requests a run"] == verdicts["statements a run"] == "met"
    assert verdicts["CPU of the worker: ours / former"] == "missed"
    uneven = judge({"ours": [cost(each, 0.02) for each in (0.05, 0.2, 0.5)], "former": former})
    assert uneven["rate: ours / former"] == "too noisy"
    assert judge({"ours": [cost(0.05, 0.02)], "former": former[:1]})["rate: ours / former"] == "too few"


def test_runs_that_are_recorded_later_are_judged_by_the_cpu_of_all_processes() -> None:
    verdicts = judge({"unshown": [cost(0.005, 0.01)] * 3, "dbos": [cost(0.011)] * 3, "former": [cost(0.3, 0.1)] * 3})
    assert verdicts == {
        "CPU in all: unshown": "missed",
        "rate: unshown / DBOS": "met",
        "latency: unshown / former": "met",
    }


@pytest.mark.parametrize(
    ("wrong", "failed", "hidden", "grown"),
    [(0, 2, 0, 1.0), (1, 2, 0, 1.0), (0, 1, 0, 1.0), (0, 2, 1, 1.0), (0, 2, 0, 2.0)],
)
def test_an_overload_is_borne_only_if_everything_is_right(wrong: int, failed: int, hidden: int, grown: float) -> None:
    memory = [100.0] * 8 + [100.0 * grown] * 4
    found = Overload(10.0, 100, 50, memory, wrong, failed, hidden)
    assert report(found).is_missed == ((wrong, failed, hidden, grown) != (0, 2, 0, 1.0))


@pytest.mark.parametrize(
    ("name", "steps", "deps"),
    [
        ("chain of 100", 100, 99),
        ("1 to 100 to 1", 102, 200),
        ("10 layers of 10", 100, 900),
        ("1,000 wide", 1000, 0),
        ("100 layers of 50", 5000, 99 * 50 * 3),
    ],
)
def test_shapes_are_what_their_names_say(name: str, steps: int, deps: int) -> None:
    graph = SHAPES[name]
    assert len(graph) == steps
    assert sum(map(len, graph.values())) == deps
    assert sum(map(len, find_downstream(graph).values())) == deps


def test_layers_are_found_from_the_top() -> None:
    assert find_layers(layers(3, 2)) == [["s0_0", "s0_1"], ["s1_0", "s1_1"], ["s2_0", "s2_1"]]


def test_a_run_that_left_out_a_step_or_an_order_is_found() -> None:
    graph = {"a": [], "b": ["a"]}
    trace = Trace()
    work = {step: trace.make_sync(step, 0) for step in graph}
    work["a"]()
    with pytest.raises(AssertionError, match="not every step"):
        trace.check(graph)
    work["b"]()
    trace.check(graph)
    trace.clear()
    work["b"]()
    work["a"]()
    with pytest.raises(AssertionError, match="b began before its upstream ended"):
        trace.check(graph)
