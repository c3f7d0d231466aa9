"""What the documentation says of this tree is true: paths and tests that it names are there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
NODE = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
# Only names that can be nothing else: in a directory of this tree, and with an end.
FILE = re.compile(r"`((?:agent|cli|docs|protos|scripts|shim|tests|ttrpc|vc|yamux)/[\w./-]*\w\.\w+)`")


def functions(path: Path) -> set[str]:
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, kinds)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_every_test_that_a_page_names_exists(page: Path) -> None:
    text = page.read_text()
    for name in FILE.findall(text):
        assert (ROOT / name).exists(), f"{page.name} names {name}"
    for path, test in NODE.findall(text):
        assert test in functions(ROOT / path), f"{page.name} names {path}::{test}"


def test_every_way_from_the_guest_to_the_host_has_its_test() -> None:
    table = (ROOT / "docs" / "security.md").read_text().partition("## The table")[2].partition("## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 20
    assert [row for row in rows if not NODE.search(row.split(" | ")[-1])] == []
