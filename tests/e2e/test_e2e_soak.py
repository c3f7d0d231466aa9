"""Random lives of containers: nothing is wrong, nothing is left. For longer there is scripts/soak."""

import secrets

import pytest

from tests.e2e.conftest import MakeContainerd
from tests.harness.soak import Soak, slope, use_template

CYCLES = 10


def test_ten_random_lives_end_as_they_must_and_leave_nothing(make_containerd: MakeContainerd) -> None:
    """A failure names the seed, by which scripts/soak has the same lives again."""
    with make_containerd() as containerd:
        if not containerd.runtime.is_vm:
            pytest.skip(f"{containerd.runtime.name} has no VM")
        use_template(containerd, containerd.runtime)
        soak = Soak(containerd, secrets.token_hex(4))
        soak.run(0, CYCLES)
        assert soak.figures.cycles == [CYCLES]
        assert sum(soak.counts.values()) > 2 * CYCLES


def test_growth_is_the_slope_of_the_best_line() -> None:
    assert slope([10, 20, 30, 40], [105, 95, 115, 125]) == pytest.approx(0.8)
