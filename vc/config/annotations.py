"""What a pod may override: annotations `io.katacontainers.config.*` of its sandbox container -> a new Config.

Rules, all of them Kata's. An annotation for the hypervisor counts only if a regular expression of
`enable_annotations` occurs in its name. One whose key has a list of valid paths must also match a glob of
that list. Annotations for the agent and the runtime need no permission.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from math import ceil
from pathlib import Path
from typing import Any, Final, TypeVar

from vc.config.ignored import IGNORED
from vc.config.kinds import Refused, describe
from vc.config.load import NO_HOST_NETWORK, brief, contradictions, file_problem, host_cpus, settle
from vc.config.schema import (
    MIN_MEMORY_MIB,
    AgentConfig,
    Config,
    HypervisorConfig,
    Key,
    RuntimeConfig,
    keys,
)
from vc.errors import InvalidArgument, Unsupported

T = TypeVar("T", HypervisorConfig, AgentConfig, RuntimeConfig)

PREFIX: Final = "io.katacontainers."
HYPERVISOR: Final = PREFIX + "config.hypervisor."
AGENT: Final = PREFIX + "config.agent."
RUNTIME: Final = PREFIX + "config.runtime."

# Annotations that promise something about the guest's identity: ignoring them would break the promise.
_HASHES: Final = tuple(
    f"{asset}_hash"
    for asset in ("kernel", "image", "initrd", "hypervisor", "jailer", "firmware", "firmware_volume")
)
_PROMISES: Final = frozenset({*_HASHES, "cc_init_data"})
_AGENT_PROMISES: Final = frozenset({"policy"})
# Annotations whose name is not the key's.
_RENAMED: Final = {
    "blk_logical_sector_size": "block_device_logical_sector_size",
    "blk_physical_sector_size": "block_device_physical_sector_size",
}
_MORE_KNOWN: Final = frozenset({"default_gpus", "default_gpu_model", *_RENAMED})


def apply_annotations(config: Config, annotations: Mapping[str, str], cpus: int | None = None) -> Config:
    """Return the configuration with a pod's wishes in it; `cpus` is the number of the host's, if known.

    Annotations that are not for us are passed over; those that are known and do nothing here add a warning.
    Raises: InvalidArgument, Unsupported.
    """
    ours = {name: text for name, text in annotations.items() if name.startswith(PREFIX + "config.")}
    if not ours:
        return config
    cpus = cpus or host_cpus()
    warnings: list[str] = []
    hypervisor = _hypervisor(config.hypervisor, _below(ours, HYPERVISOR), warnings)
    _check_sizes(config.hypervisor, hypervisor, cpus)
    agent = _section(config.agent, AGENT, _below(ours, AGENT), _AGENT_PROMISES, warnings)
    runtime = _section(config.runtime, RUNTIME, _below(ours, RUNTIME), frozenset(), warnings)
    if runtime.disable_new_netns and not config.runtime.disable_new_netns:
        warnings.append(f"annotation {RUNTIME}disable_new_netns: {NO_HOST_NETWORK}")
    changed = replace(
        config,
        hypervisor=hypervisor,
        agent=agent,
        runtime=runtime,
        warnings=(*config.warnings, *warnings),
    )
    if problems := contradictions(changed):
        raise InvalidArgument("annotations: " + "; ".join(problems))
    return settle(changed, cpus)


def merge_kernel_params(base: str, more: str) -> str:
    """Return both lists of kernel parameters in one; a parameter of `more` replaces its namesake."""
    wanted = dict(_parameters(more))
    kept = [text for name, text in _parameters(base) if name not in wanted]
    return " ".join([*kept, *wanted.values()])


def _parameters(text: str) -> Iterator[tuple[str, str]]:
    """Yield each parameter's name and whole text; blanks inside double quotes belong to a value."""
    for found in re.findall(r'(?:[^\s"]|"[^"]*"?)+', text):
        yield found.partition("=")[0], found


def _below(annotations: Mapping[str, str], prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): text for name, text in annotations.items() if name.startswith(prefix)}


