"""How the operator commands show things: findings as lines, facts as TOML or JSON. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """How bad a finding is."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"  # no pod can run


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. `advice` says what to do about it."""

    level: Level
    subject: str
    text: str
    advice: str = ""


def format_finding(finding: Finding) -> str:
    """Return one line, and a second one with the advice if there is any."""
    line = f"{finding.level.value:<5} {finding.subject}: {finding.text}"
    return f"{line}\n      -> {finding.advice}" if finding.advice else line


def format_json(facts: Mapping[str, object]) -> str:
    """Return facts as JSON."""
    return json.dumps(facts, indent=2, ensure_ascii=False)


def format_toml(facts: Mapping[str, object]) -> str:
    """Return facts as TOML: tables for mappings; null, which TOML has not, is left out."""
    return "\n".join(_table_lines(facts, ())).strip()


def _table_lines(table: Mapping[str, object], path: tuple[str, ...]) -> list[str]:
    plain = {
        key: value for key, value in table.items() if value is not None and not isinstance(value, Mapping)
    }
    lines = [f"{_key(key)} = {format_value(value)}" for key, value in plain.items()]
    if path:
        lines = ["", f"[{'.'.join(map(_key, path))}]", *lines]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _table_lines(value, (*path, key))
    return lines


def _key(name: str) -> str:
    bare = name.isascii() and name.replace("-", "").replace("_", "").isalnum()
    return name if bare else format_value(name)


def format_value(value: object) -> str:
    """Return a value as TOML writes it in line."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        pairs = (f"{_key(key)} = {format_value(item)}" for key, item in value.items() if item is not None)
        return "{" + ", ".join(pairs) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(format_value(item) for item in value if item is not None) + "]"
    if isinstance(value, int | float):
        return str(value)
    # A JSON string is a TOML string but for DEL, which TOML wants escaped, and pairs of surrogates.
    return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
