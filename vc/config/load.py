"""Find the configuration files, read them, and check every key; problems are reported all together.

Order of search: the path that containerd's runtime options name, the environment variable KATA_CONF_FILE,
then `DEFAULT_PATHS`. Symbolic links are resolved; files of `config.d` beside the result override it key by
key, in the order of their names. Rule: `load` raises nothing but `InvalidArgument`, whatever the files hold.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil
from pathlib import Path
from typing import Any, Final, TypeVar

from vc.config.ignored import IGNORED, IGNORED_SECTIONS, REFUSED, is_neutral
from vc.config.kinds import AbsolutePath, OptionalPath, Refused, describe, type_name
from vc.config.schema import (
    MIN_MEMORY_MIB,
    AgentConfig,
    Config,
    FactoryConfig,
    HypervisorConfig,
    Key,
    RuntimeConfig,
    keys,
)
from vc.errors import InvalidArgument

T = TypeVar("T")

DEFAULT_PATHS: Final = (
    Path("/etc/kata-containers/configuration.toml"),
    Path("/usr/share/defaults/kata-containers/configuration.toml"),
)
PATH_VARIABLE: Final = "KATA_CONF_FILE"
DROP_INS: Final = "config.d"
MAX_FILE_BYTES: Final = 1 << 20  # Kata's longest template has 40 KiB; more is a wrong file
HYPERVISORS: Final = ("qemu",)
KATA_HYPERVISORS: Final = (
    "clh",
    "cloud-hypervisor",
    "firecracker",
    "dragonball",
    "stratovirt",
    "remote",
    "acrn",
)


@dataclass(frozen=True, slots=True)
class Setting:
    """One key's value and the file that gave it; the last file wins."""

    value: object
    file: Path


@dataclass(slots=True)
class _Loading:
    """What is known so far: the settings by section and key, and everything there is to complain about."""

    settings: dict[str, dict[str, Setting]] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def load(
    explicit: str | None = None, environ: Mapping[str, str] = os.environ, *, check_files: bool = True
) -> Config:
    """Read the configuration.

    `explicit` is the path from the runtime options. With `check_files` false nobody looks whether kernel,
    image and programs exist: clean-up and `kata-runtime check` want the rest even then.

    Raises: InvalidArgument.
    """
    source = find(explicit, environ)
    loading = _Loading()
    for path in (source, *_drop_ins(source)):
        _merge(loading, path)
    config = _build(loading, source)
    if check_files and not loading.problems:
        loading.problems += missing_files(config)
    if loading.problems:
        raise InvalidArgument(_report(source, loading.problems))
    return config


def find(explicit: str | None, environ: Mapping[str, str], defaults: Sequence[Path] = DEFAULT_PATHS) -> Path:
    """Return the file to read, symbolic links resolved. Raises: InvalidArgument."""
    if explicit:
        return _resolve(explicit, "ConfigPath or --config")
    if named := environ.get(PATH_VARIABLE):
        return _resolve(named, f"the environment variable {PATH_VARIABLE}")
    for path in defaults:
        if os.access(path, os.F_OK):
            return _resolve(str(path), "the default places")
    tried = ", ".join(map(str, defaults))
    raise InvalidArgument(
        f"Cannot find usable config file ({tried}): create one of them, or name yours by {PATH_VARIABLE}"
    )


