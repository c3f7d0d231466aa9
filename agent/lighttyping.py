"""A small `typing` for a program that only starts: a quarter of the agent's start-up time was the real one.

Annotations are not evaluated in this code base, so all that modules want of `typing` while they are
imported is TYPE_CHECKING and a few names to derive from. Only the agent's start-up may put this in place,
as it owns its process. Whoever asks for anything else gets the real module.
"""

from __future__ import annotations

import sys

NAME = "typing"


class _Generic:
    def __class_getitem__(cls, _: object) -> type:
        return cls


class _TypeVar:
    def __init__(self, *_: object, **__: object) -> None:
        pass


class _Typing(type(sys)):  # type: ignore[misc]
    TYPE_CHECKING = False
    Any = object
    Generic = Protocol = _Generic
    TypeVar = _TypeVar

    @staticmethod
    def cast(_: object, value: object) -> object:
        return value

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        del sys.modules[NAME]
        import typing

        return getattr(typing, name)


def install() -> None:
    """Put the small module in place, unless the real one is loaded already."""
    if NAME not in sys.modules:
        sys.modules[NAME] = _Typing(NAME)
