"""The kinds of value that a configuration key can have, and how an annotation writes each of them.

Rule: `parse` takes anything that TOML can hold, `parse_text` any text, and both raise nothing but `Refused`,
whose text says what is allowed. The caller knows file and key and adds them.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

T = TypeVar("T")

_SHOWN_CHARS = 120  # of a refused value: enough to recognise it, not enough to flood a log line
_EXACT_BITS = 64  # Python refuses to print integers of many thousand digits, and nobody wants to read them


class Refused(Exception):
    """The value is not of its kind; the text ends the sentence "…: got X, must be …"."""


def type_name(value: object) -> str:
    """Return what TOML calls the type of this value."""
    for python, name in (
        (bool, "a boolean"),
        (int, "an integer"),
        (float, "a float"),
        (str, "a string"),
        (list, "an array"),
        (dict, "a table"),
    ):
        if isinstance(value, python):
            return name
    return "a date or time"


def describe(value: object) -> str:
    """Return a value and its type for an error message, on one line and of bounded length."""
    if isinstance(value, bool):
        return f"{str(value).lower()} (a boolean)"
    if isinstance(value, int) and value.bit_length() > _EXACT_BITS:
        return f"an integer of more than {_EXACT_BITS} bits"
    if isinstance(value, str | int | float):
        shown = f'"{value}"' if isinstance(value, str) else str(value)
        shown = "".join(
            char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in shown[:_SHOWN_CHARS]
        )
        return f"{shown} ({type_name(value)})"
    return type_name(value)


class Kind(ABC, Generic[T]):
    """One kind of value; `allowed` says in words what it accepts."""

    allowed: str

    @abstractmethod
    def parse(self, value: object) -> T:
        """Take a value as TOML gave it. Raises: Refused."""

    @abstractmethod
    def parse_text(self, text: str) -> T:
        """Take an annotation's text. Raises: Refused."""

    def format(self, value: T) -> object:
        """Return the value as TOML and JSON write it."""
        return value

    def _refuse(self, value: object) -> Refused:
        return Refused(f"got {describe(value)}, must be {self.allowed}")


class Boolean(Kind[bool]):
    """True or false; in an annotation the words that Go's strconv.ParseBool takes."""

    allowed = "true or false"
    _WORDS: ClassVar[Mapping[str, bool]] = {
        **dict.fromkeys(("1", "t", "T", "TRUE", "true", "True"), True),
        **dict.fromkeys(("0", "f", "F", "FALSE", "false", "False"), False),
    }

    def parse(self, value: object) -> bool:
        """Take a TOML boolean; 0 and 1 are not booleans."""
        if not isinstance(value, bool):
            raise self._refuse(value)
        return value

    def parse_text(self, text: str) -> bool:
        """Take a word for true or false."""
        if text not in self._WORDS:
            raise Refused(f"Please specify boolean value 'true|false', not {describe(text)}")
        return self._WORDS[text]


class Integer(Kind[int]):
    """A whole number within bounds; a boolean is not one."""

    def __init__(self, minimum: int, maximum: int = 2**31 - 1, *, unit: str = "") -> None:
        self.minimum = minimum
        self.maximum = maximum
        self.allowed = f"an integer from {minimum} to {maximum}{unit and f' ({unit})'}"

    def parse(self, value: object) -> int:
        """Take a TOML integer."""
        if not isinstance(value, int) or isinstance(value, bool):
            raise self._refuse(value)
        if not self.minimum <= value <= self.maximum:
            raise self._refuse(value)
        return value

    def parse_text(self, text: str) -> int:
        """Take an unsigned decimal number."""
        if not re.fullmatch(r"[0-9]{1,19}", text):
            raise Refused(f"Please specify positive numeric value, not {describe(text)}")
        return self.parse(int(text))


class Number(Kind[float]):
    """A finite number within bounds, whole or not."""

    def __init__(self, minimum: float, maximum: float = float(2**31), *, unit: str = "") -> None:
        self.minimum = minimum
        self.maximum = maximum
        self.allowed = f"a number from {minimum:g} to {maximum:g}{unit and f' ({unit})'}"

    def parse(self, value: object) -> float:
        """Take a TOML integer or float."""
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise self._refuse(value)
        if not math.isfinite(value) if isinstance(value, float) else value.bit_length() > _EXACT_BITS:
            raise self._refuse(value)
        if not self.minimum <= value <= self.maximum:
            raise self._refuse(value)
        return float(value)

    def parse_text(self, text: str) -> float:
        """Take a decimal number without sign or exponent."""
        if not re.fullmatch(r"[0-9]{1,19}(\.[0-9]{1,19})?", text):
            raise Refused(f"Please specify positive numeric value, not {describe(text)}")
        return self.parse(float(text))