def _resolve(text: str, origin: str) -> Path:
    try:
        path = Path(text).resolve(strict=True)
    except (OSError, ValueError, RuntimeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else exc
        raise InvalidArgument(f"config file {_quoted(text)} of {origin}: {reason}") from exc
    if not path.is_file():
        raise InvalidArgument(f"config file {_quoted(text)} of {origin} is not a regular file")
    return path


def _drop_ins(source: Path) -> list[Path]:
    directory = source.parent / DROP_INS
    try:
        return sorted(entry for entry in directory.iterdir() if entry.is_file())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as exc:
        raise InvalidArgument(f"drop-in directory {directory}: {exc.strerror}") from exc


def _parse(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as exc:
        raise InvalidArgument(f"cannot read config file {path}: {exc.strerror}") from exc
    if len(data) > MAX_FILE_BYTES:
        raise InvalidArgument(
            f"config file {path} has more than {MAX_FILE_BYTES} bytes: is it the right file?"
        )
    try:
        return tomllib.loads(data.decode())
    except RecursionError:
        raise InvalidArgument(f"config file {path} is nested too deeply") from None
    except ValueError as exc:  # TOMLDecodeError, UnicodeDecodeError, numbers with too many digits
        raise InvalidArgument(f"config file {path} is not TOML: {exc}") from exc


def _merge(loading: _Loading, path: Path) -> None:
    """Add one file's keys; keys of earlier files with the same name are overridden."""
    for top, table in _parse(path).items():
        if not isinstance(table, dict):
            loading.problems.append(
                f"{path}: {brief(top)} is {type_name(table)}, and keys belong into a table"
            )
        elif top in ("hypervisor", "agent", "proxy", "shim"):
            for name, inner in table.items():
                if isinstance(inner, dict):
                    _merge_table(loading, path, f"{top}.{name}", inner)
                else:
                    hint = "qemu" if top == "hypervisor" else "kata"
                    loading.problems.append(
                        f"{path}: {top}.{brief(name)} belongs into the table [{top}.{hint}]"
                    )
        else:
            _merge_table(loading, path, top, table)


def _merge_table(loading: _Loading, path: Path, section: str, table: dict[str, Any]) -> None:
    known = (*(f"hypervisor.{name}" for name in HYPERVISORS), "agent.kata", "runtime", "factory")
    if section in IGNORED_SECTIONS:
        loading.warnings.append(f"{path}: the table [{section}] is of Kata 1.x and has no effect")
    elif section in known:
        settings = loading.settings.setdefault(section, {})
        settings.update((name, Setting(value, path)) for name, value in table.items())
    elif section.startswith("hypervisor."):
        name = section.removeprefix("hypervisor.")
        why = "is not supported" if name in KATA_HYPERVISORS else "is not a hypervisor"
        loading.problems.append(
            f"{path}: invalid hypervisor prefix: [{brief(section)}] {why}, allowed: {', '.join(HYPERVISORS)}"
        )
    else:
        loading.problems.append(f"{path}: unknown table [{brief(section)}]{_did_you_mean(section, known)}")


def _build(loading: _Loading, source: Path) -> Config:
    hypervisor = _section(loading, source, "hypervisor.qemu", HypervisorConfig)
    agent = _section(loading, source, "agent.kata", AgentConfig)
    runtime = _section(loading, source, "runtime", RuntimeConfig)
    factory = _section(loading, source, "factory", FactoryConfig)
    config = Config(source, hypervisor, agent, runtime, factory)
    if not loading.problems:
        loading.problems += [f"{source}: {text}" for text in contradictions(config)]
        config = settle(config)
    if hypervisor.default_memory < MIN_MEMORY_MIB:
        loading.warnings.append(
            f"{source}: hypervisor.qemu.default_memory is {hypervisor.default_memory} MiB; "
            f"a guest may not boot with less than {MIN_MEMORY_MIB}"
        )
    if runtime.disable_new_netns:
        loading.warnings.append(f"{source}: {NO_HOST_NETWORK}")
    return replace(config, warnings=tuple(loading.warnings))


def _section(loading: _Loading, source: Path, section: str, cls: type[T]) -> T:
    settings = loading.settings.get(section, {})
    known = {key.name: key for key in keys(cls)}
    values: dict[str, Any] = {}
    for name, setting in settings.items():
        if name in known:
            try:
                values[name] = known[name].kind.parse(setting.value)
            except Refused as exc:
                loading.problems.append(f"{setting.file}: {section}.{name}: {exc}")
        else:
            _unknown(loading, section, name, setting, known)
    for key in known.values():
        if key.required and key.name not in settings:
            loading.problems.append(f"{source}: {section}.{key.name} is not set: it must name {key.meaning}")
    return cls(**values)


def _unknown(loading: _Loading, section: str, name: str, setting: Setting, known: Mapping[str, Key]) -> None:
    """Judge a key that does nothing here: fine, worth a warning, or a mistake."""
    ignored = IGNORED["hypervisor" if section.startswith("hypervisor.") else section]
    where = f"{setting.file}: {section}.{brief(name)}"
    if name in ignored:
        if not is_neutral(setting.value, ignored[name]):
            loading.warnings.append(
                f"{where} = {describe(setting.value)} has no effect: it is not implemented"
            )
    elif section.startswith("hypervisor.") and name in REFUSED:
        if not is_neutral(setting.value, REFUSED[name]):
            loading.problems.append(
                f"{where}: got {describe(setting.value)}, must be false: there are no confidential guests"
            )
    else:
        hint = _did_you_mean(name, (*known, *ignored))
        loading.problems.append(f"{where} = {describe(setting.value)} is an unknown key{hint}")


NO_HOST_NETWORK: Final = (
    "runtime.disable_new_netns = true has no effect: it is not implemented, and a VM has no interface anyway"
)


def contradictions(config: Config) -> list[str]:
    """Return what is wrong with keys that are fine one by one."""
    found = []
    if config.hypervisor.image is None and config.hypervisor.initrd is None:
        found.append(
            "image or initrd must be defined in the configuration file (hypervisor.qemu.image, .initrd)"
        )
    if config.runtime.disable_new_netns and config.runtime.internetworking_model != "none":
        found.append(
            "config disable_new_netns only works with 'none' internetworking_model, "
            f"not with '{config.runtime.internetworking_model}'"
        )
    return found


def host_cpus() -> int:
    """Return how many CPUs of the host this process may use."""
    return len(os.sched_getaffinity(0))


def settle(config: Config, cpus: int | None = None) -> Config:
    """Replace the vCPU numbers that stand for "all of the host" or "the default" by real ones."""
    host = cpus or host_cpus()
    asked_max = config.hypervisor.default_maxvcpus
    maximum = host if asked_max == 0 else min(asked_max, host)
    asked = config.hypervisor.default_vcpus
    vcpus = float(host) if asked < 0 else asked or 1.0
    hypervisor = replace(
        config.hypervisor,
        default_vcpus=min(vcpus, float(maximum)) if ceil(vcpus) > maximum else vcpus,
        default_maxvcpus=maximum,
    )
    return replace(config, hypervisor=hypervisor)


def missing_files(config: Config) -> list[str]:
    """Return a sentence for each file that the configuration names and that cannot be used."""
    hypervisor = config.hypervisor
    wanted: list[tuple[str, Path | None]] = [
        (key.name, getattr(hypervisor, key.name))
        for key in keys(HypervisorConfig)
        if isinstance(key.kind, AbsolutePath | OptionalPath) and key.kind.file
    ]
    if hypervisor.shared_fs != "virtio-fs":
        wanted = [(name, path) for name, path in wanted if name != "virtio_fs_daemon"]
    found = []
    for name, path in wanted:
        if path is not None and (reason := file_problem(path)):
            found.append(
                f"{config.source}: hypervisor.{hypervisor.name}.{name} = {path}: {reason}; {_REMEDIES[name]}"
            )
    return found


_REMEDIES: Final = {
    "path": "install QEMU (Debian: qemu-system-x86), or name the right program",
    "kernel": "build or install a guest kernel, or name the right file",
    "image": "build or install a guest image, or name the right file",
    "initrd": "build or install a guest initrd, or name the right file",
    "virtio_fs_daemon": "install virtiofsd (Debian 12: in qemu-system-common), or name the right program",
}


def file_problem(path: Path) -> str:
    """Return why a file cannot be used; empty if it can."""
    try:
        status = path.stat()
    except OSError as exc:
        return exc.strerror or "cannot be opened"
    if not path.is_file():
        return "not a regular file"
    return "" if status.st_size else "the file is empty"


def _report(source: Path, problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems in the configuration {source}: " + "; ".join(problems)


def _quoted(text: str) -> str:
    return describe(text).removesuffix(" (a string)")


def brief(name: str) -> str:
    """Return a name from the file so that it stays on one line and short."""
    return name if name.isprintable() and 0 < len(name) <= 64 else describe(name)


def _did_you_mean(name: str, known: Iterable[str]) -> str:
    import difflib  # costs milliseconds, and only a mistake needs it

    close = difflib.get_close_matches(name[:64], list(known), n=1)
    return f', did you mean "{close[0]}"?' if close else ""
