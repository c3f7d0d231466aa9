"""guest.toml as values: what the guest is made of. Reading it is the only thing that happens here."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path


class BuildError(Exception):
    """Something the person who builds can put right; the message says how."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The files of one package: those that match `keep`, without those that match `drop`."""

    name: str
    keep: tuple[str, ...] = ("*",)
    drop: tuple[str, ...] = ()
    unused_libraries: tuple[str, ...] = ()  # named by its extension modules, but nothing is taken from them


@dataclass(frozen=True, slots=True)
class Recipe:
    """All of guest.toml."""

    architecture: str
    kernel_params: tuple[str, ...]
    kernel_package: str
    initrd_modules: tuple[str, ...]
    boot_modules: tuple[str, ...]
    root_modules: tuple[str, ...]
    label: str
    uuid: str
    directories: tuple[str, ...]
    busybox_links: tuple[str, ...]
    drop: tuple[str, ...]
    packages: tuple[Selection, ...]
    wheels: tuple[Selection, ...]
    agent_packages: tuple[str, ...]


def load_recipe(path: Path) -> Recipe:
    """Read guest.toml; raises BuildError that names the key if one is missing."""
    table = tomllib.loads(path.read_text())
    try:
        return Recipe(
            architecture=table["architecture"],
            kernel_params=tuple(table["kernel_params"]),
            kernel_package=table["kernel"]["package"],
            initrd_modules=tuple(table["kernel"]["initrd_modules"]),
            boot_modules=tuple(table["kernel"]["boot_modules"]),
            root_modules=tuple(table["kernel"]["root_modules"]),
            label=table["root"]["label"],
            uuid=table["root"]["uuid"],
            directories=tuple(table["root"]["directories"]),
            busybox_links=tuple(table["root"]["busybox_links"]),
            drop=tuple(table["root"]["drop"]),
            packages=tuple(_selection(entry) for entry in table["package"]),
            wheels=tuple(_selection(entry) for entry in table["wheel"]),
            agent_packages=tuple(table["agent"]["packages"]),
        )
    except KeyError as exc:
        raise BuildError(f"{path}: key {exc} is missing") from exc


def _selection(entry: dict[str, str | list[str]]) -> Selection:
    return Selection(
        name=str(entry["name"]),
        keep=tuple(entry.get("keep", ("*",))),
        drop=tuple(entry.get("drop", ())),
        unused_libraries=tuple(entry.get("unused_libraries", ())),
    )
