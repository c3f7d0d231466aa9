"""What a fuzz target is, the list of them, and what its bytes are made of and read with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA_FILES = ROOT / "tests" / "data"


@dataclass(frozen=True, slots=True)
class Target:
    """One function of bytes, and inputs from which a fuzzer finds its way into it."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...] = ()


TARGETS: dict[str, Target] = {}


def target(*seeds: bytes) -> Callable[[Callable[[bytes], None]], Callable[[bytes], None]]:
    """Put a function into the list, under its own name."""

    def add(function: Callable[[bytes], None]) -> Callable[[bytes], None]:
        TARGETS[function.__name__.replace("_", "-")] = Target(function, seeds)
        return function

    return add


class Choices:
    """Decisions taken from the input's first bytes; all zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self.rest = data

    def number(self, limit: int) -> int:
        """Return one of the numbers below `limit`, which is 256 at most."""
        if not self.rest:
            return 0
        value, self.rest = self.rest[0], self.rest[1:]
        return value % limit

    def piece(self, limit: int) -> bytes:
        """Return the next bytes, fewer than `limit`."""
        size = self.number(limit)
        value, self.rest = self.rest[:size], self.rest[size:]
        return value


def file(name: str) -> bytes:
    """Return a file of the test data."""
    return (DATA_FILES / name).read_bytes()


def captured(package: str, kind: str) -> list[bytes]:
    """Return the bytes of other implementations that the tests keep as hexadecimal text, the short ones."""
    found = []
    for path in sorted((DATA_FILES / package).glob(f"*{kind}.hex")):
        words = "".join(line for line in path.read_text().splitlines(keepends=True) if line[0] != "#").split()
        if not any("*" in word or word.startswith("zeros") for word in words):  # abbreviated: see the files
            found.append(bytes.fromhex("".join(words)))
    return found


def cut(stream: bytes, before: bytes = b"") -> bytes:
    """Return the input from which `Choices.piece` takes these bytes, with `before` before each piece."""
    parts = [stream[start : start + 255] for start in range(0, len(stream), 255)]
    return b"".join(before + bytes([len(part)]) + part for part in parts)