class Text(Kind[str]):
    """Text without control characters, so that it fits on a command line."""

    allowed = "a string without control characters"

    def parse(self, value: object) -> str:
        """Take a TOML string."""
        if not isinstance(value, str) or any(ord(char) < 32 or ord(char) == 127 for char in value):
            raise self._refuse(value)
        try:
            value.encode()
        except UnicodeEncodeError:
            raise self._refuse(value) from None
        return value

    def parse_text(self, text: str) -> str:
        """Take the annotation as it is."""
        return self.parse(text)


class Choice(Kind[str]):
    """One of some words; an alias is replaced by the word that it stands for."""

    def __init__(self, *choices: str, aliases: Mapping[str, str] | None = None) -> None:
        self.choices = choices
        self.aliases = dict(aliases or {})
        words = ", ".join(f'"{choice}"' for choice in (*choices, *self.aliases))
        self.allowed = f"one of {words}" if words else "absent, for nothing is supported"

    def parse(self, value: object) -> str:
        """Take one of the words."""
        if not isinstance(value, str):
            raise self._refuse(value)
        word = self.aliases.get(value, value)
        if word not in self.choices:
            raise self._refuse(value)
        return word

    def parse_text(self, text: str) -> str:
        """Take one of the words."""
        return self.parse(text)


class Words(Kind[tuple[str, ...]]):
    """A list of strings; in an annotation joined by `separator`, or JSON when there is none."""

    def __init__(self, *, separator: str = "", items: Kind[str] | None = None) -> None:
        self.separator = separator
        self.items = items or Text()
        self.allowed = f"an array whose items are each {self.items.allowed}"

    def parse(self, value: object) -> tuple[str, ...]:
        """Take a TOML array of strings."""
        if not isinstance(value, list):
            raise self._refuse(value)
        return tuple(self._item(index, item) for index, item in enumerate(value))

    def _item(self, index: int, item: object) -> str:
        try:
            return self.items.parse(item)
        except Refused as exc:
            raise Refused(f"item {index}: {exc}") from None

    def parse_text(self, text: str) -> tuple[str, ...]:
        """Take items between separators, or a JSON list."""
        if self.separator:
            return self.parse([item.strip() for item in text.split(self.separator) if item.strip()])
        import json  # only annotations of this kind need it

        try:
            return self.parse(json.loads(text))
        except (ValueError, RecursionError):
            raise Refused(f"Please specify a JSON list of strings, not {describe(text)}") from None

    def format(self, value: tuple[str, ...]) -> object:
        """Return a list."""
        return list(value)


class Regex(Text):
    """A regular expression."""

    allowed = "a regular expression"

    def parse(self, value: object) -> str:
        """Take a string that compiles."""
        pattern = super().parse(value)
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as exc:
            raise Refused(f"got {describe(pattern)}, which is no regular expression: {exc}") from None
        return pattern


class AbsolutePath(Kind[Path]):
    """An absolute path; `file` says that a non-empty file must be there."""

    def __init__(self, *, file: bool = False) -> None:
        self.file = file
        self.allowed = "an absolute path" + (" of a file" if file else "")

    def parse(self, value: object) -> Path:
        """Take a string that begins with a slash."""
        text = Text().parse(value) if isinstance(value, str) else ""
        if not text.startswith("/"):
            raise self._refuse(value)
        return Path(text)

    def parse_text(self, text: str) -> Path:
        """Take the annotation as a path."""
        return self.parse(text)

    def format(self, value: Path) -> object:
        """Return text."""
        return str(value)


class OptionalPath(Kind[Path | None]):
    """An absolute path, or the empty string for none."""

    def __init__(self, *, file: bool = False) -> None:
        self.file = file
        self._path = AbsolutePath(file=file)
        self.allowed = f'{self._path.allowed}, or "" for none'

    def parse(self, value: object) -> Path | None:
        """Take a string that is empty or begins with a slash."""
        if value == "":
            return None
        try:
            return self._path.parse(value)
        except Refused:
            raise self._refuse(value) from None

    def parse_text(self, text: str) -> Path | None:
        """Take the annotation as a path."""
        return self.parse(text)

    def format(self, value: Path | None) -> object:
        """Return text."""
        return "" if value is None else str(value)
