"""Collects the tests without Python's garbage collector, which took two fifths of the time.

It goes through all that was imported again and again, and finds nothing: modules and tests stay. Each process of
pytest-xdist collects all tests. Later, too, the collector has no need to look at them.
"""

import gc

import pytest

gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop() -> None:
    """Collect garbage from now on, but none of what is there."""
    gc.freeze()
    gc.enable()
