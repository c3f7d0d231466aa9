"""Every reader of others' bytes, with inputs near real ones and far from them. For long: `scripts/fuzz`."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.harness.fuzz import TARGETS, Target

EXAMPLES = 60  # of each target: the whole list takes some seconds


@st.composite
def mutated(draw: st.DrawFn, seeds: tuple[bytes, ...]) -> bytes:
    """A seed in which some pieces are replaced."""
    data = draw(st.sampled_from(seeds))
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = min(len(data), start + draw(st.integers(0, 8)))
        data = data[:start] + draw(st.binary(max_size=8)) + data[end:]
    return data


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    anything = st.binary(max_size=400)
    return anything | mutated(target.seeds) if target.seeds else anything


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_do_what_the_target_promises(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_any_bytes_do_what_the_target_promises(name: str) -> None:
    target = TARGETS[name]

    @settings(max_examples=EXAMPLES)
    @given(inputs(target))
    def holds(data: bytes) -> None:
        target.run(data)

    holds()
