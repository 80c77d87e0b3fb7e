"""Which names of flow runs Prefect has made up: those are replaced by the run's own."""

import pytest

from pgflow_prefect.prefect_api.flow_run_names import is_made_up


@pytest.mark.parametrize(
    "name",
    [
        "fierce-fox",
        "alpha-andromedae",
        "beta6-canis-majoris",
        "gamma417-ursae-minoris-nebula",
        "nu-lyrae-q",
        "mu2-almeisan-f",
    ],
)
def test_a_name_that_prefect_made_up_is_replaced(name: str) -> None:
    assert is_made_up(name)


@pytest.mark.parametrize("name", ["Nightly load", "alpha-release-2", "beta-test-run", "order-4711", "alpha", ""])
def test_a_name_that_a_person_gave_stays(name: str) -> None:
    assert not is_made_up(name)
