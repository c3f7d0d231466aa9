"""What the operator commands print can be read back."""

from __future__ import annotations

import json
import tomllib
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from cli.report import Finding, Level, format_finding, format_json, format_toml

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
PLAIN = (
    st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)
VALUES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=12
)
FACTS = st.dictionaries(TEXT, VALUES, max_size=4)


@given(FACTS)
def test_toml_reads_back_as_it_was(facts: dict[str, Any]) -> None:
    assert tomllib.loads(format_toml(facts)) == facts


@given(FACTS)
def test_json_reads_back_as_it_was(facts: dict[str, Any]) -> None:
    assert json.loads(format_json(facts)) == facts


def test_null_is_left_out_of_toml() -> None:
    assert tomllib.loads(format_toml({"a": None, "b": {"c": None, "d": [1, None], "e": [{"f": None}]}})) == {
        "b": {"d": [1], "e": [{}]}
    }


def test_a_finding_shows_its_level_and_what_to_do() -> None:
    assert format_finding(Finding(Level.OK, "QEMU", "there")) == "ok    QEMU: there"
    assert format_finding(Finding(Level.FAIL, "QEMU", "not there", "install it")) == (
        "fail  QEMU: not there\n      -> install it"
    )
