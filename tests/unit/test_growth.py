"""The judge of other tests: it lets linear work pass however uneven the machine is, and quadratic work never."""

from collections.abc import Callable
from itertools import cycle

from tests.growth import is_linear


class Machine:
    """Work of a known length, in seconds of a clock that only this work turns; some of it is disturbed."""

    def __init__(self, length: Callable[[int], float], *disturbances: float) -> None:
        self.now = 0.0
        self._length = length
        self._disturbances = cycle(disturbances or [1.0])

    def act(self, size: int) -> None:
        self.now += self._length(size) * next(self._disturbances)

    def is_linear(self) -> bool:
        return is_linear(self.act, 100, 5, clock=lambda: self.now)


def test_linear_work_is_linear_with_what_only_a_first_call_does() -> None:
    assert Machine(lambda size: 7 + size).is_linear()


def test_linear_work_that_was_disturbed_once_is_linear() -> None:
    assert Machine(lambda size: size, 1, 50, 1, 1).is_linear()


def test_work_that_is_a_little_more_than_linear_is_linear() -> None:
    assert Machine(lambda size: size * size.bit_length()).is_linear()


def test_quadratic_work_is_not_linear() -> None:
    assert not Machine(lambda size: size**2).is_linear()
    assert not Machine(lambda size: size**2, 1, 1, 1.5).is_linear()