def _hypervisor(config: HypervisorConfig, wishes: Mapping[str, str], warnings: list[str]) -> HypervisorConfig:
    for suffix in wishes:
        if not any(re.search(pattern, suffix) for pattern in config.enable_annotations):
            raise InvalidArgument(
                f"annotation {HYPERVISOR}{brief(suffix)} is not enabled: "
                "an administrator may add it to enable_annotations in [hypervisor.qemu]"
            )
    changed = _section(config, HYPERVISOR, wishes, _PROMISES, warnings)
    if "kernel_params" in wishes:
        merged = merge_kernel_params(config.kernel_params, changed.kernel_params)
        changed = replace(changed, kernel_params=merged)
    return changed


def _section(
    config: T, prefix: str, wishes: Mapping[str, str], promises: frozenset[str], warnings: list[str]
) -> T:
    """Return one section with the wishes that name its keys, each checked."""
    known = {key.annotation: key for key in keys(type(config)) if key.annotation}
    values: dict[str, Any] = {}
    for suffix, text in wishes.items():
        if suffix in promises:
            raise Unsupported(
                f"annotation {prefix}{suffix} is not implemented, and ignoring it would mislead"
            )
        if suffix in known:
            values[known[suffix].name] = _value(config, known[suffix], prefix + suffix, text)
        else:
            _ignored(prefix, suffix, text, warnings)
    return replace(config, **values)


def _value(config: object, key: Key, name: str, text: str) -> object:
    """Return what one annotation says, checked like the key in the file and against its globs."""
    try:
        value = key.kind.parse_text(text)
    except Refused as exc:
        raise InvalidArgument(f"Error parsing annotation for {key.annotation}: {exc} ({name})") from None
    if key.valid_list and not _is_in_globs(value, getattr(config, key.valid_list)):
        raise InvalidArgument(
            f"{key.annotation} {value} required from annotation is not valid: "
            f"it matches no glob of {key.valid_list} ({name})"
        )
    if isinstance(value, Path) and getattr(key.kind, "file", False) and (reason := file_problem(value)):
        raise InvalidArgument(f"annotation {name} = {value}: {reason}")
    return value


def _is_in_globs(path: Path, globs: tuple[str, ...]) -> bool:
    return ".." not in path.parts and any(glob.startswith("/") and path.match(glob) for glob in globs)


def _ignored(prefix: str, suffix: str, text: str, warnings: list[str]) -> None:
    """Warn about an annotation that does nothing here, unless it asks for nothing either."""
    section = {HYPERVISOR: "hypervisor", AGENT: "agent.kata", RUNTIME: "runtime"}[prefix]
    name = _RENAMED.get(suffix, suffix)
    neutral = IGNORED[section].get(name, ())
    if any(isinstance(value, bool | int | str) and text == format_text(value) for value in neutral):
        return
    known = name in IGNORED[section] or suffix in _MORE_KNOWN
    why = "is not implemented" if known else "is unknown"
    warnings.append(f"annotation {prefix}{brief(suffix)} = {describe(text)} has no effect: it {why}")


def format_text(value: bool | int | str) -> str:
    """Return a value as an annotation writes it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_sizes(old: HypervisorConfig, new: HypervisorConfig, cpus: int) -> None:
    """Refuse sizes that a file may have, but a pod may not ask for."""
    if new.default_vcpus != old.default_vcpus and ceil(new.default_vcpus) > cpus:
        raise InvalidArgument(
            f"Number of cpus {new.default_vcpus:g} specified in annotation default_vcpus "
            f"is greater than the number of CPUs {cpus} on the system"
        )
    if new.default_maxvcpus != old.default_maxvcpus and new.default_maxvcpus > cpus:
        raise InvalidArgument(
            f"Number of cpus {new.default_maxvcpus} specified in annotation default_max_vcpus "
            f"is greater than the number of CPUs {cpus} on the system"
        )
    if new.default_memory != old.default_memory and new.default_memory < MIN_MEMORY_MIB:
        raise InvalidArgument(
            f"Memory {new.default_memory} specified in annotation {HYPERVISOR}default_memory is less than "
            f"minimum required {MIN_MEMORY_MIB}, please specify a larger value"
        )
